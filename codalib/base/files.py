"""Atomic writes, JSON with plain numbers, and digests of files."""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from codalib.base.paths import runs_folder

DIGESTS = ".digests.jsonl"  # in the folder of runs: [path, bytes, mtime_ns, ctime_ns, SHA-256] a line
SETTLED = 2_000_000_000  # ns after its last change from which a file's times tell every later change
PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, type(None))  # what papermill can inject


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
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; a broken one raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file ({error}): remove it and run its stage again.") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write VALUE atomically; numpy and torch scalars become numbers, a float that is not finite becomes null."""
    with atomic_write(path) as file:
        json.dump(_plain(value), file, indent=2, allow_nan=False)
        file.write("\n")


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


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits.

    It is kept beside the file's size, mtime and ctime in `DIGESTS`, so that an unchanged file is read once; where there
    is no folder of runs, or none that can be written, every process reads it anew.
    """
    path = Path(path).resolve()
    status, kept = path.stat(), runs_folder(DIGESTS)
    state = (str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = _digests(kept)
    if state in known:
        return known[state]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED:
        known[state] = digest
        with suppress(OSError), open(kept, "a", encoding="utf-8") as file:
            file.write(json.dumps([*state, digest]) + "\n")  # one short write, so that processes do not mix theirs
    return digest


@cache
def _digests(kept: Path) -> dict[tuple, str]:
    try:
        lines = kept.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    known = {}
    for line in lines:
        with suppress(ValueError, TypeError):  # a line that a stopped process left unfinished
            *state, digest = json.loads(line)
            known[tuple(state)] = digest
    return known
