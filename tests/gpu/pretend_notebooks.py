"""The notebooks on the pretend device, where no GPU is: `python tests/gpu/pretend_notebooks.py [NOTEBOOK ...]`.

Each runs as it is (the profile smoke), one after the other in this process, and prints a line: "whole", or the cell
that raised and its error. An hour for all, in one thread; status 1 where one raised. What they write lies in a folder
of the system's that is removed. Not part of `make test`, which runs the stages there without their notebooks.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import nbformat

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from IPython.core.interactiveshell import InteractiveShell  # noqa: E402
from pretend_device import DEVICE, OneProcess, pretending  # noqa: E402

from codalib.base import hardware, processes  # noqa: E402

# What later ones read is first.
FIRST = ("00_pretrain_vae", "01_quantizer_factorial", "01_adapted_factorial", "01_train_tokenizer")
ELSEWHERE = ("bench", "report")  # which read results alone


def run(path: Path) -> str:
    """What came of a notebook."""
    notebook = nbformat.read(path, as_version=4)
    InteractiveShell.clear_instance()
    shell, began = InteractiveShell.instance(), time.monotonic()
    shell.user_ns["__name__"] = "__main__"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    with pretending() as waits:
        for number, cell in enumerate(cells, 1):
            result = shell.run_cell(cell.source, store_history=True)
            if error := result.error_before_exec or result.error_in_exec:
                return f"cell {number} of {len(cells)}: {error!r}"
    return f"whole, {time.monotonic() - began:.0f} s, {waits.total()} waits of the host"


def main(names: list[str]) -> int:
    matplotlib.use("agg")
    processes.make_accelerator = OneProcess  # before anything else imports it
    hardware.compute_device = lambda: DEVICE.type
    paths = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem not in ELSEWHERE]
    paths.sort(key=lambda path: FIRST.index(path.stem) if path.stem in FIRST else len(FIRST))
    chosen = [path for path in paths if not names or path.stem in names]
    os.chdir(ROOT)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"CODALIB_RUNS": f"{folder}/runs", "CODALIB_REPORTS": f"{folder}/reports"}
        for path in chosen:
            said = run(path)
            failed |= not said.startswith("whole")
            print(f"{path.stem}: {said}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
