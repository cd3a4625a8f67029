"""Models by name: embedded ones, folders below runs/ and the weights folder, ours or as the release saves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codalib.base.paths import runs_folder
from codalib.models.maskgit import EMBEDDED_GENERATORS
from codalib.models.released import load_released_tokenizer
from codalib.models.tokenizer import CONFIG, EMBEDDED_TOKENIZERS, CodaTokenizer
from codalib.models.vae import PUBLISHED_VAES
from codalib.pretrained.registry import weights_folder


def find_model(name: str) -> str:
    """Where a model of a profile lies: the name of a known one, below runs/ or the weights folder, or NAME itself."""
    if name in {*PUBLISHED_VAES, *EMBEDDED_TOKENIZERS, *EMBEDDED_GENERATORS}:  # the embedded VAE is "emoji" too
        return name
    for place in (runs_folder(name), weights_folder() / name):
        if place.exists():
            return str(place)
    return name


def present_models(models: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """MODELS whose files are here, and those that are not, each name -> path."""
    here = {name: path for name, path in models.items() if Path(find_model(path)).expanduser().exists()}
    return here, {name: path for name, path in models.items() if name not in here}


def check_models(vaes: Mapping[str, str], tokenizers: Mapping[str, str]) -> None:
    """Raise ValueError where two models share a name, there is none, or a tokenizer's folder is not here."""
    if shared := vaes.keys() & tokenizers.keys():
        raise ValueError(f"a VAE and a tokenizer are both named {', '.join(sorted(shared))}: give each its own name")
    if not vaes and not tokenizers:
        raise ValueError("no model is given to measure: name a VAE or a tokenizer")
    for name, path in tokenizers.items():
        if path not in EMBEDDED_TOKENIZERS and not Path(find_model(path)).expanduser().exists():
            places = f"{runs_folder()}, {weights_folder()} and as a path"
            raise ValueError(f"the tokenizer of {name!r} is not here: looked for {path} in {places}")


def load_tokenizer(
    folder: str | Path, base: str | Path | None = None, backend: str = "auto", **released: Any
) -> CodaTokenizer:
    """A tokenizer, frozen and in evaluation mode: an embedded one, one of ours, or one as the release saves it.

    Args:
        folder: "emoji" or "emoji-small"; a folder of `CodaTokenizer.save_pretrained`; or one of the release's files.
        base: what `load_vae` takes for the VAE without adapters, where it is not the one that was saved.
        backend: the quantizer's (see `kernels.assignment`).
        released: further arguments of `models.released.load_released_tokenizer`, such as `scales`.
    Raises:
        ValueError: no tokenizer there, parts that do not fit, or a setting of the release's for a folder of ours.
    """
    known = str(folder) in EMBEDDED_TOKENIZERS
    if known or (Path(folder).expanduser() / CONFIG).exists():
        if released:
            raise ValueError(f"expected {', '.join(released)} only for a folder of the release, got {folder}, of ours")
        return CodaTokenizer.from_pretrained(folder if known else Path(folder).expanduser(), base, backend)
    return load_released_tokenizer(folder, base=base, backend=backend, **released)
