"""Run one notebook under a profile: `python -m codalib.execute notebooks/NAME.ipynb --profile PROFILE [-p name value]`.

The profile's section for the notebook is checked against the notebook's parameters cell before anything runs; papermill
then runs it into `runs/PROFILE/NAME.ipynb`, its progress shown here, and the page goes to `reports/PROFILE/NAME.html`.
"""

import argparse
import ast
import fcntl
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from codalib.compare import clock
from codalib.pages import notebook_page
from codalib.runs import atomic_write, project_folder, reports_folder, runs_folder, validate

log = logging.getLogger(__name__)

CHECKED = "nbval-check-output"
STAGES = "stages"  # a profile's list of the notebooks that it runs
DEAD_KERNEL = 138  # papermill's own exit status for a kernel that died
PRESENTATION = {"compare", "execute", "figures", "pages", "paper", "report", "runs"}
SECONDS_BETWEEN_PROGRESS_LINES = 10
# Text progress bars in the kernel: tqdm.auto looks for this widget and takes the text bar where it is not there.
TEXT_PROGRESS = (
    "import warnings, tqdm.notebook; tqdm.notebook.IProgress = None; "
    "warnings.filterwarnings('ignore', message='IProgress not found')"
)


class StageError(Exception):
    """A notebook that could not be run to its end; its message says why in one sentence."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def profile_path(profile: str) -> Path:
    """The YAML file of a profile; an unknown profile raises StageError with the known ones."""
    folder = project_folder() / "profiles"
    path = folder / f"{profile}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise StageError(f"There is no profile {profile!r}; profiles/ has {known}.")
    return path


def profile_section(profile: str, notebook: str) -> dict[str, Any]:
    """What PROFILE changes in the parameters of NOTEBOOK: {name: value}, empty where it has no section for it."""
    path, contents = profile_path(profile), _read_profile(profile)
    section = contents.get(notebook) or {}
    if not isinstance(section, dict):
        raise StageError(f"{path}: the section {notebook!r} must map names to values, got {section!r}.")
    return section


def profile_stages(profile: str, order: Sequence[str]) -> dict[str, list[str]]:
    """The notebooks that PROFILE runs, its `stages` or all, in ORDER: notebook -> those whose results it reads.

    A notebook reads the results of another where one of its values names that one's folder, "PROFILE/NOTEBOOK".
    Raises StageError for a name that is not in ORDER, and for a notebook that reads one which the profile does not run.
    """
    chosen = _read_profile(profile).get(STAGES, order)
    unknown = [str(name) for name in chosen if name not in order]
    if unknown:
        raise StageError(
            f"{profile_path(profile)}: {STAGES} names {', '.join(unknown)}, expected some of {', '.join(order)}."
        )
    needs = {}
    for name in (name for name in order if name in chosen):
        texts = list(_texts(profile_section(profile, name)))
        needs[name] = [other for other in order if any(f"{text}/".startswith(f"{profile}/{other}/") for text in texts)]
        missing = [other for other in needs[name] if other not in chosen]
        if missing:
            raise StageError(f"{profile_path(profile)}: {name} needs {', '.join(missing)}: add it to {STAGES}.")
    return needs


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of a profile, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _read_profile(profile: str) -> dict[str, Any]:
    path = profile_path(profile)
    contents = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    notebooks = project_folder() / "notebooks"
    unknown = [str(name) for name in contents if name != STAGES and not (notebooks / f"{name}.ipynb").exists()]
    if unknown:
        raise StageError(f"{path} has sections of no notebook: {', '.join(unknown)}.")
    return contents


def declared_parameters(notebook: nbformat.NotebookNode) -> dict[str, tuple[str, Any]]:
    """{name: (type as written, default)} of the parameters cell.

    Read by Python's own parser: papermill's inspection loses a parameter whose default holds an equals sign.
    """
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise StageError(f"The notebook must have exactly one cell tagged `parameters`, it has {len(cells)}.")
    return {
        statement.target.id: (ast.unparse(statement.annotation), ast.literal_eval(statement.value))
        for statement in ast.parse(cells[0]).body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
    }


def library_files(path: str | Path) -> list[str]:
    """The modules of codalib that shape a notebook's numbers: those that it imports and those that these import.

    A notebook that trains (its name starts with a digit) does not depend on the modules that only draw, write and
    record, so that a new colour does not train anything again.
    """
    path = Path(path)
    package = Path(__file__).parent
    cells = nbformat.read(path, as_version=4).cells
    pending = _imports("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    skipped = PRESENTATION if path.stem[0].isdigit() else set()
    found: set[str] = set()
    while pending:
        name = pending.pop()
        file = package / f"{name}.py"
        if name not in found | skipped and file.exists():
            found.add(name)
            pending |= _imports(file.read_text(encoding="utf-8"))
    return [os.path.relpath(package / f"{name}.py") for name in sorted(found)]


def _imports(source: str) -> set[str]:
    """Names of the modules of codalib that SOURCE imports."""
    return set(re.findall(r"^\s*(?:from|import)\s+codalib\.(\w+)", source, flags=re.MULTILINE)) | {
        name.strip().split(" ")[0]
        for names in re.findall(r"^\s*from\s+codalib\s+import\s+([^#\n]+)", source, flags=re.MULTILINE)
        for name in names.strip("() ").split(",")
    }


def execute(path: Path, profile: str, given: Mapping[str, Any] | None = None) -> Path:
    """Run the notebook PATH under PROFILE with the values GIVEN on top, and return its page.

    A notebook with a parameter `output` writes to the folder PROFILE/NAME below `runs_folder()` unless told otherwise.
    Wrong parameters, a failing cell and a dead kernel raise StageError.
    """
    name = path.stem
    notebook = nbformat.read(path, as_version=4)
    declared = declared_parameters(notebook)
    output = {"output": f"{profile}/{name}"} if "output" in declared else {}
    parameters = output | profile_section(profile, name) | dict(given or {})
    try:
        validate({key: hint for key, (hint, _) in declared.items()}, parameters)
    except ValueError as error:
        raise StageError(f"{path}, profile {profile}: {error}") from error

    executed = runs_folder(profile) / path.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(name, notebook)
    log.info("%s: started, profile %s", name, profile)
    started = time.monotonic()
    try:
        with _alone(executed.with_suffix(".lock")), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the execution environment, not about the run
            result = papermill.execute_notebook(
                str(path),
                str(executed),
                parameters,
                kernel_name="python3",  # the kernel of this very environment
                language="python",
                progress_bar=False,
                stdout_file=progress,
                stderr_file=progress,
                on_cell_start=progress.cell_start,
                extra_arguments=[f"--IPKernelApp.exec_lines={TEXT_PROGRESS}", "--IPKernelApp.log_level=CRITICAL"],
            )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
        raise StageError(f"{name} stopped in {progress.where}: {reason} (the whole trace: {executed}).") from None
    except DeadKernelError:
        raise StageError(
            f"{name} stopped: its process died in {progress.where}, most often for want of memory; "
            "take a smaller batch or close other programs, then run again: it goes on from its last checkpoint.",
            DEAD_KERNEL,
        ) from None
    page = reports_folder(profile) / f"{name}.html"
    with atomic_write(page) as file:
        file.write(notebook_page(result, name, home="index.html", footer=f"Notebook {name}, profile {profile}."))
    log.info("%s: finished in %s", name, clock(time.monotonic() - started))
    return page


def keep_checked_outputs(path: Path, executed: Path) -> None:
    """Put the outputs of cells tagged `nbval-check-output` from EXECUTED into the notebook PATH; strip all others."""
    outputs = {cell.id: cell.get("outputs", []) for cell in nbformat.read(executed, as_version=4).cells}
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        checked = CHECKED in cell.metadata.get("tags", [])
        cell.outputs = outputs[cell.id] if checked else []
        cell.execution_count = number if checked else None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    with atomic_write(path) as file:
        nbformat.write(notebook, file)
        file.write("\n")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold LOCK, which the system gives back when this process ends however it ends; StageError if another holds it."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{lock.stem} is running already in another process: wait for it, or stop it.") from None
        yield


class _Progress:
    """Shows where a running notebook is: the heading above the current cell, and what the cell writes.

    A file for papermill: progress bars come as carriage returns, of which one line every few seconds is kept.
    """

    def __init__(self, name: str, notebook: nbformat.NotebookNode) -> None:
        self.name, self.where, self._shown, self._bar_shown, self._rest = name, "its first cell", "", 0.0, ""
        self._headings: list[str] = []
        heading = ""
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                heading = next((line.lstrip("# ") for line in cell.source.splitlines() if line[:1] == "#"), heading)
            self._headings.append(heading)

    def cell_start(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        index = min(cell_index, len(self._headings) - 1)  # papermill has injected a cell of parameters
        self.where = f"cell {cell_index + 1} of {len(self._headings)}"
        if self._headings[index] != self._shown:
            self._shown = self._headings[index]
            log.info("%s: %s (%s)", self.name, self._shown, self.where)

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line.rsplit("\r", 1)[-1])
        if "\r" in self._rest:
            self._bar(self._rest.rsplit("\r", 1)[-1])
            self._rest = self._rest[self._rest.rindex("\r") :]
        return len(text)

    def flush(self) -> None:
        pass

    def _bar(self, line: str) -> None:
        if time.monotonic() - self._bar_shown > SECONDS_BETWEEN_PROGRESS_LINES:
            self._bar_shown = time.monotonic()
            self._line(line)

    def _line(self, line: str) -> None:
        if line.strip():
            log.info("%s: %s", self.name, line.strip())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m codalib.execute", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--profile", default="smoke", help="a name in profiles/ (smoke)")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter, as YAML"
    )
    parser.add_argument("--keep-checked", action="store_true", help="then put the checked cells' outputs into NOTEBOOK")
    options = parser.parse_args(arguments)
    if options.keep_checked and (options.profile != "smoke" or options.p):
        parser.error("--keep-checked is for the notebook's own defaults: take the profile smoke and no -p.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    try:
        page = execute(options.notebook, options.profile, {name: yaml.safe_load(value) for name, value in options.p})
    except (StageError, OSError) as error:
        log.error("%s", error)
        return getattr(error, "status", 1)
    if options.keep_checked:
        keep_checked_outputs(options.notebook, runs_folder(options.profile) / options.notebook.name)
    log.info("page: %s", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
