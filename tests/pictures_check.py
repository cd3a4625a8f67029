"""The pictures of the committed reports beside those that the notebooks have just drawn with their small defaults.

`make test` runs it behind the notebooks, with the same CODALIB_RUNS: a picture that a long and a tiny run draw alike
shows nothing of either.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codalib.base.files import read_json
from codalib.base.paths import MANIFEST, runs_folder

REPORTS = Path(__file__).parents[1] / "reports"
OF_THE_PAPER = {"fig1_comparison-fig1_paper.png"}  # drawn from paper.py alone
NOT_IN_SMOKE = {  # drawn from the logs of 01_train_baselines, which the defaults do without
    "fig1_comparison-fig1_budget_petaflop.png",
    "fig1_comparison-fig1_budget_steps.png",
}
BLANK = 2.0  # standard deviation of a picture's 8-bit values, below which nobody sees anything


def committed():
    """Those of finished reports; one's own report of the profile smoke is the twin itself."""
    pictures = (path for path in REPORTS.glob("*/figures/*.png") if path.parents[1].name != "smoke")
    return sorted(path for path in pictures if (path.parents[1] / MANIFEST).exists())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest.mark.parametrize("path", committed(), ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_a_committed_picture_is_neither_blank_nor_its_twin(path):
    own = pixels(path)
    assert own.std() > BLANK
    stage, _, name = path.name.partition("-")
    stages = [folder for folder in runs_folder("smoke").glob("*") if (folder / MANIFEST).exists()]
    if not stages:
        pytest.skip("CODALIB_RUNS holds no run of a notebook")
    folder = next((folder for folder in stages if read_json(folder / MANIFEST)["notebook"] == stage), None)
    assert folder is not None, f"{stage} has not run"
    if path.name in NOT_IN_SMOKE:
        assert not (folder / name).exists(), f"{name} has a twin now: take it out of NOT_IN_SMOKE"
        return
    assert (folder / name).exists(), f"{stage} no longer draws {name}"
    twin = pixels(folder / name)
    assert twin.std() > BLANK
    if path.name not in OF_THE_PAPER:
        assert twin.shape != own.shape or np.abs(twin - own).max() > 0
