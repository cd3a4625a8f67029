"""Where a training's curves go beside log.jsonl: accelerate's trackers, chosen by CODALIB_TRACKER."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

VARIABLE = "CODALIB_TRACKER"  # of the environment, so that what is trained does not depend on it
NONE = "none"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # the first where the variable is not set
PROJECT = "codalib"


def chosen_tracker() -> str:
    """The tracker's name, or "none"; ValueError where it is unknown or its package is missing."""
    name = os.environ.get(VARIABLE) or TRACKERS[0]
    if name not in (*TRACKERS, NONE):
        raise ValueError(f"expected {VARIABLE} to be one of {', '.join((*TRACKERS, NONE))}, got {name!r}")
    if name != NONE and importlib.util.find_spec(name) is None:
        raise ValueError(f"{VARIABLE} is {name}, whose package is not here: pip install {name}, or take {TRACKERS[0]}")
    return name


def start_tracker(folder: Path, run: str, step: int, settings: dict[str, Any]) -> GeneralTracker | None:
    """The chosen tracker of the training in FOLDER that goes on from STEP, started; None for "none".

    TensorBoard's files are below FOLDER. The others get a run in the project "codalib", named after FOLDER; RUN, a name
    of this training alone, has a resumed one go on in wandb's and trackio's.
    """
    name = chosen_tracker()
    if name == NONE:
        return None
    title = "/".join(folder.absolute().parts[-2:])
    options = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step},
        "wandb": {"run_name": PROJECT, "name": title, "id": run, "resume": "allow", "dir": folder},
        "trackio": {"run_name": PROJECT, "name": f"{title}-{run}", "resume": "allow"},
        "mlflow": {"experiment_name": PROJECT, "run_name": title},
    }[name]
    tracker = LOGGER_TYPE_TO_CLASS[name](**options)
    tracker.start()
    if name != "tensorboard":  # which writes a second run for them
        tracker.store_init_configuration(settings)
    return tracker
