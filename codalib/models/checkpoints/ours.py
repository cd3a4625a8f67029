"""Our own folders: the VAE, its adapters, tokenizers and MaskGIT; weights as safetensors, settings as JSON."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from codalib.base.files import atomic_folder, atomic_write, write_json
from codalib.base.paths import embedded
from codalib.models.adapters import add_adapters
from codalib.models.checkpoints.names import EMBEDDED_GENERATORS, EMBEDDED_TOKENIZERS, EMOJI_VAE, PUBLISHED_VAES
from codalib.models.maskgit import MaskGIT
from codalib.models.quantizer_kinds import quantizer_from_config
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.registry import MissingWeights, find_weights, read_weights
from codalib.pretrained.vae_layouts import CONFIGS, build_autoencoder, differences, raise_differences, shapes_of

PUBLISHED_WIDTHS = tuple(config["block_out_channels"] for config in CONFIGS.values())
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt")  # files in latent diffusion's layout
CONFIG, WEIGHTS = "config.json", "model.safetensors"
QUANTIZER_WEIGHTS = "quantizer.safetensors"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapters.safetensors", "adapters.json"
STORED_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


# --- the VAE and its adapters -----------------------------------------------------------------------------------------
def load_vae(name: str | Path, subfolder: str | None = None) -> ContinuousVAE:
    """Load a continuous VAE, frozen and in evaluation mode.

    Args:
        name: "emoji" (embedded); "kl16" or "flux" (the paper's two, from the weights folder); a folder written by
            diffusers' `save_pretrained`; a file in latent diffusion's layout (MAR's kl16.safetensors); or a Hub name
            such as "stabilityai/sd-vae-ft-mse", a gated one with the token from the environment (HF_TOKEN). What
            follows the Hub name's two parts is the subfolder: "black-forest-labs/FLUX.1-dev/vae".
        subfolder: where the VAE lies below the folder or Hub name, e.g. "vae".
    Raises:
        ValueError: nothing loadable under that name; the message says what was looked for.
    """
    source = embedded(EMOJI_VAE) if name == "emoji" else name
    if name in PUBLISHED_VAES:
        try:
            source = find_weights(str(name))
        except MissingWeights as error:
            raise ValueError(str(error)) from error
    path = Path(source).expanduser()
    if path.suffix in CHECKPOINTS and path.is_file():
        return _load_checkpoint(path)
    folder, is_local = path / (subfolder or ""), path.exists()
    if is_local and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no config.json: expected a folder written by diffusers' AutoencoderKL.save_pretrained"
        )
    if not is_local and subfolder is None and len(parts := str(source).split("/")) > 2:
        source, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        autoencoder = AutoencoderKL.from_pretrained(
            folder if is_local else str(source), subfolder=None if is_local else subfolder
        )
    except (OSError, ValueError) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no VAE could be loaded from {source!s} ({reason}): give 'emoji', a diffusers folder or a Hub name"
        ) from error
    return ContinuousVAE(autoencoder.float()).eval().requires_grad_(False)


def _load_checkpoint(path: Path) -> ContinuousVAE:
    state = read_weights(path)
    if any(".lora_layer." in name for name in state):
        raise ValueError(
            f"{path} holds adapters beside its VAE: open its folder with codalib.models.checkpoints.load_tokenizer"
        )
    autoencoder = build_autoencoder(state)
    if autoencoder.config.block_out_channels not in PUBLISHED_WIDTHS:
        raise ValueError(
            f"{path} holds a VAE of widths {autoencoder.config.block_out_channels}, whose latent scale is not known: "
            "give it as a diffusers folder, whose config.json states the scale"
        )
    return ContinuousVAE(autoencoder).eval().requires_grad_(False)


def plain_copy(vae: ContinuousVAE, merge: bool) -> ContinuousVAE:
    """A copy without peft's layers: with `merge` the same function, the adapters added into their convolutions, else
    the VAE as it was before they were added."""
    vae = copy.deepcopy(vae)
    for name, layer in [(n, m) for n, m in vae.autoencoder.named_modules() if isinstance(m, LoraLayer)]:
        if merge:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(vae.autoencoder.get_submodule(parent), child, layer.get_base_layer())
    vae.adapter_settings = None
    return vae


def save_adapters(vae: ContinuousVAE, folder: str | Path) -> None:
    """Write the adapters alone: their weights (safetensors) and settings (JSON)."""
    if vae.adapter_settings is None:
        raise ValueError("this VAE holds no adapters to save")
    state = get_peft_model_state_dict(vae.autoencoder)
    with atomic_write(Path(folder) / ADAPTER_WEIGHTS, "wb") as file:
        file.write(save(_on_cpu(state)))
    write_json(Path(folder) / ADAPTER_CONFIG, vae.adapter_settings)


def load_adapters(vae: ContinuousVAE, folder: str | Path) -> ContinuousVAE:
    """Add the adapters of a folder written by `save_adapters` to their base VAE, in place."""
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} holds no {ADAPTER_CONFIG}: expected a folder written by save_adapters")
    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    add_adapters(vae, settings["where"], settings["rank"], tuple(settings["layers"]))
    state, expected = load_file(folder / ADAPTER_WEIGHTS), get_peft_model_state_dict(vae.autoencoder)
    raise_differences(f"the adapters of {folder} on this VAE", differences(shapes_of(state), shapes_of(expected)))
    set_peft_model_state_dict(vae.autoencoder, state)
    return vae


# --- tokenizers -------------------------------------------------------------------------------------------------------
def save_tokenizer(tokenizer: CodaTokenizer, folder: str | Path, base: str | Path | None = None) -> None:
    """`CodaTokenizer.save_pretrained`: the quantizer, the adapters, and the base VAE or its name."""
    with atomic_folder(folder) as new:
        if base is None:
            tokenizer.vae.save_pretrained(new / "vae")
        if tokenizer.vae.adapter_settings is not None:
            save_adapters(tokenizer.vae, new)
        save_file(_on_cpu(tokenizer.quantizer.state_dict()), new / QUANTIZER_WEIGHTS)
        config = {"vae": None if base is None else str(base), "quantizer": tokenizer.quantizer.config()}
        write_json(new / CONFIG, config)


def load_saved_tokenizer(folder: str | Path, vae: str | Path | None = None, backend: str = "auto") -> CodaTokenizer:
    """`CodaTokenizer.from_pretrained`."""
    known = EMBEDDED_TOKENIZERS.get(str(folder))
    folder = embedded(known) if known else Path(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}: expected a folder written by CodaTokenizer.save_pretrained")
    config = json.loads((folder / CONFIG).read_text())
    source = vae or config["vae"] or folder / "vae"
    base = load_vae(source)
    if (folder / ADAPTER_CONFIG).exists():
        load_adapters(base, folder)
    quantizer = quantizer_from_config(config["quantizer"], backend)
    state = load_file(folder / QUANTIZER_WEIGHTS)
    raise_differences(
        f"{folder / QUANTIZER_WEIGHTS} with its {CONFIG}",
        differences(shapes_of(state), shapes_of(quantizer.state_dict())),
    )
    quantizer.load_state_dict(state)
    tokenizer = CodaTokenizer(base, quantizer).eval().requires_grad_(False)
    tokenizer.base = str(source)
    return tokenizer


# --- MaskGIT ----------------------------------------------------------------------------------------------------------
def save_maskgit(model: MaskGIT, folder: str | Path, dtype: str = "float32") -> None:
    """`MaskGIT.save_pretrained`: weights, settings and `info`, replacing the folder; `dtype` is how they are stored."""
    if dtype not in STORED_TYPES:
        raise ValueError(f"expected a dtype of {', '.join(STORED_TYPES)}, got {dtype!r}")
    state = {name: value.to(STORED_TYPES[dtype]) for name, value in _on_cpu(model.state_dict()).items()}
    with atomic_folder(folder) as new:
        save_file(state, new / WEIGHTS)
        write_json(new / CONFIG, {"model": model.config(), "info": model.info})


def load_maskgit(folder: str | Path) -> MaskGIT:
    """`MaskGIT.from_pretrained`: a saved folder or one of `EMBEDDED_GENERATORS` by its name; float32, frozen."""
    known = EMBEDDED_GENERATORS.get(str(folder))
    path = embedded(known) if known else Path(folder).expanduser()
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise ValueError(f"{path} holds no {CONFIG} and {WEIGHTS}: expected a folder of MaskGIT.save_pretrained")
    config, state = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    try:
        model = MaskGIT(**config["model"], code_values=state.get("code_values"))
        model.load_state_dict(state)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {WEIGHTS} does not fit {CONFIG} ({str(error).splitlines()[0]})") from error
    model.info = config["info"]
    return model.eval().requires_grad_(False)
