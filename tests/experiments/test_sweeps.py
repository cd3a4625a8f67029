import json

import pytest

from codalib.experiments.sweeps import BEST, PAPER, check_sweep, read_rows, sweep, write_rows


def test_every_rate_is_tried_once_and_two_are_trained_with_every_seed():
    trained = []

    def train(rate, seed):
        trained.append((rate, seed))
        return {"learning_rate": rate, "seed": seed, "error": abs(rate - 0.01) + (9 if seed else 0)}

    rows = sweep(train, [0.1, 0.01, 0.001], [0, 1, 2], "error", paper=0.001)
    assert trained == [(0.1, 0), (0.01, 0), (0.001, 0), (0.01, 1), (0.01, 2), (0.001, 1), (0.001, 2)]
    assert [(row["learning_rate"], row["seed"]) for row in rows] == trained
    assert [row["settings"] for row in rows] == [[], [BEST], [PAPER], [BEST], [BEST], [PAPER], [PAPER]]
    assert [row["settings"] for row in sweep(train, [0.001], [0], "error", paper=0.001)] == [[BEST, PAPER]]
    assert [row["settings"] for row in sweep(train, [0.1, 0.01], [0], "error", paper=0.001)] == [[], [BEST]]


def test_trials_that_cannot_be_are_refused_before_any_work():
    check_sweep([0.1, 0.01], [0, 1])
    for rates in ([], [0.1, -0.01]):
        with pytest.raises(ValueError, match="expected one or more learning_rates, all above 0"):
            check_sweep(rates, [0])
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="expected one or more seeds, all different"):
            check_sweep([0.1], seeds)


def test_trained_tokenizers_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    row = {"method": "CODA", "seed": 1, "tokenizer": str(tmp_path / "x/coda/seed-1/tokenizer")}
    write_rows([row], tmp_path / "x")
    assert json.loads((tmp_path / "x" / "variants.json").read_text())[0]["tokenizer"] == "coda/seed-1/tokenizer"
    assert read_rows("x") == [row]
    with pytest.raises(ValueError, match="the folder of 01_train_variants or 01_train_baselines"):
        read_rows("y")
