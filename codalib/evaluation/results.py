"""One cache of results: a JSON file each, whose name changes with everything that decides its numbers."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from codalib.base.files import read_json
from codalib.models.checkpoints import EMBEDDED_GENERATORS, EMBEDDED_TOKENIZERS, EMOJI_VAE, PUBLISHED_VAES, find_model
from codalib.pretrained.registry import find_weights, has_weights

EXECUTION = ("batch_size", "workers")  # settings that change no number


def digest(*parts: Any) -> str:
    """12 hex digits of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def fingerprint(name: str) -> list[Any]:
    """The files of a model named as `find_model` takes it, with the times of their last change."""
    if name in EMBEDDED_TOKENIZERS:
        places = [EMBEDDED_TOKENIZERS[name], EMOJI_VAE]
    elif name in EMBEDDED_GENERATORS:
        places = [EMBEDDED_GENERATORS[name]]
    elif name in PUBLISHED_VAES:
        places = [find_weights(name)] if has_weights(name) else []
    else:
        places = [Path(find_model(name)).expanduser()]
    files = [file for place in places for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
    return [*map(str, places), *((file.name, file.stat().st_mtime_ns) for file in files)]


def result_file(folder: Path, label: str, settings: Any, models: Iterable[str], *inputs: Any) -> Path:
    """Where the result of LABEL lies in FOLDER, given a dataclass of settings, the models, and what else decides it."""
    values = {name: value for name, value in asdict(settings).items() if name not in EXECUTION}
    key = digest(values, [fingerprint(model) for model in models], inputs)
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-')}-{key}.json"


def is_cached(file: Path, accelerator: Accelerator) -> bool:
    """Whether FILE is there, the same answer for every process: all look before the first one writes."""
    cached = file.exists()
    accelerator.wait_for_everyone()
    return cached


def read_results(files: Iterable[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of some results, and the protocol of each metric."""
    results = [read_json(file) for file in files]
    protocol = {metric: text for result in results for metric, text in result["protocol"].items()}
    return [result["row"] for result in results], protocol
