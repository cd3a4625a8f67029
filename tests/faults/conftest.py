"""Collects what each fault did and writes it to reports/faults: a table, and beside it how each line came about."""

import os
from datetime import UTC, datetime

import pytest
import stages
from stages import PARAMETERS, Started

from codalib.base.files import atomic_write, read_json, write_json
from codalib.base.hardware import machine
from codalib.base.paths import project_folder
from codalib.workflow.manifest import library_versions, source_version

ROWS: dict[str, dict] = {}
RAN: set[str] = set()  # tests: where one failed before, that line goes
INTRODUCTION = """# Faults

What `make faults` did to runs in tiny settings, and how they ended. A killed run is started again until it is done; its
files and its log (times left out) are then compared bit for bit with those of a run that nothing interrupted, each
process in one thread. A part of the suite replaces its own lines alone: [manifest.json](manifest.json) gives the
commit, date and parameters of each line, the machine and the versions.

| fault | expected | what happened |
|---|---|---|
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder for the runs, with the caches of tokens that MaskGIT takes."""
    folder = tmp_path_factory.mktemp("faults")
    assert Started(stages.make_caches, folder).finish() is None
    return folder


@pytest.fixture
def row():
    """Add a line to the table: the fault, what is expected, what happened."""

    def add(fault, expected, happened):
        ROWS[fault] = {"expected": expected, "happened": happened}

    return add


def pytest_runtest_logreport(report):
    name = report.nodeid.split("::")[-1]
    RAN.add(name)
    if report.failed or report.skipped:
        reason = report.longrepr[2] if report.skipped else report.longreprtext.splitlines()[-1]
        ROWS[name] = {"expected": "a run to its end", "happened": f"{report.outcome.upper()}: {reason}"}


def pytest_sessionfinish(session):
    if not ROWS:
        return
    folder = project_folder() / "reports" / "faults"
    settings = {name: int(os.environ.get(name, default)) for name, default in PARAMETERS.items()}
    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **source_version(), "parameters": settings}
    path = folder / "manifest.json"
    before = read_json(path)["faults"] if path.exists() else {}
    rows = {name: own for name, own in before.items() if name not in RAN} | {n: own | made for n, own in ROWS.items()}
    write_json(path, {"versions": library_versions(), "machine": machine(), "faults": rows})
    with atomic_write(folder / "README.md") as file:
        cells = ([name, own["expected"], own["happened"]] for name, own in sorted(rows.items()))
        lines = (
            "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in line) + " |" for line in cells
        )
        file.write(INTRODUCTION + "".join(f"{line}\n" for line in lines))
