import json

import pytest

from codalib.base.paths import runs_folder
from codalib.datasets.images import load_dataset
from codalib.evaluation.reconstruction import image_scores
from codalib.experiments.sweeps import BEST, PAPER, write_rows
from codalib.experiments.variants import (
    TokenizerTrials,
    baseline_curves,
    baseline_rows,
    baseline_tokenizers,
    table_4_rows,
    tokenizer_variants,
    variant_row,
)
from codalib.models.checkpoints import load_tokenizer
from codalib.training.settings import FitSettings, TokenizerSettings

SETTINGS = TokenizerSettings(steps=1, batch_size=1, codebook_size=64)


def test_each_variant_differs_from_the_base_in_one_thing():
    variants = tokenizer_variants(SETTINGS, ["none", "decoder"], [16, 256], [None])
    assert list(variants) == [
        "base",
        "adapters none",
        "adapters decoder",
        "codebook size 16",
        "codebook size 256",
        "norm none",
    ]
    for name, own in variants.items():
        differs = [field for field, value in vars(own).items() if value != getattr(SETTINGS, field)]
        assert len(differs) == (name != "base")
    with pytest.raises(ValueError, match="expected codebook_size other than the base's as a variant, got 64"):
        tokenizer_variants(SETTINGS, [], [64], [])


def test_the_base_stands_in_each_table_and_a_variant_in_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    variants = tokenizer_variants(SETTINGS, ["decoder"], [256], [None])
    rows = [variant_row(name, own, f"{name}/tokenizer") for name, own in variants.items()]
    settings = [[BEST, PAPER], [BEST], [BEST], []]  # of the base, the decoder, 256 codes and no norm
    write_rows([row | {"settings": own} for row, own in zip(rows, settings, strict=True)], tmp_path / "x")
    found = [(row["table"], row["method"], row["setting"]) for row in table_4_rows("x")]
    best = [("4a", "both"), ("4a", "decoder"), ("4b", "64"), ("4b", "256"), ("4c", "rms")]
    assert found == [(*row, BEST) for row in best] + [(*row, PAPER) for row in (best[0], best[2], best[4])]
    assert table_4_rows("x")[1]["tokenizer"] == str(runs_folder("x") / "adapters decoder/tokenizer")
    with pytest.raises(ValueError, match="the folder of 01_train_variants"):
        table_4_rows("y")


def test_the_embedded_tokenizer_is_one_row_of_each_table():
    assert [(row["table"], row["method"]) for row in table_4_rows(None)] == [
        ("4a", "both"),
        ("4b", "1024"),
        ("4c", "rms"),
    ]


def test_baselines_have_a_quantizer_of_their_own_and_the_same_decoder_adapters():
    settings = TokenizerSettings(steps=5, batch_size=1, codebook_size=256, scales=(1, 2, 8))
    found = baseline_tokenizers(settings, ["rvq", "fsq"], levels=3, longer=6)
    assert list(found) == ["CODA", "CODA, decoder adapted", "VQGAN-style", "VQ", "Residual VQ", "FSQ"]
    assert found["CODA"] == settings
    assert found["VQGAN-style"].steps == 30
    assert found["VQGAN-style"].adapters == "scratch"
    for name in ("CODA, decoder adapted", "VQ", "Residual VQ", "FSQ"):
        assert (found[name].adapters, found[name].rank, found[name].steps) == ("decoder", settings.rank, 5)
    assert [own.build_quantizer(16).num_tokens for own in found.values()] == [69, 69, 64, 64, 192, 192]
    with pytest.raises(ValueError, match="expected baselines of rvq, rotation"):
        baseline_tokenizers(settings, ["pq"], levels=3, longer=6)


def test_the_chosen_trials_are_read_with_their_cost_and_curves(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    common = {"method": "CODA", "seed": 0, "codebook_size": 8, "tokens": 5, "steps": 4, "seconds": 1.0}
    common |= {"operations_a_step": 1e15, "learning_rate": 0.1}
    settings = {"a": [], "b": [BEST], "c": [PAPER]}
    rows = [common | {"tokenizer": f"{name}/tokenizer", "settings": own} for name, own in settings.items()]
    write_rows(rows, tmp_path / "x")
    (tmp_path / "x/b").mkdir()
    lines = [{"step": 1, "l1": 1.0}, {"step": 2, "l1": 1.0, "val_psnr": 9.0}, {"step": 4, "l1": 1.0, "val_psnr": 11.0}]
    (tmp_path / "x/b/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = baseline_rows("x")
    assert row["tokenizer"] == str(tmp_path / "x/b/tokenizer")
    assert row["petaflop"] == 4
    assert [(line["steps"], line["petaflop"], line["val_psnr"]) for line in baseline_curves("x")] == [
        (2, 2, 9),
        (4, 4, 11),
    ]
    assert baseline_curves(None) == []
    assert [row["method"] for row in baseline_rows(None)] == ["CODA"]


def test_rates_are_bracketed_on_images_of_their_own(tmp_path, monkeypatch):
    train, choose = load_dataset("emoji", "train", 64, limit=24).split_groups(0.3)
    val = load_dataset("emoji", "val", 64, limit=2)
    small = TokenizerSettings(
        steps=1, batch_size=2, codebook_size=8, scales=(8,), rank=2, perceptual_weight=0, adversarial_weight=0, ema=0
    )
    trials = TokenizerTrials("emoji", train, choose, val, tmp_path, FitSettings(), None, 1)
    given = {5e-4: 0.5, 3e-4: 0.3, 1e-3: 0.2, 3e-3: 0.1, 9e-3: 0.4}
    monkeypatch.setattr(TokenizerTrials, "choose_error", lambda self, place, own: given[own.learning_rate])
    rows = trials.variants({"base": small}, [3e-4, 1e-3, 3e-3], [0, 1])
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [
        *((rate, 0) for rate in (3e-4, 1e-3, 3e-3, 9e-3, 5e-4)),
        (3e-3, 1),
        (5e-4, 1),
    ]
    assert [row["settings"] for row in rows] == [[], [], [BEST], [], [PAPER], [BEST], [PAPER]]
    monkeypatch.undo()
    one = load_tokenizer(tmp_path / rows[0]["tokenizer"])
    scores = image_scores(one, choose)[0]
    expected = 0.2 * scores["l1"].mean() + scores["l2"].mean()
    assert trials.choose_error(rows[0]["tokenizer"], small) == pytest.approx(expected.item())
