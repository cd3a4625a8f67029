"""Loading, saving and finding models: ours (`ours`), the authors' (`released`), and by name (`names`)."""

import os
from pathlib import Path
from typing import Any

from codalib.models.checkpoints.names import (
    EMBEDDED_GENERATORS,
    EMBEDDED_TOKENIZERS,
    EMOJI_VAE,
    PUBLISHED_VAES,
    check_models,
    find_model,
    present_models,
    weights_digest,
)
from codalib.models.checkpoints.ours import load_adapters, load_vae, save_adapters
from codalib.models.checkpoints.released import export_tokenizer, load_kl16, load_quantizer, load_released_tokenizer
from codalib.models.hub import CONFIG, is_hub_name
from codalib.models.tokenizer import CodaTokenizer

__all__ = [
    "EMBEDDED_GENERATORS",
    "EMBEDDED_TOKENIZERS",
    "EMOJI_VAE",
    "PUBLISHED_VAES",
    "check_models",
    "export_tokenizer",
    "find_model",
    "load_adapters",
    "load_kl16",
    "load_quantizer",
    "load_tokenizer",
    "load_vae",
    "present_models",
    "save_adapters",
    "weights_digest",
]


def load_tokenizer(
    folder: str | Path, base: str | Path | None = None, backend: str = "auto", **released: Any
) -> CodaTokenizer:
    """A tokenizer, frozen and in evaluation mode: an embedded one, one of ours, or one as the release saves it.

    Args:
        folder: "emoji" or "emoji-small"; a folder of `CodaTokenizer.save_pretrained`, or OWNER/NAME of
            `push_to_hub`; or one of the release's files.
        base: what `load_vae` takes for the VAE without adapters, where it is not at the place that was saved.
        backend: the quantizer's (see `kernels.assignment`).
        released: further arguments of `load_released_tokenizer`, such as `scales`.
    Raises:
        ValueError: no tokenizer there, parts that do not fit, or a setting of the release's for a folder of ours.
    """
    known = str(folder) in EMBEDDED_TOKENIZERS
    place = Path(folder if known else os.path.expanduser(folder))
    if known or (place / CONFIG).exists() or is_hub_name(folder):
        if released:
            raise ValueError(f"expected {', '.join(released)} only for a folder of the release, got {folder}, of ours")
        return CodaTokenizer.from_pretrained(folder, base, backend)
    return load_released_tokenizer(folder, base=base, backend=backend, **released)
