"""Images in, tensors out: the emoji, folders, tables and tars of images, in a seeded order that a run can resume.

The order is a pure function of (seed, step): a run that stops at step s continues with exactly the images it would have
seen, whatever the number of processes or workers, and so do the random crops.
"""

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Sampler

from codalib.base.files import file_digests, printable
from codalib.base.paths import DATA, embedded, fetched
from codalib.datasets.archives import Row, Stored, class_names, table_rows, tar_rows
from codalib.datasets.pictures import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    DataError,
    UnreadableImage,
    read_rgb,
    square,
    to_tensor,
    visible,
    warn_of_unread,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


EMOJI_FOLDER = DATA / "emoji"
SPLITS = ("train", "val")
COCO_YEARS = (2014, 2017)  # U-ViT's and the paper's split is 2014's
TRAIN_ENLARGEMENT = 1.125  # shorter side before the random crop, as a multiple of the resolution (release)
HELD_OUT = 0.1  # fraction of a plain folder's images that is its validation split
HELD_OUT_IMAGES = 2  # at least, where a folder has twice as many: a Frechet distance takes two
COMPARED_IMAGES = 200_000  # of both splits, at most: of more, nearly every file has the size of another
MAX_UNREADABLE = 0.01  # fraction of a data set's images, and one at least; a run that meets more stops


@dataclass(frozen=True, slots=True)
class Item:
    """One image: where its bytes are, its class, its captions (one at least)."""

    name: str
    label: int
    captions: tuple[str, ...]
    stored: bytes | Stored | None = None  # None: read the file `name`
    group: str | None = None  # images of one group stay on one side of a split; None: it is alone

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]

    @property
    def picture(self) -> str | bytes:
        """The path of its file, or its bytes; UnreadableImage where these cannot be had."""
        if self.stored is None:
            return self.name
        return self.stored.read() if isinstance(self.stored, Stored) else self.stored


class ImageDataset(Dataset):
    """Labelled, captioned images at one resolution with the paper's transforms (section 5.1 and the release).

    Item i: dict of image float (3, r, r) in [-1, 1], label int, caption str, index int; None for an unreadable file.
    Training crops at random from a picture whose shorter side is 1.125 r, evaluation takes the centre at r, both
    resized by Lanczos. Of several captions the crop's seed takes one, evaluation the first.
    """

    def __init__(self, items: list[Item], classes: list[str], resolution: int, random_crop: bool, name: str = ""):
        self.items, self.classes, self.resolution = items, classes, resolution
        self.random_crop, self.name = random_crop, name
        self._guessed = False  # whether it was said that a picture's range of values is a guess

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def labels(self) -> torch.Tensor:
        """(N,) long."""
        return torch.tensor([item.label for item in self.items])

    @cached_property
    def content_digest(self) -> str:
        """Changes with the classes, the images' order, names, labels, captions and bytes: 16 hex digits.

        Names count from the folder that holds them all, so that a data set may be moved. Of a picture in an archive the
        archive's bytes and the place in it count.
        """
        files = [item.name for item in self.items if item.stored is None]
        contents = file_digests(files)
        root = os.path.commonpath({os.path.dirname(file) for file in files}) if files else ""
        digest = hashlib.sha256(repr(self.classes).encode())
        for item in self.items:
            if item.stored is None:
                content = contents[item.name]
            elif isinstance(item.stored, Stored):
                content = item.stored.content
            else:
                content = hashlib.sha256(item.stored).hexdigest()
            row = item.name.removeprefix(root), item.label, item.captions, item.group, content
            digest.update(repr(row).encode())
        return digest.hexdigest()[:16]

    @property
    def inputs(self) -> list:
        """All that decides what a training sees of the images: their content, and how they are cut."""
        return [self.content_digest, self.resolution, self.random_crop]

    def check_enough_images(self, processes: int) -> None:
        """Raise DataError where a process would have no image."""
        if len(self) < processes:
            raise DataError(
                f"expected an image of {self.name} for each of {processes} processes, got {len(self)}: "
                "take fewer processes"
            )

    def subset(self, indices: list[int]) -> "ImageDataset":
        items = [self.items[i] for i in indices]
        return ImageDataset(items, self.classes, self.resolution, self.random_crop, self.name)

    def without_unreadable(self) -> "ImageDataset":
        """The images that can be read, each opened once: for results that go image by image."""
        read = [i for batch in evaluation_batches(self, 64) for i in batch["index"].tolist()]
        return self if len(read) == len(self) else self.subset(read)

    def split_groups(self, fraction: float, seed: int = 0) -> tuple["ImageDataset", "ImageDataset"]:
        """The images of most groups, and those of a FRACTION of the groups, drawn by the seed; one group at least."""
        groups = sorted({item.group or item.name for item in self.items})
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = {groups[i] for i in order[: max(1, round(fraction * len(groups)))]}
        held_out = [i for i, item in enumerate(self.items) if (item.group or item.name) in drawn]
        return self.subset(sorted(set(range(len(self))) - set(held_out))), self.subset(held_out)

    def __getitem__(self, key: int | tuple[int, int]) -> dict | None:
        """`key` is an index, or (index, seed of the random crop)."""
        index, seed = key if isinstance(key, tuple) else (key, 0)
        item = self.items[index]
        try:
            rgb = read_rgb(item.picture, partial(self._warn_of_guess, item.name))
        except UnreadableImage as error:
            log.warning("skipped unreadable image %s (%s)", printable(item.name), printable(str(error)))
            return None
        generator = torch.Generator().manual_seed(seed) if self.random_crop else None
        side = round(self.resolution * TRAIN_ENLARGEMENT) if self.random_crop else self.resolution
        image = to_tensor(square(rgb, side, self.resolution, generator))
        caption = item.captions[seed % len(item.captions)]
        return {"image": image, "label": item.label, "caption": caption, "index": index}

    def _warn_of_guess(self, name: str, guess: str) -> None:
        if not self._guessed:
            log.warning("%s %s; others of %s may be alike", printable(name), guess, printable(self.name))
        self._guessed = True

    def readable(self, count: int, numbers: Iterable[int] | None = None) -> list[dict]:
        """The first COUNT items that can be read, of some NUMBERS in their order (None: all); DataError for none."""
        unreadable, found = UnreadableCount(self), []
        numbers = range(len(self)) if numbers is None else numbers
        for sample in map(self.__getitem__, numbers):
            unreadable.add(sample is None)
            found += [] if sample is None else [sample]
            if len(found) == count:
                break
        unreadable.report()
        if not found:
            raise DataError(f"no image of {self.name} that was asked for can be read: the warnings above say why")
        return found


def load_dataset(
    name: str,
    split: str,
    resolution: int,
    random_crop: bool | None = None,
    limit: int | None = None,
) -> ImageDataset:
    """Load a data set by name.

    Args:
        name: "emoji" (embedded, 9 classes, 64 x 64), "imagefolder:PATH" (PATH/train/CLASS/*.jpg, PATH/val/...),
            "coco:PATH" (PATH/annotations/captions_train2014.json, PATH/train2014/*.jpg and the same of val2014; or
            2017), "folder:PATH" (images of any sizes in PATH and below, all of one class; a tenth of them, chosen by
            their names, is the validation split), "parquet:PATH" (a Hub mirror's folder with train and validation in
            the names of its files or folders, or one file; columns image, label, caption), "hf:NAME" (what
            `datasets.load_dataset` takes: a folder or a name on the Hub, NAME:CONFIG for one of its configurations) or
            "webdataset:PATH/{000..127}.tar" (pictures with cls, txt or json; train, val or test in the names). The
            last three are measured on validation where there is one, else on test, else on a tenth that is held out.
            Both of `datasets` are written to its cache once, so that any row is reached at once: room for a second
            copy.
            Hidden files and folders are left out, and an environment variable in PATH is filled in:
            "imagefolder:$IMAGENET".
        split: "train" or "val".
        resolution: side of the square images, pixels.
        random_crop: the training transform; by default for the training split only.
        limit: keep this many images, evenly spread over the set.
    Raises:
        DataError: unknown name, missing folder or split, no images, or a picture that is in both splits of a folder.
        ValueError: a Git LFS pointer in place of a file.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if resolution < 1:
        raise DataError(f"resolution is {resolution}, expected a positive number of pixels")
    kind, _, path = name.partition(":")
    if name == "emoji":
        items, classes = _emoji(split)
    elif kind in KINDS and path:
        items, classes = KINDS[kind](_filled_in(path), split)
    else:
        known = ", ".join(f"'{kind}:PATH'" for kind in KINDS)
        raise DataError(f"data set is {name!r}, expected 'emoji' or one of {known}")
    if limit is not None:
        if limit < 1:
            raise DataError(f"limit is {limit}, expected at least 1 image")
        keep = np.linspace(0, len(items) - 1, min(limit, len(items))).round().astype(int)
        items = [items[i] for i in keep]
    return ImageDataset(items, classes, resolution, split == "train" if random_crop is None else random_crop, name)


def _emoji(split: str) -> tuple[list[Item], list[str]]:
    path = embedded(EMOJI_FOLDER / f"{split}.parquet")
    classes = json.loads((EMOJI_FOLDER / "summary.json").read_text())["classes"]
    rows = pq.read_table(path, columns=["image", "label", "caption", "style", "concept"]).to_pylist()
    names = (f"emoji/{split}/{i} ({row['caption']}, {row['style']})" for i, row in enumerate(rows))
    items = [
        Item(name, row["label"], (row["caption"],), row["image"], row["concept"])
        for name, row in zip(names, rows, strict=True)
    ]
    return items, classes


def _archive(kind: str, place: Path, split: str) -> tuple[list[Item], list[str]]:
    rows, classes = (tar_rows(str(place)), None) if kind == "webdataset" else table_rows(str(place), kind == "parquet")
    if not sum(map(len, rows.values())):
        raise DataError(f"expected a picture at least for each split in {place}, got none")
    log.info("not compared whether pictures of %s are in both splits", place)
    classes = classes or class_names({row.label for own in rows.values() for row in own}, str(place))
    if "val" not in rows:
        rows = _hold_out(rows["train"], [row.name for row in rows["train"]])
    if split not in rows:
        raise DataError(f"{place} has no split {split!r}: expected train in the name of a file, a folder or a split")
    numbers = {name: number for number, name in enumerate(classes)}
    spoken = [(printable(name.replace("_", " ")),) for name in classes]

    def item(row: Row) -> Item:
        label = row.label if isinstance(row.label, int) else numbers.get(_spelt(row.label, numbers), -1)
        if not 0 <= label < len(classes):
            raise DataError(f"{row.name} of {place} has the label {label}, expected 0 to {len(classes) - 1}")
        return Item(row.name, label, tuple(map(printable, row.captions)) or spoken[label], row.stored)

    return [item(row) for row in rows[split]], [printable(name) for name in classes]


def _spelt(label: str | None, numbers: Mapping[str, int]) -> str:
    """A label as its class is named: 07 is 7 where classes are numbers."""
    label = "image" if label is None else label
    return str(int(label)) if label not in numbers and label.isdecimal() else label


def _hold_out(members: Sequence[T], names: Sequence[str | bytes]) -> dict[str, list[T]]:
    """Those of a split without a validation set: the tenth whose names' hashes are lowest is held out."""
    if len(members) < 2:
        raise DataError(f"{names[0]} is the only picture, expected at least 2: one to train on and one to measure on")
    ranked = sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())
    held_out = max(min(HELD_OUT_IMAGES, len(names) // 2), round(HELD_OUT * len(names)))
    sides = {"train": ranked[held_out:], "val": ranked[:held_out]}
    return {side: [members[i] for i in sorted(own)] for side, own in sides.items()}


def _filled_in(path: str) -> Path:
    filled = os.path.expandvars(path)
    if "$" in filled:
        raise DataError(f"{path} names an environment variable that is not set: export it, or give the path itself")
    return Path(filled).expanduser()


def _imagefolder(root: Path, split: str) -> tuple[list[Item], list[str]]:
    folders = {s: root / s for s in SPLITS}
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give imagefolder:PATH with PATH/train and PATH/val inside")
    if not folders[split].is_dir():
        found = _visible_folders(root)[:8]
        raise DataError(
            f"{root} has no folder {split!r} (found: {', '.join(found) or 'none'}): expected train/ and val/"
        )
    per_split = {s: _visible_folders(f) for s, f in folders.items() if f.is_dir()}
    classes = per_split[split]
    if len(per_split) == 2 and per_split["train"] != per_split["val"]:
        odd = sorted(set(per_split["train"]) ^ set(per_split["val"]))
        raise DataError(
            f"{root}: train has {len(per_split['train'])} classes and val {len(per_split['val'])}, expected the same; "
            f"only on one side: {', '.join(odd[:5])}"
        )
    files = {s: [_image_files(folders[s] / name) for name in per_split[s]] for s in per_split}
    if len(files) == 2:
        _check_apart(*(list(itertools.chain(*files[s])) for s in SPLITS))
    items = [
        Item(path, label, (printable(name.replace("_", " ")),))
        for label, (name, own) in enumerate(zip(classes, files[split], strict=True))
        for path in own
    ]
    if not items:
        raise DataError(
            f"expected one folder a class with {', '.join(sorted(IMAGE_SUFFIXES))} in {folders[split]}, got no images"
        )
    return items, [printable(name) for name in classes]


def _coco(root: Path, split: str) -> tuple[list[Item], list[str]]:
    """MS-COCO's images with their captions (five or so each), by image number; all of one class, "image"."""
    paths = {(s, year): root / "annotations" / f"captions_{s}{year}.json" for year in COCO_YEARS for s in SPLITS}
    there = [key for key, path in paths.items() if path.exists()]
    year = next((year for year in COCO_YEARS if all((s, year) in there for s in SPLITS)), None)
    if year is None and {s for s, _ in there} == set(SPLITS):
        raise DataError(
            f"expected both splits of one year in {root}, got {' and '.join(paths[key].name for key in there)}: images "
            "that one year trains on are validation images of the other"
        )
    year = year or next((year for s, year in there if s == split), None)
    if year is None:
        wanted = (str(paths[split, year].relative_to(root)) for year in COCO_YEARS)
        raise DataError(f"{root} holds neither {' nor '.join(wanted)}")
    annotations = paths[split, year]
    fetched(annotations)
    try:
        contents = json.loads(annotations.read_text(encoding="utf-8"))
        captions: dict[int, list[str]] = {row["image_id"]: [] for row in contents["annotations"]}
        for row in contents["annotations"]:
            if caption := " ".join((row["caption"] or "").split()):
                captions[row["image_id"]].append(printable(caption))
        names = {row["id"]: row["file_name"] for row in contents["images"]}
        if odd := [name for name in names.values() if os.path.basename(name) != name]:
            raise ValueError(f"the file name {odd[0]!r} leaves its folder")
        folder = root / annotations.stem.removeprefix("captions_")
        items = [Item(str(folder / names[i]), 0, tuple(own)) for i, own in sorted(captions.items()) if own]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotations} is not a file of MS-COCO captions ({error!r}): fetch it again") from error
    if len(items) < len(captions):
        log.warning("%d images of %s have no caption and are left out", len(captions) - len(items), annotations)
    if not items:
        raise DataError(f"{annotations} has no caption, expected one at least for each image: fetch it again")
    if not Path(items[0].name).exists():
        raise DataError(f"{folder} does not hold the {len(items)} images of {annotations.name}: unpack them there")
    fetched(items[0].name)
    return items, ["image"]


def _folder(root: Path, split: str) -> tuple[list[Item], list[str]]:
    """The images of a folder of any layout, a tenth held out."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give folder:PATH with images in PATH or below")
    files = _image_files(root)
    if len(files) < 2:
        raise DataError(
            f"expected at least 2 images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {root}, one to train on and one to "
            f"measure on, got {len(files)}"
        )
    sides = _hold_out(files, [os.path.relpath(path, root) for path in files])
    _check_apart(*sides.values())
    return [Item(path, 0, (printable(Path(path).stem.replace("_", " ")),)) for path in sides[split]], ["image"]


KINDS = {
    "imagefolder": _imagefolder,
    "coco": _coco,
    "folder": _folder,
    **{kind: partial(_archive, kind) for kind in ("parquet", "hf", "webdataset")},
}


def _visible_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and visible(path.name))


def _image_files(root: Path) -> list[str]:
    """The images in ROOT and below; a folder that several links lead to is visited once, by its own name if it can."""
    found, others, folders, seen = [], [], [str(root)], set()
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        try:
            entries = [entry for entry in os.scandir(folder) if visible(entry.name)]
        except OSError as error:
            raise DataError(
                f"{folder} cannot be read ({error}): let this user read it, or move it elsewhere"
            ) from error
        files, inner = ([entry for entry in entries if entry.is_dir() == kind] for kind in (False, True))
        found += [entry.path for entry in files if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
        others += [entry.path for entry in files if Path(entry.name).suffix.lower() in UNREAD_SUFFIXES]
        folders[:0] = [entry.path for entry in inner if entry.is_symlink()]  # after the others
        folders += [entry.path for entry in inner if not entry.is_symlink()]
    warn_of_unread(others, str(root))
    found.sort()
    if found:
        fetched(found[0])
    return found


def _check_apart(train: Sequence[str], val: Sequence[str]) -> None:
    """DataError where a file of one split has the bytes of one of the other; only those of equal sizes are read."""
    if len(train) + len(val) > COMPARED_IMAGES:
        log.info("not compared whether pictures are in both splits: more than %d images", COMPARED_IMAGES)
        return
    sides = [train, val]
    for of_files in (_sizes, file_digests):
        keys = [of_files(side) for side in sides]
        shared = set(keys[0].values()) & set(keys[1].values()) - {0, ""}  # empty and unreadable files show nothing
        sides = [[path for path, key in own.items() if key in shared] for own in keys]
    if shared:
        twins = [next(path for path in side if keys[i][path] == min(shared)) for i, side in enumerate(sides)]
        raise DataError(
            f"{twins[0]} (to train on) and {twins[1]} (held out) are the same picture, and so are {len(shared) - 1} "
            "other pairs: remove one of each, since a held-out picture must not be trained on"
        )


def _sizes(paths: Iterable[str]) -> dict[str, int]:
    return {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}


class EndlessOrder(Sampler):
    """Endless (index, crop seed) pairs: epoch after epoch of seeded permutations, starting anywhere.

    Step s of a global batch of size n takes the positions s*n ... s*n+n-1 of the endless order; process `rank` of
    `world_size` takes every world_size-th of them, so that the union over processes does not depend on their number.
    """

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.length, self.seed, self.start = length, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch = self.start + self.rank, None
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            yield int(order[position % self.length]), hash((self.seed, position)) & (2**63 - 1)
            position += self.world_size


def collate(samples: list[dict | None]) -> dict:
    """Readable samples -> {"image" (B, 3, r, r), "label" (B,), "index" (B,), "caption" list, "unreadable" int}."""
    kept = [sample for sample in samples if sample is not None]
    batch = {"unreadable": len(samples) - len(kept), "caption": [sample["caption"] for sample in kept]}
    if kept:
        batch["image"] = torch.stack([sample["image"] for sample in kept])
        batch["label"] = torch.tensor([sample["label"] for sample in kept])
        batch["index"] = torch.tensor([sample["index"] for sample in kept])
    return batch


class UnreadableCount:
    """Counts skipped images; stops the run when they are all, or more than one and 1 % of the data set.

    `epochs` is how often an image may have been read, and so counted, by now; `world_size` over how many processes the
    images are shared out, of which this one counts its own.
    """

    def __init__(self, dataset: ImageDataset, epochs: int = 1, world_size: int = 1):
        self.dataset, self.epochs, self.world_size, self.count = dataset, epochs, world_size, 0

    def add(self, unreadable: int) -> None:
        self.count += unreadable
        images, count = len(self.dataset) / self.world_size, self.count / self.epochs
        if count > max(1, MAX_UNREADABLE * images) or count >= images:
            whose = " that this process reads" if self.world_size > 1 else ""
            raise DataError(
                f"{math.ceil(count)} unreadable images among the {math.ceil(images)} of {self.dataset.name}{whose}, at "
                f"most {MAX_UNREADABLE:.0%} (and one) are skipped: the warnings above name the files; repair or remove "
                "them"
            )

    def report(self) -> None:
        if self.count:
            log.warning("%d unreadable images of %s were skipped", self.count, printable(self.dataset.name))


def _loader(dataset: ImageDataset, batch_size: int, sampler: Iterable, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[dict]:
    """Endless batches of `batch_size` images for this process, from global step `start_step` on.

    An unreadable image is left out of its batch, once an epoch; see `UnreadableCount` for when the run stops. A batch
    of none takes the order's next image that can be read, so that every step keeps its number.
    """
    step_images = batch_size * world_size
    order = EndlessOrder(len(dataset), seed, start_step * step_images, rank, world_size)
    unreadable = UnreadableCount(dataset, world_size=world_size)
    seen = since = start_step * step_images  # of the endless order; since when unreadable images are counted
    for batch in _loader(dataset, batch_size, order, workers):
        if seen // len(dataset) != (seen + step_images) // len(dataset):
            unreadable.report()
            unreadable.count, since = 0, seen  # a new epoch meets the same files again
        seen += step_images
        unreadable.epochs = (seen - 1) // len(dataset) - since // len(dataset) + 1
        unreadable.add(batch["unreadable"])
        if "image" not in batch:
            later = itertools.islice(EndlessOrder(len(dataset), seed, seen, rank, world_size), 2 * len(dataset))
            batch = next((collate([sample]) for sample in map(dataset.__getitem__, later) if sample is not None), {})
        if batch:
            yield batch


def readable_batches(
    dataset: ImageDataset, batch_size: int, keys: Sequence, workers: int, unreadable: UnreadableCount
) -> Iterator[dict]:
    """The images of KEYS (as `ImageDataset` takes them) in order, without those that cannot be read."""
    for batch in _loader(dataset, batch_size, keys, workers):
        unreadable.add(batch["unreadable"])
        if "image" in batch:
            yield batch


def evaluation_batches(
    dataset: ImageDataset, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[dict]:
    """Every image once, in order; process `rank` of `world_size` takes every world_size-th image, none twice."""
    unreadable = UnreadableCount(dataset, world_size=world_size)
    yield from readable_batches(dataset, batch_size, range(rank, len(dataset), world_size), workers, unreadable)
    unreadable.report()


def share_content_digests(*datasets: ImageDataset) -> None:
    """Have `content_digest` of each ready in every process of a distributed run, the files of a machine read once."""
    with PartialState().local_main_process_first():
        for dataset in datasets:
            dataset.content_digest  # noqa: B018 computed here, kept
