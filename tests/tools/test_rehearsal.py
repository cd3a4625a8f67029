"""The rehearsal, on tiny networks: it runs the real training code, counts rightly, and says what is not real."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from codalib.base.files import read_json
from codalib.base.paths import project_folder
from codalib.kernels.assignment import softmax_assign
from codalib.models.checkpoints import load_vae
from codalib.pretrained.vae_layouts import CONFIGS
from codalib.tools import operations as counting
from codalib.tools import rehearsal as rehearse
from codalib.tools.fetch import needed
from codalib.tools.rehearsal_page import page
from codalib.training.settings import TokenizerSettings
from codalib.training.tokenizer import untrained_tokenizer
from codalib.workflow.parameters import settings_from
from codalib.workflow.profiles import StageError, profile_stages

NOTEBOOKS = sorted(path.stem for path in (project_folder() / "notebooks").glob("*.ipynb"))
PROFILES = sorted(path.stem for path in (project_folder() / "profiles").glob("*.yaml"))
PROFILES = [name for name in PROFILES if rehearse.NOTEBOOK in profile_stages(name, NOTEBOOKS)]
TINY_KL16 = CONFIGS["ldm"] | {"block_out_channels": (4, 4, 8, 8, 8), "norm_num_groups": 4, "sample_size": 64}
TINY = {"codebook_size": 32, "scales": (1, 2, 4), "resolution": 64, "batch_size": 8, "accumulation": 4, "processes": 2}


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """No weights on this machine but those that come with packages and with the kit; results go to a folder."""
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("IMAGENET", raising=False)
    return tmp_path


def test_a_rehearsal_of_a_papers_profile_on_a_tiny_vae(nothing_here, monkeypatch):
    monkeypatch.setitem(CONFIGS, "ldm", TINY_KL16)
    profile = "imagenet-mar-65536"
    parameters = rehearse.training_parameters(profile) | TINY
    found = rehearse.rehearse(profile, parameters=parameters, tflops=[100], utilisation=0.5)

    assert all(found["checks"].values()), found["checks"]
    first, second = found["terms"]
    assert {"l1", "l2", "perceptual_effnet", "quantization", "entropy", "adversarial", "discriminator"} <= first.keys()
    assert first["adversarial_factor"] == 0 < second["adversarial_factor"]  # the ramp
    assert math.isfinite(second["val_psnr"])
    folder = nothing_here / "runs" / profile / "rehearsal"
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["manifest.json", "rehearsal.json", "rehearsal.md"]
    assert read_json(folder / "rehearsal.json")["operations"] == found["operations"]
    assert read_json(folder / "manifest.json")["state"] == "finished"

    rows = {row["part"]: row for row in found["parameters"]}
    assert rows["quantizer"]["trained"] == 32 * 16 + 2 * (16 * 32 + 32) + 16 * 16 + 16 + 2 * 32
    trained = {part for part, row in rows.items() if row["trained"]}
    assert trained == {
        "adapters of the encoder",
        "adapters of the decoder",
        "quantizer",
        "discriminator_effnet, heads",
    }
    tokens = 1 + 4 + 16
    assert found["tokens"] == tokens
    assert found["operations"]["of which the assignment"] == counting.assignment_operations(tokens, 32, 32, 16)
    ahead, work = found["forecast"], found["operations"]["an image"]
    assert work == found["operations"]["convolutions"] + found["operations"]["matrix products"]
    assert ahead["images_a_step"] == 8 * 4 * 2
    hours = {row["steps"]: row["gpu_hours"] for row in ahead["rows"]}
    assert hours == pytest.approx({n: work * 64 * n / (100e12 * 0.5) / 3600 for n in (25_020, 50_000)})

    # The tiny VAE's step is the losses' networks' for the most part, which keep theirs.
    assert 0 < found["saved_by_checkpointing"] < found["kept_for_backward"]
    saved = ahead["gpu_memory_bytes"] - ahead["gpu_memory_bytes_checkpointed"]
    assert saved == pytest.approx(8 * rehearse.AUTOCAST_FACTOR * found["saved_by_checkpointing"], abs=16)

    text = page(found)
    assert (folder / "rehearsal.md").read_text() == text + "\n"
    assert "RANDOM WEIGHTS: those of kl16 are not here." in text
    assert "STAND-IN: perceptual_effnet for perceptual_vgg" in text
    assert "STAND-IN: discriminator_effnet for discriminator_dino" in text
    assert "make fetch PROFILE=imagenet-mar-65536" in text
    assert "$IMAGENET (the variable is not set)" in text
    assert all(part in text for part in rows)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_command_line(nothing_here, monkeypatch, capsys, caplog):
    found = {}
    monkeypatch.setattr(rehearse, "page", lambda found: f"page of {found['profile']}")
    monkeypatch.setattr(
        rehearse,
        "rehearse",
        lambda profile, *rest: found | {"profile": profile, "checks": {"it ran": profile == "good"}},
    )
    assert rehearse.main(["--profile", "good"]) == 0
    assert capsys.readouterr().out == "page of good\n"
    assert rehearse.main(["--profile", "bad"]) == 1
    monkeypatch.undo()
    assert rehearse.main(["--profile", "no such profile"]) == 1
    assert rehearse.main(["--profile", "smoke", "--utilisation", "2"]) == 1
    assert "got 'no such profile'" in caplog.text
    assert "utilisation 2" in caplog.text


def test_what_cannot_be_rehearsed_is_one_sentence(nothing_here):
    parameters = rehearse.training_parameters("smoke")
    with pytest.raises(ValueError, match="expected scales that end with 8"):
        rehearse.rehearse("smoke", parameters=parameters | {"scales": (1, 4)})
    with pytest.raises(ValueError, match=r"no config\.json"):
        rehearse.rehearse("smoke", parameters=parameters | {"vae": str(nothing_here)})
    with pytest.raises(StageError, match="expected a profile of"):
        rehearse.rehearse("no such profile")
    with pytest.raises(StageError, match="expected a profile that runs 01_train_tokenizer"):
        rehearse.training_parameters("maskgit-imagenet")


@pytest.mark.parametrize("profile", PROFILES)
def test_the_settings_are_the_profiles_but_for_what_is_said(profile, nothing_here):
    parameters = rehearse.training_parameters(profile)
    real, here = settings_from(TokenizerSettings, parameters), rehearse.rehearsal_settings(parameters, batch=1)
    said = rehearse._changes(parameters, here).keys()
    networks = {"perceptual_network", "discriminator_network"}  # said as stand-ins
    quiet = {"evaluate_every", "checkpoint_every", "log_every"}  # change no number
    for name in TokenizerSettings.__dataclass_fields__:
        if name not in said | networks | quiet:
            assert getattr(real, name) == getattr(here, name), name
    missing = rehearse._missing(profile, parameters)
    assert set(missing["networks"]) <= set(needed(profile))
    assert bool(missing["folders"]) == parameters["dataset"].startswith("imagefolder:")


def test_random_images_are_seeded_and_are_interrupted():
    one, same, other = (rehearse.RandomImages(8, seed, "random") for seed in (0, 0, 1))
    assert torch.equal(one[3]["image"], same[3, 99]["image"])
    assert not torch.equal(one[3]["image"], other[3]["image"])
    assert one[3]["image"].abs().max() <= 1
    one.interrupt_after = one.handed_out + 1
    one[0]
    with pytest.raises(rehearse.Interruption):
        one[1]


# --- counting ---------------------------------------------------------------------------------------------------------


def test_the_assignments_operations_are_those_that_the_counter_sees():
    tokens, codes, width, channels = 48, 40, 32, 16
    queries, keys, values = (
        torch.randn(rows, columns, requires_grad=True)
        for rows, columns in ((tokens, width), (codes, width), (codes, channels))
    )
    with counting.count_operations() as counted:
        out = softmax_assign(queries, keys, values, 1.0, 0.1, "tiled")
        (out.value.square().sum() + out.entropy).backward()
    expected = counting.assignment_operations(tokens, codes, width, channels)
    assert expected <= counted.get_total_flops() <= 1.02 * expected  # sums over tokens may be products with ones
    with FlopCounterMode(display=False) as plain:  # it does not know `addmm_`
        out = softmax_assign(queries, keys, values, 1.0, 0.1, "tiled")
        (out.value.square().sum() + out.entropy).backward()
    assert plain.get_total_flops() < counted.get_total_flops()


def test_kept_for_backward_counts_each_storage_once_and_no_parameter():
    x = torch.randn(100, 10)
    network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Sigmoid())
    network[0].weight.requires_grad_(False)  # kept by autograd for the gradient of x, but not to be counted
    x.requires_grad_(True)
    with counting.KeptForBackward() as kept:
        y = network(x)  # sigmoid keeps its result
        z = y * y  # the same storage, twice
        loss = z.exp().sum()  # exp keeps its result
    assert kept.most == kept.bytes == 2 * x.nbytes
    loss.backward()
    assert kept.bytes == 0
    assert kept.most == 2 * x.nbytes
    plain = copy.deepcopy(network)
    leaf = x.detach().requires_grad_(True)
    (plain(leaf) ** 2).exp().sum().backward()
    torch.testing.assert_close(leaf.grad, x.grad)


def test_the_memory_of_a_step_is_its_peak_above_what_was_there_before():
    class Steps(nn.Module):
        def forward(self, x, checkpointed):
            for _ in range(4):  # tanh keeps its result, exp its own; one more lives while it is made
                x = checkpoint(self.two, x, use_reentrant=False) if checkpointed else self.two(x)
            return x

        def two(self, x):
            return x.tanh().exp()

    leaf, unit = torch.randn(1000, requires_grad=True), 4000
    most = []
    for checkpointed in (False, True):
        leaf.grad = None
        with counting.StepMemory(Steps) as memory:
            before = torch.zeros(10**6)
            steps = Steps()
            steps(leaf, checkpointed).sum().backward()
            del before
            with torch.no_grad():
                steps(leaf, False)  # no training step
        most.append(memory.most / unit)
        assert memory.bytes <= 1.1 * unit  # the gradient
    assert 9 <= most[0] <= 12  # 8 results, gradients on the way
    assert 6 <= most[1] <= 9  # 4 inputs, 2 results, gradients on the way


def test_training_from_scratch_takes_more_operations_than_adapting():
    vae, images = load_vae("emoji"), torch.zeros(2, 3, 64, 64)
    settings = TokenizerSettings(steps=1, batch_size=1, codebook_size=32, scales=(1, 8), rank=2)

    def count(batch, **changes):
        tokenizer = untrained_tokenizer(dataclasses.replace(settings, **changes), vae)
        found = counting.training_operations(tokenizer, batch)
        assert all(p.grad is None for p in tokenizer.parameters())
        return found

    adapted = count(images)
    assert count(images[:1]) == pytest.approx(adapted, rel=0.01)  # an image's, whatever the batch
    assert count(images, adapters="none") < count(images, adapters="decoder") < adapted
    forward_and_backward = 3  # of every layer; a frozen layer spares the gradient of its weights
    plain = count(images, adapters="none")
    assert plain < count(images, adapters="scratch") < forward_and_backward * plain
