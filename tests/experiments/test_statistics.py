import numpy as np
import pytest

from codalib.experiments.paper import CLAIMS, SIX_TIMES, SMALLEST_GAINS, TABLE_1, TABLE_2, USED, gain
from codalib.experiments.statistics import (
    FAILS,
    HOLDS,
    NOT_TESTED,
    UNDECIDED,
    claim_verdict,
    corrected,
    decide,
    group_interval,
    group_means,
    holm,
    over_seeds,
    p_value,
    resampled_means,
    smallest_gain,
)

FURTHER = {  # claim -> gains that the paper's numbers show beside its comparisons of two rows, by part
    "attention_utilization": {"utilization floor": TABLE_1["+ attention quantization"].utilization - USED},
    "adaptation_closes_gap": {
        "gap closed": (TABLE_1["+ attention quantization"].rfid - TABLE_1["+ adapted VAE"].rfid)
        / (TABLE_1["+ attention quantization"].rfid - TABLE_1["Continuous VAE"].rfid)
        - 0.5
    },
    "training_budget": {
        "iterations": TABLE_2["VQGAN 16384"].iterations / TABLE_2["CODA MAR 65536"].iterations / SIX_TIMES - 1
    },
}


def published_gains(claim):
    named = {f"{own.column}: {own.before} to {own.after}": own for own in claim.comparisons}
    return {part: gain(own.column, *own.published) for part, own in named.items()} | FURTHER.get(claim.id, {})


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=str)
def test_every_rule_says_that_the_papers_own_numbers_hold(claim):
    for part, value in published_gains(claim).items():
        assert decide(value, value, value, smallest_gain(part)) == HOLDS, part
    assert published_gains(claim) or claim.id in ("levels_monotone", "sparse_assignment", "codes_cover_latents")


def test_a_gain_is_relative_for_errors_and_a_difference_else():
    assert gain("quantization_error", 0.2, 0.05) == pytest.approx(0.75)
    assert gain("psnr", 20.0, 21.5) == 1.5


def test_an_interval_over_seeds_is_students():
    gains = np.array([0.1, 0.2, 0.4])
    low, high = np.quantile(resampled_means(gains), [0.025, 0.975])
    half = 4.3027 * gains.std(ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    assert low == pytest.approx(gains.mean() - half, rel=0.05)
    assert high == pytest.approx(gains.mean() + half, rel=0.05)
    # t = 0.23333 / 0.08819 = 2.6458, two-sided: 0.118
    assert p_value(resampled_means(gains), 0.0) == pytest.approx(0.118, abs=0.005)


@pytest.mark.parametrize(("seed_noise", "group_noise"), [(1.0, 0.1), (0.1, 1.0), (0.5, 0.5)])
def test_intervals_over_seeds_and_images_hold_the_truth_as_often_as_they_say(seed_noise, group_noise):
    rng, inside, repeats = np.random.default_rng(0), 0, 300
    for _ in range(repeats):
        noise = rng.normal(size=(4, 1)) * seed_noise + rng.normal(size=(1, 40)) * group_noise
        gains = 0.3 + noise + 0.3 * rng.normal(size=(4, 40))
        low, high = np.quantile(resampled_means(gains, draws=2000), [0.025, 0.975])
        inside += low <= 0.3 <= high
    assert 0.91 <= inside / repeats <= 0.99


def test_images_count_beside_seeds():
    alike = np.tile(np.random.default_rng(0).normal(0.3, 1, 20), (3, 1))  # the seeds agree, the images do not
    assert np.quantile(resampled_means(alike), 0.025) < 0 < np.quantile(resampled_means(alike.mean(1)), 0.025)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.001]) == pytest.approx([0.9, 0.002])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.3, 0.31, 0.29], HOLDS),
        ([-0.3, -0.31, -0.29], FAILS),
        ([0.05, 0.051, 0.049], FAILS),  # above 0, but below what is of interest: 0.1 dB
        ([0.3, 0.9, -0.5], UNDECIDED),
        ([0.3, 0.3], NOT_TESTED),
        ([0.2, 0.2, 0.2], HOLDS),
        ([0.0, 0.0, 0.0], FAILS),
    ],
)
def test_a_verdict_follows_from_the_gains(gains, verdict):
    found = claim_verdict("residual_error", {"psnr": gains}, "effect")
    assert found["verdict"] == verdict
    assert (found["p"] is None) == (verdict == NOT_TESTED)


def test_a_verdict_says_what_decides():
    few = claim_verdict("residual_error", {"psnr": [0.3, 0.3]}, "up", "Detail.", "here")
    assert few == {
        "id": "residual_error",
        "setting": "here",
        "effect": "up",
        "verdict": NOT_TESTED,
        "p": None,
        "parts": {},
        "detail": "Detail. 2 seeds; a test takes 3.",
    }
    assert claim_verdict("residual_error", {"psnr": [0.3]}, "")["detail"] == "1 seed; a test takes 3."
    reason = claim_verdict("residual_error", {"psnr": [0.3] * 3}, "", not_tested="No run.")
    assert (reason["verdict"], reason["detail"]) == (NOT_TESTED, "No run.")
    one = claim_verdict("residual_error", {"psnr": [0.2, 0.2, 0.2]}, "up", setting="here")
    assert one["detail"].startswith("3 seeds; psnr: gain 0.2, 95 % from 0.2 to 0.2, p = ")
    assert {name: one[name] for name in ("id", "setting", "effect")} == {
        name: few[name] for name in few if name in ("id", "setting", "effect")
    }
    assert one["parts"]["psnr"] | {"p": 0} == {
        "gain": pytest.approx(0.2),
        "interval": [pytest.approx(0.2)] * 2,
        "smallest": 0.1,
        "p": 0,
        "verdict": HOLDS,
    }
    parts = {"psnr: a": [0.3, 0.35, 0.25], "psnr: b": [0.3, 0.31, 0.29], "psnr: c": [-0.3, -0.31, -0.29]}
    both = claim_verdict("ladder", {name: parts[name] for name in ("psnr: a", "psnr: b")}, "")
    assert "of 2 parts psnr: a decides" in both["detail"]  # the less certain of those that hold
    assert both["p"] == max(part["p"] for part in both["parts"].values())
    bad = claim_verdict("ladder", parts, "")
    assert "of 3 parts psnr: c decides" in bad["detail"]
    assert bad["p"] == pytest.approx(min(1, 3 * bad["parts"]["psnr: c"]["p"]))


def test_a_part_of_few_seeds_leaves_a_claim_open_unless_another_part_fails():
    good, bad, few = [0.3, 0.31, 0.29], [-0.3, -0.31, -0.29], [0.3]
    open_ = claim_verdict("ladder", {"psnr: a": good, "psnr: b": few}, "")
    assert (open_["verdict"], open_["detail"]) == (NOT_TESTED, "1 seed; a test takes 3.")
    failed = claim_verdict("ladder", {"psnr: a": good, "psnr: b": few, "psnr: c": bad}, "")
    assert failed["verdict"] == FAILS
    assert list(failed["parts"]) == ["psnr: a", "psnr: c"]
    assert failed["p"] == pytest.approx(min(1, 3 * failed["parts"]["psnr: c"]["p"]))
    assert "3 seeds; of 2 parts psnr: c decides" in failed["detail"]
    reason = claim_verdict("ladder", {"psnr": bad}, "", not_tested="No run.")
    assert (reason["verdict"], reason["detail"]) == (NOT_TESTED, "No run.")


def test_a_claim_in_parts_is_decided_part_by_part():
    good, bad, open_ = [0.3, 0.31, 0.29], [-0.3, -0.31, -0.29], [0.3, 0.9, -0.5]
    verdict = {
        (a, b): claim_verdict("ladder", {"psnr: x": a, "quantization_error: y": b}, "")["verdict"]
        for a in map(tuple, (good, bad, open_))
        for b in map(tuple, (good, bad, open_))
    }
    good, bad, open_ = map(tuple, (good, bad, open_))
    assert verdict[good, good] == HOLDS
    assert {verdict[pair] for pair in verdict if bad in pair} == {FAILS}
    assert verdict[good, open_] == verdict[open_, good] == verdict[open_, open_] == UNDECIDED


def test_what_falls_under_holms_correction_is_undecided():
    base = {"id": "ladder", "detail": "d."}
    claims = [base | {"verdict": HOLDS, "p": 0.03}, base | {"verdict": FAILS, "p": 0.001}, base | {"verdict": HOLDS}]
    first, second, old = corrected(claims)
    assert (first["verdict"], second["verdict"], old["verdict"]) == (HOLDS, FAILS, NOT_TESTED)
    assert "earlier rule" in old["detail"]
    assert second["adjusted_p"] == pytest.approx(0.002)
    first, second, _ = corrected([base | {"verdict": HOLDS, "p": p} for p in (0.03, 0.02, 0.9)])
    assert (first["verdict"], second["verdict"]) == (UNDECIDED, UNDECIDED)
    assert "Holm" in first["detail"]


def test_unknown_claims_parts_and_missing_numbers_raise():
    with pytest.raises(ValueError, match=r"expected a claim of .*got 'magic'"):
        claim_verdict("magic", {"psnr": [1.0]}, "")
    with pytest.raises(ValueError, match=r"expected a part of .*got 'beauty'"):
        claim_verdict("ladder", {"beauty": [1.0, 1.0, 1.0]}, "")
    for gains in ([np.nan], []):
        with pytest.raises(ValueError, match="expected finite gains"):
            claim_verdict("ladder", {"psnr": gains}, "")
    assert set(SMALLEST_GAINS) >= {part.partition(":")[0] for c in CLAIMS.values() for part in published_gains(c)}


def test_group_means_are_each_groups_own():
    means = group_means([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 4.0, 0.0]], ["b", "a", "b", "b"])
    assert means.tolist() == [[2.0, 10 / 3], [0.0, 4 / 3]]
    with pytest.raises(ValueError, match="each of 4 images, got 3"):
        group_means([1.0, 2.0, 3.0, 4.0], ["a", "b", "b"])


def test_the_interval_of_a_mean_takes_groups_as_wholes():
    values = np.repeat([0.0, 1.0], 50)  # two groups of 50 equal images are two observations, not a hundred
    assert group_interval(values, ["a"] * 50 + ["b"] * 50) == (0.0, 1.0)
    rng = np.random.default_rng(1)
    alone = rng.random(400)
    low, high = group_interval(alone, range(400))
    error = 1.96 * alone.std() / 20
    assert (low, high) == (pytest.approx(alone.mean() - error, abs=3e-3), pytest.approx(alone.mean() + error, abs=3e-3))
    assert group_interval([0.25] * 3, ["a", "b", "b"]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="length"):
        group_interval([1.0, 2.0], ["a"])


def test_rows_that_agree_become_their_means_and_spreads():
    rows = [
        {"method": "a", "rate": 1, "seed": 0, "psnr": 1.0, "note": "x", "gap": None, "same": 0.1},
        {"method": "b", "rate": 1, "seed": 0, "psnr": 5.0, "note": "y", "gap": 2.0, "same": 0.1},
        {"method": "a", "rate": 1, "seed": 1, "psnr": 3.0, "note": "x", "gap": 1.0, "same": 0.1},
        {"method": "a", "rate": 2, "seed": 1, "psnr": 4.0, "note": "z", "gap": 1.0, "same": 0.1},
    ]
    first, second = over_seeds(rows)
    numbers = {"psnr": pytest.approx(8 / 3), "psnr_std": pytest.approx(7**0.5 / 3**0.5), "same": 0.1, "same_std": 0.0}
    spreads = {"rate": pytest.approx(4 / 3), "rate_std": pytest.approx(3**-0.5)}
    assert first == {"method": "a", "seeds": 3, "note": None, "gap": None} | numbers | spreads
    assert second == {"method": "b", "rate": 1.0, "seeds": 1, "psnr": 5.0, "note": "y", "gap": 2.0, "same": 0.1}
    names = [(row["method"], row["rate"], row["seeds"], row["note"]) for row in over_seeds(rows, ("method", "rate"))]
    assert names == [("a", 1, 2, "x"), ("b", 1, 1, "y"), ("a", 2, 1, "z")]
