"""Models by name: embedded ones, and folders below runs/ and the weights folder."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from codalib.base.files import file_digest
from codalib.base.paths import DATA, runs_folder
from codalib.pretrained.registry import weights_folder

EMOJI_VAE = DATA / "vae-emoji"
PUBLISHED_VAES = ("kl16", "flux")  # the paper's two, by their names in `pretrained.registry.NETWORKS`
EMBEDDED_TOKENIZERS = {  # name -> folder
    "emoji": DATA / "tokenizer-emoji",  # 332 tokens an image
    "emoji-small": DATA / "tokenizer-emoji-small",  # 149 tokens, for generators that are trained on a processor
}
EMBEDDED_GENERATORS = {  # name -> folder; of the tokenizer "emoji-small"
    "emoji-class": DATA / "maskgit-emoji-class",
    "emoji-text": DATA / "maskgit-emoji-text",
}
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def find_model(name: str) -> str:
    """Where a model of a profile lies: the name of a known one, below runs/ or the weights folder, or NAME itself."""
    if name in {*PUBLISHED_VAES, *EMBEDDED_TOKENIZERS, *EMBEDDED_GENERATORS}:  # the embedded VAE is "emoji" too
        return name
    places = (runs_folder(name), weights_folder() / name)
    return next((str(place) for place in places if place.exists()), name)


def present_models(models: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """MODELS whose files are here, and those that are not, each name -> path."""
    here = {name: path for name, path in models.items() if Path(os.path.expanduser(find_model(path))).exists()}
    return here, {name: path for name, path in models.items() if name not in here}


def check_models(vaes: Mapping[str, str], tokenizers: Mapping[str, str]) -> None:
    """Raise ValueError where two models share a name, there is none, or a tokenizer's folder is not here."""
    if shared := vaes.keys() & tokenizers.keys():
        raise ValueError(f"expected a name of its own for each model, got a VAE and a tokenizer named {sorted(shared)}")
    if not vaes and not tokenizers:
        raise ValueError("expected a VAE or a tokenizer to evaluate, got no model")
    for name, path in tokenizers.items():
        if path not in EMBEDDED_TOKENIZERS and not Path(os.path.expanduser(find_model(path))).exists():
            places = f"{runs_folder()}, {weights_folder()} and as a path"
            raise ValueError(f"the tokenizer of {name!r} is not here: looked for {path} in {places}")


def weights_digest(place: str | Path) -> str:
    """Changes with the bytes of a model's files: 16 hex digits.

    `place` is a file, or a folder of which the weights and the JSON files below it count, with their names there, but
    no manifest of a run and nothing hidden. A base VAE elsewhere is not read: its digest stands in the config.json.
    Raises ValueError where there is no such file.
    """
    place = Path(os.path.expanduser(place))
    if place.is_file():
        return file_digest(place)[:16]
    files = {
        path.relative_to(place).as_posix(): path
        for path in place.rglob("*")
        if (path.suffix in WEIGHT_SUFFIXES or (path.suffix == ".json" and not path.match("manifest*.json")))
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
    }
    if not files:
        raise ValueError(f"{place} holds no weights: expected the file or the folder of a model")
    lines = [f"{file_digest(path)} {name}" for name, path in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
