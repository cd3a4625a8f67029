"""The authors' checkpoints of CODA as ours, and ours as theirs.

A released folder holds a VAE with its LoRA tensors and a quantizer, each as trained and as averaged (vae.pth,
vae_ema.pth, quantizer.pth, quantizer_ema.pth). The LoRA tensors become peft adapters, so that whatever works on
adapters here (saving, merging, training on) works on them. Nothing is dropped or guessed: tensors that are missing,
not expected or of another shape are counted, and the first listed, in one error.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from codalib.base.files import atomic_write
from codalib.models.adapters import ADAPTED_LAYERS, adapted_convolutions, add_adapters
from codalib.models.checkpoints.names import EMBEDDED_TOKENIZERS
from codalib.models.checkpoints.ours import load_vae, naming, plain_copy
from codalib.models.quantizer import FLUX_SCALES, MAR_SCALES, ResidualAttentionQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.registry import Shapes, differences, raise_differences, read_weights, shapes_of
from codalib.pretrained.vae_layouts import (
    fill,
    layout_of,
    plan,
    published_name,
    published_state,
    set_scale,
)

log = logging.getLogger(__name__)


SCALES = {"ldm": MAR_SCALES, "diffusers": FLUX_SCALES}  # of the released MAR and FLUX tokenizers
NORMS = {"rms_norm": "rms", "layer_norm": "layer", "none": None}  # the release's names -> ours
DOWN, UP = ".lora_layer.down.weight", ".lora_layer.up.weight"  # the release's endings of an adapter's two factors
FACTORS = {DOWN: "lora_A", UP: "lora_B"}  # -> peft's
SUFFIXES = (".pth", ".safetensors", ".pt")
WEIGHTS = {"averaged": "_ema", "trained": ""}


# --- the quantizer ----------------------------------------------------------------------------------------------------
def load_quantizer(
    state_dict: Mapping[str, Tensor],
    scales: Sequence[int] = MAR_SCALES,
    norm: str | None = "rms",
    attention_dim: int | None = None,
    beta: float = 0.05,
    entropy_temperature: float = 0.01,
    backend: str = "auto",
) -> ResidualAttentionQuantizer:
    """The quantizer of a released state dict, frozen and in evaluation mode.

    Args:
        state_dict: codebooks.weight (K, C); attn.to_q, attn.to_k (D, C) and attn.to_v (C, C), weight and bias; the
            weights (and biases) of attn.norm_q and attn.norm_k.
        scales: side of each level, the last the latent grid's; the tensors do not tell it.
        norm: "rms", "layer" or None, of queries and keys; the release's "rms_norm" and "layer_norm" are taken too.
        attention_dim: D; None reads it from the tensors.
        beta, entropy_temperature: settings of the loss, not stored in a checkpoint; the release's by default.
        backend: of the assignment (see `models.quantizer.BACKENDS`).
    Raises:
        ValueError: tensors are missing, not expected or mis-shaped; the message lists all of them.
    """
    norm = NORMS.get(norm, norm)
    found = shapes_of(state_dict)
    codes = _side(found, ("codebooks.weight", 0))
    channels = _side(
        found, ("codebooks.weight", 1), ("attn.to_q.weight", 1), ("attn.to_k.weight", 1), ("attn.to_v.weight", 0)
    )
    width = attention_dim or _side(found, ("attn.to_q.weight", 0), ("attn.to_k.weight", 0), ("attn.to_q.bias", 0))
    with torch.device("meta"):
        quantizer = ResidualAttentionQuantizer(
            channels, codes, scales, width, norm, beta, entropy_temperature, backend=backend
        )
    raise_differences("the quantizer", differences(found, shapes_of(quantizer.state_dict())))
    tensors = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in state_dict.items()}
    quantizer.load_state_dict(tensors, assign=True)
    return quantizer.eval().requires_grad_(False)


def _side(found: Shapes, *places: tuple[str, int]) -> int:
    """The size that most of the tensors' sides at PLACES (name, dimension) agree on; 1 where none of them is there."""
    sides = Counter(found[name][i] for name, i in places if len(found.get(name, ())) > i)
    return sides.most_common(1)[0][0] if sides else 1


def norm_of(state_dict: Mapping[str, Tensor]) -> str | None:
    """Which norm of queries and keys a released quantizer has, by its tensors: "rms", "layer" or None."""
    if "attn.norm_q.bias" in state_dict:
        return "layer"
    return "rms" if "attn.norm_q.weight" in state_dict else None


# --- the VAE ----------------------------------------------------------------------------------------------------------
def load_kl16(state_dict: Mapping[str, Tensor], scale: float | None = None) -> ContinuousVAE:
    """MAR's VAE in the layout of latent diffusion (latent scale 0.2325), frozen and in evaluation mode.

    With the release's LoRA tensors beside the convolutions they become adapters (`save_adapters` and `plain_copy` take
    them); without, there are none. Other widths, depths and ranks than the published ones are read from the shapes, and
    want their own latent scale.
    Raises ValueError, listing every tensor that is missing, not expected or mis-shaped.
    """
    layout = layout_of(state_dict)
    if layout != "ldm":
        raise ValueError(
            "these are tensors of a VAE in diffusers' layout, expected latent diffusion's (encoder.down.0.block.0...): "
            "load_adapted_vae takes either"
        )
    return load_adapted_vae(state_dict, scale=scale)


def load_adapted_vae(
    state_dict: Mapping[str, Tensor],
    base: ContinuousVAE | None = None,
    scale: float | None = None,
    shift: float | None = None,
) -> ContinuousVAE:
    """A VAE with or without the release's LoRA tensors, in either layout, frozen and in evaluation mode.

    Args:
        state_dict: published tensors, those of the base VAE and NAME.lora_layer.down.weight (rank, in, k, k) and
            NAME.lora_layer.up.weight (out, rank, 1, 1) beside each adapted convolution NAME, scale 1.
        base: a VAE without adapters for a state dict that holds the LoRA tensors alone; its own latent shift and scale
            count.
        scale, shift: of the latents; None: the base's, or without one those of the architecture (see `load_vae`).
    """
    layout = layout_of(state_dict)
    lora = {name: value for name, value in state_dict.items() if ".lora_layer." in name}
    plain = {name: value for name, value in state_dict.items() if name not in lora}
    if base is not None:
        plain = published_state(base.autoencoder, layout) | plain
    autoencoder, problems = plan(plain, layout, base and dict(base.autoencoder.config))
    settings, expected = _adapters(autoencoder, lora, layout)
    problems += differences(shapes_of(lora), {name: shape for name, (_, shape) in expected.items()})
    raise_differences(f"the VAE in the {layout} layout", problems)
    vae = ContinuousVAE(set_scale(fill(autoencoder, plain, layout), scale, shift))
    if lora:
        add_adapters(vae, **settings)
        tensors = {ours: lora[name].detach().to("cpu", torch.float32) for name, (ours, _) in expected.items()}
        set_peft_model_state_dict(vae.autoencoder, tensors)
    return vae.eval().requires_grad_(False)


def _adapters(autoencoder: nn.Module, lora: Mapping[str, Tensor], layout: str) -> tuple[dict, dict]:
    """The settings of `add_adapters` that LORA speaks of, and {published name: (peft's name, shape)} under them."""
    levels = len(autoencoder.config.block_out_channels)
    convolutions = {
        published_name(name, layout, levels): name
        for name, module in autoencoder.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    adapted = {
        convolutions[name] for name in (re.sub(r"\.lora_layer\..*", "", n) for n in lora) if name in convolutions
    }
    if not adapted:
        return {}, {}
    parts = {name.split(".")[0] for name in adapted}
    ranks = Counter(value.shape[0] for name, value in lora.items() if name.endswith(DOWN))
    ranks += Counter(value.shape[1] for name, value in lora.items() if name.endswith(UP) and value.ndim == 4)
    settings = {
        "where": "both" if len(parts) > 1 else parts.pop(),
        "rank": ranks.most_common(1)[0][0],
        "layers": tuple(layer for layer in ADAPTED_LAYERS if any(layer in name for name in adapted)),
    }
    expected = {}
    for name, convolution in adapted_convolutions(autoencoder, settings["where"], settings["layers"]).items():
        published = published_name(name, layout, levels)
        inside = (settings["rank"], convolution.in_channels, *convolution.kernel_size)
        expected[published + DOWN] = f"{name}.lora_A.weight", inside
        expected[published + UP] = f"{name}.lora_B.weight", (convolution.out_channels, settings["rank"], 1, 1)
    return settings, expected


# --- folders ----------------------------------------------------------------------------------------------------------
def load_released_tokenizer(
    folder: str | Path,
    weights: str | None = None,
    base: str | Path | None = None,
    scales: Sequence[int] | None = None,
    beta: float = 0.05,
    entropy_temperature: float = 0.01,
    backend: str = "auto",
    scale: float | None = None,
    shift: float | None = None,
) -> CodaTokenizer:
    """The tokenizer in a folder as the release saves it (Hub: shuidi0020/CODA), frozen and in evaluation mode.

    Args:
        folder: holds vae_ema.pth and quantizer_ema.pth, or vae.pth and quantizer.pth, or all four (.safetensors are
            taken too); MAR's in the layout of latent diffusion, FLUX's in diffusers'.
        weights: "averaged" (the _ema files) or "trained"; None: the averaged ones where both are there.
        base: what `load_vae` takes, for a VAE file that holds the LoRA tensors alone; None takes the rest from vae.pth.
        scales: side of each level; None: the released ones of the layout (`MAR_SCALES`, `FLUX_SCALES`).
        beta, entropy_temperature, backend: see `load_quantizer`.
        scale, shift: see `load_adapted_vae`.
    Raises:
        ValueError: files are missing, or tensors do not fit; the message names the file and the first of them.
    """
    folder = Path(os.path.expanduser(folder))
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights is {weights!r}, expected 'averaged', 'trained' or None")
    if weights is None:
        weights = "averaged" if _file(folder, "vae_ema") and _file(folder, "quantizer_ema") else "trained"
    names = [f"{part}{WEIGHTS[weights]}" for part in ("vae", "quantizer")]
    files = [_file(folder, name) for name in names]
    if None in files:
        here = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        lost = " and ".join(f"{name}.pth" for name, path in zip(names, files, strict=True) if path is None)
        raise ValueError(
            f"{folder} holds no {lost} (found: {here or 'nothing'}): expected {', '.join(EMBEDDED_TOKENIZERS)}, a "
            "folder with our config.json, or one of the release"
        )
    log.info("%s: the %s weights", folder, weights)
    vae_state, quantizer_state = map(read_weights, files)
    trained = _file(folder, "vae")
    if base is None and trained and all(".lora_layer." in name for name in vae_state):
        vae_state = {n: v for n, v in read_weights(trained).items() if ".lora_layer." not in n} | vae_state
    with naming(files[0]):
        vae = load_adapted_vae(vae_state, None if base is None else load_vae(base), scale, shift)
    with naming(files[1]):
        quantizer = load_quantizer(
            quantizer_state,
            SCALES[layout_of(vae_state)] if scales is None else scales,
            norm_of(quantizer_state),
            beta=beta,
            entropy_temperature=entropy_temperature,
            backend=backend,
        )
    return CodaTokenizer(vae, quantizer).eval().requires_grad_(False)


def export_tokenizer(
    tokenizer: CodaTokenizer, folder: str | Path, weights: str = "averaged", layout: str | None = None
) -> None:
    """Write a tokenizer as the release does: a VAE file with its LoRA tensors and a quantizer file, in float32.

    Args:
        tokenizer: with an attention quantizer; its adapters may be of any rank, or none.
        folder: the two files in it are replaced.
        weights: "averaged" writes vae_ema.pth and quantizer_ema.pth, "trained" vae.pth and quantizer.pth.
        layout: "ldm" or "diffusers"; None: latent diffusion's for a VAE whose encoder has attention at its last level,
            as MAR's, else diffusers'.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, expected 'averaged' or 'trained'")
    if not isinstance(tokenizer.quantizer, ResidualAttentionQuantizer):
        raise ValueError(f"the quantizer is {type(tokenizer.quantizer).__name__}, the release knows only attention's")
    layout = layout or layout_for(tokenizer.vae)
    states = {"vae": vae_state(tokenizer.vae, layout), "quantizer": tokenizer.quantizer.state_dict()}
    for part, state in states.items():
        plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        with atomic_write(Path(folder) / f"{part}{WEIGHTS[weights]}.pth", "wb") as file:
            torch.save(plain, file)


def layout_for(vae: ContinuousVAE) -> str:
    """The layout in which the release stores such a VAE."""
    return "ldm" if vae.autoencoder.config.down_block_types[-1].startswith("Attn") else "diffusers"


def vae_state(vae: ContinuousVAE, layout: str) -> dict[str, Tensor]:
    """The tensors of a VAE and of its adapters under the names of a layout, on the CPU."""
    plain = plain_copy(vae, merge=False).autoencoder
    state = published_state(plain, layout)
    if vae.adapter_settings is not None:
        levels = len(plain.config.block_out_channels)
        where, layers = vae.adapter_settings["where"], vae.adapter_settings["layers"]
        for name in adapted_convolutions(plain, where, layers):
            for ending, factor in FACTORS.items():
                value = vae.autoencoder.get_submodule(name).get_submodule(f"{factor}.default").weight
                state[published_name(name, layout, levels) + ending] = value.detach().cpu()
    return state


def _file(folder: Path, name: str) -> Path | None:
    return next((folder / (name + suffix) for suffix in SUFFIXES if (folder / (name + suffix)).is_file()), None)
