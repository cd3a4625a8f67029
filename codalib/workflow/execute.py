"""Run one notebook under a profile.

The profile's section for the notebook is checked against the notebook's parameters cell before anything runs; papermill
then runs it into `runs/PROFILE/NAME.ipynb`, its progress shown here, and the page goes to `reports/PROFILE/NAME.html`.
"""

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from codalib.base.files import atomic_write, hold, release, writing
from codalib.base.hardware import set_threads
from codalib.base.paths import MissingPart, project_folder, reports_folder, runs_folder
from codalib.base.team import check_processes, launched_processes
from codalib.reporting.pages import notebook_page
from codalib.reporting.tables import clock
from codalib.workflow.parameters import (
    declared_parameters,
    filled_settings,
    notebook_values,
    parsed,
    resolved_values,
)
from codalib.workflow.profiles import StageError, profile_section, profile_stages

log = logging.getLogger(__name__)

CHECKED = "nbval-check-output"
DEAD_KERNEL = 138  # papermill's own exit status for a kernel that died
SECONDS_BETWEEN_PROGRESS_LINES = 10
# Text progress bars in the kernel: tqdm.auto looks for this widget and takes the text bar where it is not there.
FIRST_LINE = (
    "import warnings, tqdm.notebook; tqdm.notebook.IProgress = None; "
    "warnings.filterwarnings('ignore', message='IProgress not found'); "
    "import codalib.base.hardware; codalib.base.hardware.keep_niceness()"
)


class _OwnKernel(AsyncKernelManager):
    """The kernel of this very interpreter: a kernelspec of the name python3 may be a site's own, of another Python."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(
    path: Path,
    profile: str,
    given: Mapping[str, Any] | None = None,
    page: Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Run the notebook PATH under PROFILE with the values GIVEN on top, and return its page.

    TEXTS are further values as typed on the command line, read as the types that the notebook declares.

    The page is reports/PROFILE/NAME.html unless PAGE names another, outside of profiles.

    A notebook's `output` is the folder PROFILE/NAME below `runs_folder()`, its `profile` PROFILE and its `processes`
    as many as a launcher has started, unless told otherwise.
    Wrong parameters, a failing cell and a dead kernel raise StageError.
    """
    if not path.exists():
        raise StageError(str(MissingPart(path)))
    notebook, name = nbformat.read(path, as_version=4), path.stem
    parameters = _parameters(path, notebook, profile, given or {}, texts or {})
    # Beside the run's folder: runs of one notebook into two folders do not meet.
    place = runs_folder(parameters.get("output", f"{profile}/{name}"))
    executed, lock = place.with_name(f"{place.name}.ipynb"), place.with_name(f"{place.name}.lock")
    home, footer = ("", "") if page else ("index.html", f", profile {profile}")
    page = page or reports_folder(profile) / f"{name}.html"
    hold(lock)
    try:
        with writing(page.parent):
            threads = set_threads()
        log.info("%s: started, profile %s, threads: %d", name, profile, threads)
        started = time.monotonic()
        result = _run(path, executed, parameters, _Progress(name, notebook))
    finally:
        release(lock)
    with atomic_write(page) as file:
        file.write(notebook_page(result, name, home=home, footer=f"Notebook {name}{footer}."))
    log.info("%s: finished in %s", name, clock(time.monotonic() - started))
    return page


def check_profile(profile: str) -> None:
    """Whether every stage of PROFILE takes its values, asked before the first one runs; StageError names all problems.

    A wrong name, another type, and values that do not go together (`filled_settings`): each would else be found when
    the stage's turn comes, hours later.
    """
    folder, problems = project_folder() / "notebooks", []
    for stage in profile_stages(profile, sorted(path.stem for path in folder.glob("*.ipynb"))):
        path = folder / f"{stage}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        try:
            _parameters(path, notebook, profile, {}, {})
            filled_settings(notebook, resolved_values(notebook, profile_section(profile, stage)))
        except StageError as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"{path}, profile {profile}: {error}")
    if problems:
        raise StageError("\n".join(problems))


def _parameters(
    path: Path, notebook: nbformat.NotebookNode, profile: str, given: Mapping[str, Any], texts: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a notebook under a profile, as `execute` says; StageError for wrong ones."""
    started = launched_processes()
    own = {"output": f"{profile}/{path.stem}", "profile": profile} | ({"processes": started} if started else {})
    own = {key: value for key, value in own.items() if key in declared_parameters(notebook)}
    try:
        last = {**given, **parsed(notebook, texts)}
        parameters = notebook_values(notebook, own, profile_section(profile, path.stem), last)
        if started and "processes" in parameters:
            check_processes(parameters["processes"], started)
    except ValueError as error:
        raise StageError(f"{path}, profile {profile}: {error}") from error
    return parameters


def _run(path: Path, executed: Path, parameters: Mapping[str, Any], progress: "_Progress") -> nbformat.NotebookNode:
    """PATH executed by papermill into the file EXECUTED; StageError where a cell fails or the kernel dies."""
    name = path.stem
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the execution environment, not about the run
            return papermill.execute_notebook(
                _literal(path),
                _literal(executed),
                parameters,
                kernel_name="python3",
                kernel_manager_class=_OwnKernel,
                language="python",
                progress_bar=False,
                stdout_file=progress,
                stderr_file=progress,
                on_cell_start=progress.cell_start,
                extra_arguments=[f"--IPKernelApp.exec_lines={FIRST_LINE}", "--IPKernelApp.log_level=CRITICAL"],
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


def _literal(path: Path) -> str:
    """PATH as papermill takes it, which fills in names in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


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


class _Progress:
    """Shows where a running notebook is: the heading above the current cell, and what the cell writes.

    A file for papermill: progress bars come as carriage returns, of which one line every few seconds is kept.
    """

    def __init__(self, name: str, notebook: nbformat.NotebookNode) -> None:
        self.name, self.where, self._shown, self._bar_shown, self._rest = name, "its first cell", "", 0.0, ""
        self._headings: list[str] = []
        self._injected = 0  # papermill's cell of parameters, once it was met
        heading = ""
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                heading = next((line.lstrip("# ") for line in cell.source.splitlines() if line[:1] == "#"), heading)
            self._headings.append(heading)

    def cell_start(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        self._injected |= "injected-parameters" in cell.metadata.get("tags", [])
        index = cell_index - self._injected
        self.where = f"cell {index + 1} of {len(self._headings)}"
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
