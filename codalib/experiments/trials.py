"""Finished trials of an experiment: one small JSON file each, from which an interrupted experiment goes on."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codalib.base.files import read_json, write_json
from codalib.datasets.images import ImageDataset
from codalib.experiments.bracketing import bracket
from codalib.experiments.paper import gain
from codalib.experiments.statistics import group_means
from codalib.models.vae import ContinuousVAE

log = logging.getLogger(__name__)


def words(name: str) -> str:
    """A trial's name as a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name)


def inputs_key(inputs: Sequence[Any]) -> str:
    """Changes with all that decides a trial's result, as JSON can write it: 8 hex digits."""
    return hashlib.sha256(json.dumps(list(inputs)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class TrialFolder:
    """Where an experiment's results lie, and what each file says of the run: commit, machine, versions."""

    results: Path
    provenance: Mapping[str, Any]

    def once(
        self,
        name: str,
        inputs: Sequence[Any],
        make: Callable[[str], dict[str, Any]],
        whole: Callable[[dict[str, Any]], bool] = lambda found: True,
    ) -> dict[str, Any]:
        """The result of a trial, from its file or made now.

        Args:
            name: of the trial, in words; `make` gets it as a file's name.
            inputs: all that decides the result, as JSON can write it.
            whole: whether a result that was found has all that is asked for; else it is made again.
        """
        file = self.results / f"{words(name)}-{inputs_key(inputs)}.json"
        if not (file.exists() and whole(read_json(file))):
            write_json(file, make(words(name)) | dict(self.provenance))
            log.info("%s: finished", name)
        return read_json(file)


def bracket_trials(
    trial: Callable[[float], dict[str, Any]], rates: Sequence[float], score: str
) -> tuple[float, list[dict[str, Any]]]:
    """The rate of the least SCORE on the choosing images, bracketed from RATES; and the trials, "setting": "tried"."""
    tried: list[dict[str, Any]] = []

    def score_of(rate: float) -> float:
        tried.append(trial(rate) | {"setting": "tried"})
        return tried[-1]["choose"].get(score, math.inf)

    return bracket(score_of, rates), tried


class Compared:
    """Finished trials by name, to compare two of them seed by seed; each row has "test": {metric: number}.

    Args:
        rows: name -> its trials, one a seed, the seeds in one order.
        groups: of each test image, such as its concept.
    """

    def __init__(self, rows: Mapping[str, Sequence[Mapping[str, Any]]], groups: Sequence[Any]):
        self.rows, self.groups = rows, groups

    def of(self, name: str, metric: str) -> list[float]:
        return [row["test"][metric] for row in self.rows[name]]

    def by_group(self, name: str, scores: str) -> np.ndarray:
        """The images' own scores, meaned by group, (seeds, groups)."""
        return group_means([row[scores] for row in self.rows[name]], self.groups)

    def gains(self, metric: str, before: str, after: str) -> list[float]:
        """One a seed, as `paper.gain` counts."""
        return [gain(metric, a, b) for a, b in zip(self.of(before, metric), self.of(after, metric), strict=True)]

    def error_falls(self, before: str, after: str) -> np.ndarray:
        """The fall of each group's error, relative to the mean error before, (seeds, groups)."""
        errors = self.by_group(before, "test_errors")
        return (errors - self.by_group(after, "test_errors")) / errors.mean(axis=1, keepdims=True)

    def change(self, metric: str, before: str, after: str) -> str:
        """In words."""
        return f"{metric} {np.mean(self.of(before, metric)):.4g} -> {np.mean(self.of(after, metric)):.4g}"


def data_digest(vae: ContinuousVAE, datasets: Sequence[ImageDataset], *inputs: Any) -> str:
    """16 hex digits of images and a VAE's weights, not of the latents, whose last bits are the machine's."""
    digest = hashlib.sha256(repr(list(inputs)).encode())
    for item in (item for images in datasets for item in images.items):
        picture = item.picture
        digest.update(picture if isinstance(picture, bytes) else Path(picture).read_bytes())
    for name, weights in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
