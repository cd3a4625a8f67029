import dataclasses
import itertools
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from codalib.base import hardware
from codalib.base.processes import make_accelerator
from codalib.datasets.images import load_dataset
from codalib.evaluation.latents import encode_images
from codalib.evaluation.metrics import ReconstructionMetrics
from codalib.evaluation.reconstruction import evaluate
from codalib.models.adversary import frozen
from codalib.models.checkpoints import load_vae
from codalib.models.checks import NonFiniteLoss
from codalib.models.loss_weights import LossWeights, adaptive_weight
from codalib.models.losses import generator_hinge, reconstruction_terms, weighted_sum
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.quantizer import QuantizerStage, fit_quantizer, outline
from codalib.training.settings import (
    SCRATCH,
    FitSettings,
    LoopSettings,
    PretrainSettings,
    QuantizerSettings,
    TokenizerSettings,
)
from codalib.training.tokenizer import TokenizerStage, train_and_save, train_tokenizer, untrained_tokenizer
from codalib.training.trainer import RampedEMA, Stage, TimeLimit, Trainer, checksum, learning_rate_factor, read_log
from codalib.training.vae import VaeStage, build_autoencoder, latent_std, pretrain_vae

SCALES = (1, 2, 4, 8)
SMALL = TokenizerSettings(
    steps=3, batch_size=2, codebook_size=32, scales=SCALES, rank=2, log_every=1, checkpoint_every=1, accumulation=2
)


@pytest.fixture(scope="module")
def vae():
    return load_vae("emoji")


@pytest.fixture(scope="module")
def images():
    return load_dataset("emoji", "train", 64, limit=8), load_dataset("emoji", "val", 64, limit=4)


@pytest.fixture(scope="module")
def trained(vae, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(SMALL, vae, *images, folder), folder


def state(tokenizer):
    return dict(tokenizer.state_dict().items())


def test_every_named_term_is_logged(trained):
    rows = read_log(trained[1])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"l1", "l2", "perceptual_effnet", "quantization", "entropy", "adversarial", "discriminator"} <= rows[
        0
    ].keys()
    assert rows[0]["adversarial_factor"] == 0  # the ramp starts at 0
    assert "val_psnr" in rows[-1]
    assert "val_psnr" not in rows[0]
    perplexities = [rows[-1][f"val_perplexity_level_{i + 1}"] for i in range(len(SCALES))]
    assert all(1 <= value <= min(32, 4 * p * p) for value, p in zip(perplexities, SCALES, strict=True))  # of 4 images


def test_a_resumed_run_equals_an_uninterrupted_one(trained, vae, images, tmp_path, monkeypatch):
    update, calls = Trainer.update, []

    def interrupted(self, *arguments, **keywords):
        calls.append(self.step)
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(SMALL, vae, *images, tmp_path)
    monkeypatch.undo()
    resumed = state(train_tokenizer(SMALL, vae, *images, tmp_path))
    assert all(torch.equal(value, resumed[name]) for name, value in state(trained[0]).items())
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3]
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/*/*"))
    assert kept == ["step-00000002", "step-00000003"]


def test_a_finished_run_is_not_trained_again(trained, vae, images, monkeypatch):
    monkeypatch.setattr(Trainer, "update", lambda *a, **k: pytest.fail("trained again"))
    again = state(train_tokenizer(SMALL, vae, *images, trained[1]))
    assert all(torch.equal(value, again[name]) for name, value in state(trained[0]).items())


def test_a_tokenizer_survives_its_folder(trained, images, tmp_path):
    tokenizer = trained[0]
    tokenizer.save_pretrained(tmp_path / "t", base="emoji")
    again = CodaTokenizer.from_pretrained(tmp_path / "t")
    batch = images[1][0]["image"][None]
    first = tokenizer(batch, generator=torch.Generator().manual_seed(0))
    indices = again.encode(batch, generator=torch.Generator().manual_seed(0))
    assert [level.shape for level in indices] == [(1, p, p) for p in SCALES]
    assert all(torch.equal(a, b) for a, b in zip(indices, first.indices, strict=True))
    assert torch.allclose(again.decode(indices), first.reconstruction, atol=1e-5)
    assert not torch.allclose(again.decode(indices, levels=1), first.reconstruction, atol=1e-3)
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        again.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"no config\.json"):
        CodaTokenizer.from_pretrained(tmp_path)


def test_a_frozen_vae_and_weights_of_zero_load_no_network(vae, images, tmp_path):
    settings = dataclasses.replace(
        SMALL, steps=1, adapters="none", perceptual_weight=0.0, adversarial_weight=0.0, kind="nearest", ema=0.0
    )
    tokenizer = train_tokenizer(settings, vae, *images, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.vae.parameters(), vae.parameters(), strict=True))
    assert not {"perceptual_effnet", "adversarial", "discriminator"} & read_log(tmp_path)[0].keys()


def test_a_tokenizer_from_scratch_trains_every_weight_and_brings_its_own_vae(vae, images, tmp_path):
    settings = dataclasses.replace(SMALL, steps=2, adapters=SCRATCH, kind="nearest", scales=(8,), perceptual_weight=0.0)
    train_and_save(settings, "emoji", *images, tmp_path)
    tokenizer = CodaTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours, theirs = tokenizer.vae.state_dict(), vae.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("conv1.weight"))
    picture = torch.stack([images[0][i]["image"] for i in range(4)])
    assert torch.allclose(tokenizer.vae.encode(picture), tokenizer.vae.encode(picture), atol=1e-5)  # no noise
    start = dataclasses.replace(settings, steps=1, learning_rate=0.0, ema=0.0)
    still = state(train_tokenizer(start, vae, *images, tmp_path / "still"))
    moved = state(train_tokenizer(dataclasses.replace(start, learning_rate=0.01), vae, *images, tmp_path / "moved"))
    changed = {name for name in still if not torch.equal(still[name], moved[name])}
    assert {name.split(".")[2] for name in changed if name.startswith("vae.")} >= {"encoder", "decoder"}


def test_fitting_a_quantizer_lowers_its_error(vae, images, tmp_path):
    latents = encode_images(vae, images[0], 8, batch_size=4)
    assert latents.shape == (8, 16, 8, 8)
    settings = QuantizerSettings(
        steps=60, batch_size=8, learning_rate=0.02, codebook_size=32, scales=SCALES, log_every=20, ema=0.0
    )
    fit_quantizer(settings, latents, tmp_path)
    rows = read_log(tmp_path)
    assert rows[-1]["quantization"] < 0.7 * rows[0]["quantization"]
    assert all(row["loss"] == pytest.approx(row["quantization"] + 0.05 * row["entropy"], rel=1e-5) for row in rows)


def test_evaluation_gives_every_measure(trained, images):
    measures = ReconstructionMetrics(32, len(SCALES), frechet=None)
    values = evaluate(trained[0], images[1], measures)
    assert values == evaluate(trained[0], images[1], ReconstructionMetrics(32, len(SCALES), frechet=None))
    assert {"psnr", "ssim", "quantization_error", "utilization", "utilization_level_4"} <= values.keys()


def test_a_term_that_is_not_finite_stops_the_run(vae, images, tmp_path):
    with pytest.raises(NonFiniteLoss, match="at step 1 the loss"):
        train_tokenizer(dataclasses.replace(SMALL, learning_rate=1e30, clip=1e30), vae, *images, tmp_path)


def test_pretraining_sets_the_latent_scale(images, tmp_path):
    settings = PretrainSettings(steps=2, batch_size=2, widths=(8, 8, 8, 8), evaluate_every=1)
    vae = pretrain_vae(settings, *images, tmp_path)
    assert vae.encode(images[1][0]["image"][None]).shape == (1, 16, 8, 8)
    assert vae.scale != 1
    assert "val_psnr" in read_log(tmp_path)[0]


@pytest.fixture
def calls(monkeypatch):
    """(name, whether it is the last micro-batch, rate, betas, weight decay) of every `Trainer.update`."""
    update, found = Trainer.update, []

    def noted(self, loss, terms, name, parameters, last):
        group = self.optimizers[name].param_groups[0]
        assert {id(p) for p in parameters} == {id(p) for p in group["params"]}
        found.append((name, last, group["lr"], group["betas"], group["weight_decay"]))
        update(self, loss, terms, name, parameters, last)

    monkeypatch.setattr(Trainer, "update", noted)
    return found


def test_pretraining_steps_once_a_step_on_all_weights(images, tmp_path, calls):
    settings = PretrainSettings(
        steps=1, batch_size=1, accumulation=2, widths=(8, 8, 8, 8), learning_rate=0.01, weight_decay=0.3
    )
    pretrain_vae(settings, *images, tmp_path)
    assert calls == [("VAE", last, 0.01, (0.9, 0.99), 0.3) for last in (False, True)]


def test_a_vae_that_goes_on_gets_the_scale_of_its_own_latents(vae, images, tmp_path):
    assert build_autoencoder(PretrainSettings(steps=1, batch_size=1), 64).config.scaling_factor == 1.0
    settings = PretrainSettings(steps=1, batch_size=2, learning_rate=0.0, ema=0.0)
    again = pretrain_vae(settings, *images, tmp_path, start=vae)
    assert vae.scale != 1
    assert again.scale == pytest.approx(vae.scale / latent_std(vae, images[0], 2), rel=1e-4)


def test_snapshots_are_the_weights_after_so_many_steps(vae, images, tmp_path):
    latents = encode_images(vae, images[0], 4, batch_size=4)
    settings = QuantizerSettings(steps=2, batch_size=2, codebook_size=8, scales=SCALES, ema=0.0, start="data")
    after = {}
    for steps in (1, 2):
        own = dataclasses.replace(settings, steps=steps, final_learning_rate=1.0)
        after[steps] = fit_quantizer(own, latents, tmp_path / str(steps), snapshots=range(steps)).state_dict()
    start, one = (load_file(tmp_path / "2" / f"snapshot-{step}.safetensors") for step in (0, 1))
    assert not (tmp_path / "1" / "snapshot-1.safetensors").exists()
    assert all(torch.equal(one[name], value) for name, value in after[1].items())
    assert any(not torch.equal(start[name], value) for name, value in one.items())
    with pytest.raises(ValueError, match=r"snapshots after \[2\] steps asked for, expected from 0 to below 2"):
        fit_quantizer(settings, latents, tmp_path, snapshots=[0, 2])


def test_snapshots_are_those_of_the_settings_that_ask(vae, images, tmp_path, caplog):
    latents = encode_images(vae, images[0], 4, batch_size=4)
    settings = QuantizerSettings(steps=2, batch_size=2, codebook_size=8, scales=SCALES, ema=0.0)

    def first(seed):
        fit_quantizer(dataclasses.replace(settings, seed=seed), latents, tmp_path, snapshots=[1])
        return load_file(tmp_path / "snapshot-1.safetensors")["codebooks.weight"]

    one, two = first(0), first(1)
    assert not torch.equal(one, two)
    assert torch.equal(first(0), one)  # finished before: nothing is trained, and the folder held the other's
    assert "trained again" not in caplog.text
    for file in tmp_path.glob("checkpoints/*/snapshot-1.safetensors"):
        file.unlink()  # as of a run by an earlier version
    assert torch.equal(first(0), one)
    assert "was trained without its snapshots" in caplog.text


def test_the_start_on_latents_has_settings_of_its_own():
    own = dataclasses.replace(SMALL, seed=7, norm="layer", quantization_weight=0.1, entropy_weight=0.3)
    fit = FitSettings(fit_steps=9, fit_batch_size=4, fit_learning_rate=0.02, fit_entropy_weight=0.01).quantizer(own, 5)
    given = {"seed": 7, "norm": "layer", "scales": SCALES, "codebook_size": 32, "checkpoint_every": 1}
    changed = {"steps": 9, "batch_size": 4, "learning_rate": 0.02, "entropy_weight": 0.01, "log_every": 5}
    fixed = {"quantization_weight": 1.0, "accumulation": 1, "ema": 0.0, "evaluate_every": 0}
    for name, value in (given | changed | fixed).items():
        assert getattr(fit, name) == value, name


def test_the_last_level_is_the_latent_grid():
    SMALL.check_grid(8)
    with pytest.raises(
        ValueError, match=r"^expected scales that end with 16, the latent grid's side, got \(1, 2, 4, 8\)$"
    ):
        SMALL.check_grid(16)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    settings = LoopSettings(steps=10, batch_size=1, warmup_steps=2)
    rates = [learning_rate_factor(step, settings) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    floor = dataclasses.replace(settings, final_learning_rate=0.2)
    by_hand = [0.5, 1, 1, 0.2 + 0.8 * 0.75, 0.2 + 0.8 / 2, 0.2 + 0.8 * 0.25, 0.2, 0.2]
    cosine = [learning_rate_factor(step, dataclasses.replace(floor, steps=14)) for step in (0, 1, 2, 6, 8, 10, 14, 20)]
    assert cosine == pytest.approx(by_hand)  # a third, a half, two thirds of the 12 steps: cos of 60, 90, 120 degrees
    with pytest.raises(ValueError, match="expected steps to be a whole number of at least 1, got 0"):
        LoopSettings(steps=0, batch_size=1)


def line_trainer(folder, **settings):
    """A trainer of one weight, at 0, by plain descent with rate 1: the weight falls by the gradient."""
    line = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(line.weight)
    own = LoopSettings(**{"steps": 4, "batch_size": 1, "ema": 0.0} | settings)
    return Trainer(own, folder, make_accelerator(), line, {"main": torch.optim.SGD(line.parameters(), 1.0)}), line


@pytest.mark.parametrize(("clip", "moved"), [(10.0, [4.0, 5.0]), (3.0, [3.0, 4.0])])
def test_a_step_takes_the_mean_of_its_micro_batches_gradients_clipped(tmp_path, clip, moved):
    trainer, line = line_trainer(tmp_path, accumulation=2, clip=clip)
    positions = []
    for slopes in ((3.0, 5.0), (1.0, 1.0)):  # mean 4, then 1: nothing is left of the first step
        for slope, last in zip(slopes, (False, True), strict=True):
            loss = slope * line.weight.sum()
            trainer.update(loss, {"loss": loss}, "main", list(line.parameters()), last)
        positions.append(-line.weight.item())
    assert positions == pytest.approx(moved, rel=1e-5)


class NoteNoise(Stage):
    """Notes each step's first random numbers and the optimiser's learning rate."""

    def __init__(self, trainer):
        super().__init__(trainer.settings)
        self.trainer, self.noise, self.rates = trainer, [], []

    def batches(self, first):
        return itertools.repeat(torch.zeros(1))

    def train_step(self, micro_batches, step):
        self.noise.append(torch.rand(3))
        self.rates.append(self.trainer.optimizers["main"].param_groups[0]["lr"])
        return {}


def test_each_steps_noise_is_its_own_and_the_rate_is_the_schedules(tmp_path):
    stages = []
    for number, seed in enumerate((0, 0, 1)):
        trainer, _ = line_trainer(tmp_path / str(number), seed=seed, final_learning_rate=0.2)
        stages.append(NoteNoise(trainer))
        trainer.run(stages[-1], "noise")
    first, again, other = (torch.stack(stage.noise) for stage in stages)
    assert torch.equal(first, again)
    assert len(torch.cat([first, other]).unique(dim=0)) == 8  # a neighbouring seed shares none
    assert stages[0].rates == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])


@pytest.mark.parametrize(("precision", "runs"), [("auto", 2), ("float32", 1), ("bfloat16", 1)])
def test_a_machine_that_computes_in_another_precision_starts_a_run_of_its_own(tmp_path, monkeypatch, precision, runs):
    folders = set()
    for has in (False, True):
        monkeypatch.setattr(hardware, "has_bfloat16", lambda has=has: has)
        folders.add(line_trainer(tmp_path, precision=precision)[0].checkpoints)
    assert len(folders) == runs


def test_the_tokenizers_two_optimisers_step_once_a_step_on_all_that_they_train(vae, images, tmp_path, calls):
    train_tokenizer(dataclasses.replace(SMALL, steps=1, batch_size=1), vae, *images, tmp_path)
    decay = {"generator": 0.005, "discriminator": 0.0005}
    assert calls == [(name, last, 5e-4, (0.5, 0.9), decay[name]) for last in (False, True) for name in decay]


def test_the_tokenizers_defaults_are_the_papers_and_the_releases():
    own = TokenizerSettings(steps=1, batch_size=1)
    assert (own.codebook_size, own.rank, own.norm, own.adapters, own.learning_rate) == (65536, 32, "rms", "both", 5e-4)
    assert own.scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert (own.betas, own.weight_decay, own.discriminator_weight_decay, own.clip) == ((0.5, 0.9), 0.005, 0.0005, 10)
    assert (own.warmup_steps, own.final_learning_rate, own.accumulation, own.ema, own.ema_ramp) == (0, 0, 1, 0.9999, 2)
    assert (own.attention_dim, own.beta, own.entropy_temperature) == (32, 0.05, 0.01)
    assert own.weights == LossWeights(l1=0.2, l2=1.0, perceptual=1.0, quantization=1.0, entropy=0.05, adversarial=1.0)
    names = ("l1", "l2", "perceptual", "quantization", "entropy", "adversarial")
    numbered = {name: float(i) for i, name in enumerate(names, start=2)}
    changed = dataclasses.replace(own, **{f"{name}_weight": value for name, value in numbered.items()})
    assert changed.weights == LossWeights(**numbered)


def test_the_average_begins_where_it_is_told(vae, images, tmp_path):
    latents = encode_images(vae, images[0], 8, batch_size=4)
    settings = QuantizerSettings(steps=4, batch_size=4, codebook_size=8, scales=SCALES, ema=0.9)
    averaged = fit_quantizer(settings, latents, tmp_path / "a").state_dict()
    late = fit_quantizer(dataclasses.replace(settings, ema_start=4), latents, tmp_path / "b").state_dict()
    plain = fit_quantizer(dataclasses.replace(settings, ema=0.0), latents, tmp_path / "c").state_dict()
    assert all(torch.equal(late[name], value) for name, value in plain.items())
    assert not all(torch.equal(averaged[name], value) for name, value in plain.items())


def test_one_process_trains_in_float32_in_bfloat16_and_in_float32_again(vae, images, tmp_path):
    plain = dataclasses.replace(
        SMALL, steps=1, batch_size=1, accumulation=1, perceptual_weight=0.0, adversarial_weight=0.0
    )
    seen = []

    def note(module, inputs, output):
        if torch.is_grad_enabled():  # not in the validation
            seen.append(output.dtype)

    for precision in ("float32", "bfloat16", "float32"):
        watched = load_vae("emoji")
        watched.autoencoder.decoder.conv_out.register_forward_hook(note)
        settings = dataclasses.replace(plain, precision=precision)
        tokenizer = train_tokenizer(settings, watched, *images, tmp_path / str(len(seen)))
        with torch.no_grad():
            assert tokenizer(torch.zeros(1, 3, 64, 64)).reconstruction.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert all(row["loss"] > 0 for number in range(3) for row in read_log(tmp_path / str(number)))


def test_the_averages_ramp_counts_every_second_step_as_the_releases_does():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = RampedEMA([weight], 2, decay=0.9999)
    assert [average.get_decay(step) for step in (1, 2)] == [0, 0]
    assert [average.get_decay(step) for step in (3, 4, 5)] == [2 / 11, 2 / 11, 3 / 12]
    assert RampedEMA([weight], 1, decay=0.9999).get_decay(3) == 3 / 12
    late = RampedEMA([weight], 2, decay=0.9999, update_after_step=10)
    assert [late.get_decay(step) for step in (10, 12, 13)] == [0, 0, 2 / 11]


# --- resuming: nothing is lost, damage is seen ------------------------------------------------------------------------
LOOP = QuantizerSettings(
    steps=4, batch_size=4, codebook_size=8, scales=(1, 2), ema=0.0, log_every=1, checkpoint_every=1
)


def fit(folder, latents=None, **changes):
    latents = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0)) if latents is None else latents
    quantizer = fit_quantizer(dataclasses.replace(LOOP, **changes), latents, folder)
    return quantizer.state_dict()


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder whose run stopped after step 3 of 4, with the checkpoints of 2 and 3; and what the whole run gives."""
    whole = fit(tmp_path / "whole")
    update = Trainer.update

    def interrupted(self, *arguments):
        if self.step == 3:
            raise KeyboardInterrupt
        update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run")
    monkeypatch.undo()
    return tmp_path / "run", whole


def steps_of(folder):
    return [row["step"] for row in read_log(folder)]


def test_a_checksum_is_of_bits_and_not_of_sums():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert checksum(x) == checksum(x.clone()) != checksum(x[[1, 0, 2]])  # of one sum
    assert checksum(x) != checksum(x.reshape(1, 3))
    assert checksum(torch.tensor(1.0), x.bfloat16(), torch.zeros(0)) == checksum(
        torch.tensor(1.0), x.bfloat16(), torch.zeros(0)
    )
    many = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = checksum(many)
    finally:
        torch.set_num_threads(before)
    assert len(set(found.values())) == 1


def test_the_last_bits_of_latents_do_not_make_another_run(stopped):
    latents = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    fit(stopped[0], latents + 1e-7)
    assert len(list(stopped[0].glob("checkpoints/*/"))) == 1
    assert outline(latents) != outline(latents.flip(0))


def test_the_layers_that_are_named_are_adapted(vae):
    own = TokenizerSettings(steps=1, batch_size=1, codebook_size=8, scales=SCALES, rank=2, adapted_layers=("conv1",))
    trained = [name for name, p in untrained_tokenizer(own, vae).vae.named_parameters() if p.requires_grad]
    assert trained
    assert all(".conv1." in name and "lora" in name for name in trained)


def test_a_fit_weighs_its_terms_and_starts_from_data_as_it_is_told(tmp_path):
    plain = fit(tmp_path / "plain")
    assert not same(plain, fit(tmp_path / "lighter", quantization_weight=0.01))
    assert not same(plain, fit(tmp_path / "surer", entropy_weight=1.0))
    latents = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    own = {"kind": "nearest", "start": "data", "steps": 1, "learning_rate": 0.0}
    codes = fit(tmp_path / "data", latents, **own)["codebooks.weight"]
    means = latents.mean(dim=(2, 3))  # the features of a level of side 1, which gets the first three codes
    assert (torch.cdist(codes[:3], means).amin(dim=1) < 1e-5).all()


def test_latents_of_other_images_are_another_run_whatever_their_averages(tmp_path):
    latents = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    moved = latents.clone()
    moved[3, 0, 0, 0] += 1e-4  # one of thousands of images replaced moves their averages no further
    assert outline(latents) == outline(moved)
    one, again = (fit_quantizer(LOOP, x, tmp_path, source=name) for x, name in ((latents, "a"), (moved, "b")))
    assert len(list(tmp_path.glob("checkpoints/*/"))) == 2
    assert not same(one.state_dict(), again.state_dict())


def test_other_inputs_are_another_run(vae, images, tmp_path):
    """A stage goes on from the checkpoints of its own inputs alone, each of which decides the result."""
    latents, small = torch.randn(4, 16, 8, 8), {"steps": 1, "batch_size": 1}
    pretrain, quantizer = PretrainSettings(**small, widths=(8, 8, 8, 8)), QuantizerSettings(**small, codebook_size=32)
    torch.manual_seed(0)
    trained, other = (SMALL.build_quantizer(16) for _ in range(2))
    moved, scaled, shifted = load_vae("emoji"), load_vae("emoji", scale=2.0), load_vae("emoji", shift=0.5)
    next(moved.parameters()).data += 1
    other_images = [
        [(at, images[at].subset([0, 1])), (at, load_dataset("emoji", split, 32, limit=limit))]
        for at, (split, limit) in enumerate((("train", 8), ("val", 4)))
    ]
    other_images = [*other_images[0], *other_images[1], (0, load_dataset("emoji", "train", 64, False, limit=8))]
    later = [(1 + at, new) for at, new in other_images]
    stages = {
        "VAE": (VaeStage, pretrain, [*images, None], [*other_images, (2, vae)]),
        "VAE that goes on": (VaeStage, pretrain, [*images, vae], [(2, moved)]),
        "quantizer": (QuantizerStage, quantizer, [latents, "", ()], [(0, 2 * latents), (1, "x"), (2, (0,))]),
        "tokenizer": (
            TokenizerStage,
            SMALL,
            [vae, *images, None],
            [*later, (0, moved), (0, scaled), (0, shifted), (3, trained)],
        ),
        "tokenizer that goes on": (TokenizerStage, SMALL, [vae, *images, trained], [(3, other)]),
    }
    for name, (stage, settings, inputs, changes) in stages.items():
        cases = [inputs, inputs, *([*inputs[:at], new, *inputs[at + 1 :]] for at, new in changes)]
        made = [stage(settings, *first, tmp_path, last) for *first, last in cases]
        first, again, *others = [one.trainer.checkpoints for one in made]
        assert first == again, name
        assert len({first, *others}) == 1 + len(others), name


def test_a_log_is_never_emptied(stopped, caplog):
    folder, whole = stopped
    fit(folder, learning_rate=0.1)  # other settings: the old log is moved, and said so
    assert steps_of(folder) == [1, 2, 3, 4]
    assert "is of other settings or inputs: moved to" in caplog.text
    assert sorted(map(len, (path.read_text().splitlines() for path in folder.rglob("log.jsonl")))) == [3, 4]
    assert same(fit(folder), whole)  # the first settings again: their log comes back
    assert steps_of(folder) == [1, 2, 3, 4]
    assert sum(len(path.read_text().splitlines()) for path in folder.rglob("log.jsonl")) == 8
    for checkpoint in folder.glob("checkpoints/*/step-*"):
        shutil.rmtree(checkpoint)
    fit(folder)
    assert steps_of(folder) == [1, 2, 3, 4]
    assert len((folder / "log-old.jsonl").read_text().splitlines()) == 4


def test_a_torn_last_line_of_the_log_is_passed_over_and_another_is_named(stopped, caplog):
    folder, whole = stopped
    log = folder / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "sec')
    assert same(fit(folder), whole)
    assert "the last line is torn" in caplog.text
    assert steps_of(folder) == [1, 2, 3, 4]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: expected a row of a log"):
        read_log(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    path.write_bytes(path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 1]) + path.read_bytes()[-2:])


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["trainable.safetensors", "state.json", "sha256sums.txt"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(stopped, caplog, damage, name):
    if (damage, name) == (Path.unlink, "sha256sums.txt"):
        pytest.skip("a checkpoint of an older version, which had no digests")
    folder, whole = stopped
    older, newest = sorted(folder.glob("checkpoints/*/step-*"))
    os.utime(older, (2e9, 2e9))  # the clock was set back since
    damage(newest / name)
    assert same(fit(folder), whole)
    assert "step-00000003 is damaged" in caplog.text
    assert steps_of(folder) == [1, 2, 3, 4]


def test_damage_to_every_checkpoint_is_one_sentence(stopped):
    folder, _ = stopped
    for checkpoint in folder.glob("checkpoints/*/step-*"):
        flip(checkpoint / "trainable.safetensors")
    before = (folder / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in .*, got 2 damaged: restore one"):
        fit(folder)
    assert (folder / "log.jsonl").read_text() == before


def test_a_checkpoint_without_digests_is_taken_and_still_seen_where_it_is_torn(stopped, caplog):
    folder, whole = stopped
    for digests in folder.rglob("sha256sums.txt"):
        digests.unlink()
    truncate(max(folder.rglob("trainable.safetensors")))
    assert same(fit(folder), whole)
    assert "step-00000003 is damaged" in caplog.text


def test_a_full_disk_leaves_the_older_checkpoints_whole(stopped, monkeypatch):
    folder, whole = stopped
    before = sorted(folder.rglob("step-*"))

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codalib.training.trainer.save_file", full)
    with pytest.raises(OSError, match=r"step 4 could not be written .*No space left.*it goes on from .*step-00000003"):
        fit(folder)
    monkeypatch.undo()
    assert sorted(folder.rglob("step-*")) == before
    assert same(fit(folder), whole)


def test_a_full_disk_under_the_log_is_one_sentence_that_names_it(stopped, monkeypatch):
    folder, whole = stopped

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(OSError, match=r"expected a folder that can be written, got .*run \(No space left"):
        fit(folder)
    monkeypatch.undo()
    assert same(fit(folder), whole)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 1.5, True])
def test_a_seed_out_of_range_is_one_sentence(seed):
    with pytest.raises(ValueError, match=r"expected a whole number from 0 to 4294967295 as seed, got"):
        LoopSettings(steps=1, batch_size=1, seed=seed)


def test_a_promise_of_minutes_is_watched(caplog):
    limit = TimeLimit(1.0)
    assert not limit.ends(10.0, 10, 60)  # 60 s in all, as promised
    assert not caplog.messages
    assert not limit.ends(40.0, 20, 60)  # 120 s in all
    assert (
        "1.0 minutes were promised for 60 steps, which take about 2.0 at this pace: it ends at about step 30"
        in (caplog.messages[0])
    )
    assert limit.ends(61.0, 31, 60)
    assert len(caplog.messages) == 1  # said once
    assert not TimeLimit(1.0, "steps").ends(61.0, 31, 60)
    assert TimeLimit(0.5).ends(31.0, 20, 60)
    for wrong in ((math.nan,), (1.0, "both"), (0.0, "minutes"), (-1.0, "steps")):
        with pytest.raises(ValueError, match="expected minutes above 0, and to keep 'minutes' or 'steps'"):
            TimeLimit(*wrong)


def test_minutes_are_for_one_process():
    several = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="expected one process with a limit of minutes"):
        Trainer.run(several, None, "", TimeLimit(1.0))


def test_what_ends_early_goes_on_from_there(vae, images, tmp_path):
    settings = dataclasses.replace(SMALL, steps=4, checkpoint_every=100)
    whole = train_tokenizer(settings, vae, *images, tmp_path / "whole").state_dict()
    early = train_tokenizer(settings, vae, *images, tmp_path / "cut", limit=TimeLimit(1e-6))
    assert [row["step"] for row in read_log(tmp_path / "cut")] == [1]
    assert "val_psnr" in read_log(tmp_path / "cut")[-1]
    assert not all(torch.equal(whole[name], value) for name, value in early.state_dict().items())
    again = train_tokenizer(settings, vae, *images, tmp_path / "cut", limit=TimeLimit(1e-6))  # nothing is left to do
    assert all(torch.equal(early.state_dict()[name], value) for name, value in again.state_dict().items())
    resumed = train_tokenizer(settings, vae, *images, tmp_path / "cut", limit=TimeLimit(1e-6, "steps"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.state_dict().items())


def test_shared_feature_maps_give_the_plain_losses(vae, images, tmp_path, monkeypatch):
    settings = dataclasses.replace(SMALL, steps=2, accumulation=1, precision="float32", ema=0.0)
    train_tokenizer(settings, vae, *images, tmp_path / "shared")
    monkeypatch.setattr(TokenizerStage, "feature_maps", lambda *_: None)
    train_tokenizer(settings, vae, *images, tmp_path / "plain")
    rows = [read_log(tmp_path / name)[-1] for name in ("shared", "plain")]
    for name in ("loss", "adversarial", "discriminator", "adversarial_factor", "perceptual_effnet"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3), name


def test_the_steps_gradient_is_that_of_equation_9(vae, images, tmp_path):
    settings = dataclasses.replace(SMALL, steps=4, accumulation=1, precision="float32")
    stage = TokenizerStage(settings, vae, *images, tmp_path, None)
    found = {}
    stage.trainer.update = lambda loss, *_: found.update(
        ours=torch.autograd.grad(loss, stage.trained, retain_graph=True)
    )
    batch = torch.stack([images[0][i]["image"] for i in range(2)])
    torch.manual_seed(0)
    stage.generator_step(batch, 2, True)
    torch.manual_seed(0)
    output = stage.tokenizer(batch)
    terms = reconstruction_terms(batch, output.reconstruction, stage.perceptual)
    with frozen(stage.discriminator) as discriminator:
        adversarial = generator_hinge(discriminator(output.reconstruction))
    adaptive = adaptive_weight(weighted_sum(terms, stage.weights), adversarial, stage.adaptive_layer)
    terms |= {"adversarial": adversarial, "quantization": output.quantization_loss, "entropy": output.entropy_loss}
    loss = weighted_sum(terms, stage.weights, {"adversarial": adaptive * 0.5})  # step 2 of 4
    for ours, plain in zip(found["ours"], torch.autograd.grad(loss, stage.trained), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5 * max(1.0, plain.abs().max().item()))


def test_nearest_codes_on_a_frozen_vae_learn_from_the_quantization_term_alone(vae, images, tmp_path):
    """No gradient of the images reaches them: the adversarial term has nothing to be weighed by."""
    own = dataclasses.replace(SMALL, kind="nearest", adapters="none", entropy_weight=0.0, ema=0.0, accumulation=1)
    start = own.build_quantizer(vae.latent_channels)
    before = start.codebooks.weight.detach().clone()
    trained = train_tokenizer(own, vae, *images, tmp_path, start)
    assert not torch.equal(trained.quantizer.codebooks.weight, before)
    assert read_log(tmp_path)[-1]["adversarial_factor"] == 0
