"""Atomic writes, locks, JSON with plain numbers, and digests of files that are not read twice."""

import hashlib
import json
import logging
import math
import os
import re
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from codalib.base.paths import runs_folder

log = logging.getLogger(__name__)

PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, type(None))  # what papermill can inject

SURROGATES = re.compile("[\ud800-\udfff]")
SETTLED = 2 * 10**9  # ns: a file that changed later than this may change again within one tick of the clock


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open PATH for writing ("w" or "wb") so that readers see the old file or the whole new one, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes private files; give this one the mode of any other
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk: the system does not say which
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, hidden beside PATH, that takes its place once the block has ended without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as own:  # of this process alone
        new = Path(own) / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(Path(own) / "old")
        new.rename(path)


NUMBERS = re.compile(r"\[\n((?:[^\[\]{}\"\n]+\n)+?) *\]")  # a list without strings, lists and objects, an item a line
_HELD: dict[Path, IO] = {}  # the locks of this process


def hold(lock: Path) -> None:
    """Lock the file LOCK for this process until `release` or its end, however it ends; a second call changes nothing.

    Raises BlockingIOError, which names the other process, where one holds it, and OSError where its folder cannot be
    written: each before any work.
    """
    import fcntl  # here alone: Windows has none

    if (lock := lock.resolve()) in _HELD:
        return
    with writing(lock.parent):
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            what = lock.parent if lock.stem == lock.name else lock.with_suffix("")
            raise BlockingIOError(
                f"{what} is in use, running already in {holder}: wait for it, stop it, or take another output"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _HELD[lock] = file


def release(lock: Path) -> None:
    """Give back a lock of this process."""
    if file := _HELD.pop(lock.resolve(), None):
        file.close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make FOLDER, and test that it can be written; errors of the system become one sentence that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"expected a folder that can be written, got {folder} ({error.strerror or error}): make room or mend its "
            "rights, or take another (the parameter output, CODALIB_RUNS, CODALIB_REPORTS)"
        ) from error


def read_json(path: str | Path, *keys: str) -> Any:
    """The contents of a JSON file; a broken one, or one that lacks one of KEYS, raises ValueError with its name."""
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not a JSON file ({error}): remove it and run its stage again.") from error
    if missing := [key for key in keys if not isinstance(contents, dict) or key not in contents]:
        raise ValueError(f"{path} is damaged, expected {missing[0]!r} in it: remove it and run its stage again.")
    return contents


def write_json(path: str | Path, value: Any) -> None:
    """Write VALUE atomically; numpy and torch scalars become numbers, a float that is not finite becomes null.

    A list of numbers stands on one line.
    """
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(NUMBERS.sub(lambda found: "[" + ", ".join(found[1].replace(",", " ").split()) + "]", text) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, PLAIN) and hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits; the file is read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits; read as `file_digests` does. Raises OSError where it cannot be."""
    path = Path(path).resolve()
    if digest := file_digests([str(path)])[str(path)]:
        return digest
    raise OSError(f"expected a file that can be read, got {path}")


def printable(text: str) -> str:
    """TEXT as a page can hold it: what stands for bytes of a file's name that are not UTF-8 becomes U+FFFD."""
    return SURROGATES.sub("\ufffd", text)


def file_digests(paths: Iterable[str]) -> dict[str, str]:
    """Path -> SHA-256 of the file's bytes, in hex; "" where it cannot be read.

    A file is read again only where its inode, size or times (mtime, ctime) are others than when it was last read: a
    link may lead to another file of the same tick. They are kept in `runs/digests`, one file for each folder, where
    there is a folder of runs.
    """
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    digests = {}
    with ThreadPoolExecutor() as pool:
        for folder, members in tqdm(folders.items(), desc="digests", unit="folder", delay=5, leave=False):
            key = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:16]
            kept = runs_folder("digests") / f"{key}.json"
            known = _kept_digests(kept)
            names = [os.path.basename(path) for path in members]
            rows = dict(zip(names, pool.map(_digest, members, map(known.get, names)), strict=True))
            digests |= {path: rows[name][-1] for path, name in zip(members, names, strict=True)}
            new = {name: row for name, row in rows.items() if row != known.get(name) and _settled(row)}
            if new and runs_folder().exists():
                try:
                    write_json(kept, known | new)
                except OSError as error:
                    log.warning("%s cannot be written (%s): its files' digests are not remembered", kept, error)
    return digests


def _kept_digests(kept: Path) -> dict[str, list]:
    try:
        rows = read_json(kept)
    except (OSError, ValueError):  # not there yet, or broken: the files are read again
        return {}
    rows = rows if isinstance(rows, dict) else {}
    return {name: row for name, row in rows.items() if isinstance(row, list) and len(row) == 5}


def _digest(path: str, known: list | None) -> list:
    """[inode, size, mtime, ctime, digest] of a file: KNOWN where the first four have not changed."""
    try:
        state = os.stat(path)
        row = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if known is not None and known[:4] == row:
            return known
        return [*row, sha256(path)]
    except OSError:
        return [0, 0, 0, 0, ""]


def _settled(row: list) -> bool:
    return bool(row[-1]) and time.time_ns() - row[3] > SETTLED
