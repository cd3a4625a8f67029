"""Models on the Hugging Face Hub: the local copies of their files, a model as a repository, and its card."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from codalib.base.files import read_json
from codalib.base.paths import MANIFEST
from codalib.pretrained.registry import reason

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_TIMEOUT = 10  # seconds
CONFIG = "config.json"
CARD = """---
{header}
---
# {title}

{model} of [CODA](https://arxiv.org/abs/2503.17760), made with codalib {version}.

```python
from codalib import {kind}

model = {kind}.from_pretrained("{title}")
```

## Settings

{settings}

## Trained on

{training}

## Metrics

{metrics}

## Licence

{licence}, as whoever uploaded it states; the terms of the data and of the base VAE hold beside it.
"""
PROTOCOL = """
Measured by `{notebook}` on {images} of `{dataset}`, {resolution} x {resolution}, seed {seed}; PSNR and SSIM on 8-bit
images. What ends in `_effnet` is of EfficientNet-Lite0's features and cannot be compared with LPIPS or FID.
"""


@contextmanager
def asking(name: str) -> Iterator[None]:
    """Say in one sentence that the Hub did not answer for the repository NAME; ValueErrors pass."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # those of huggingface_hub's HTTP client, which is another in each of its versions
        raise ValueError(
            f"{name} could not be fetched from the Hub ({reason(error)}): without a network give a local folder; for a "
            "gated repository set HF_TOKEN, where the cache cannot be written HF_HOME"
        ) from error


def is_hub_name(source: str | Path, suffixes: Iterable[str] = ()) -> bool:
    """Whether SOURCE reads OWNER/NAME, has no ending of a file and its first part is no folder here."""
    path = Path(os.path.expanduser(source))
    return bool(HUB_NAME.fullmatch(str(source))) and not path.parent.exists() and path.suffix not in suffixes


def hub_file(repository: str, file: str, **revision: str) -> Path | None:
    """The local copy of a file on the Hub, None where there is no such file; what is here is not asked for again."""
    kept = huggingface_hub.try_to_load_from_cache(repository, file, **revision)
    if isinstance(kept, str):
        return Path(kept)
    url = huggingface_hub.hf_hub_url(repository, file, **revision)
    try:  # asked for once: without a network, hf_hub_download would try again for 23 s
        token = huggingface_hub.get_token() or False
        huggingface_hub.get_hf_file_metadata(url, token=token, timeout=HUB_TIMEOUT)
    except EntryNotFoundError:
        return None
    return Path(huggingface_hub.hf_hub_download(repository, file, **revision))


def model_folder(source: str | Path, parts: Callable[[Any], Iterable[str]]) -> Path:
    """The folder of a saved model: a local one as it is, or the copies of one on the Hub, all of one commit.

    What was fetched before is not asked for again, so that a newer upload of that name goes unseen here.

    PARTS gives, of its config.json, the names of its other files. Raises ValueError where the Hub has no such model.
    """
    path = Path(os.path.expanduser(source))
    if not is_hub_name(source):
        return path
    with asking(str(source)):
        config = hub_file(str(source), CONFIG)
        if config is None:
            raise ValueError(f"{source} on the Hub holds no {CONFIG}: expected what push_to_hub wrote there")
        for part in parts(read_json(config)):
            hub_file(str(source), part, revision=config.parent.name)
    return config.parent


class OnHub:
    """`push_to_hub` of a model with `save_pretrained`; its `from_pretrained` takes OWNER/NAME."""

    def push_to_hub(
        self,
        repository: str,
        licence: str,
        run: str | Path | None = None,
        private: bool = False,
        **saving: Any,
    ) -> str:
        """Upload the model and a card written from the manifest of its run; returns the repository's address.

        Args:
            repository: OWNER/NAME, made where it is not there yet; needs a token (HF_TOKEN or `hf auth login`).
            licence: of the weights, by its SPDX name such as "mit"; the data's and the base VAE's terms decide it.
            run: the folder of the run that trained it, whose manifest.json the card tells of; None: the card says so.
            saving: arguments of `save_pretrained`; a tokenizer takes its VAE along unless `base` names a public one.
        Raises:
            ValueError: no manifest there, no such name, or the Hub refuses.
        """
        if not HUB_NAME.fullmatch(repository):
            raise ValueError(f"expected a repository OWNER/NAME, got {repository!r}")
        manifest = {} if run is None else read_manifest(Path(os.path.expanduser(run)))
        with TemporaryDirectory() as work, asking(repository):
            folder = Path(work) / "model"
            self.save_pretrained(folder, **saving)
            (folder / "README.md").write_text(model_card(self, repository, licence, manifest), encoding="utf-8")
            api = huggingface_hub.HfApi()
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder)
        return str(address)


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a finished run; ValueError where there is none."""
    place = next((place for place in (run, run.parent) if (place / MANIFEST).is_file()), None)
    if place is None:
        raise ValueError(f"{run} holds no {MANIFEST}: expected the folder of the run that trained the model")
    manifest = read_json(place / MANIFEST)
    if manifest.get("state") != "finished":
        raise ValueError(f"{place} is the folder of a run that has not finished: expected a finished one")
    return manifest


def model_card(model: OnHub, repository: str, licence: str, manifest: Mapping[str, Any]) -> str:
    """The README.md of a model's repository: settings, training, metrics with their protocol, licence, loading."""
    from codalib import __version__

    own, found = manifest.get("parameters", {}), manifest.get("results", {}).get("metrics", {})
    settings = model.config() if hasattr(model, "config") else model.quantizer.config() | {"tokens": model.num_tokens}
    names = ("dataset", "limit", "vae", "tokenizer", "resolution", "steps", "batch_size", "learning_rate", "seed")
    training = {name: own[name] for name in names if own.get(name) is not None}
    training |= {name: manifest[name] for name in ("notebook", "commit") if manifest.get(name)}
    training |= {name: value for name, value in manifest.get("versions", {}).items() if name in ("python", "torch")}
    images = f"{own.get('val_limit') or 'all'} validation images"
    said = {"notebook": manifest.get("notebook"), "images": images}
    said |= {name: own.get(name, "?") for name in ("dataset", "resolution", "seed")}
    protocol = "" if hasattr(model, "config") else PROTOCOL.format(**said)  # a generator's are of its tokens
    header = huggingface_hub.ModelCardData(license=licence, library_name="codalib", tags=["coda", "arxiv:2503.17760"])
    return CARD.format(
        header=header.to_yaml(),
        title=repository,
        kind=type(model).__name__,
        model="The masked generator" if hasattr(model, "config") else "An image tokenizer",
        version=__version__,
        settings=_table(settings),
        training=_table(training) if training else "Not recorded.",
        metrics=_table(found) + "\n" + protocol if found else "Not recorded.",
        licence=licence,
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in values.items())
    return "\n".join(("| | |", "|---|---|", *rows))
