import pytest
import torch

from codalib.evaluation.latents import latent_scores
from codalib.models.library_quantizers import LIBRARY_KINDS, LibraryQuantizer
from codalib.models.quantizer_kinds import quantizer_from_config
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import QuantizerSettings

KINDS = list(LIBRARY_KINDS)


@pytest.fixture
def latents():
    return torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def build(kind, levels=3, codes=256):
    torch.manual_seed(0)
    return LibraryQuantizer(kind, 8, codes, (4,) * levels)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_the_indices_gives_what_forward_gives(kind, latents):
    quantizer = build(kind).eval()
    out = quantizer(latents)
    indices = quantizer.encode(latents)
    assert [tuple(level.shape) for level in indices] == [(6, 4, 4)] * 3
    assert all(torch.equal(one, two) for one, two in zip(indices, out.indices, strict=True))
    assert torch.allclose(quantizer.decode(indices), out.quantized, atol=1e-5)
    assert max(level.max().item() for level in indices) < quantizer.codebook_size
    assert quantizer.num_tokens == 48


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_summed(kind, latents):
    quantizer = build(kind).eval()
    indices = quantizer.encode(latents)
    single = build(kind, levels=1).eval()
    if kind in ("rvq", "rotation", "fsq"):  # the first level does not depend on the others
        first = single.encode(latents)[0]
        own = quantizer.inner.state_dict()
        taken = {name: own[name] for name in single.inner.state_dict()}
        single.inner.load_state_dict(taken)
        first = single.encode(latents)[0]
        assert torch.equal(first, indices[0])
    parts = [quantizer.decode(indices, levels=k) for k in (1, 2, 3)]
    assert torch.allclose(parts[-1], quantizer.decode(indices))
    assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_gives_gradients(kind, latents, tmp_path):
    quantizer = build(kind).train()
    moved = latents.clone().requires_grad_()
    out = quantizer(moved)
    (out.quantized.square().sum() + out.quantization_loss).backward()
    assert moved.grad.abs().sum() > 0
    settings = QuantizerSettings(
        kind=kind, codebook_size=1024, scales=(4, 4), steps=60, batch_size=6, learning_rate=0.02, ema=0.0, log_every=60
    )
    fitted = fit_quantizer(settings, latents, tmp_path)
    torch.manual_seed(settings.seed)
    before = latent_scores(settings.build_quantizer(8).eval(), latents)["quantization_error"]
    assert latent_scores(fitted, latents)["quantization_error"] < before


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_and_a_state_rebuild_it(kind, latents):
    quantizer = build(kind).eval()
    again = quantizer_from_config(quantizer.config()).eval()
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(latents).quantized, quantizer(latents).quantized)


def test_what_a_method_cannot_have_is_said():
    with pytest.raises(ValueError, match="expected scales of one side"):
        LibraryQuantizer("rvq", 8, 256, (1, 4))
    with pytest.raises(ValueError, match="expected a codebook_size of 256, 1024"):
        LibraryQuantizer("fsq", 8, 100, (4,))
    with pytest.raises(ValueError, match="a power of two"):
        LibraryQuantizer("lfq", 8, 100, (4,))
    with pytest.raises(ValueError, match="shape"):
        build("rvq")(torch.zeros(1, 8, 5, 5))
    with pytest.raises(ValueError, match=r"expected indices of level 1 in \[0, \d+\], got \[9999, 9999\]"):
        build("lfq").decode([torch.full((1, 4, 4), value) for value in (0, 9999, 0)])
    with pytest.raises(ValueError, match="expected finite latents"):
        build("fsq").encode(torch.full((1, 8, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="whole indices"):
        build("rvq").decode([torch.zeros(1, 4, 4, dtype=torch.long)] * 3, partial=True)


def test_behind_a_frozen_encoder_the_rotation_trick_is_residual_vq(latents):
    gradients = []
    for kind in ("rvq", "rotation"):
        quantizer = build(kind)
        out = quantizer(latents)
        (out.quantization_loss + (out.quantized - 1).square().mean()).backward()
        gradients.append([p.grad for p in quantizer.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    moving = [latents.clone().requires_grad_() for _ in range(2)]
    for kind, given in zip(("rvq", "rotation"), moving, strict=True):
        (build(kind)(given).quantized - 1).square().mean().backward()
    assert not torch.allclose(moving[0].grad, moving[1].grad)
