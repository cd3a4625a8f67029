"""The ablation ladder of Table 1: quantizers on a frozen VAE, each at the paper's setting and at the best of its sweep.

A comparison of two methods at one learning rate says as much about the rate as about the methods, so each method gets
the same number of trials, judged on latents that it was not trained on.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from codalib.quantize import ResidualQuantizer
from codalib.train import QuantizerSettings, fit_quantizer, latent_scores

HELD_OUT = 0.1  # share of the training latents on which a sweep's trials are compared


@dataclass(frozen=True)
class Trial:
    """One quantizer of a sweep, with its scores on the held-out latents."""

    settings: QuantizerSettings
    quantizer: ResidualQuantizer
    quantization_error: float
    utilization: float

    def row(self, method: str) -> dict[str, Any]:
        """A line of the sweep's table."""
        return {
            "method": method,
            "learning_rate": self.settings.learning_rate,
            "entropy_weight": self.settings.entropy_weight if self.settings.kind == "attention" else None,
            "quantization_error": self.quantization_error,
            "utilization": self.utilization,
        }


def sweep(
    settings: QuantizerSettings,
    latents: Tensor,
    folder: str | Path,
    learning_rates: Sequence[float],
    entropy_weights: Sequence[float] = (0.0,),
) -> list[Trial]:
    """Fit a quantizer at every learning rate and entropy weight, in the order given; a finished trial is not repeated.

    Args:
        settings: all else.
        latents: (N, C, H, W); the last tenth is held out of training and scores the trials.
        folder: receives one folder a trial.
    """
    held_out = max(1, round(HELD_OUT * len(latents)))
    trials = []
    for rate, weight in itertools.product(learning_rates, entropy_weights):
        own = replace(settings, learning_rate=rate, entropy_weight=weight)
        quantizer = fit_quantizer(own, latents[:-held_out], Path(folder) / f"rate-{rate:g}-entropy-{weight:g}")
        trials.append(Trial(own, quantizer, **latent_scores(quantizer, latents[-held_out:])))
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the lowest quantization error on the held-out latents."""
    return min(trials, key=lambda trial: trial.quantization_error)


def paper_setting(trials: Sequence[Trial]) -> Trial:
    """The trial at the paper's learning rate (5e-4) and, for attention, the release's entropy weight (0.05).

    Raises ValueError where the sweep left it out.
    """
    for trial in trials:
        weight = (
            QuantizerSettings.entropy_weight if trial.settings.kind == "attention" else trial.settings.entropy_weight
        )
        if (trial.settings.learning_rate, trial.settings.entropy_weight) == (QuantizerSettings.learning_rate, weight):
            return trial
    tried = [(trial.settings.learning_rate, trial.settings.entropy_weight) for trial in trials]
    raise ValueError(
        f"the sweep tried (learning rate, entropy weight) {tried}, expected the paper's "
        f"({QuantizerSettings.learning_rate}, {QuantizerSettings.entropy_weight}) among them"
    )
