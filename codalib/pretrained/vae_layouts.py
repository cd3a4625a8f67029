"""How published VAE checkpoints name their tensors, and how they become diffusers' `AutoencoderKL`.

Two layouts: latent diffusion's ("ldm"), in which MAR's kl16 was published, and diffusers' own ("diffusers"), FLUX's.
They hold the same network: block by block the same sums, with other names, and with the projections of attention as
1 x 1 convolutions in the one and as linear layers in the other.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from codalib.pretrained.registry import Shapes, differences, raise_differences, shapes_of

log = logging.getLogger(__name__)


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

# The VAE of Stable Diffusion 1 and 2, 8x. SDXL's has the same shapes and the scale 0.13025, Stable Diffusion 3's the
# shapes of FLUX's and another scale and shift: of these, a file without a config.json needs its own to be given.
SD_CONFIG = FLUX_CONFIG | {
    "latent_channels": 4,
    "sample_size": 512,  # pixels
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
CONFIGS = {"ldm": KL16_CONFIG, "diffusers": FLUX_CONFIG}
RECOGNISED = {"MAR's kl16": KL16_CONFIG, "FLUX.1's": FLUX_CONFIG, "Stable Diffusion's": SD_CONFIG}
BY_SHAPES = (  # what shapes tell of a config
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "down_block_types",
    "up_block_types",
    "use_quant_conv",
    "use_post_quant_conv",
)


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
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers before 0.12
TRAINING = ("loss.", "discriminator.", "model_ema.")  # what latent diffusion's training keeps beside its VAE


# --- names and shapes -------------------------------------------------------------------------------------------------
def vae_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors of a checkpoint, as its layout names them.

    A prefix such as "first_stage_model.", "module." or "ema." goes, and with it every tensor that lies beside; of
    trained and averaged tensors the trained ones are taken. What a training script keeps (`TRAINING`) is left out, and
    diffusers' first names of attention become today's.
    """
    found = (re.match(r"((?:.*\.)?)(?:encoder|decoder)\.(?:conv_in|mid)", name) for name in state)
    counts = Counter(match[1] for match in found if match)
    prefixes = sorted(counts, key=lambda prefix: ("ema" in prefix, -counts[prefix]))
    prefix = prefixes[0] if prefixes else ""
    if prefix or len(prefixes) > 1:
        log.info("the VAE is taken from the names that begin with %r, of %s", prefix, prefixes)
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {
        re.sub(r"(?<=attentions\.\d\.)(query|key|value|proj_attn)\b", lambda part: OLD_ATTENTION[part[1]], name): value
        for name, value in own.items()
        if not name.startswith((*TRAINING, *filter(None, prefixes)))
    }


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


# --- building ---------------------------------------------------------------------------------------------------------
def plan(
    state: Mapping[str, Tensor], layout: str, config: Mapping[str, Any] | None = None
) -> tuple[AutoencoderKL, list[str]]:
    """The autoencoder (on the meta device) that a layout's tensors fit best, and what is wrong with them.

    With no `config` the published architecture is taken, unless another width, depth or number of channels, read from
    the tensors' shapes, fits better: so a damaged kl16 is reported against kl16. Its scaling factor is then that of the
    architecture that was recognised, or None.
    """
    found = shapes_of(state)
    best: tuple[AutoencoderKL, list[str]] | None = None
    candidates = (CONFIGS[layout], _inferred_config(found, layout)) if config is None else (config,)
    for candidate in candidates:
        if candidate is None or (best is not None and not best[1]):
            continue
        with torch.device("meta"):
            autoencoder = AutoencoderKL.from_config(dict(candidate))
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


def build_autoencoder(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    scale: float | None = None,
    shift: float | None = None,
) -> AutoencoderKL:
    """The autoencoder of a published state dict without adapters, frozen; ValueError lists what does not fit.

    `config` is diffusers', None reads it from the shapes; `scale`, `shift`: see `set_scale`.
    """
    layout = layout_of(state)
    autoencoder, problems = plan(state, layout, config)
    raise_differences(f"the VAE in the {layout} layout", problems)
    return set_scale(fill(autoencoder, state, layout), scale, shift)


def set_scale(autoencoder: AutoencoderKL, scale: float | None = None, shift: float | None = None) -> AutoencoderKL:
    """Give an autoencoder the latent scale and shift that are not None, in place; ValueError where it then has no
    scale, or one for each channel."""
    if scale is not None:
        autoencoder.register_to_config(scaling_factor=scale, latents_mean=None, latents_std=None)
    if shift is not None:
        autoencoder.register_to_config(shift_factor=shift)
    config = autoencoder.config
    if config.scaling_factor is None:
        raise ValueError(
            f"a VAE of widths {tuple(config.block_out_channels)} and {config.latent_channels} latent channels, whose "
            "latent scale is not known: give scale (and shift), or a diffusers folder whose config.json states them"
        )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(
            "expected one scaling_factor (and shift_factor) for all latent channels, got latents_mean and latents_std, "
            "which state them a channel: give scale (and shift)"
        )
    return autoencoder


def _inferred_config(found: Shapes, layout: str) -> dict[str, Any] | None:
    """The config that the shapes tell, with the scale of the architecture of `RECOGNISED` that it is, or None; groups
    of channels, which no shape tells, are the published 32. None where the shapes tell no VAE."""
    levels_of = r"encoder\.down_blocks\.(\d+)\." if layout == "diffusers" else r"encoder\.down\.(\d+)\."
    levels = 1 + max((int(n) for n in _matches(levels_of, found)), default=-1)
    found = {published_name(name, "ldm", levels) if layout == "diffusers" else name: found[name] for name in found}
    blocks = 1 + max((int(n) for n in _matches(r"encoder\.down\.\d+\.block\.(\d+)\.", found)), default=-1)
    widths = tuple(found.get(f"encoder.down.{i}.block.0.conv1.weight", (0,))[0] for i in range(levels))
    channels = found.get("decoder.conv_in.weight", (0, 0))[1]
    groups = KL16_CONFIG["norm_num_groups"]
    if not widths or not blocks or not channels or any(width < 1 or width % groups for width in widths):
        return None
    down_attention = {int(n) for n in _matches(r"encoder\.down\.(\d+)\.attn\.", found)}
    up_attention = {levels - 1 - int(n) for n in _matches(r"decoder\.up\.(\d+)\.attn\.", found)}
    config = KL16_CONFIG | {
        "down_block_types": tuple(f"{'Attn' * (i in down_attention)}DownEncoderBlock2D" for i in range(levels)),
        "up_block_types": tuple(f"{'Attn' * (i in up_attention)}UpDecoderBlock2D" for i in range(levels)),
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "latent_channels": channels,
        "use_quant_conv": any(name.startswith("quant_conv.") for name in found),
        "use_post_quant_conv": any(name.startswith("post_quant_conv.") for name in found),
    }
    for name, published in RECOGNISED.items():
        if all(config[key] == published[key] for key in BY_SHAPES):
            log.info("recognised as %s VAE: latent scale %s", name, published["scaling_factor"])
            return dict(published)
    return config | {"scaling_factor": None, "shift_factor": None}


def _matches(pattern: str, names: Mapping[str, Any]) -> set[str]:
    return {match[1] for match in (re.match(pattern, name) for name in names) if match}
