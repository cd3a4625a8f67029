"""Token cache: a data set's images as a tokenizer's indices, encoded once, in shards, for the generator's training.

A cache is a folder: `manifest.json` (which tokenizer, which data), `captions.json` and `names.json` (each image's),
`codes.safetensors` (the codes' values) and, while it is made, `shards/NNNNN.safetensors`. A shard appears whole or not
at all, and what is there is not encoded again: an interrupted stage goes on with the next shard, and processes share a
data set by sharing its shards. Once all are there they become `columns/NAME.npy`, which every process maps into its
memory instead of reading it: the system holds one copy for all. A cache of an earlier version, shards alone, is
assembled when it is first opened.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from codalib.base.files import atomic_folder, atomic_write, read_json, write_json, writing
from codalib.base.processes import make_accelerator
from codalib.base.seeds import SEED_STRIDE, check_seed, sample_generators
from codalib.datasets.images import (
    EndlessOrder,
    ImageDataset,
    UnreadableCount,
    load_dataset,
    readable_batches,
    share_content_digests,
)
from codalib.models.checkpoints import load_tokenizer
from codalib.models.checks import check_whole
from codalib.models.maskgit import MaskGIT
from codalib.models.tokenizer import CodaTokenizer
from codalib.pretrained.registry import read_weights

MANIFEST, CAPTIONS, IMAGE_NAMES, CODES = "manifest.json", "captions.json", "names.json", "codes.safetensors"
SHARDS, COLUMNS = "shards", "columns"
NAMES = ("indices", "label", "image", "view")  # of the columns, in a shard and as files


class CacheMismatch(ValueError):
    """A cache belongs to another tokenizer or to other data than are asked for."""


def tokenizer_hash(tokenizer: CodaTokenizer) -> str:
    """Changes with every weight of a tokenizer and with all that decides its indices and images: 16 hex digits."""
    digest = hashlib.sha256(json.dumps(tokenizer.quantizer.config(), sort_keys=True).encode())
    digest.update(repr((tokenizer.vae.scale, tokenizer.vae.shift)).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_generator(model: MaskGIT, tokenizer: CodaTokenizer) -> MaskGIT:
    """MODEL, or CacheMismatch where it was trained on the tokens of another tokenizer than this."""
    mine = tokenizer_hash(tokenizer)
    if model.info.get("tokenizer") != mine:
        raise CacheMismatch(
            f"the generator was trained on the tokens of the tokenizer {model.info.get('tokenizer')}, expected {mine}: "
            "give it the tokenizer that it was trained with"
        )
    return model


def index_type(codebook_size: int) -> type[np.integer]:
    """The smallest unsigned type that holds the indices 0 to K - 1."""
    return next(kind for kind in (np.uint8, np.uint16, np.uint32) if codebook_size - 1 <= np.iinfo(kind).max)


@dataclass(frozen=True)
class CacheSettings:
    """How a data set is encoded."""

    views: int = 1  # times that each image is encoded; with the data set's `random_crop` each with a crop of its own
    flip: bool = False  # mirror every second view, left to right
    sample: bool = True  # latents drawn from the posterior, as the release does; False: its mean
    seed: int = 0
    batch_size: int = 64  # images
    workers: int = 0  # data loading processes
    shard_images: int = 1024

    def __post_init__(self) -> None:
        check_whole(1, views=self.views, batch_size=self.batch_size, shard_images=self.shard_images)
        check_whole(0, workers=self.workers)
        check_seed(self.seed)


def cache_tokens(
    tokenizer: CodaTokenizer,
    dataset: ImageDataset,
    folder: str | Path,
    settings: CacheSettings = CacheSettings(),
    process: tuple[int, int] = (0, 1),
) -> Path:
    """Encode a data set into FOLDER, each image once a view; goes on with what an interrupted call left.

    The noise of an image's latents, its crop and its flip depend on the seed, the view and the image alone: the indices
    do not change with the batch or the number of processes (but for the rounding of sums).

    Args:
        tokenizer: on the device that is to do the work.
        process: (rank, world_size) of this process; it takes every world_size-th shard.
    Returns:
        FOLDER, complete once all processes are through.
    Raises:
        CacheMismatch: FOLDER holds another tokenizer's or other data's tokens, whatever the data set is called.
    """
    if dataset.resolution != tokenizer.resolution:
        raise ValueError(f"expected images of {tokenizer.resolution} pixels, got {dataset.resolution}")
    folder, positions = Path(folder), len(dataset) * settings.views
    manifest = _manifest(tokenizer, dataset, settings)
    _begin(folder, manifest, tokenizer, dataset)
    rank, world_size = process
    mine = () if (folder / COLUMNS).exists() else range(rank, manifest["shards"], world_size)
    missing = [number for number in mine if not _shard(folder, number).exists()]
    unreadable = UnreadableCount(dataset, settings.views, world_size)
    for number in tqdm(missing, desc="tokens", disable=rank > 0, mininterval=2.0):
        start = number * settings.shard_images
        numbers = range(start, min(start + settings.shard_images, positions))
        arrays = _encode(tokenizer, dataset, numbers, settings, unreadable)
        with atomic_write(_shard(folder, number), "wb") as file:
            file.write(save(arrays, {"manifest": _manifest_digest(manifest)}))
    unreadable.report()
    return folder


def cache_dataset(
    tokenizer: str,
    dataset: str,
    split: str,
    folder: str | Path,
    limit: int | None = None,
    random_crop: bool = False,
    settings: CacheSettings = CacheSettings(),
) -> None:
    """`cache_tokens` from names, for `base.processes.launch`: every process opens the two and takes its shards.

    `tokenizer` is what `models.checkpoints.load_tokenizer` takes, `dataset` what `load_dataset` does.
    """
    accelerator = make_accelerator()
    opened = load_tokenizer(tokenizer).to(accelerator.device)
    images = load_dataset(dataset, split, opened.resolution, random_crop, limit)
    share_content_digests(images)
    cache_tokens(opened, images, folder, settings, (accelerator.process_index, accelerator.num_processes))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        assemble(Path(folder))
    accelerator.wait_for_everyone()


def _manifest(tokenizer: CodaTokenizer, dataset: ImageDataset, settings: CacheSettings) -> dict[str, Any]:
    """What decides a cache's tokens, and how many shards they fill."""
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "codebook_size": tokenizer.quantizer.codebook_size,
        "scales": list(tokenizer.quantizer.scales),
        "dataset": dataset.name,
        "classes": list(dataset.classes),
        "images": len(dataset),
        "content": dataset.content_digest,
        "resolution": dataset.resolution,
        "random_crop": dataset.random_crop,
        "views": settings.views,
        "flip": settings.flip,
        "sample": settings.sample,
        "seed": settings.seed,
        "shard_images": settings.shard_images,
        "shards": -(-len(dataset) * settings.views // settings.shard_images),
    }


def _manifest_digest(manifest: dict[str, Any]) -> str:
    """Of all that decides the tokens: not of the data set's name, which may change."""
    values = {key: value for key, value in manifest.items() if key != "dataset"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _begin(folder: Path, manifest: dict[str, Any], tokenizer: CodaTokenizer, dataset: ImageDataset) -> None:
    """Write what describes the cache, the same from every process, or make sure that what is there says the same."""
    tokens = [name for name in (SHARDS, COLUMNS) if (folder / name).exists()]  # before the manifest: they come after it
    there = (folder / MANIFEST).exists()
    if there:
        found = read_json(folder / MANIFEST)
        if not isinstance(found, dict) or "tokenizer" not in found:
            raise CacheMismatch(f"{folder / MANIFEST} is of no token cache: choose another folder")
        if odd := [key for key in manifest if found.get(key) != manifest[key] and key != "dataset"]:
            differences = ", ".join(f"{key} {found.get(key)} there and {manifest[key]} here" for key in odd)
            raise CacheMismatch(f"{folder} holds other tokens: {differences}; remove it or choose another folder")
    elif tokens:
        raise CacheMismatch(f"{folder / tokens[0]} has no {MANIFEST} to say what it holds: remove {folder}, run again")
    beside = [name for name in (CAPTIONS, IMAGE_NAMES, CODES) if not (there and (folder / name).exists())]
    # The folder may be one that is only read, of before there were names too.
    if not beside or (beside == [IMAGE_NAMES] and not os.access(folder, os.W_OK)):
        return
    with writing(folder):
        for name, own in ((CAPTIONS, "captions"), (IMAGE_NAMES, "name")):
            if name in beside:
                write_json(folder / name, [getattr(item, own) for item in dataset.items])
        if CODES in beside:
            with atomic_write(folder / CODES, "wb") as file:
                file.write(save({"values": tokenizer.quantizer.code_values.cpu().numpy()}))
        if not there:
            write_json(folder / MANIFEST, manifest)  # last: where it is, the others were


@torch.no_grad()
def _encode(
    tokenizer: CodaTokenizer,
    dataset: ImageDataset,
    numbers: range,
    settings: CacheSettings,
    unreadable: UnreadableCount,
) -> dict[str, np.ndarray]:
    """The arrays of one shard: NUMBERS count the images view after view."""
    device = next(tokenizer.parameters()).device
    runs = {number: settings.seed * SEED_STRIDE + number // len(dataset) for number in numbers}  # a seed a view
    keys = [(number % len(dataset), (runs[number] * SEED_STRIDE + number) % 2**63) for number in numbers]
    kind, columns = index_type(tokenizer.quantizer.codebook_size), {"indices": [], "label": [], "image": [], "view": []}
    view_of = iter(numbers)
    for batch in readable_batches(dataset, settings.batch_size, keys, settings.workers, unreadable):
        chosen = [_next_of(view_of, image, len(dataset)) for image in batch["index"].tolist()]
        views = torch.tensor([number // len(dataset) for number in chosen])
        images = batch["image"]
        if settings.flip:
            images = torch.where((views % 2 == 1)[:, None, None, None], images.flip(3), images)
        noise = [rng for number in chosen for rng in sample_generators(runs[number], [number])]
        indices = tokenizer.encode(images.to(device), settings.sample, noise)
        columns["indices"].append(torch.cat([level.flatten(1) for level in indices], dim=1).cpu().numpy().astype(kind))
        columns["label"].append(batch["label"].numpy().astype(np.int32))
        columns["image"].append(batch["index"].numpy().astype(np.int32))
        columns["view"].append(views.numpy().astype(np.int32))
    if not columns["label"]:
        empty = np.zeros(0, np.int32)
        return {"indices": np.zeros((0, tokenizer.num_tokens), kind), "label": empty, "image": empty, "view": empty}
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _next_of(numbers: Iterator[int], image: int, images: int) -> int:
    """The next position that shows IMAGE; those between are of unreadable images."""
    return next(number for number in numbers if number % images == image)


def _shard(folder: Path, number: int) -> Path:
    return folder / SHARDS / f"{number:05d}.safetensors"


def assemble(folder: Path) -> None:
    """Make one file a column of a cache's shards, a shard at a time, and remove them; nothing where that is done.

    One process works, others that call it meanwhile wait. ValueError where shards are missing or broken; says which.
    """
    if not (folder / SHARDS).exists():
        return
    with writing(folder), FileLock(folder / ".assembling"):
        if not (folder / COLUMNS).exists():
            manifest = read_json(folder / MANIFEST, "shards")
            paths = [_shard(folder, number) for number in range(manifest["shards"])]
            if missing := [path.name for path in paths if not path.exists()]:
                raise ValueError(
                    f"{folder} lacks {len(missing)} of its {len(paths)} shards ({missing[0]}, ...): run its stage again"
                )
            _write_columns(paths, folder / COLUMNS, _manifest_digest(manifest))
        shutil.rmtree(folder / SHARDS, ignore_errors=True)


def _write_columns(shards: Sequence[Path], folder: Path, manifest: str) -> None:
    rows = sum(_rows(path, manifest) for path in shards)
    first = load_file(shards[0])
    with atomic_folder(folder) as new:
        columns = {
            name: np.lib.format.open_memmap(new / f"{name}.npy", "w+", own.dtype, (rows, *own.shape[1:]))
            for name, own in first.items()
        }
        start = 0
        for path in tqdm(shards, desc="one file of the shards", delay=5, leave=False, mininterval=2.0):
            part = load_file(path)
            stop = start + len(part["label"])
            for name, column in columns.items():
                column[start:stop] = part[name]
            start = stop
        for column in columns.values():
            column.flush()  # before the shards are removed


def _mapped(column: Path) -> np.ndarray:
    try:
        found = np.lib.format.open_memmap(column, mode="r")
        whole = found.offset + found.nbytes == column.stat().st_size
        if not (whole and found.dtype.isnative and found.dtype.kind in "iu"):
            raise ValueError(f"its head speaks of {found.shape} {found.dtype}")
    except (ValueError, OSError, SyntaxError, TokenError) as error:  # the last two of a damaged head
        raise ValueError(f"{column} cannot be read ({error}): remove its folder and run its stage again") from error
    return np.asarray(found)


def encoded_rows(folder: Path) -> int:
    """How many images and views the cache of FOLDER holds by now; ValueError for a file that cannot be read."""
    if (folder / COLUMNS).exists():
        return len(_mapped(folder / COLUMNS / "label.npy"))
    return sum(_rows(shard) for shard in (folder / SHARDS).glob("*.safetensors"))


def _rows(shard: Path, manifest: str | None = None) -> int:
    try:
        with safe_open(shard, "np") as file:
            if manifest and (file.metadata() or {}).get("manifest", manifest) != manifest:  # of two runs in one folder
                raise CacheMismatch(
                    f"{shard} holds other tokens than {MANIFEST} says: remove {shard.parent.parent}, run again"
                )
            return file.get_slice("label").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} cannot be read ({error}): remove it and run its stage again") from error


class TokenCache:
    """A complete cache, mapped from its files in its small integer type; N images and views.

    Item access is by `batch`, training order by `batches`; only the rows that a batch asks for are copied.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], columns: dict[str, np.ndarray]):
        self.folder, self.manifest = folder, manifest
        self.indices, self._label = columns["indices"], columns["label"]  # (N, L), (N,)
        self.image, self.view = columns["image"], columns["view"]  # (N,): which image of the data set, which view
        self.captions: list[list[str]] = read_json(folder / CAPTIONS)  # an image's, one at least
        if len({len(own) for own in columns.values()}) > 1:
            raise ValueError(f"{folder / COLUMNS} holds columns of different lengths: remove {folder}, run again")
        shape = self.indices.shape
        if shape != (len(self.image), width := sum(side * side for side in self.scales)):
            raise ValueError(
                f"expected {width} tokens a row in {folder / COLUMNS}, as its scales say, got {shape}: "
                f"remove {folder}, run again"
            )

    @classmethod
    def open(cls, folder: str | Path, tokenizer_hash: str | None = None) -> "TokenCache":
        """Map a cache, whose shards become one file a column at its first opening.

        Raises:
            CacheMismatch: it was made by another tokenizer than that of `tokenizer_hash`.
            ValueError: no cache there, or shards missing or broken; says which.
        """
        folder = Path(folder)
        if missing := [name for name in (MANIFEST, CAPTIONS) if not (folder / name).exists()]:
            raise ValueError(
                f"{folder} holds no whole token cache, {missing[0]} is missing: make it with `codalib encode` or the "
                "stage that did; both leave what is there"
            )
        manifest = read_json(folder / MANIFEST, "tokenizer", "scales", "codebook_size", "classes", "shards")
        if tokenizer_hash is not None and manifest["tokenizer"] != tokenizer_hash:
            raise CacheMismatch(
                f"the tokens of {folder} were made by the tokenizer {manifest['tokenizer']}, expected "
                f"{tokenizer_hash}: encode the data again with this tokenizer, into another folder"
            )
        assemble(folder)
        return cls(folder, manifest, {name: _mapped(folder / COLUMNS / f"{name}.npy") for name in NAMES})

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def tokenizer(self) -> str:
        """The tokenizer's hash."""
        return self.manifest["tokenizer"]

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(self.manifest["scales"])

    @property
    def codebook_size(self) -> int:
        return self.manifest["codebook_size"]

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(self._label.astype(np.int64))

    @cached_property
    def names(self) -> list[str]:
        """Each image's, as its data set has it: a path, a tar's member, a row; its number in a cache of before."""
        path = self.folder / IMAGE_NAMES
        return read_json(path) if path.exists() else [str(number) for number in range(len(self.captions))]

    @cached_property
    def code_values(self) -> Tensor:
        """What each code adds to the latents, (K, C)."""
        return read_weights(self.folder / CODES)["values"]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the tokens and labels: 16 hex digits."""
        digest = hashlib.sha256(self.tokenizer.encode())
        for array in (self.indices, self._label, self.image):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(json.dumps(self.captions).encode())
        return digest.hexdigest()[:16]

    def batch(self, rows: Sequence[int], choices: Sequence[int] | None = None) -> dict[str, Any]:
        """Some rows: {"tokens" (B, L) int64, "label" (B,), "caption" list, "index" (B,), the image's number}.

        Of an image's n captions the one of number `choices` modulo n is taken; None: the first.
        """
        rows = np.asarray(rows)
        captions = [self.captions[image] for image in self.image[rows]]
        choices = choices or [0] * len(rows)
        return {
            "tokens": torch.from_numpy(self.indices[rows].astype(np.int64)),
            "label": torch.from_numpy(self._label[rows].astype(np.int64)),
            "caption": [own[choice % len(own)] for own, choice in zip(captions, choices, strict=True)],
            "index": torch.from_numpy(self.image[rows].astype(np.int64)),
        }

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Endless batches of `batch_size` for this process, from global step `start_step` on.

        The order is that of `datasets.images.EndlessOrder`: a function of the seed and the step, the processes' union
        independent of their number; an epoch shows every view once, with a caption drawn anew.
        """
        order = iter(EndlessOrder(len(self), seed, start_step * batch_size * world_size, rank, world_size))
        while True:
            yield self.batch(*zip(*(next(order) for _ in range(batch_size)), strict=True))
