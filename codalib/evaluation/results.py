"""One cache of results: a JSON file each, whose name changes with everything that decides its numbers."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from codalib.base.files import read_json
from codalib.datasets.images import ImageDataset
from codalib.models.checkpoints import EMBEDDED_GENERATORS, EMBEDDED_TOKENIZERS, EMOJI_VAE, PUBLISHED_VAES, find_model
from codalib.models.checkpoints.names import weights_digest
from codalib.pretrained.registry import find_weights, has_weights

log = logging.getLogger(__name__)

PROTOCOL = 2  # part of every name: raised where results come to hold other numbers (2: bits per pixel)
EXECUTION = ("batch_size", "workers")  # settings that change no number
AUTO = {"frechet": "inception_fid", "perceptual": "vgg16_lpips"}  # setting -> the network of "auto" where it is here


def digest(*parts: Any) -> str:
    """12 hex digits of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def model_digest(name: str) -> str:
    """Changes with the bytes of a model, named as `find_model` takes it: its files and a tokenizer's base VAE."""
    if name in EMBEDDED_TOKENIZERS:  # "emoji" is the embedded VAE's name too
        return digest(weights_digest(EMBEDDED_TOKENIZERS[name]), weights_digest(EMOJI_VAE))
    if name in EMBEDDED_GENERATORS:
        return weights_digest(EMBEDDED_GENERATORS[name])
    if name in PUBLISHED_VAES:
        return weights_digest(find_weights(name))
    place = Path(find_model(name)).expanduser()
    return weights_digest(place) if place.exists() else name  # a repository of the Hub, by its name


def result_file(
    folder: Path, label: str, settings: Any, data: Iterable[ImageDataset], models: Iterable[str], *inputs: Any
) -> Path:
    """Where the result of LABEL lies in FOLDER: its name changes with everything that decides the result's numbers.

    Args:
        settings: a dataclass.
        data: the images; their bytes, labels and captions count, not their names or dates.
        models: named as `find_model` takes them; their weights' bytes count.
        inputs: what else decides the numbers, as JSON can write it.
    """
    values = {name: value for name, value in asdict(settings).items() if name not in EXECUTION}
    values |= {name: own for name, own in AUTO.items() if values.get(name) == "auto" and has_weights(own)}
    key = digest(
        PROTOCOL, label, values, [images.content_digest for images in data], list(map(model_digest, models)), inputs
    )
    words = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-") or "result"
    return folder / f"{words}-{key}.json"


def is_cached(file: Path, accelerator: Accelerator) -> bool:
    """Whether FILE is there and whole, the same answer for every process: the first one's, before it writes."""
    answer = [accelerator.is_main_process and _is_whole(file)]  # another machine may see it later
    return broadcast_object_list(answer)[0]


def _is_whole(file: Path) -> bool:
    """Whether FILE, JSON or safetensors, is there and can be read; a warning where it is damaged, so is made again."""
    if not file.exists():
        return False
    try:
        if file.suffix == ".json":
            read_results([file])
        else:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s is damaged (%s) and is made again", file, error)
        return False
    return True


def read_results(files: Iterable[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of some results, and the protocol of each metric; ValueError where a file holds none."""
    results = [read_json(file, "row", "protocol") for file in files]
    protocol = {metric: text for result in results for metric, text in result["protocol"].items()}
    return [result["row"] for result in results], protocol
