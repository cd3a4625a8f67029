"""Pictures inside larger files, read where they lie: Parquet and Arrow through `datasets`, and WebDataset's tars.

Nothing but names, labels and captions is held in memory, whatever the number of pictures. Any picture is reached at
once, so that the seeded order, resuming and the transforms are those of `datasets.images` for every source.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from tqdm.auto import tqdm

from codalib.base.files import atomic_write, file_digest, file_digests
from codalib.base.paths import fetched, runs_folder
from codalib.datasets.pictures import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    DataError,
    UnreadableImage,
    visible,
    warn_of_unread,
)

IMAGE, LABEL, CAPTION = ("image", "img"), ("label", "cls"), ("caption", "captions", "text")  # names of columns
TAR_TEXTS = ("json", "txt", "cls")  # the later says the label where several do
VALIDATION = ("validation", "test")  # names that `datasets` gives to splits, the first that is there is measured on
SIDE = re.compile(r"(?<![a-z])(?:(train|training)|(val|valid|validation|dev)|(test))(?![a-z])", re.IGNORECASE)
HUB_TIMEOUT = 10  # seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """One picture's bytes in an archive."""

    archive: "Rows | Tar"
    place: int | tuple[int, int]  # the row; of a tar the first byte and how many

    def read(self) -> bytes:
        """Raises UnreadableImage where they cannot be read."""
        try:
            return self.archive.read(self.place)
        except OSError as error:
            raise UnreadableImage(str(error)) from error

    @property
    def content(self) -> str:
        """Changes with the archive's bytes and the place in it."""
        return f"{self.archive.digest} {self.place}"


class Row(NamedTuple):
    """One picture of an archive, with what is said of it there."""

    name: str
    stored: Stored
    label: str | int | None
    captions: list[str]


class Rows:
    """The pictures of one split of `datasets`, memory-mapped; SOURCES are the files or Hub addresses it was read from.

    An address on the Hub names its commit, and stands for its bytes.
    """

    def __init__(self, table: Any, column: str, sources: Iterable[str]):
        from datasets import Image  # slow to import

        self.table = table.select_columns([column]).cast_column(column, Image(decode=False))
        self.column, self.sources = column, list(sources)

    @cached_property
    def digest(self) -> str:
        local = file_digests(path for path in self.sources if "://" not in path)
        return hashlib.sha256(repr([local.get(path, path) for path in self.sources]).encode()).hexdigest()[:16]

    def read(self, row: int) -> bytes:
        cell = self.table[row][self.column]
        if cell is None:
            raise UnreadableImage("the row has no picture")
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]


class Tar:
    """An uncompressed tar of WebDataset's."""

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def digest(self) -> str:
        return file_digest(self.path)[:16]

    def read(self, place: tuple[int, int]) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def rows(self) -> list[Row]:
        """The samples in the tar's order.

        The index is kept in `runs/tars` where there is a folder of runs; one that is damaged is made anew.
        """
        state = os.stat(self.path)
        key = repr(
            (
                INDEX_FORMAT,
                os.path.abspath(self.path),
                state.st_ino,
                state.st_size,
                state.st_mtime_ns,
                state.st_ctime_ns,
            )
        )
        kept = runs_folder("tars") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
        if (table := _read_index(kept)) is None:
            table = pa.Table.from_pylist(self._samples(), _INDEX)
            if runs_folder().exists():
                _keep_index(table, kept)
        return [
            Row(row["key"], Stored(self, (row["offset"], row["size"])), row["label"], row["captions"])
            for row in table.to_pylist()
        ]

    def _samples(self) -> list[dict]:
        samples: dict[str, dict] = {}
        unread, plain = [], defaultdict(set)  # plain: sample -> its texts named KEY.json and so on
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    folder, name = os.path.split(os.path.normpath(f"/{member.name}"))
                    stem, _, rest = name.partition(".")
                    ending = rest.lower().rpartition(".")[2]
                    if not member.isfile() or not stem:
                        continue
                    key = f"{folder.rstrip('/')}/{stem}"
                    sample = samples.setdefault(key, {})
                    kind = "picture" if f".{ending}" in IMAGE_SUFFIXES else ending
                    exact = kind == rest.lower()  # a.json stands before a.more.json
                    if kind in sample and exact == (kind in plain[key]):
                        raise DataError(
                            f"{self.path}: the sample {key} holds several {kind} files ({member.name} too), expected "
                            "one for each name up to its first dot: leave the others out, or rename them"
                        )
                    if kind in sample and not exact:
                        continue
                    if exact:
                        plain[key].add(kind)
                    if kind == "picture":
                        sample[kind] = {"key": key, "offset": member.offset_data, "size": member.size}
                    elif kind in TAR_TEXTS:
                        sample[kind] = _said(kind, tar.extractfile(member).read(), f"{self.path}: {member.name}")
                    elif f".{kind}" in UNREAD_SUFFIXES:
                        unread.append(member.name)
                # `tarfile` takes a file that is cut between two members, or damaged there, for one that ends there.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no mark of its end after {len(samples)} samples")
        except DataError:
            raise
        except (tarfile.TarError, OSError, ValueError) as error:
            fetched(self.path)
            raise DataError(
                f"{self.path} is no whole, uncompressed tar of WebDataset ({error}): write it anew"
            ) from error
        warn_of_unread(unread, self.path)
        return [_indexed(sample) for sample in samples.values() if "picture" in sample]


# Raised where the same tar comes to have other rows. 1 let a sample's last picture stand; 2 read four kinds of pictures
# and the texts whose endings are in small letters alone.
INDEX_FORMAT = 3
_INDEX = pa.schema(
    {
        "key": pa.string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.string(),
        "captions": pa.list_(pa.string()),
    }
)


def _read_index(kept: Path) -> pa.Table | None:
    """The index of a tar; None where it is not there yet, or damaged."""
    try:
        table = pq.read_table(kept, page_checksum_verification=True)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        log.warning("%s is damaged (%s): its tar is read again", kept, error)
        return None
    if not table.schema.equals(_INDEX):
        log.warning("%s is damaged (its columns are not those of an index): its tar is read again", kept)
        return None
    return table


def _keep_index(table: pa.Table, kept: Path) -> None:
    try:
        with atomic_write(kept, "wb") as file:
            pq.write_table(table, file, write_page_checksum=True)
    except OSError as error:
        log.warning("%s cannot be written (%s): its tar is read again at each opening", kept, error)


def _said(kind: str, stored: bytes, place: str) -> dict[str, Any]:
    """{"label", "captions"} that the text file PLACE of a tar gives to a picture."""
    try:
        text = stored.decode()
        said = json.loads(text) if kind == "json" else {"label" if kind == "cls" else "caption": text.strip()}
    except ValueError as error:
        raise DataError(f"{place}: expected {'JSON' if kind == 'json' else 'UTF-8'}, got {error}: mend it") from error
    said = said if isinstance(said, dict) else {}
    named = {known[0]: next((said[name] for name in known if name in said), None) for known in (LABEL, CAPTION)}
    label = _label(named[LABEL[0]], place)
    return {"label": None if label is None else str(label), "captions": _captions(named[CAPTION[0]], place)}


def _indexed(sample: dict[str, dict]) -> dict[str, Any]:
    """A sample's row of the index: its picture's, and what its texts say."""
    texts = [sample[kind] for kind in TAR_TEXTS if kind in sample]
    labels = [said["label"] for said in texts if said["label"] is not None]
    captions = [caption for said in texts for caption in said["captions"]]
    return sample["picture"] | {"label": labels[-1] if labels else None, "captions": captions}


def _label(cell: Any, place: str) -> str | int | None:
    """A label as a source holds it: a name, a whole number (which pandas may have made a float), or none."""
    if cell is None or cell == "" or cell != cell:  # NaN, as pandas has it for none
        return None
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    if isinstance(cell, str | int):
        return cell if isinstance(cell, str) else int(cell)
    raise DataError(f"{place}: expected a name or a whole number as the label of a picture, got {cell!r}: mend it")


def _captions(cell: Any, place: str) -> list[str]:
    texts = [cell] if isinstance(cell, str) else [] if cell is None else cell
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise DataError(
            f"{place}: expected a text or a list of texts as caption, got {cell!r}: mend it, or leave it out"
        )
    return [text for text in texts if text]


def tar_rows(pattern: str) -> dict[str, list[Row]]:
    """Split -> the samples of the tars that PATTERN names: braces {000..127}, {a,b}, or a folder of tars.

    The test split stands for a validation split that is not there. Raises DataError where a tar is missing, or there
    twice.
    """
    try:
        paths = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise DataError(f"expected braces such as {{000..127}} or {{a,b}}, got {pattern} ({error}): mend it") from error
    if len(paths) == 1 and os.path.isdir(paths[0]):
        root = Path(paths[0])
        found = (path for path in root.rglob("*.tar") if all(map(visible, path.relative_to(root).parts)))
        paths = sorted(map(str, found))
    if twice := [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]:
        raise DataError(f"expected each tar once in {pattern}, got {twice[0]} more than once: name it once")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        found = f"{len(missing)} of {len(paths)} missing ({missing[0]})" if missing else "none"
        raise DataError(f"expected the tars {pattern}, got {found}: fetch them, or mend the numbers in the braces")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    rows: dict[str, list[Row]] = {}
    for path in tqdm(paths, desc="tars", delay=5, leave=False):
        name = os.path.relpath(path, root)
        _, validation, test = next(reversed(SIDE.findall(name)), ("", "", ""))
        own = rows.setdefault("val" if validation else "test" if test else "train", [])
        own += [row._replace(name=f"{name}{row.name}") for row in Tar(path).rows()]
    if test := rows.pop("test", []):
        if "val" in rows:
            log.info("%d test pictures of %s are left out: its validation split is measured on", len(test), pattern)
        rows.setdefault("val", test)
    return rows


def table_rows(place: str, parquet: bool) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Split -> the rows of what `datasets` loads, and the names of its classes where it knows them.

    Args:
        place: with PARQUET a file, a pattern or a folder of Parquet files; else what `datasets.load_dataset` takes, a
            folder or a name on the Hub, or a folder of `save_to_disk`. NAME:CONFIG takes one of its configurations.
    Raises:
        DataError: nothing there, no network, or no picture in it.
    """
    import datasets  # slow to import

    local = Path(place).exists() or parquet
    name, _, config = (place, "", "") if local else place.partition(":")
    try:
        if Path(place, "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(place)
            sources = {split: [file["filename"] for file in table.cache_files] for split, table in tables.items()}
        else:
            if local:
                files = Path(place).rglob("*.parquet") if Path(place).is_dir() else [Path(place)]
                for file in files:
                    fetched(file)
            else:
                _check_hub(name)
            what = {"data_dir" if Path(place).is_dir() else "data_files": place} if parquet else {}
            build = partial(datasets.load_dataset_builder, "parquet" if parquet else name, config or None, **what)
            builder = build()
            sources = builder.config.data_files
            if local:  # its cache knows files by their names and dates alone
                contents = file_digests(file for own in sources.values() for file in own)
                key = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()[:16]
                builder = build(cache_dir=os.path.join(datasets.config.HF_DATASETS_CACHE, f"codalib-{key}"))
            builder.download_and_prepare()
            tables = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:  # those of `datasets`, of its readers and of the HTTP client are of many kinds
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(
            f"{place} cannot be opened as a data set of images ({cause}): give another path or name"
        ) from error
    names = {"train": ["train"], "val": [*VALIDATION]}
    chosen = {side: next((split for split in own if split in tables), None) for side, own in names.items()}
    rows, classes = {}, None
    for side, split in chosen.items():
        if split is not None:
            rows[side], classes = _rows(tables[split], split, sources[split], place)
    if not rows:
        raise DataError(f"{place} has the splits {', '.join(tables)}, expected train, and validation or test")
    return rows, classes


def _check_hub(name: str) -> None:
    """DataError at once where the Hub cannot be reached: `datasets` itself tries for 23 s."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # those of huggingface_hub's HTTP client, which is another in each of its versions
        cause = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} is no folder here and cannot be fetched from the Hub ({cause}): without a network give a local "
            "folder, or set HF_HUB_OFFLINE=1 for what was fetched before; for a gated data set set HF_TOKEN"
        ) from error


def _rows(table: Any, split: str, sources: Iterable[str], place: str) -> tuple[list[Row], list[str] | None]:
    found = [next((name for name in known if name in table.column_names), None) for known in (IMAGE, LABEL, CAPTION)]
    image, label, caption = found
    if image is None:
        raise DataError(f"{place} has the columns {', '.join(table.column_names)}, expected {' or '.join(IMAGE)}")
    if label is None and (odd := [name for name in table.column_names if "label" in name.lower()]):
        raise DataError(
            f"{place} has the columns {', '.join(table.column_names)}, expected the classes' to be named "
            f"{' or '.join(LABEL)}: rename {' or '.join(odd)}, or leave it out"
        )
    archive = Rows(table, image, map(str, sources))

    def column(name: str | None) -> list:
        none = [None] * len(table)
        return table.select_columns([name]).with_format("arrow")[:][name].to_pylist() if name and len(table) else none

    rows = [
        Row(name := f"{split}, row {number}", Stored(archive, number), _label(own, name), _captions(text, name))
        for number, (own, text) in enumerate(zip(column(label), column(caption), strict=True))
    ]
    return rows, getattr(table.features[label], "names", None) if label else None


def class_names(labels: set, place: str) -> list[str]:
    """The classes of labels that are numbers, or names, or are all missing (one class, "image")."""
    if labels == {None}:
        return ["image"]
    if None in labels:
        raise DataError(f"expected a label of each picture or of none in {place}, got some of both")
    if not all(str(label).removeprefix("-").isdecimal() for label in labels):
        return sorted(map(str, labels))
    if min(map(int, labels)) < 0:
        raise DataError(
            f"{place} has the label {min(map(int, labels))}, expected numbers from 0 on: take another split"
        )
    return [str(number) for number in range(max(map(int, labels)) + 1)]
