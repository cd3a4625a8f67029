"""The quantizers against the golden values, and the properties that every quantizer of the house has."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.quantizer import MAR_SCALES, ResidualAttentionQuantizer
from codalib.models.quantizer_kinds import quantizer_from_config
from codalib.models.ranking import confidence, rank_codes
from codalib.models.tokens import Tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "quantizer_mar.safetensors"
SCALES = (1, 2, 3, 5)
KINDS = [ResidualAttentionQuantizer, ResidualNearestQuantizer]


def small(kind, scales=SCALES, **settings):
    torch.manual_seed(0)
    return kind(latent_channels=4, codebook_size=24, scales=scales, **settings)


def latents(batch=3, side=5, seed=1):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_not_known_add_nothing(kind):
    q = small(kind)
    indices = q.encode(latents())
    coarse = [level if number < 2 else torch.full_like(level, -1) for number, level in enumerate(indices)]
    torch.testing.assert_close(q.decode(coarse, partial=True), q.decode(indices, levels=2))
    torch.testing.assert_close(q.decode(indices, partial=True), q.decode(indices))
    with pytest.raises(ValueError, match=r"expected indices of level 2 in \[0, 23\], got \[-1"):
        q.decode(coarse)


@pytest.mark.parametrize("backend", ["reference", "tiled", "compiled"])
def test_golden_values_and_gradients(backend):
    with safe_open(GOLDEN, "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = file.metadata()
    q = ResidualAttentionQuantizer(
        latent_channels=int(settings["latent_channels"]),
        codebook_size=int(settings["codebook_size"]),
        scales=json.loads(settings["scales"]),
        attention_dim=int(settings["attn_dim"]),
        norm="rms",
        beta=float(settings["beta"]),
        entropy_temperature=float(settings["entropy_temperature"]),
        backend=backend,
    )
    # The parameters carry the released names themselves.
    q.load_state_dict({key.removeprefix("param."): x for key, x in golden.items() if key.startswith("param.")})
    x = golden["input"].requires_grad_()
    out = q(x)
    for number, level in enumerate(out.indices):
        assert torch.equal(level, golden[f"indices.{number}"])
    loss = out.quantized.square().mean() + out.quantization_loss + 0.05 * out.entropy_loss
    loss.backward()
    torch.testing.assert_close(out.quantized, golden["f_hat"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.quantization_loss, golden["vq_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy_loss, golden["entropy_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=1e-5)
    gradients = {"input": x.grad} | {name: parameter.grad for name, parameter in q.named_parameters()}
    for name, gradient in gradients.items():
        expected = golden[f"grad.{name}"]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("scales", [SCALES, (5,), (2, 5, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_encode_is_the_forward_value(kind, scales, backend):
    q, x = small(kind, scales, backend=backend), latents()
    out, indices = q(x), q.encode(x)
    assert [tuple(level.shape) for level in indices] == [(3, p, p) for p in scales]
    assert all(torch.equal(a, b) for a, b in zip(indices, out.indices, strict=True))
    assert torch.equal(q.decode(indices), out.quantized)


@pytest.mark.parametrize("kind", KINDS)
def test_k_levels_are_the_first_k_partial_sums(kind):
    q, x = small(kind), latents()
    indices = q.encode(x)
    values = q.code_values
    total = torch.zeros_like(x)
    for k, level in enumerate(indices, start=1):
        total = total + F.interpolate(values[level].permute(0, 3, 1, 2), size=(5, 5), mode="bicubic")
        torch.testing.assert_close(q.decode(indices, levels=k), total, rtol=1e-5, atol=1e-5)
        assert torch.equal(q.decode(indices[:k], levels=k), q.decode(indices, levels=k))


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_do_not_touch_each_other(kind):
    q, x = small(kind), latents()
    for alone, together in zip(q.encode(x[1:2]), q.encode(x), strict=True):
        assert torch.equal(alone, together[1:2])


def test_nearest_is_plain_vq_at_a_single_scale():
    q, x = small(ResidualNearestQuantizer, (5,)), latents().requires_grad_()
    out = q(x)
    rows = x.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = torch.cdist(rows, q.codebooks.weight).argmin(dim=1).view(3, 5, 5)
    assert torch.equal(out.indices[0], nearest)
    codes = q.codebooks.weight[nearest].permute(0, 3, 1, 2)
    assert torch.equal(out.quantized, codes)
    torch.testing.assert_close(out.quantization_loss, 1.25 * F.mse_loss(x, codes))
    assert out.entropy_loss == 0


@pytest.mark.parametrize("scales", [SCALES, (5,)])
def test_nearest_is_straight_through_over_all_levels(scales):
    q, x = small(ResidualNearestQuantizer, scales), latents().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (q(x).quantized * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight, rtol=1e-4, atol=1e-5)
    assert q.codebooks.weight.grad is None


def test_nearest_codes_learn_and_features_commit():
    q, x = small(ResidualNearestQuantizer, (5,)), latents().requires_grad_()
    out = q(x)
    out.quantization_loss.backward()
    codes = q.codebooks.weight[out.indices[0]].permute(0, 3, 1, 2)
    torch.testing.assert_close(x.grad, (0.25 * 2 * (x - codes) / x.numel()).detach())
    used = torch.zeros(24, dtype=torch.bool).index_fill_(0, out.indices[0].flatten().unique(), True)
    assert ((q.codebooks.weight.grad != 0).any(dim=1) == used).all()


def test_attention_gradient_reaches_every_code_but_the_hard_value_only_the_chosen():
    q, x = small(ResidualAttentionQuantizer), latents().requires_grad_()
    out = q(x)
    out.quantized.sum().backward()
    assert (q.codebooks.weight.grad != 0).any(dim=1).all()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_norms_build_train_and_round_trip_their_config(norm):
    q = small(ResidualAttentionQuantizer, norm=norm, attention_dim=8)
    names = {name for name, _ in q.named_parameters() if "norm" in name}
    expected = {"rms": {"weight"}, "layer": {"weight", "bias"}, None: set()}[norm]
    assert names == {f"attn.norm_{x}.{leaf}" for x in "qk" for leaf in expected}
    out = q(latents())
    (out.quantization_loss + out.entropy_loss).backward()
    assert all(p.grad.isfinite().all() for p in q.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_config_rebuilds_the_quantizer(kind):
    q = small(kind, beta=0.125)
    config = json.loads(json.dumps(q.config()))
    twin = quantizer_from_config(config)
    assert type(twin) is kind
    assert twin.config() == q.config()
    twin.load_state_dict(q.state_dict())
    assert torch.equal(twin.decode(q.encode(latents())), q(latents()).quantized)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_latents_are_quantized_in_float32(kind):
    q, x = small(kind), latents().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = q(x)
    assert out.quantized.dtype == torch.float32
    assert torch.equal(out.quantized, q(x.float()).quantized)


def test_confidence_of_attention_is_its_softmax_and_of_vq_its_distance():
    x = latents()
    for kind in KINDS:
        q = small(kind)
        scores = confidence(q, x, top=24)
        assert [tuple(level.shape) for level in scores] == [(3, p, p, 24) for p in SCALES]
        rising = 1 if kind is ResidualNearestQuantizer else -1
        assert all((rising * level.diff(dim=-1) >= 0).all() for level in scores)
        if kind is ResidualAttentionQuantizer:
            assert all(torch.allclose(level.sum(-1), torch.ones(())) for level in scores)
    single = small(ResidualNearestQuantizer, (5,))
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    expected = (rows[:, None] - single.codebooks.weight).norm(dim=2).sort(dim=1).values[:, :7]
    torch.testing.assert_close(confidence(single, x, top=7)[0].view(-1, 7), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent_type", [torch.float32, torch.bfloat16])
def test_the_first_of_a_ranking_is_the_code_that_encode_takes_in_bfloat16_too(kind, latent_type):
    q, x = small(kind), latents().to(latent_type)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ranked, tokens = rank_codes(q, x, top=3), q.encode(x)
        for level, own in zip(ranked, tokens, strict=True):
            assert level.scores.dtype == torch.float32
            assert torch.equal(level.codes[..., 0], own)


def test_tokens_of_the_released_pyramids():
    q = ResidualNearestQuantizer(latent_channels=2, codebook_size=2, scales=MAR_SCALES)
    assert q.num_tokens == 680


BAD_LATENTS = [torch.zeros(2, 4, 6, 6), torch.zeros(2, 3, 5, 5), torch.zeros(4, 5, 5), torch.zeros(0, 4, 5, 5)]


@pytest.mark.parametrize("bad", BAD_LATENTS, ids=lambda x: str(tuple(x.shape)))
def test_latents_of_another_shape_raise(bad):
    q = small(ResidualAttentionQuantizer)
    for call in (q, q.encode):
        with pytest.raises(
            ValueError, match=r"expected latents of shape \(B, 4, 5, 5\), got .*: the last scale is the latent grid"
        ):
            call(bad)


@pytest.mark.parametrize("kind", [ResidualAttentionQuantizer, ResidualNearestQuantizer])
def test_latents_that_are_no_numbers_have_no_indices(kind):
    bad = latents()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite latents, got NaN or infinite ones"):
        small(kind).encode(bad)


BAD_INDICES = {
    "expected indices of 4 levels": lambda x: x[:3],
    "to be integers": lambda x: [level.float() for level in x],
    r"shape \(B, 3, 3\)": lambda x: [x[0], x[1], x[1], x[3]],
    "one B for all levels": lambda x: [x[0][:1], *x[1:]],
    "expected tokens of 24 codes, got tokens of 32": lambda x: Tokens(x, 32),
    "integers of shape .*got a ndarray": lambda x: [level.numpy() for level in x],
    r"level 3 in \[0, 23\]": lambda x: [*x[:3], x[3] + 24],
    r"level 0 in \[0, 23\], got \[-1": lambda x: [x[0] * 0 - 1, *x[1:]],
}


@pytest.mark.parametrize("message", BAD_INDICES)
def test_bad_indices_raise_one_clear_sentence(message):
    q = small(ResidualNearestQuantizer)
    with pytest.raises(ValueError, match=message):
        q.decode(BAD_INDICES[message](q.encode(latents())))


@pytest.mark.parametrize("levels", [0, 5, -1])
def test_levels_out_of_range_raise(levels):
    q = small(ResidualNearestQuantizer)
    with pytest.raises(ValueError, match="expected levels from 1 to 4"):
        q.decode(q.encode(latents()), levels=levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (4, 2)}, "the largest"),
        ({"scales": (0, 2)}, "at least 1"),
        ({"codebook_size": 0}, "got 16 and 0"),
        ({"norm": "batch"}, 'expected the norm "rms", "layer" or None'),
        ({"entropy_temperature": 0.0}, "above 0"),
        ({"backend": "magic"}, "expected a backend of reference"),
        ({"entropy_temperature": math.nan}, "above 0"),
        ({"beta": math.nan}, "expected beta from 0"),
        ({"attention_dim": 0}, "expected attention_dim above 0"),
        ({"scales": (1, 2.7, 4)}, r"whole numbers, such as \(1, 2, 4\), got \(1, 2.7, 4\)"),
        ({"scales": "124"}, "expected scales as a list, got the text '124'"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        ResidualAttentionQuantizer(**({"codebook_size": 8} | settings))


def test_bad_configs_raise():
    with pytest.raises(ValueError, match="kind 'fsq'"):
        quantizer_from_config({"kind": "fsq"})
    with pytest.raises(ValueError, match="of the quantizer kind 'nearest'"):
        quantizer_from_config({"kind": "nearest", "norm": "rms"})


def test_the_defaults_are_the_releases():
    quantizer = ResidualAttentionQuantizer(latent_channels=4, codebook_size=8, scales=(1, 2), attention_dim=4)
    config = quantizer.config()
    assert {name: config[name] for name in ("beta", "entropy_temperature", "norm")} == {
        "beta": 0.05,
        "entropy_temperature": 0.01,
        "norm": "rms",
    }
    assert ResidualNearestQuantizer(4, 8, (1, 2)).config()["beta"] == 0.25  # VQ-VAE's
