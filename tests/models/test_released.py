import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from codalib.models.adapters import add_adapters
from codalib.models.checkpoints import (
    export_tokenizer,
    load_adapters,
    load_kl16,
    load_quantizer,
    load_released_tokenizer,
    load_tokenizer,
    load_vae,
    save_adapters,
)
from codalib.models.checkpoints.ours import plain_copy
from codalib.models.checkpoints.released import load_adapted_vae, norm_of, vae_state
from codalib.models.loss_weights import ADAPTIVE_LAYERS, LossWeights, adaptive_weight, adaptive_weight_layer
from codalib.models.losses import reconstruction_terms, weighted_sum
from codalib.models.quantizer import MAR_SCALES, ResidualAttentionQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.pretrained.registry import read_weights
from codalib.pretrained.vae_layouts import (
    FLUX_CONFIG,
    KL16_CONFIG,
    build_autoencoder,
    layout_of,
    published_name,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"block_out_channels": (32, 32, 64, 64, 64), "layers_per_block": 1, "latent_channels": 4}
SCALES = {"ldm": {"scale": 0.2325}, "diffusers": {"scale": 0.3611, "shift": 0.1159}}  # of the small VAEs
SMALL_FLUX = {"block_out_channels": (32, 64, 64, 96), "layers_per_block": 1, "latent_channels": 4}


def adapter_parameters(vae):
    return [parameter for name, parameter in vae.named_parameters() if "lora_" in name]


def filled(keys):
    """Weights by the rule that the golden values were made with: a sine of the index, its phase from the name."""
    state = {}
    for name, shape in keys.items():
        count = math.prod(shape)
        values = np.sin(0.37 * np.arange(count) + zlib.crc32(name.encode()) % 1000).reshape(shape)
        if len(shape) > 1:
            values = values * 1.5 / math.sqrt(math.prod(shape[1:]))
        else:
            values = 0.1 * values + (1 if name.endswith("weight") else 0)
        state[name] = torch.from_numpy(values).float()
    return state


def keys(name):
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / name).read_text()).items()}


def close(ours, golden, tolerance=1e-4):
    return torch.allclose(ours, golden, rtol=tolerance, atol=tolerance * golden.abs().max().item())


@pytest.fixture(scope="module")
def kl16():
    return filled(keys("mar_kl16_keys.json"))


# --- golden values of the real size -----------------------------------------------------------------------------------


def matches(vae, file, tolerance=1e-4):
    golden = load_file(GOLDEN / file, device=str(next(vae.parameters()).device))
    with torch.no_grad():
        posterior = vae.posterior(golden["image"])
        latents = vae.encode(golden["image"], sample=False)
        assert close(posterior.mean, golden["mean"], tolerance)
        assert close(posterior.logvar, golden["logvar"], tolerance)
        assert close(latents, 0.2325 * golden["mean"], tolerance)
        # In norm: these weights make latents nearly constant, and group norm then magnifies rounding. The golden image
        # itself lies 1.02e-4 of its maximum from what float64 gives, so that elements cannot be held to less.
        decoded = vae.decode(latents)
        assert (decoded - golden["decoded"]).norm() < tolerance * golden["decoded"].norm()
        assert close(decoded, golden["decoded"], 5 * tolerance)


def test_kl16_gives_the_golden_values(kl16):
    vae = load_kl16(kl16)
    assert vae.downsampling == 16
    assert vae.latent_channels == 16
    assert vae.scale == 0.2325
    assert vae.latent_side(256) == 16
    assert not any(p.requires_grad for p in vae.parameters())
    matches(vae, "mar_kl16_vae.safetensors")


def test_kl16_with_lora_gives_the_golden_values_and_its_own_tensors_again(kl16):
    state = kl16 | filled(keys("mar_lora_keys_rank8.json"))
    vae = load_kl16(state)
    assert vae.adapter_settings["rank"] == 8
    matches(vae, "mar_kl16_vae_lora8.safetensors")
    exported = vae_state(vae, "ldm")
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)


@pytest.mark.gpu
@pytest.mark.parametrize("adapters", [None, "mar_lora_keys_rank8.json"])
def test_golden_values_of_the_vae(kl16, adapters):
    """In float32 throughout: TF32, which convolutions otherwise take, has 10 bits."""
    state, file = kl16, "mar_kl16_vae.safetensors"
    if adapters:
        state, file = kl16 | filled(keys(adapters)), "mar_kl16_vae_lora8.safetensors"
    with torch.backends.cudnn.flags(allow_tf32=False):
        matches(load_kl16(state).cuda(), file, 1e-3)


def test_the_adaptive_weight_is_the_releases(kl16):
    golden = load_file(GOLDEN / "adaptive_weight_mar.safetensors")
    vae = load_kl16(kl16 | filled(keys("mar_lora_keys_rank8.json"))).double()
    for parameter in adapter_parameters(vae):
        parameter.requires_grad_(True)
    decoded = vae.autoencoder.decode(golden["latents_unnormalised"]).sample
    torch.testing.assert_close(decoded, golden["reconstruction"], rtol=1e-4, atol=1e-4)
    terms = reconstruction_terms(golden["image"], decoded)
    loss = weighted_sum(terms, LossWeights())
    assert loss.item() == pytest.approx(golden["nll"].item(), rel=1e-4)
    adversarial = -(decoded * golden["pattern"]).mean()
    weights = [adaptive_weight(loss, adversarial, adaptive_weight_layer(vae, name)).item() for name in ADAPTIVE_LAYERS]
    assert weights[0] == pytest.approx(golden["weight"].item(), rel=1e-4)
    assert weights[1] == pytest.approx(1464.6, rel=1e-4)


# --- other sizes, in both layouts -------------------------------------------------------------------------------------


def small_vae(layout, rank=None, where="both", seed=0):
    """A VAE of few channels in the architecture of a layout, with random adapters where a rank is given."""
    from diffusers import AutoencoderKL

    from codalib.models.vae import ContinuousVAE

    torch.manual_seed(seed)
    config = KL16_CONFIG | SMALL if layout == "ldm" else FLUX_CONFIG | SMALL_FLUX
    vae = ContinuousVAE(AutoencoderKL(**config)).eval().requires_grad_(False)
    if rank:
        layers = ("conv1", "conv2", "upsample", "downsample") if layout == "ldm" else ("conv1", "conv2")
        add_adapters(vae, where, rank, layers)
        for parameter in adapter_parameters(vae):
            torch.nn.init.normal_(parameter, std=0.2)
    return vae.requires_grad_(False)


def released_state(vae, layout):
    """The published tensors, written down from the network itself and not through the functions under test."""
    state = {}
    for name, value in vae.autoencoder.state_dict().items():
        name = name.replace(".base_layer", "").replace(".lora_A.default", ".lora_layer.down")
        name = name.replace(".lora_B.default", ".lora_layer.up")
        if layout == "ldm":
            value = value[:, :, None, None] if value.ndim == 2 else value
            name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
            name = name.replace("conv_shortcut", "nin_shortcut").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace(".to_", ".")
            name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
            name = name.replace("samplers.0", "sample").replace("down_blocks", "down")
            for i in range(5):
                name = name.replace(f"up_blocks.{i}.", f"up.{4 - i}.")
        state[name] = value.clone()
    return state


def picture(side=64, seed=0):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize(("rank", "where"), [(None, "both"), (3, "both"), (5, "decoder"), (2, "encoder")])
def test_any_size_and_rank_is_the_same_function(layout, rank, where):
    vae = small_vae(layout, rank, where)
    state = released_state(vae, layout)
    assert layout_of(state) == layout
    loaded = load_adapted_vae(state, **SCALES[layout])
    assert (loaded.adapter_settings or {}).get("rank") == rank
    assert (loaded.scale, loaded.shift) == ((0.2325, 0.0) if layout == "ldm" else (0.3611, 0.1159))
    with torch.no_grad():
        ours, theirs = loaded.encode(picture(), sample=False), vae.encode(picture(), sample=False)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.allclose(loaded.decode(ours), vae.decode(theirs), atol=1e-5)
    exported = vae_state(loaded, layout)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)


def test_loaded_adapters_are_ours(tmp_path):
    vae = load_adapted_vae(released_state(small_vae("ldm", rank=3), "ldm"), scale=0.2325)
    with torch.no_grad():
        expected = vae(picture(), sample=False)
        assert torch.allclose(plain_copy(vae, merge=True)(picture(), sample=False), expected, atol=1e-5)
        plain = plain_copy(vae, merge=False)
        assert not torch.allclose(plain(picture(), sample=False), expected, atol=1e-3)
        plain.save_pretrained(tmp_path / "base")
        save_adapters(vae, tmp_path / "adapters")
        again = load_adapters(load_vae(tmp_path / "base"), tmp_path / "adapters")
        assert torch.equal(again(picture(), sample=False), expected)


def test_the_callers_tensors_are_left_alone():
    state = released_state(small_vae("ldm", rank=2), "ldm")
    before = {name: value.clone() for name, value in state.items()}
    vae = load_kl16(state, scale=0.2325)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_the_projections_of_attention_are_convolutions_there_and_linear_layers_here():
    state = released_state(small_vae("ldm"), "ldm")
    assert state["encoder.down.4.attn.0.q.weight"].shape == (64, 64, 1, 1)
    assert state["decoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert not any(".attn.3" in name or "up.0.attn" in name for name in state)
    autoencoder = build_autoencoder(state, scale=1.0)
    assert autoencoder.encoder.down_blocks[4].attentions[0].to_q.weight.shape == (64, 64)
    assert published_name("decoder.up_blocks.1.resnets.0.conv1", "ldm", 5) == "decoder.up.3.block.0.conv1"


def test_bad_tensors_are_listed_in_one_error():
    state = released_state(small_vae("ldm", rank=2), "ldm")
    del state["encoder.conv_in.weight"], state["decoder.up.2.block.0.conv1.lora_layer.up.weight"]
    state["decoder.up.1.block.0.conv3.weight"] = torch.zeros(1)
    state["encoder.mid.attn_1.q.bias"] = torch.zeros(7)
    state["decoder.mid.block_1.conv2.lora_layer.down.weight"] = torch.zeros(9, 64, 3, 3)
    with pytest.raises(ValueError, match="5 tensors differ") as error:
        load_kl16(state)
    for text in (
        "encoder.conv_in.weight is missing",
        "decoder.up.2.block.0.conv1.lora_layer.up.weight is missing",
        "decoder.up.1.block.0.conv3.weight is not expected",
        "encoder.mid.attn_1.q.bias has shape (7,), expected (64,)",
        "decoder.mid.block_1.conv2.lora_layer.down.weight has shape (9, 64, 3, 3), expected (2, 64, 3, 3)",
    ):
        assert text in str(error.value)


def test_a_damaged_kl16_is_reported_against_kl16():
    state = {name: torch.empty(shape, device="meta") for name, shape in keys("mar_kl16_keys.json").items()}
    state["encoder.down.2.block.0.conv1.weight"] = torch.empty(64, 128, 3, 3, device="meta")
    with pytest.raises(ValueError, match=r"1 tensors differ: encoder\.down\.2\.block\.0\.conv1\.weight has shape"):
        load_kl16(state)


def test_tensors_of_something_else_are_no_vae():
    with pytest.raises(ValueError, match="no VAE's"):
        load_adapted_vae({"codebooks.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="latent diffusion"):
        load_kl16(released_state(small_vae("diffusers"), "diffusers"))


# --- quantizers -------------------------------------------------------------------------------------------------------


def golden_quantizer():
    with safe_open(GOLDEN / "quantizer_mar.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def test_a_released_quantizer_gives_the_golden_values():
    golden, metadata = golden_quantizer()
    state = {name.removeprefix("param."): value for name, value in golden.items() if name.startswith("param.")}
    quantizer = load_quantizer(
        state,
        scales=json.loads(metadata["scales"]),
        norm=metadata["norm"],
        attention_dim=int(metadata["attn_dim"]),
        beta=float(metadata["beta"]),
        entropy_temperature=float(metadata["entropy_temperature"]),
    )
    assert quantizer.norm == norm_of(state) == "rms"
    out = quantizer(golden["input"])
    assert close(out.quantized, golden["f_hat"])
    assert close(out.quantization_loss, golden["vq_loss"])
    assert close(out.entropy_loss, golden["entropy_loss"])
    assert all(torch.equal(level, golden[f"indices.{i}"]) for i, level in enumerate(out.indices))


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize(("scales", "width", "channels"), [((1, 2, 4), 8, 4), ((1, 3, 5, 9), 32, 16)])
def test_any_quantizer_comes_back(norm, scales, width, channels):
    torch.manual_seed(1)
    theirs = ResidualAttentionQuantizer(channels, 50, scales, width, norm, beta=0.3, entropy_temperature=0.1)
    state = theirs.state_dict()
    assert norm_of(state) == norm
    ours = load_quantizer(state, scales=scales, norm=norm, beta=0.3, entropy_temperature=0.1)
    assert ours.config() == theirs.config()
    latents = torch.randn(2, channels, scales[-1], scales[-1])
    assert all(torch.equal(a, b) for a, b in zip(ours.encode(latents), theirs.encode(latents), strict=True))
    assert torch.equal(ours(latents).quantization_loss, theirs(latents).quantization_loss)


def test_bad_quantizer_tensors_are_listed_in_one_error():
    state = ResidualAttentionQuantizer(4, 10, (1, 2), 8).state_dict() | {"extra.weight": torch.zeros(3)}
    state["attn.to_k.bias"] = torch.zeros(5)
    del state["codebooks.weight"]
    with pytest.raises(ValueError, match="3 tensors differ") as error:
        load_quantizer(state, scales=(1, 2))
    assert "attn.to_k.bias has shape (5,), expected (8,)" in str(error.value)
    assert "extra.weight is not expected" in str(error.value)
    with pytest.raises(ValueError, match=r"attn\.norm_k\.bias is missing"):
        load_quantizer(ResidualAttentionQuantizer(4, 10, (1, 2), 8).state_dict(), scales=(1, 2), norm="layer")


# --- folders ----------------------------------------------------------------------------------------------------------


def released_folder(folder, layout, scales, kinds=("", "_ema")):
    """A folder as the release saves it, and the parts of each kind of weights."""
    parts = {}
    for seed, kind in enumerate(kinds):
        vae = small_vae(layout, rank=3, seed=seed)
        quantizer = ResidualAttentionQuantizer(4, 40, scales, 8)
        folder.mkdir(exist_ok=True)
        torch.save(released_state(vae, layout), folder / f"vae{kind}.pth")
        torch.save(quantizer.state_dict(), folder / f"quantizer{kind}.pth")
        parts[kind] = CodaTokenizer(vae, quantizer)
    return parts


def same(tokenizer, parts):
    indices = tokenizer.encode(picture(), sample=False)
    assert all(torch.equal(a, b) for a, b in zip(indices, parts.encode(picture(), sample=False), strict=True))
    assert torch.allclose(tokenizer.decode(indices), parts.decode(indices), atol=1e-5)


@pytest.mark.parametrize(("layout", "scales"), [("ldm", (1, 2, 3, 4)), ("diffusers", (1, 2, 5, 8))])
def test_a_released_folder_loads_and_goes_back(tmp_path, layout, scales):
    parts = released_folder(tmp_path / "theirs", layout, scales)
    tokenizer = load_released_tokenizer(tmp_path / "theirs", scales=scales, **SCALES[layout])
    assert tokenizer.resolution == 64
    same(tokenizer, parts["_ema"])
    same(load_released_tokenizer(tmp_path / "theirs", "trained", scales=scales, **SCALES[layout]), parts[""])
    export_tokenizer(tokenizer, tmp_path / "ours")
    export_tokenizer(tokenizer, tmp_path / "ours", weights="trained")
    for name in ("vae_ema", "quantizer_ema"):
        before, after = (read_weights(tmp_path / who / f"{name}.pth") for who in ("theirs", "ours"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "vae.pth",
        "vae_ema.pth",
        "quantizer.pth",
        "quantizer_ema.pth",
    }


def test_released_scales_are_the_default(tmp_path):
    released_folder(tmp_path, "ldm", MAR_SCALES, kinds=("",))
    tokenizer = load_released_tokenizer(tmp_path, scale=0.2325)
    assert tokenizer.resolution == 256
    assert tokenizer.quantizer.scales == MAR_SCALES


def test_a_file_of_adapters_alone_takes_the_rest_from_the_base(tmp_path):
    parts = released_folder(tmp_path, "ldm", (1, 2, 4))
    whole = read_weights(tmp_path / "vae_ema.pth")
    torch.save({"model": {n: v for n, v in whole.items() if "lora" in n}}, tmp_path / "vae_ema.pth")
    trained = {n: v for n, v in whole.items() if "lora" not in n}
    torch.save({f"module.{n}": v for n, v in trained.items()}, tmp_path / "vae.pth")
    same(load_released_tokenizer(tmp_path, scales=(1, 2, 4), scale=0.2325), parts["_ema"])
    (tmp_path / "vae.pth").unlink()
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias is missing"):
        load_released_tokenizer(tmp_path, scales=(1, 2, 4))
    load_kl16(trained, scale=0.2325).save_pretrained(tmp_path / "base")
    same(load_released_tokenizer(tmp_path, scales=(1, 2, 4), base=tmp_path / "base"), parts["_ema"])


def test_bad_folders_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no vae\.pth and quantizer\.pth \(found: no such folder\)"):
        load_released_tokenizer(tmp_path / "nowhere")
    torch.save({"epoch": 3}, tmp_path / "vae.pth")
    (tmp_path / "quantizer.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"expected named tensors .*vae\.pth, got epoch"):
        load_released_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "quantizer.pth")
    with pytest.raises(ValueError, match=r"no vae_ema\.pth"):
        load_released_tokenizer(tmp_path, weights="averaged")
    with pytest.raises(ValueError, match="weights is 'best'"):
        load_released_tokenizer(tmp_path, weights="best")


def test_our_own_folders_open_too():
    assert load_tokenizer("emoji").resolution == 64
