"""Where things lie: the project, its runs, its reports, its embedded data."""

import os
import tempfile
from pathlib import Path

MANIFEST = "manifest.json"  # in the folder of a run
LFS_POINTER = b"version https://git-lfs"  # a pointer file begins so
DATA = Path(os.environ.get("CODALIB_DATA") or Path(__file__).resolve().parents[2] / "data")  # the embedded data


class MissingPart(ValueError):
    """A part of the repository that an installed package does not carry; one sentence says how to get it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is not here: data/, notebooks/ and profiles/ come with the repository, not with the package, so "
            "clone it and run inside the clone, or set CODALIB_DATA to its folder data/"
        )


def fetched(path: str | Path) -> Path:
    """PATH; ValueError where there is but Git LFS's pointer to the file."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path} is a Git LFS pointer, expected the file itself: run `git lfs pull` beside it")
    return path


def embedded(path: Path) -> Path:
    """PATH of the embedded data; MissingPart where it is not there, ValueError where it is Git LFS's pointer."""
    if not path.exists():
        raise MissingPart(path)
    return fetched(path)


def project_folder() -> Path:
    """The checkout that holds this package, or the working directory where the package is installed apart from one."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "Snakefile").exists() else Path.cwd()


def runs_folder(name: str | Path = "") -> Path:
    """The folder NAME of checkpoints and results, below `$CODALIB_RUNS` or `runs/`; an absolute NAME is kept."""
    return Path(os.environ.get("CODALIB_RUNS") or project_folder() / "runs") / name


HOMES = {  # variable -> folder of a library that else writes below HOME
    "XDG_CACHE_HOME": "cache",
    "NUMBA_CACHE_DIR": "cache/numba",
    "MPLCONFIGDIR": "matplotlib",
    "IPYTHONDIR": "ipython",
    "JUPYTER_RUNTIME_DIR": "jupyter",
}


def move_home() -> None:
    """Where HOME is missing or cannot be written (containers), let libraries keep their files below `runs_folder()`.

    What is set already stays; a HOME that can be read keeps its name.
    """
    home = os.environ.get("HOME", "")
    try:
        with tempfile.TemporaryFile(dir=home or os.devnull):
            return
    except OSError:
        place = runs_folder(".home").resolve()
    for variable, name in HOMES.items():
        os.environ.setdefault(variable, str(place / name))
    if not os.path.isdir(home):
        os.environ["HOME"] = str(place)


def reports_folder(name: str | Path = "") -> Path:
    """The folder NAME of pages and tables, below `$CODALIB_REPORTS` or `reports/`; an absolute NAME is kept."""
    return Path(os.environ.get("CODALIB_REPORTS") or project_folder() / "reports") / name
