"""The factorial of quantizers on a frozen VAE's latents."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from codalib import load_dataset, load_vae
from codalib.base.files import read_json
from codalib.base.paths import project_folder
from codalib.evaluation.latents import quantizer_scores
from codalib.evaluation.metrics import build_frechet
from codalib.experiments.factorial import METHODS, PROTOCOL, Factorial, FactorialData, factorial_claims, level_rows
from codalib.experiments.trials import data_digest, words
from codalib.training.settings import QuantizerSettings

SETTINGS = QuantizerSettings(steps=4, batch_size=4, codebook_size=16, ema=0.0, checkpoint_every=100)


@pytest.fixture(scope="module")
def data():
    train, test = load_dataset("emoji", "train", 64, limit=24), load_dataset("emoji", "val", 64, limit=6)
    return FactorialData.encode(load_vae("emoji"), train, test, held_out=0.2)


def factorial(folder, data):
    return Factorial(SETTINGS, data, folder / "results", folder / "work", scored=(2,), provenance={"commit": "abc"})


def test_choosing_images_are_no_training_images(data):
    assert len(data.train) + len(data.choose[0]) == 24
    assert len(data.choose[0]) >= 4
    means, first, again = data.test
    assert first.shape == means.shape == (6, 16, 8, 8)
    assert not torch.equal(first, again)


def test_every_cell_is_bracketed_and_fitted_with_every_seed(tmp_path, data):
    rows = list(factorial(tmp_path, data).run({"one grid": [8]}, [0, 1], [0.05, 0.15], [0.02, 0.06]))
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        for setting in ("best", "paper"):
            final = [row for row in own if row["setting"] == setting]
            assert [row["settings"]["seed"] for row in final] == [0, 1]
            assert all(len(row["test_errors"]) == len(row["test_psnr"]) == 6 for row in final)
        rates = {row["settings"]["learning_rate"] for row in own if row["setting"] == "tried"}
        best = next(row["settings"]["learning_rate"] for row in own if row["setting"] == "best")
        assert min(rates) < best < max(rates) or best == 0
    final = {f"one-grid-{words(row['method'])}" for row in rows if row["setting"] != "tried"}
    kept = [folder.name for folder in (tmp_path / "work").iterdir()]
    assert len(kept) == 16  # the final ones, two settings and two seeds a method; the others' are gone
    assert {name.partition("-rate-")[0] for name in kept} == final
    assert rows[0]["commit"] == "abc"
    assert [point["step"] for point in rows[0]["curve"]] == [2]


def test_a_finished_trial_is_read_and_not_fitted_again(tmp_path, data, monkeypatch):
    cell = ("nearest, data start", "one grid", [8], 0.05, 0.0, 0)
    first = factorial(tmp_path, data).trial(*cell)
    monkeypatch.setattr("codalib.experiments.factorial.fit_quantizer", lambda *_, **__: pytest.fail("fitted again"))
    assert factorial(tmp_path, data).trial(*cell) == first
    assert json.loads(next((tmp_path / "results").iterdir()).read_text())["test"] == first["test"]


def test_the_quantizer_behind_a_trial_is_kept_and_can_be_fitted_again(tmp_path, data, monkeypatch):
    own = factorial(tmp_path, data)
    row = own.trial("attention, random start", "two levels", [4, 8], 0.05, 0.02, 1, decoded=True)
    again = factorial(tmp_path / "elsewhere", data).fitted("x", "y", row, moments=True)
    monkeypatch.setattr("codalib.training.quantizer.QuantizerStage.train_step", lambda *_: pytest.fail("trained"))
    kept = own.fitted("x", "y", row)
    assert (kept.method, kept.setting, kept.snapshots) == ("x", "y", ())
    assert kept.settings.deciding() == own_settings(row)
    for one, two in zip(kept.quantizer.state_dict().values(), again.quantizer.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert quantizer_scores(kept.quantizer, *data.test)[0] == row["test"]
    assert [step for step, _ in again.snapshots] == [0, 2]
    start, later = (state.codebooks.weight for _, state in again.snapshots)
    torch.manual_seed(1)
    assert torch.equal(start, kept.settings.build_quantizer(16).codebooks.weight)
    assert not torch.equal(start, later)
    assert not torch.equal(later, again.quantizer.codebooks.weight)


def own_settings(row):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row["settings"].items()}


def test_the_committed_trials_are_found_by_name(monkeypatch):
    """Ten hours of trials are in reports/: nothing that joins the settings may give them other names."""
    monkeypatch.setattr("codalib.experiments.factorial.fit_quantizer", lambda *_, **__: pytest.fail("fitted again"))
    folder = project_folder() / "reports/emoji-long/results/quantizer_factorial"
    images = load_dataset("emoji", "train", 64), load_dataset("emoji", "val", 64)
    data = SimpleNamespace(digest=data_digest(load_vae("emoji"), images, PROTOCOL, 0.1, 0, 64))
    files = [read_json(file) for file in sorted(folder.glob("*.json"))]
    assert len(files) > 100
    for found in files:
        own = own_settings(found)
        settings = QuantizerSettings(**own, compile=True, gradient_checkpointing=True)
        trials = Factorial(settings, data, folder, "nowhere", (500, 1000, 2000), {})
        cell = found["method"], found["grid"], own["scales"], own["learning_rate"], own["entropy_weight"], own["seed"]
        assert trials.trial(*cell) == found


def test_a_start_from_data_is_ahead_of_a_random_one(data, tmp_path):
    errors = {
        method: factorial(tmp_path, data).trial(method, "one grid", [8], 1e-6, 0.0, 0)["choose"]["relative_error"]
        for method in METHODS
    }
    assert errors["nearest, data start"] < errors["nearest, random start"]
    assert errors["attention, data start"] < errors["attention, random start"]


def test_a_grid_may_have_some_methods_alone(tmp_path, data):
    own = factorial(tmp_path, data)
    only = {"two levels": ["nearest, data start"]}
    own.trial = lambda method, grid, *_, **__: {"method": method, "grid": grid, "choose": {"relative_error": 1.0}}
    rows = list(own.run({"one grid": [8], "two levels": [4, 8]}, [0], [0.05, 0.15], [0.02, 0.06], only))
    assert {row["method"] for row in rows if row["grid"] == "two levels"} == {"nearest, data start"}
    assert {row["method"] for row in rows if row["grid"] == "one grid"} == set(METHODS)
    with pytest.raises(ValueError, match="expected only grids of one grid"):
        next(own.run({"one grid": [8]}, [0], [0.05], [0.02], {"one grid": ["closest"]}))


def result(grid, method, seed, error, change=0.5, used=1.0, setting="best"):
    test = {"relative_error": error, "utilization": used, "token_change": change}
    return {
        "grid": grid,
        "method": method,
        "setting": setting,
        "choose": {"relative_error": error},
        "test": test,
        "test_errors": [error * (1 + 0.001 * seed)] * 4,
        "settings": {"seed": seed},
    }


def test_claims_by_hand():
    grids = {"one grid": [8], "two levels": [4, 8], "pyramid": [1, 4, 8, 8], "five grids": [8] * 5}
    rows = [
        row
        for seed in range(3)
        for row in (
            result("one grid", "nearest, data start", seed, 0.22, change=0.5),
            result("one grid", "attention, random start", seed, 0.25, change=0.6, used=0.99),
            result("one grid", "attention, data start", seed, 0.2, change=0.4, used=0.90),
            result("two levels", "nearest, data start", seed, 0.1),
            result("pyramid", "nearest, data start", seed, 0.11),
        )
    ]
    verdicts = {claim["id"]: claim for claim in factorial_claims(rows, grids, list("abcd"))}
    assert all("its best" in claim["setting"] for claim in verdicts.values())
    assert verdicts["attention_error"]["verdict"] == "holds"  # of the start that is better on the choosing images
    assert "data start" in verdicts["attention_error"]["effect"]
    assert verdicts["attention_utilization"]["verdict"] == "does not hold"
    assert verdicts["sparse_assignment"]["verdict"] == "holds"
    assert verdicts["residual_error"]["verdict"] == "holds"  # from one grid to the most levels
    assert verdicts["levels_monotone"]["verdict"] == "does not hold"  # from two levels to the pyramid
    assert verdicts["levels_monotone"]["effect"] == "at 1, 2, 4 levels, each trained: relative_error 0.22, 0.1, 0.11"


def test_every_level_is_to_lower_the_frechet_distance_too_where_there_is_one():
    def verdict(last):
        distances = {"one grid": 300.0, "two levels": 200.0, "pyramid": last}
        errors = {"one grid": 0.3, "two levels": 0.2, "pyramid": 0.1}
        rows = [result(grid, "nearest, data start", seed, errors[grid]) for grid in distances for seed in range(3)]
        for row in rows:
            row["test"]["fd_effnet@64"] = distances[row["grid"]] * (1 + 0.001 * row["settings"]["seed"])
        claims = factorial_claims(rows, {"one grid": [8], "two levels": [4, 8], "pyramid": [1, 4, 8]}, list("abcd"))
        return next(claim for claim in claims if claim["id"] == "levels_monotone")

    assert verdict(150.0)["verdict"] == "holds"
    assert verdict(150.0)["effect"].endswith("; fd_effnet@64 300.3, 200.2, 150.2")
    assert verdict(210.0)["verdict"] == "does not hold"  # though the error falls
    assert "fd_effnet@64: 2 to 3 levels" in verdict(210.0)["detail"]


def test_levels_are_those_of_grids_that_end_alike_with_nearest_codes_from_data():
    grids = {"one grid": [8], "pyramid": [4, 8], "five grids": [8] * 5}
    methods = "nearest, data start", "nearest, random start"
    rows = [result(grid, method, 0, 0.1, setting=s) for grid in grids for method in methods for s in ("best", "tried")]
    found = level_rows(rows, grids)
    assert {n: [(row["grid"], row["method"], row["setting"]) for row in own] for n, own in found.items()} == {
        1: [("one grid", "nearest, data start", "best")],
        2: [("pyramid", "nearest, data start", "best")],
    }


def test_the_distances_of_a_trials_images_are_measured_once(tmp_path, data, monkeypatch):
    own = factorial(tmp_path, data)
    row = own.trial("nearest, data start", "pyramid", [4, 8], 0.05, 0.0, 0, decoded=True) | {"setting": "best"}
    distance = data.reference(build_frechet("fd_effnet", 32))
    found = own.distances(row, distance)
    assert list(found) == ["fd_effnet@32", "kd_effnet@32"]
    quantizer = own.fitted("nearest", "best", row).quantizer
    by_hand = build_frechet("fd_effnet", 32)
    by_hand.update(data.images, real=True)
    by_hand.update(data.vae.decode(quantizer.decode(quantizer.encode(data.test[1]))), real=False)
    assert found == pytest.approx(by_hand.of_reconstructions(), rel=1e-4)
    monkeypatch.setattr("codalib.experiments.factorial.fit_quantizer", lambda *_, **__: pytest.fail("fitted again"))
    shutil.rmtree(tmp_path / "work")
    assert factorial(tmp_path, data).distances(row, distance) == found


def test_the_papers_setting_has_verdicts_of_its_own():
    rows = [
        result("one grid", method, seed, error, setting=setting)
        for seed in range(3)
        for setting, errors in (("best", (0.2, 0.3)), ("paper", (0.4, 0.3)), ("tried", (0.1, 0.9)))
        for method, error in zip(("nearest, data start", "attention, data start"), errors, strict=True)
    ]
    rows.append({"grid": "one grid", "method": "attention, random start", "setting": "paper", "choose": {}})  # failed
    claims = factorial_claims(rows, {"one grid": [8]}, list("abcd"))
    found = {claim["setting"]: claim["verdict"] for claim in claims if claim["id"] == "attention_error"}
    assert found == {
        "one grid, frozen VAE, each at its best": "does not hold",
        "one grid, frozen VAE, the paper's setting": "holds",
    }


def test_at_the_papers_setting_both_are_compared_from_random_codes_too():
    errors = {"nearest, data start": 0.2, "nearest, random start": 0.5, "attention, random start": 0.3}
    errors["attention, data start"] = 0.1  # no part of that comparison
    used = {"nearest, random start": 0.5}
    rows = [
        result("one grid", method, seed, error, setting="paper", used=used.get(method, 1.0))
        for seed in range(3)
        for method, error in errors.items()
    ]
    setting = "one grid, frozen VAE, the paper's setting, both from random codes"
    claims = factorial_claims(rows, {"one grid": [8]}, list("abcd"))
    found = {claim["id"]: claim for claim in claims if claim["setting"] == setting}
    assert found["attention_error"]["effect"] == "relative_error 0.5 -> 0.3 (attention, random start)"
    assert found["attention_error"]["verdict"] == found["attention_utilization"]["verdict"] == "holds"
    assert factorial_claims([row for row in rows if "random" in row["method"]], {"one grid": [8]}, list("abcd"))
