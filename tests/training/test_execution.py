"""What decides how a stage computes leaves what it computes alone."""

import functools
import types

import pytest
import torch
from torch import nn

from codalib.datasets.images import load_dataset
from codalib.models.maskgit import MaskGIT
from codalib.models.vae import ContinuousVAE
from codalib.tools.operations import KeptForBackward
from codalib.training import execution
from codalib.training.execution import build_adamw, prepare_transformer, prepare_vae
from codalib.training.settings import LoopSettings, PretrainSettings, TokenizerSettings
from codalib.training.tokenizer import TokenizerStage
from codalib.training.trainer import RampedEMA, read_log
from codalib.training.vae import build_autoencoder

CPU = torch.device("cpu")
LOOP = LoopSettings(steps=1, batch_size=1)
CHECKPOINTED = LoopSettings(steps=1, batch_size=1, gradient_checkpointing=True)
COMPILED = LoopSettings(steps=1, batch_size=1, compile=True)
SMALL = {"steps": 2, "batch_size": 2, "codebook_size": 32, "scales": (1, 2, 4, 8), "rank": 2, "checkpoint_every": 1}


def small_vae(levels=4):
    torch.manual_seed(0)
    return ContinuousVAE(build_autoencoder(PretrainSettings(steps=1, batch_size=1, widths=(8,) * levels), 64))


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile without the machine's code: graphs are taken and differentiated as always."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def images():
    return load_dataset("emoji", "train", 64, limit=4), load_dataset("emoji", "val", 64, limit=2)


def vae_gradients(settings):
    vae = small_vae().train()
    prepare_vae(vae.autoencoder, settings, CPU)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    (vae(pictures, sample=False) - pictures).square().mean().backward()
    return [p.grad for p in vae.parameters()]


def maskgit_gradients(settings):
    torch.manual_seed(0)
    model = MaskGIT(32, (1, 2, 4), 16, 3, 2, num_classes=3, dropout=0.3).train()
    prepare_transformer(model, settings)
    tokens, mask = torch.randint(32, (4, 21)), torch.rand(4, 21) < 0.5
    model(tokens, mask, torch.tensor([0, 1, 2, 0])).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("gradients", "least"), [(vae_gradients, 3), (maskgit_gradients, 1.5)])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(gradients, least):
    with KeptForBackward() as kept:
        plain = gradients(LOOP)
    with KeptForBackward() as kept_again:
        again = gradients(CHECKPOINTED)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert least * kept_again.most < kept.most


def test_a_compiled_maskgit_has_the_same_gradients(quick_compiler):
    for one, other in zip(maskgit_gradients(LOOP), maskgit_gradients(COMPILED), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_what_is_compiled_is_said_and_copied_without(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    prepare_vae(small_vae().autoencoder, COMPILED, CPU)
    prepare_transformer(MaskGIT(8, (1, 2), 16, 2, 2), COMPILED)
    assert compiled == ["Encoder", "Decoder", "Block", "Block"]
    prepare_vae(small_vae().autoencoder, LOOP, CPU)
    assert len(compiled) == 4


def train(folder, images, interrupted=False, levels=4, **settings):
    """Two steps with all losses; or the first alone, the other left to a second call."""
    stage = TokenizerStage(TokenizerSettings(**SMALL | settings), small_vae(levels), *images, folder, None)
    if interrupted:
        stage.trainer.save_first = stage.trainer.save

        def save():
            stage.trainer.save_first()
            raise KeyboardInterrupt

        stage.trainer.save = save
        with pytest.raises(KeyboardInterrupt):
            stage.trainer.run(stage, "first")
    else:
        stage.trainer.run(stage, "all")
    return stage


def first_terms(folder):
    return {name: value for name, value in read_log(folder)[0].items() if name != "seconds"}


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return train(folder, images).tokenizer.state_dict(), first_terms(folder)


def test_a_run_goes_on_with_checkpointing_from_where_it_stopped_without(plain, images, tmp_path):
    train(tmp_path, images, interrupted=True)
    resumed = train(tmp_path, images, gradient_checkpointing=True).tokenizer.state_dict()
    assert all(torch.equal(value, plain[0][name]) for name, value in resumed.items())
    assert len(list((tmp_path / "checkpoints").glob("*/"))) == 1


def test_channels_last_trains_the_same_and_keeps_its_layout_when_resumed(plain, images, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "layout", lambda device: torch.channels_last)
    train(tmp_path, images, interrupted=True)
    stage = train(tmp_path, images)
    assert first_terms(tmp_path) == pytest.approx(plain[1], rel=2e-2)  # a code may fall the other way
    convolution = stage.tokenizer.vae.autoencoder.decoder.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    optimizer = stage.trainer.optimizers["generator"]
    moments = [(p, values[name]) for p, values in optimizer.state.items() for name in ("exp_avg", "exp_avg_sq")]
    assert any(p.stride() != p.contiguous().stride() for p, _ in moments)
    assert all(p.stride() == moment.stride() for p, moment in moments)
    stage.tokenizer.save_pretrained(tmp_path / "tokenizer")


def test_a_tokenizer_trains_compiled(images, tmp_path, quick_compiler):
    small = {"levels": 2, "scales": (1, 2, 32), "steps": 1}
    for name in ("plain", "compiled"):
        train(tmp_path / name, images, compile=name == "compiled", **small)
    assert first_terms(tmp_path / "compiled") == pytest.approx(first_terms(tmp_path / "plain"), rel=1e-3)


def test_the_optimiser_is_fused_where_all_is_on_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, fused, **__: asked.append(fused))
    here, there = (types.SimpleNamespace(is_cuda=on) for on in (False, True))
    for parameters in ([here, here], [{"params": [there]}, {"params": [here]}], [{"params": [there]}, {"params": []}]):
        build_adamw(parameters, LOOP)
    assert asked == [None, None, True]


def test_the_average_of_all_weights_at_once_is_that_of_each():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((30, 7), (5,))]
    averages = [RampedEMA(weights, 2, decay=0.9, foreach=together) for together in (False, True)]
    for _ in range(20):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight))
        for average in averages:
            average.step(weights)
    torch.testing.assert_close(averages[0].shadow_params, averages[1].shadow_params, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(averages[0].shadow_params[0], weights[0])
