"""One run of a notebook: its folder, and the manifest that says how its numbers came about."""

import contextlib
import hashlib
import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from codalib.base.files import _plain, hold, release, write_json
from codalib.base.hardware import RANK_PEAKS, machine, peaks
from codalib.base.paths import MANIFEST, project_folder, runs_folder
from codalib.base.seeds import check_seed

RESULTS = ("tables", "figures", "metrics", "claims")  # what a stage may hand to the report
LOCK = ".lock"  # in the folder of a run
FILES = ("file", "png", "svg", "gif", "html")  # keys of a result that name files
LIBRARIES = ("codalib", "torch", "torchvision", "diffusers", "peft", "accelerate", "timm", "torchmetrics", "numpy")


class Run:
    """One run of a notebook in its own folder, recorded in `manifest.json` from its first second on.

    The folder belongs to this process until `finish` or its end: BlockingIOError where another process holds it, and
    OSError where it cannot be written.

    Args:
        output: the run's folder, below `runs_folder()` unless absolute; it is made.
        notebook: the notebook's name without its ending, such as "01_train_tokenizer".
        parameters: what `check_parameters` returned.
        seed: the seed of everything random in the run.
        settings: the resolved dataclasses, recorded field by field under their names.
    """

    def __init__(
        self, output: str | Path, notebook: str, parameters: Mapping[str, Any], seed: int, *settings: Any
    ) -> None:
        self.folder = runs_folder(output)
        check_seed(seed)
        hold(self.folder / LOCK)
        self._clock = time.monotonic()
        RANK_PEAKS.clear()
        self.manifest = {
            "notebook": notebook,
            "state": "running",
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seed": seed,
            "parameters": dict(parameters),
            "settings": {type(one).__name__: asdict(one) for one in settings},
            **source_version(),
            "versions": library_versions(),
            "lock": lock_digest(),
            "machine": machine(),
        }
        write_json(self.folder / MANIFEST, self.manifest)

    def finish(self, results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Record the end of the run and its RESULTS, and return the manifest.

        RESULTS may hold "tables" [{"file", "title", "caption"}], "figures" [{"png", "svg", "caption", "alt"}, for an
        animation "gif", for a slider "html"], "metrics" {name: number} and "claims" [{"id", "verdict", "effect",
        "detail"}]; files are named relative to the folder and must exist. Anything else raises ValueError.
        """
        results = dict(results or {})
        unknown = results.keys() - set(RESULTS)
        if unknown:
            raise ValueError(f"expected results of {', '.join(RESULTS)}, got {', '.join(sorted(unknown))}")
        rows = (*results.get("tables", ()), *results.get("figures", ()))
        missing = [row[key] for row in rows for key in FILES if key in row and not self._has(row[key])]
        if missing:
            raise ValueError(f"expected the files of the results in {self.folder}, got none of {', '.join(missing)}")
        self.manifest |= {
            "state": "finished",
            "seconds": round(time.monotonic() - self._clock, 1),
            "machine": machine(),  # again: the run has set how its GPU computes
            **_largest([peaks(), *RANK_PEAKS.values()]),
            "ranks": [own for _, own in sorted(RANK_PEAKS.items())],  # of the processes that the run launched
            "results": _plain(results),
        }
        write_json(self.folder / MANIFEST, self.manifest)
        release(self.folder / LOCK)
        return self.manifest

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()


def _largest(found: Sequence[Mapping[str, int | None]]) -> dict[str, int | None]:
    """Of each peak the largest of all processes; None where none has it."""
    return {name: max((own[name] or 0 for own in found), default=0) or None for name in found[0]}


def source_version() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout, its reports left out; both None where git or a checkout is missing."""

    def git(*command: str) -> str:
        root = str(project_folder())
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)reports")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def lock_digest() -> str | None:
    """16 hex digits of requirements.lock where every library of it that is installed has its version; else None."""
    lock = project_folder() / "requirements.lock"
    if not lock.exists():
        return None
    text = lock.read_text(encoding="utf-8")
    pinned: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE):
        pinned.setdefault(name, set()).add(version)
    for name, versions in pinned.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another system
            if importlib.metadata.version(name).partition("+")[0] not in versions:
                return None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape the numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
