"""Our own folders: the VAE, its adapters, tokenizers and MaskGIT; weights as safetensors, settings as JSON."""

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save, save_file
from torch import Tensor

from codalib.base.files import atomic_folder, atomic_write, read_json, sha256, write_json
from codalib.base.paths import MANIFEST, embedded
from codalib.models.adapters import ADAPTED_PARTS, add_adapters
from codalib.models.checkpoints.names import (
    EMBEDDED_GENERATORS,
    EMBEDDED_TOKENIZERS,
    EMOJI_VAE,
    PUBLISHED_VAES,
    WEIGHT_SUFFIXES,
)
from codalib.models.hub import CONFIG, asking, hub_file, is_hub_name, model_folder
from codalib.models.maskgit import MaskGIT
from codalib.models.quantizer_kinds import quantizer_from_config
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.registry import (
    MissingWeights,
    differences,
    find_weights,
    load_checked,
    raise_differences,
    read_weights,
    reason,
    shapes_of,
)
from codalib.pretrained.vae_layouts import build_autoencoder, vae_tensors

VAE_CLASS = AutoencoderKL.__name__
VAE_STEM = "diffusion_pytorch_model"
VAE_FILES = tuple(  # diffusers' names of a VAE's weights, the first that is there is read
    f"{VAE_STEM}.{ending}"
    for ending in ("safetensors", "safetensors.index.json", "fp16.safetensors", "bin", "fp16.bin")
)
WEIGHTS = "model.safetensors"
QUANTIZER_WEIGHTS = "quantizer.safetensors"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapters.safetensors", "adapters.json"
STORED_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put PATH before the sentence of a ValueError, a TypeError or a KeyError from the block."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: expected {error} in it, got none") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {reason(error)}") from error


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


# --- the VAE and its adapters -----------------------------------------------------------------------------------------
def load_vae(
    name: str | Path, subfolder: str | None = None, scale: float | None = None, shift: float | None = None
) -> ContinuousVAE:
    """Load a continuous VAE, frozen and in evaluation mode.

    Args:
        name: "emoji" (embedded); "kl16" or "flux" (the paper's two, from the weights folder); a folder written by
            diffusers' `save_pretrained`; a file in latent diffusion's layout (MAR's kl16.safetensors) or in diffusers';
            or a Hub name OWNER/NAME such as "stabilityai/sd-vae-ft-mse", a gated one with the token from the
            environment (HF_TOKEN). What has more parts, or a first part that is a folder here, is a path.
        subfolder: where the VAE lies below the folder or Hub name; of a Hub name without a config.json, "vae".
        scale, shift: of the latents, (z - shift) * scale; None: what the config.json states, or of a file without one
            what belongs to the architecture (`pretrained.vae_layouts.RECOGNISED`).
    Raises:
        ValueError: nothing loadable under that name, tensors that do not fit, or an unknown scale.
    """
    source = embedded(EMOJI_VAE) if name == "emoji" else name
    if name in PUBLISHED_VAES:
        try:
            source = find_weights(str(name))
        except MissingWeights as error:
            raise ValueError(str(error)) from error
    path = Path(os.path.expanduser(source))
    if path.is_file() and not (path.name.startswith(VAE_STEM) and (path.parent / CONFIG).exists()):
        autoencoder = _read_vae(path, None, scale, shift)
    elif path.exists():
        autoencoder = _read_vae_folder(path / (subfolder or ""), scale, shift)
    elif is_hub_name(source, WEIGHT_SUFFIXES):
        autoencoder = _read_vae_folder(_hub_folder(str(source), subfolder), scale, shift)
    else:
        known = ", ".join(("emoji", *PUBLISHED_VAES))
        raise ValueError(f"{path} is not here: expected {known}, a diffusers folder, a file, or a Hub name OWNER/NAME")
    return ContinuousVAE(autoencoder).eval().requires_grad_(False)


def _read_vae_folder(folder: Path, scale: float | None, shift: float | None) -> AutoencoderKL:
    """The autoencoder of a folder of diffusers, or of one of the files in it."""
    files = (folder.name,) if folder.is_file() else VAE_FILES
    folder = folder.parent if folder.is_file() else folder
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}: expected a folder written by {VAE_CLASS}.save_pretrained")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("_class_name") != VAE_CLASS:
        found = config.get("_class_name") or ", ".join(config) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"expected the config of an {VAE_CLASS} in {folder / CONFIG}, got {found}")
    path = next((folder / name for name in files if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds no weights: expected {VAE_FILES[0]}, or another of {', '.join(VAE_FILES)}")
    return _read_vae(path, config, scale, shift)


def _read_vae(path: Path, config: Mapping | None, scale: float | None, shift: float | None) -> AutoencoderKL:
    state = _read_shards(path) if path.suffix == ".json" else read_weights(path)
    if any(".lora_layer." in name for name in state):
        raise ValueError(
            f"{path} holds adapters beside its VAE: open its folder with codalib.models.checkpoints.load_tokenizer"
        )
    with naming(path):
        return build_autoencoder(vae_tensors(state), config, scale, shift)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of sharded weights names; they lie beside it."""
    names = set(read_json(index)["weight_map"].values())
    if outside := sorted(name for name in names if Path(name).name != name or "\\" in name):
        raise ValueError(f"{index}: expected files beside it, got {', '.join(outside[:3])}")
    return {name: value for file in sorted(names) for name, value in read_weights(index.parent / file).items()}


def _hub_folder(name: str, subfolder: str | None) -> Path:
    """The folder of local copies of a VAE on the Hub; what was fetched before is not asked for again."""
    with asking(name):
        for inside in ("", "vae/") if subfolder is None else (f"{subfolder}/",):
            if config := hub_file(name, inside + CONFIG):
                any(hub_file(name, inside + file) for file in VAE_FILES if not file.endswith(".json"))  # the first
                return config.parent
    raise ValueError(f"{name} on the Hub holds no {CONFIG}: expected a VAE of diffusers, or give its subfolder")


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
    write_json(Path(folder) / ADAPTER_CONFIG, vae.adapter_settings | {"vae_digest": vae_digest(vae)})


def load_adapters(vae: ContinuousVAE, folder: str | Path) -> ContinuousVAE:
    """Add the adapters of a folder written by `save_adapters` to their base VAE, in place."""
    folder = Path(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).exists():
            raise ValueError(f"{folder} holds no {name}: expected a folder written by save_adapters")
    state = read_weights(folder / ADAPTER_WEIGHTS)
    with naming(folder / ADAPTER_CONFIG):
        settings = read_json(folder / ADAPTER_CONFIG)
        check_digest(vae, settings)
        add_adapters(vae, settings["where"], settings["rank"], tuple(settings["layers"]))
    expected = shapes_of(get_peft_model_state_dict(vae.autoencoder))
    raise_differences(f"{folder / ADAPTER_WEIGHTS} on this VAE", differences(shapes_of(state), expected))
    set_peft_model_state_dict(vae.autoencoder, state)
    return vae


def vae_digest(vae: ContinuousVAE) -> str:
    """Changes with the function that a VAE is, without its adapters: 16 hex digits.

    That is its weights, their names and shapes, its scale and shift, and what none of these tell: its group
    normalisations' groups and its activation.
    """
    state = {n.replace(".base_layer", ""): v for n, v in vae.autoencoder.state_dict().items() if ".lora_" not in n}
    config = vae.autoencoder.config
    digest = hashlib.sha256(repr((vae.scale, vae.shift, config.norm_num_groups, config.act_fn)).encode())
    for name, value in sorted(_on_cpu(state).items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().numpy().data)
    return digest.hexdigest()[:16]


def check_digest(vae: ContinuousVAE, config: Mapping[str, Any]) -> None:
    """Raise ValueError where a config, saved since it records the VAE's digest, was saved on another than this."""
    if config.get("vae_digest", found := vae_digest(vae)) != found:
        raise ValueError(f"it was saved on the VAE {config['vae_digest']}, got the VAE {found}: give its own as base")


# --- tokenizers -------------------------------------------------------------------------------------------------------
def save_tokenizer(tokenizer: CodaTokenizer, folder: str | Path, base: str | Path | None = None) -> None:
    """`CodaTokenizer.save_pretrained`: the quantizer, the adapters, and the base VAE or its name.

    config.json records the digests of the base VAE and of the folder's other files, its parts, checked on loading.
    """
    with atomic_folder(folder) as new:
        if base is None:
            plain_copy(tokenizer.vae, merge=False).save_pretrained(new / "vae")
        if tokenizer.vae.adapter_settings is not None:
            save_adapters(tokenizer.vae, new)
        save_file(_on_cpu(tokenizer.quantizer.state_dict()), new / QUANTIZER_WEIGHTS)
        if base is not None and Path(base).exists():
            base = Path(base).resolve()  # found from any working directory
        config = {
            "vae": None if base is None else str(base),
            "vae_digest": vae_digest(tokenizer.vae),
            "parts": {p.relative_to(new).as_posix(): sha256(p) for p in sorted(new.rglob("*")) if p.is_file()},
            "quantizer": tokenizer.quantizer.config(),
        }
        write_json(new / CONFIG, config)


def load_saved_tokenizer(folder: str | Path, vae: str | Path | None = None, backend: str = "auto") -> CodaTokenizer:
    """`CodaTokenizer.from_pretrained`."""
    known = EMBEDDED_TOKENIZERS.get(str(folder))
    folder = embedded(known) if known else model_folder(folder, lambda config: config["parts"])
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}: expected a folder written by CodaTokenizer.save_pretrained")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not {"vae", "quantizer"} <= config.keys():
        raise ValueError(f"expected the vae and the quantizer of a tokenizer in {folder / CONFIG}, got another config")
    adapted = check_parts(folder, config)
    source = vae or config["vae"] or folder / "vae"
    if vae is None and ".." in Path(source).parts:
        raise ValueError(f"{folder / CONFIG} names the VAE {source}, outside of where it may point: give its base")
    with naming(folder):
        base = load_vae(source)
        check_digest(base, config)
    if adapted:
        load_adapters(base, folder)
    with naming(folder / CONFIG):
        quantizer = quantizer_from_config(config["quantizer"], backend)
    weights = folder / QUANTIZER_WEIGHTS
    load_checked(quantizer, read_weights(weights), f"{weights} with its {CONFIG}")
    check_contents(folder, config["parts"] if isinstance(config.get("parts"), Mapping) else {})
    tokenizer = CodaTokenizer(base, quantizer).eval().requires_grad_(False)
    tokenizer.base = str(source)
    return tokenizer


def check_parts(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer has adapters; ValueError where a part of its folder is missing, or adapters do not belong.

    A folder saved before its config recorded its parts has adapters where one of their two files is there, or where the
    manifest of its run, in it or above it, names convolutions that were adapted.
    """
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    adapters = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    parts = set(config.get("parts", ()))
    if not parts:
        manifest = next((path for path in (folder / MANIFEST, folder.parent / MANIFEST) if path.is_file()), None)
        settings = read_json(manifest).get("parameters", {}) if manifest else {}
        adapted = adapters & here or ADAPTED_PARTS.get(config.get("adapters", settings.get("adapters")))
        parts = {QUANTIZER_WEIGHTS} | (adapters if adapted else set()) | (set() if config["vae"] else {f"vae/{CONFIG}"})
    if missing := sorted(parts - here):
        raise ValueError(f"{folder} holds no {', '.join(missing)}, of the parts that its {CONFIG} names: copy it whole")
    if extra := sorted(adapters & here - parts):
        raise ValueError(f"{folder} holds {', '.join(extra)}, which its {CONFIG} does not name: remove what is not its")
    return adapters <= parts


def check_contents(folder: Path, recorded: Mapping[str, str]) -> None:
    """ValueError where a file has not the SHA-256 that a config recorded; earlier configs recorded none."""
    if odd := [name for name, digest in recorded.items() if sha256(folder / name) != digest]:
        raise ValueError(
            f"{', '.join(odd)} in {folder} changed since its {CONFIG} was written, by damage or as part of another "
            "model: copy the folder whole"
        )


# --- MaskGIT ----------------------------------------------------------------------------------------------------------
def save_maskgit(model: MaskGIT, folder: str | Path, dtype: str = "float32") -> None:
    """`MaskGIT.save_pretrained`: weights, settings and `info`, replacing the folder; `dtype` is how they are stored."""
    if dtype not in STORED_TYPES:
        raise ValueError(f"expected a dtype of {', '.join(STORED_TYPES)}, got {dtype!r}")
    state = {name: value.to(STORED_TYPES[dtype]) for name, value in _on_cpu(model.state_dict()).items()}
    with atomic_folder(folder) as new:
        save_file(state, new / WEIGHTS)
        digest = sha256(new / WEIGHTS)
        write_json(new / CONFIG, {"model": model.config(), "info": model.info, "digest": digest})


def load_maskgit(folder: str | Path) -> MaskGIT:
    """`MaskGIT.from_pretrained`: a saved folder or one of `EMBEDDED_GENERATORS` by its name; float32, frozen."""
    known = EMBEDDED_GENERATORS.get(str(folder))
    path = embedded(known) if known else model_folder(folder, lambda config: [WEIGHTS])
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise ValueError(f"{path} holds no {CONFIG} and {WEIGHTS}: expected a folder of MaskGIT.save_pretrained")
    config, state = read_json(path / CONFIG, "model", "info"), read_weights(path / WEIGHTS)
    with naming(path / CONFIG):
        model, info = MaskGIT(**config["model"], code_values=state.get("code_values")), config["info"]
    load_checked(model, state, f"{path / WEIGHTS} with its {CONFIG}")
    check_contents(path, {WEIGHTS: config["digest"]} if "digest" in config else {})
    model.info = info
    return model.eval().requires_grad_(False)
