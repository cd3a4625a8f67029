"""How long tokenizers from scratch take to what an adapted one reaches."""

from codalib.experiments.budget import (
    ADAPTED,
    SCRATCH,
    budget_claims,
    budget_curves,
    budget_trials,
    steps_to_reach,
)


def curve(*points):
    return [{"step": step, "psnr": psnr} for step, psnr in points]


def test_a_curve_reaches_a_quality_between_its_points():
    rising = curve((10, 10.0), (20, 15.0), (40, 25.0), (60, 19.0))
    assert steps_to_reach(rising, 20.0) == (30.0, True)
    assert steps_to_reach(rising, 25.0) == (40.0, True)
    assert steps_to_reach(rising, 9.0) == (10.0, True)
    assert steps_to_reach(rising, 26.0) == (60.0, False)


def rows(*scratch):
    """Three seeds of an adapted tokenizer that ends at 20 dB after 10 steps, and of the given curve from scratch."""
    made = []
    for seed in range(3):
        own = {"method": ADAPTED, "setting": "best", "settings": {"seed": seed, "batch_size": 4}}
        own["fit"] = {"steps": 5, "batch_size": 8}  # as many latents as 10 steps have images
        made.append(own | {"curve": curve((5, 18.0), (10, 20.0))})
        made.append({"method": "x", "setting": "best", "settings": {"seed": seed}, "curve": curve(*scratch)})
        made.append({"method": "x", "setting": "tried", "settings": {"seed": seed}, "curve": curve((1, 99.0))})
    return made


def test_claims_by_hand():
    found = budget_claims(rows((40, 10.0), (80, 30.0)), vae_steps=40)  # there after 60 steps
    assert [claim["verdict"] for claim in found] == ["holds", "does not hold", "does not hold"]
    assert [claim["effect"] for claim in found] == [f"{n} times the steps to the same PSNR" for n in (6, 3, 1)]
    assert [claim["setting"] for claim in found] == [
        "x, steps on images alone",
        "x, the start on latents counted",
        "x, the start on latents and the VAE's own training counted",
    ]


def test_a_baseline_that_was_stopped_decides_only_where_its_bound_does():
    without, *counted = budget_claims(rows((40, 10.0), (80, 19.0)), vae_steps=40)  # never there, in 80 steps
    assert without["verdict"] == "holds"
    assert [claim["verdict"] for claim in counted] == ["not tested"] * 2
    assert without["effect"] == "more than 8 times the steps to the same PSNR"
    (capped, *_) = budget_claims(rows((40, 10.0), (50, 19.0)), vae_steps=50)
    assert capped["verdict"] == "not tested"
    assert "stopped before it got there" in capped["detail"]


def test_curves_count_the_vaes_training_beside():
    lines = budget_curves(rows((40, 10.0)), {ADAPTED: 2e15, "x": 3e15}, vae_steps=100, vae_operations=1e15)
    found = {(line["method"], line["steps"], line["petaflop"], line["val_psnr"]) for line in lines}
    own = f"{ADAPTED}, with the VAE's training"
    assert found == {
        (ADAPTED, 5, 10.0, 18.0),
        (ADAPTED, 10, 20.0, 20.0),
        (own, 105, 110.0, 18.0),
        (own, 110, 120.0, 20.0),
        ("x", 40, 120.0, 10.0),
    }


def test_the_rates_from_scratch_are_bracketed_in_short_trainings():
    class Fake:
        def trial(self, cell, rate, seed, longer=1):
            return {"choose": {"image_loss": abs(rate - 0.003)}, "key": (cell, rate, seed, longer)}

    found = list(budget_trials(Fake(), 0.5, {"x": Fake()}, [0.001, 0.003], [4, 5], longer=7))
    tried = [row["key"] for row in found if row["setting"] == "tried"]
    assert tried == [(SCRATCH, rate, 4, 1) for rate in (0.001, 0.003, 0.009)]
    best = [(row["method"], row["key"]) for row in found if row["setting"] == "best"]
    assert best == [
        (name, key)
        for seed in (4, 5)
        for name, key in ((ADAPTED, (ADAPTED, 0.5, seed, 1)), ("x", (SCRATCH, 0.003, seed, 7)))
    ]
