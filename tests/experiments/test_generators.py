"""Generators trained alike on the tokens of several tokenizers."""

from dataclasses import replace

import pytest
import test_adapted

from codalib import load_dataset, load_vae
from codalib.evaluation.generation import GenerationSettings, SamplerConfig
from codalib.evaluation.metrics import build_frechet
from codalib.experiments.adapted import AdaptedData, AdaptedTrials
from codalib.experiments.generators import GeneratorTrials, TokenizerTrial, beyond_floor, generator_claims
from codalib.experiments.trials import TrialFolder
from codalib.training.settings import EncodingSettings, MaskGITSettings

SETTINGS = MaskGITSettings(
    steps=2, batch_size=4, preset="XS", width=16, depth=1, heads=2, warmup_steps=0, checkpoint_every=100
)
EVALUATION = GenerationSettings(
    "emoji", samples=5, val_limit=5, train_limit=6, batch_size=5, frechet="fd_effnet", frechet_resolution=32
)
SAMPLERS = {"steps 1": SamplerConfig(steps=1), "steps 2": SamplerConfig(steps=2)}


def trials(folder):
    train, test = load_dataset("emoji", "train", 64, limit=12), load_dataset("emoji", "val", 64, limit=5)
    data = AdaptedData.split(load_vae("emoji"), train, test, 0.3, None, build_frechet("fd_effnet", 32))
    results = TrialFolder(folder / "results", {"commit": "abc"})
    cells = {"ours": "attention, frozen VAE", "theirs": "nearest, frozen VAE"}
    tokenizers = {
        name: TokenizerTrial(
            AdaptedTrials(test_adapted.SETTINGS, test_adapted.FITS, data, results, folder / name, "emoji"),
            cell,
            0.001,
            3,
        )
        for name, cell in cells.items()
    }
    return GeneratorTrials(
        SETTINGS, EncodingSettings(views=2), EVALUATION, SAMPLERS, tokenizers, results, folder / "work"
    )


def test_a_generator_is_trained_on_its_tokenizers_tokens_and_read_from_its_file_the_next_time(tmp_path, monkeypatch):
    own = trials(tmp_path)
    row = own.trial("ours", 0.001, 4)
    assert row["settings"]["seed"] == 4
    assert row["choose"]["step"] == 2
    assert list(row["judged"]) == ["steps 1", "steps 2"]
    assert row["judged"]["steps 2"]["samples"] == 5
    assert row["commit"] == "abc"
    train, choose = own.caches("ours")
    assert train.tokenizer == choose.tokenizer != own.caches("theirs")[0].tokenizer
    assert len(train) == 2 * len(own.tokenizers["ours"].trials.data.train)  # two views
    assert list(own.trial("theirs", 0.001, 4)["judged"]) == ["steps 1"]  # many steps for the first tokenizer alone
    tried = own.trial("ours", 0.001, 4, 2)
    assert "judged" not in tried
    assert tried["choose"] == row["choose"]  # as many steps, and so the same training
    monkeypatch.setattr("codalib.experiments.generators.train_maskgit", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("codalib.experiments.adapted.train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert trials(tmp_path).trial("ours", 0.001, 4) == row
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        trials(tmp_path).trial("ours", 0.001, 5)


def test_a_trial_that_stopped_while_it_was_judged_is_not_trained_again(tmp_path, monkeypatch):
    whole = trials(tmp_path / "whole").trial("ours", 0.001, 4)
    with monkeypatch.context() as patch:
        patch.setattr("codalib.experiments.generators.evaluate_maskgit", lambda *_: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception, match="stopped here"):
            trials(tmp_path / "cut").trial("ours", 0.001, 4)
    monkeypatch.setattr("codalib.experiments.generators.train_maskgit", lambda *_: pytest.fail("trained again"))
    resumed = trials(tmp_path / "cut").trial("ours", 0.001, 4)
    assert resumed["choose"]["val_loss"] == whole["choose"]["val_loss"]
    assert resumed["parameters"] == whole["parameters"]
    for sampler, judged in whole["judged"].items():
        assert resumed["judged"][sampler]["fd_effnet@32"] == judged["fd_effnet@32"]
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # other settings are another training
        trials(tmp_path / "cut").trial("ours", 0.002, 4)


def test_how_the_work_is_done_is_in_no_trials_name(tmp_path, monkeypatch):
    monkeypatch.setattr(TrialFolder, "once", lambda self, name, inputs, make, *_: [name, inputs])
    plain, fast = trials(tmp_path), trials(tmp_path)
    for tokenizer in fast.tokenizers.values():
        inner = tokenizer.trials
        inner.settings = replace(inner.settings, compile=True)
        inner.fits = {kind: replace(own, gradient_checkpointing=True) for kind, own in inner.fits.items()}
    fast.settings = replace(fast.settings, compile=True, gradient_checkpointing=True)
    assert fast.trial("ours", 0.001, 4) == plain.trial("ours", 0.001, 4)
    assert fast.baselines("theirs") == plain.baselines("theirs")


def test_a_tokenizer_whose_numbers_alone_were_kept_is_trained_again(tmp_path):
    chosen = trials(tmp_path).tokenizers["theirs"]
    folder = chosen.folder()
    weights = (folder / "quantizer.safetensors").read_bytes()
    folder.rename(tmp_path / "gone")
    assert chosen.folder() == folder
    assert (folder / "quantizer.safetensors").read_bytes() == weights


def test_the_run_brackets_first_and_then_takes_whole_seeds(tmp_path, monkeypatch):
    own = trials(tmp_path)

    def fake(name, rate, seed, steps=None):
        return {"tokenizer": name, "choose": {"val_loss": abs(rate - 0.003)}, "key": (rate, seed, steps)}

    monkeypatch.setattr(own, "trial", fake)
    monkeypatch.setattr(own, "baselines", lambda name: {"tokenizer": name})
    rows = list(own.run([0, 1], [0.001, 0.003], 1))
    best = [(row["tokenizer"], row["key"]) for row in rows if row["setting"] == "best"]
    assert best == [(name, (0.003, seed, None)) for seed in (0, 1) for name in ("ours", "theirs")]
    tried = {row["key"] for row in rows if row["setting"] == "tried"}
    assert tried == {(rate, 0, 1) for rate in (0.001, 0.003, 0.009)}


def drawn(distance):
    """A row of samples whose kernel distance is a tenth of the Frechet distance."""
    return {"fd_effnet@32": distance, "kd_effnet@32": distance / 10, "class_accuracy": 0.7}


def results(ours, ours_many, theirs):
    rows = []
    for name, values in (("ours", ours), ("theirs", theirs)):
        floors = {"training images": drawn(100.0), "shuffled tokens": drawn(900.0)}
        rows.append({"tokenizer": name, "setting": "baselines", "judged": floors})
        for i, value in enumerate(values):
            judged = {"few": drawn(value)} | ({"many": drawn(ours_many[i])} if name == "ours" else {})
            rows.append({"tokenizer": name, "setting": "best", "judged": judged})
    return rows


def test_closeness_is_counted_beyond_real_images():
    rows = results((300.0, 320.0, 280.0), (290.0, 300.0, 270.0), (90.0, 90.0, 90.0))
    ours, ours_kernel, theirs, _ = beyond_floor(rows, "few")
    assert (ours["tokenizer"], ours["distance"], ours["samples"]) == ("ours", "fd_effnet@32", pytest.approx(300))
    assert ours["times closer"] == pytest.approx((900 - 100) / (300 - 100))
    assert ours_kernel["times closer"] == pytest.approx((90 - 10) / (30 - 10))
    assert (theirs["tokenizer"], theirs["times closer"]) == ("theirs", None)


def test_claims_by_hand():
    rows = results((300.0, 301.0, 299.0), (200.0, 201.0, 199.0), (400.0, 401.0, 399.0))
    gains, steps = generator_claims(rows, "few", "many")
    assert (gains["id"], gains["verdict"]) == ("generation_gains", "holds")
    assert gains["parts"]["fd_effnet@32: theirs"]["gain"] == pytest.approx(1 - 300 / 400, abs=1e-3)
    assert (steps["id"], steps["verdict"]) == ("more_steps", "holds")
    assert steps["parts"]["kd_effnet@32"]["gain"] == pytest.approx(1 - 200 / 300, abs=1e-3)
    worse = generator_claims(results((400.0, 401.0, 399.0), (1, 1, 1), (300.0, 301.0, 299.0)), "few", None)
    assert [claim["verdict"] for claim in worse] == ["does not hold"]
