"""The factorial of quantizers on a frozen VAE's latents."""

import json

import pytest
import torch

from codalib import load_dataset, load_vae
from codalib.experiments.factorial import METHODS, Factorial, FactorialData
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
    assert not list((tmp_path / "work").glob("*"))
    assert rows[0]["commit"] == "abc"
    assert [point["step"] for point in rows[0]["curve"]] == [2]


def test_a_finished_trial_is_read_and_not_fitted_again(tmp_path, data, monkeypatch):
    cell = ("nearest, data start", "one grid", [8], 0.05, 0.0, 0)
    first = factorial(tmp_path, data).trial(*cell)
    monkeypatch.setattr("codalib.experiments.factorial.fit_quantizer", lambda *_, **__: pytest.fail("fitted again"))
    assert factorial(tmp_path, data).trial(*cell) == first
    assert json.loads(next((tmp_path / "results").iterdir()).read_text())["test"] == first["test"]


def test_a_start_from_data_is_ahead_of_a_random_one(data, tmp_path):
    errors = {
        method: factorial(tmp_path, data).trial(method, "one grid", [8], 1e-6, 0.0, 0)["choose"]["relative_error"]
        for method in METHODS
    }
    assert errors["nearest, data start"] < errors["nearest, random start"]
    assert errors["attention, data start"] < errors["attention, random start"]
