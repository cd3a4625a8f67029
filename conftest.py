"""Tests see no GPU unless they are asked to; notebooks write to a temporary folder, and nbval has time for outputs."""

import os
import shutil
import tempfile

import pytest

NBVAL_OUTPUT_SECONDS = 60  # nbval's own 5 s is too short where every core is taken

# Before torch asks for GPUs: results on a processor are what most tests hold, and `make test-gpu` takes one GPU.
ON_GPU = os.environ.get("CODALIB_TEST_GPU") == "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if ON_GPU else ""


def pytest_configure(config):
    config.temporary_runs = None
    if ON_GPU:
        import torch  # here alone: it is slow to load

        if not torch.cuda.is_available():
            raise pytest.UsageError("expected a GPU that torch sees with CODALIB_TEST_GPU=1, got none: unset it")
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
        if not ON_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))
