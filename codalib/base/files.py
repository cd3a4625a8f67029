"""Atomic writes, locks, JSON with plain numbers, and digests of files."""

import hashlib
import json
import math
import os
import socket
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


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; a broken one raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
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
