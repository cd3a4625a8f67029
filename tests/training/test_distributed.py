"""Two processes with half the batch each do what one process does with the whole batch.

They are started once, since that takes longer than most of what they then do, and go through the parts below, each in a
folder of its own; a test looks at what its part has left there.
"""

import contextlib
import json
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from codalib.base.processes import launch
from codalib.datasets.images import load_dataset
from codalib.evaluation.metrics import ReconstructionMetrics
from codalib.evaluation.reconstruction import evaluate
from codalib.models.adapters import add_adapters
from codalib.models.checkpoints import load_vae
from codalib.models.loss_weights import adaptive_weight
from codalib.models.quantizer import ResidualAttentionQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.settings import TokenizerSettings
from codalib.training.tokenizer import TokenizerStage, train_and_save, train_tokenizer
from codalib.training.trainer import Trainer, read_log


def gradients(model, images):
    """Of a loss that is a mean over images (the entropy term is not: its mean distribution is each process's own)."""
    output = model(images, sample=False)
    loss = (output.reconstruction - images).square().mean() + output.quantization_loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def tokenizer():
    torch.manual_seed(0)
    vae = add_adapters(load_vae("emoji"), "both", rank=2)
    for name, parameter in vae.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the other factor's gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return CodaTokenizer(vae, ResidualAttentionQuantizer(16, 32, (1, 2, 4, 8)))


def pictures():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def share_gradients(folder):
    rank = PartialState().process_index
    found = gradients(DistributedDataParallel(tokenizer()), pictures()[2 * rank : 2 * rank + 2])
    found = {name.removeprefix("module."): value.contiguous() for name, value in found.items()}
    save_file(found, folder / f"{rank}")


def test_two_processes_give_the_gradients_of_one(parts):
    whole = gradients(tokenizer(), pictures())
    assert any("encoder" in name and value.abs().max() > 0 for name, value in whole.items())
    for rank in (0, 1):
        shared = load_file(parts / "share_gradients" / f"{rank}")
        assert shared.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.allclose(shared[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item()), name


def adaptive_weight_on(inputs):
    """At a shared parameter, and at an activation that each process has its own rows of."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    activation = inputs * parameter
    outputs = activation.sum(dim=1)
    two = (outputs.square().mean(), outputs.sin().mean())
    return [adaptive_weight(*two, anchor).item() for anchor in (parameter, activation)]


def batch():
    return torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])


def share_adaptive_weight(folder):
    rank = PartialState().process_index
    (folder / f"{rank}.json").write_text(json.dumps(adaptive_weight_on(batch()[rank : rank + 1])))


def test_two_processes_share_the_adaptive_weight_of_the_whole_batch(parts):
    for rank in (0, 1):
        found = json.loads((parts / "share_adaptive_weight" / f"{rank}.json").read_text())
        assert found == pytest.approx(adaptive_weight_on(batch()), rel=1e-5)


SCALES = (1, 2, 4, 8)


def validation():
    return load_dataset("emoji", "val", 64, limit=5)


def train(folder):
    settings = TokenizerSettings(steps=2, batch_size=2, codebook_size=32, scales=SCALES, rank=2, log_every=1)
    images, val = load_dataset("emoji", "train", 64, limit=8), validation()
    train_and_save(settings, "emoji", images, val, folder)
    # Again: nothing is left to train, each process takes up the last checkpoint.
    state = train_tokenizer(settings, load_vae("emoji"), images, val, folder).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / f"{PartialState().process_index}")


def test_two_processes_train_and_evaluate_one_tokenizer(parts):
    folder, val = parts / "train", validation()
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert {"perceptual_effnet", "adversarial", "discriminator", "entropy"} <= rows[0].keys()
    first, second = load_file(folder / "0"), load_file(folder / "1")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    tokenizer = CodaTokenizer.from_pretrained(folder / "tokenizer")
    values = evaluate(tokenizer, val, ReconstructionMetrics(32, len(SCALES), frechet=None))
    for name in ("psnr", "quantization_error", "utilization"):
        assert rows[-1][f"val_{name}"] == pytest.approx(values[name], rel=1e-4)


def count_averages(folder):
    """How often each module's gradients are averaged in a step of four micro-batches, and what they then are."""
    settings = TokenizerSettings(steps=1, batch_size=1, accumulation=4, codebook_size=32, scales=SCALES, rank=2)
    data = load_dataset("emoji", "train", 64, limit=8), load_dataset("emoji", "val", 64, limit=2)
    found, calls = [], []
    for name in ("apart", "each time"):
        stage = TokenizerStage(settings, load_vae("emoji"), *data, folder / name, None)
        seen, gradients = {"tokenizer": 0, "discriminator": 0}, []

        def average(who, bucket, seen=seen):
            seen[who] += bucket.is_last()
            return allreduce_hook(None, bucket)

        def keep(parameters, _, gradients=gradients):
            gradients += [p.grad.clone() for p in parameters]
            return torch.zeros(())

        stage.parallel.register_comm_hook("tokenizer", average)
        stage.parallel_discriminator.register_comm_hook("discriminator", average)
        if name == "each time":
            stage.gradients_apart = lambda *_: contextlib.nullcontext()
        with mock.patch("torch.nn.utils.clip_grad_norm_", keep):
            stage.trainer.run(stage, name)
        calls.append(seen)
        found.append(gradients)
    (folder / f"{PartialState().process_index}.json").write_text(json.dumps(calls))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_gradients_are_averaged_once_a_step(parts):
    for rank in (0, 1):
        apart, each_time = json.loads((parts / "count_averages" / f"{rank}.json").read_text())
        assert apart == {"tokenizer": 1, "discriminator": 1}
        assert each_time["tokenizer"] >= 4


def stop_and_go_on(folder):
    """Two steps at once, and two with a stop between them; the weights and the discriminator's state of this rank."""
    settings = TokenizerSettings(
        steps=2, batch_size=2, codebook_size=32, scales=SCALES, rank=2, checkpoint_every=1, weight_decay=0.0
    )
    data = load_dataset("emoji", "train", 64, limit=8), load_dataset("emoji", "val", 64, limit=2)

    def stage(name):
        return TokenizerStage(settings, load_vae("emoji"), *data, folder / name, None)

    stopped, save = stage("stopped"), Trainer.save

    def save_and_stop(self):
        save(self)
        raise KeyboardInterrupt

    with mock.patch.object(Trainer, "save", save_and_stop), contextlib.suppress(KeyboardInterrupt):
        stopped.trainer.run(stopped, "stopped")
    for name in ("whole", "stopped"):
        one = stage(name)
        one.trainer.run(one, name)
        state = {f"tokenizer.{key}": value for key, value in one.tokenizer.state_dict().items()}
        state |= {f"discriminator.{key}": value for key, value in one.discriminator.state_dict().items()}
        save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / f"{name}-{one.rank}")


def test_two_processes_go_on_as_if_they_had_never_stopped(parts):
    folder = parts / "stop_and_go_on"
    wanted = load_file(folder / "whole-0")
    assert any("running_mean" in name for name in wanted)
    for name in ("whole-1", "stopped-0", "stopped-1"):
        found = load_file(folder / name)
        assert [key for key, value in wanted.items() if not torch.equal(value, found[key])] == [], name


def every_part(folder):
    for part in (share_gradients, share_adaptive_weight, train, count_averages, stop_and_go_on):
        own = folder / part.__name__
        own.mkdir(exist_ok=True)
        part(own)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder in which two processes have gone through every part."""
    folder = tmp_path_factory.mktemp("parts")
    launch(every_part, 2, folder)
    return folder
