"""Where things lie: the project, its runs, its reports, its embedded data."""

import os
from pathlib import Path

MANIFEST = "manifest.json"  # in the folder of a run
DATA = Path(__file__).resolve().parents[2] / "data"  # what comes with the kit


def project_folder() -> Path:
    """The checkout that holds this package, or the working directory where the package is installed apart from one."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "Snakefile").exists() else Path.cwd()


def runs_folder(name: str | Path = "") -> Path:
    """The folder NAME of checkpoints and results, below `$CODALIB_RUNS` or `runs/`; an absolute NAME is kept."""
    return Path(os.environ.get("CODALIB_RUNS") or project_folder() / "runs") / name


def reports_folder(name: str | Path = "") -> Path:
    """The folder NAME of pages and tables, below `$CODALIB_REPORTS` or `reports/`; an absolute NAME is kept."""
    return Path(os.environ.get("CODALIB_REPORTS") or project_folder() / "reports") / name
