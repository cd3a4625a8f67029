"""Notebooks under test write to a temporary folder, and nbval waits long enough for a busy machine's outputs."""

import os
import shutil
import tempfile

NBVAL_OUTPUT_SECONDS = 60  # nbval's own 5 s is too short where every core is taken


def pytest_configure(config):
    config.temporary_runs = None
    if "CODALIB_RUNS" not in os.environ:
        config.temporary_runs = tempfile.mkdtemp(prefix="codalib-")
        os.environ["CODALIB_RUNS"] = f"{config.temporary_runs}/runs"
        os.environ["CODALIB_REPORTS"] = f"{config.temporary_runs}/reports"


def pytest_unconfigure(config):
    if config.temporary_runs:
        shutil.rmtree(config.temporary_runs, ignore_errors=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = NBVAL_OUTPUT_SECONDS
