"""How published VAE checkpoints name their tensors, and how they become diffusers' `AutoencoderKL`.

Two layouts: latent diffusion's ("ldm"), in which MAR's kl16 was published, and diffusers' own ("diffusers"), FLUX's.
They hold the same network: block by block the same sums, with other names, and with the projections of attention as
1 x 1 convolutions in the one and as linear layers in the other.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


# MAR's kl16 (arXiv:2406.11838): base width 128 times 1 1 2 2 4; self-attention after each residual block of the
# encoder's last level, none in the decoder outside its middle block. Diffusers pads its downsampling like latent
# diffusion does: one column on the right, one row below.
KL16_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 256,  # pixels
    "scaling_factor": 0.2325,  # of MAR's latents on ImageNet; another data set needs its own, 1 / std of its latents
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


# The VAE of FLUX.1-dev, as its config.json states it.
FLUX_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,  # pixels
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CONFIGS = {"ldm": KL16_CONFIG, "diffusers": FLUX_CONFIG}


# Diffusers' parts of names -> latent diffusion's; the decoder's levels are counted from the other end.
RENAMED = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", r"down.\1.attn.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)", r"up.\1.attn.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"\bconv_norm_out\b", "norm_out"),
    (r"\bconv_shortcut\b", "nin_shortcut"),
    (r"\bgroup_norm\b", "norm"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"\bto_out\.0\b", "proj_out"),
)


# --- names and shapes -------------------------------------------------------------------------------------------------
def layout_of(state: Mapping[str, Any]) -> str:
    """ "ldm" or "diffusers", by the names of the encoder's and decoder's levels; ValueError where they tell neither."""
    ldm = any(re.match(r"(encoder\.down|decoder\.up)\.\d", name) for name in state)
    diffusers = any(re.match(r"(encoder\.down|decoder\.up)_blocks\.\d", name) for name in state)
    if ldm == diffusers:
        names = ", ".join(sorted(state)[:3]) or "none"
        raise ValueError(
            f"these {len(state)} tensors are no VAE's (the first names: {names}), expected names such as "
            "encoder.down.0.block.0.conv1.weight (latent diffusion) or encoder.down_blocks.0.resnets.0.conv1.weight "
            "(diffusers)"
        )
    return "ldm" if ldm else "diffusers"


def published_name(name: str, layout: str, levels: int) -> str:
    """The name in a layout of what diffusers calls NAME, in a VAE of LEVELS resolutions; of a tensor or of a layer."""
    if layout == "diffusers":
        return name
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up.{levels - 1 - int(level[1])}", name)


def published_tensors(autoencoder: AutoencoderKL, layout: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> (diffusers' name, published shape) of every tensor of an autoencoder without adapters."""
    levels = len(autoencoder.config.block_out_channels)
    tensors = {}
    for name, value in autoencoder.state_dict().items():
        shape = tuple(value.shape)
        if layout == "ldm" and value.ndim == 2:
            shape += (1, 1)  # a projection of attention: a 1 x 1 convolution there, a linear layer here
        tensors[published_name(name, layout, levels)] = (name, shape)
    return tensors


def published_state(autoencoder: AutoencoderKL, layout: str) -> dict[str, Tensor]:
    """The tensors of an autoencoder without adapters under the names and in the shapes of a layout, on the CPU."""
    state = autoencoder.state_dict()
    return {
        published: state[name].detach().cpu().reshape(shape).contiguous()
        for published, (name, shape) in published_tensors(autoencoder, layout).items()
    }


def differences(found: Shapes, expected: Shapes) -> list[str]:
    """What is wrong with FOUND, one phrase a tensor: missing, not expected, or of another shape."""
    missing = [f"{name} is missing (shape {expected[name]})" for name in sorted(expected.keys() - found.keys())]
    extra = [f"{name} is not expected (shape {found[name]})" for name in sorted(found.keys() - expected.keys())]
    shaped = [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    return missing + extra + shaped


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def raise_differences(what: str, problems: list[str]) -> None:
    """Raise one ValueError that lists every problem; none, nothing."""
    if problems:
        raise ValueError(f"{what} does not fit, {len(problems)} tensors differ: {'; '.join(problems)}")


# --- building ---------------------------------------------------------------------------------------------------------
def plan(
    state: Mapping[str, Tensor], layout: str, config: Mapping[str, Any] | None = None
) -> tuple[AutoencoderKL, list[str]]:
    """The autoencoder (on the meta device) that a layout's tensors fit best, and what is wrong with them.

    With no `config` the published architecture is taken, unless another width, depth or number of channels, read from
    the tensors' shapes, fits better: so a damaged kl16 is reported against kl16.
    """
    found = shapes_of(state)
    best: tuple[AutoencoderKL, list[str]] | None = None
    candidates = (CONFIGS[layout], _inferred_config(found, layout)) if config is None else (config,)
    for candidate in candidates:
        if candidate is None or (best is not None and not best[1]):
            continue
        with torch.device("meta"):
            autoencoder = AutoencoderKL(**candidate)
        expected = {name: shape for name, (_, shape) in published_tensors(autoencoder, layout).items()}
        problems = differences(found, expected)
        if best is None or len(problems) < len(best[1]):
            best = autoencoder, problems
    assert best is not None
    return best


def fill(autoencoder: AutoencoderKL, state: Mapping[str, Tensor], layout: str) -> AutoencoderKL:
    """Give an autoencoder on the meta device a float32 copy of the tensors that `plan` found to fit."""
    shapes = shapes_of(autoencoder.state_dict())
    tensors = {
        name: state[published].detach().to("cpu", torch.float32, copy=True).reshape(shapes[name]).contiguous()
        for published, (name, _) in published_tensors(autoencoder, layout).items()
    }
    autoencoder.load_state_dict(tensors, assign=True)
    return autoencoder.eval().requires_grad_(False)


def build_autoencoder(state: Mapping[str, Tensor]) -> AutoencoderKL:
    """The autoencoder of a published state dict without adapters, frozen; ValueError lists what does not fit."""
    layout = layout_of(state)
    autoencoder, problems = plan(state, layout)
    raise_differences(f"the VAE in the {layout} layout", problems)
    return fill(autoencoder, state, layout)


def _inferred_config(found: Shapes, layout: str) -> dict[str, Any] | None:
    """The config that the shapes speak of; None where they speak of none."""
    if layout == "diffusers":
        levels = 1 + max((int(n) for n in _matches(r"encoder\.down_blocks\.(\d+)\.", found)), default=-1)
        found = {published_name(name, "ldm", levels): shape for name, shape in found.items()}
    levels = 1 + max((int(n) for n in _matches(r"encoder\.down\.(\d+)\.", found)), default=-1)
    blocks = 1 + max((int(n) for n in _matches(r"encoder\.down\.\d+\.block\.(\d+)\.", found)), default=-1)
    widths = tuple(found.get(f"encoder.down.{i}.block.0.conv1.weight", (0,))[0] for i in range(levels))
    channels = found.get("decoder.conv_in.weight", (0, 0))[1]
    # FLUX's VAE is published in latent diffusion's layout too: four levels, no quant convolutions, its own scale.
    quant_conv = "quant_conv.weight" in found
    is_flux = layout == "diffusers" or (levels == len(FLUX_CONFIG["block_out_channels"]) and not quant_conv)
    config = FLUX_CONFIG if is_flux else KL16_CONFIG
    groups = config["norm_num_groups"]
    if not widths or not blocks or not channels or any(width < 1 or width % groups for width in widths):
        return None
    down_attention = {int(n) for n in _matches(r"encoder\.down\.(\d+)\.attn\.", found)}
    up_attention = {levels - 1 - int(n) for n in _matches(r"decoder\.up\.(\d+)\.attn\.", found)}
    return config | {
        "down_block_types": tuple(f"{'Attn' * (i in down_attention)}DownEncoderBlock2D" for i in range(levels)),
        "up_block_types": tuple(f"{'Attn' * (i in up_attention)}UpDecoderBlock2D" for i in range(levels)),
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "latent_channels": channels,
        "use_quant_conv": quant_conv or not is_flux,
        "use_post_quant_conv": "post_quant_conv.weight" in found or not is_flux,
    }


def _matches(pattern: str, names: Mapping[str, Any]) -> set[str]:
    return {match[1] for match in (re.match(pattern, name) for name in names) if match}
