"""Quantizers on a frozen VAE, each at the paper's setting and at the best of its sweep, over several seeds.

They are the middle steps of Table 1's ablation, and what Figures 3 to 6 draw. A comparison of two methods at one
learning rate says as much about the rate as about the methods, so each method gets the same number of trials, compared
on latents that it was not trained on. A fifth method, attention with one level, is not in the paper's table: it shows
what attention does without residual levels, and its codes lie in the space of the latents themselves.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from codalib.base.files import atomic_folder, read_json, write_json
from codalib.base.paths import DATA, embedded
from codalib.evaluation.latents import latent_scores
from codalib.experiments.paper import TABLE_1
from codalib.experiments.sweeps import BEST, PAPER, sweep
from codalib.models.quantizer import ResidualQuantizer
from codalib.pretrained.registry import load_checked, read_weights
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import QuantizerSettings

HELD_OUT = 0.1  # fraction of the training latents on which a sweep's trials are compared
CONTINUOUS, VQ, RESIDUAL, ATTENTION, ADAPTED = (row.method for row in TABLE_1)
ONE_LEVEL_ATTENTION = "Attention quantization, one level"
METHODS = {  # method -> kind of quantizer, and whether it has the residual levels
    VQ: ("nearest", False),
    ONE_LEVEL_ATTENTION: ("attention", False),
    RESIDUAL: ("nearest", True),
    ATTENTION: ("attention", True),
}
EMBEDDED_QUANTIZERS = {"emoji": DATA / "quantizers-emoji"}  # name -> folder
TRIALS = "trials.json"


@dataclass(frozen=True)
class Trial:
    """One fitted quantizer, with its scores on the held-out latents."""

    method: str
    settings: QuantizerSettings
    quantizer: ResidualQuantizer
    quantization_error: float
    utilization: float
    snapshots: tuple[tuple[int, ResidualQuantizer], ...] = ()  # (step, the quantizer after so many steps), rising

    def row(self) -> dict[str, Any]:
        """A line of the sweep's table."""
        return {
            "method": self.method,
            "learning_rate": self.settings.learning_rate,
            "entropy_weight": self.settings.entropy_weight if self.settings.kind == "attention" else None,
            "seed": self.settings.seed,
            "quantization_error": self.quantization_error,
            "utilization": self.utilization,
        }


def fit_trial(
    method: str, settings: QuantizerSettings, latents: Tensor, folder: str | Path, snapshots: Sequence[int] = ()
) -> Trial:
    """Fit one quantizer; a finished trial is not repeated.

    Args:
        latents: (N, C, H, W); the last tenth is held out of training and scores the trial.
        folder: receives one folder a trial.
        snapshots: steps after which the state is kept, see `fit_quantizer`.
    """
    held_out = max(1, round(HELD_OUT * len(latents)))
    name = f"rate-{settings.learning_rate:g}-entropy-{settings.entropy_weight:g}-seed-{settings.seed}"
    place = Path(folder) / name
    quantizer = fit_quantizer(settings, latents[:-held_out], place, snapshots=snapshots)
    states = tuple((step, _with_state(settings, latents.shape[1], place / f"snapshot-{step}")) for step in snapshots)
    return Trial(method, settings, quantizer, **latent_scores(quantizer, latents[-held_out:]), snapshots=states)


def fit_methods(
    settings: QuantizerSettings,
    latents: Tensor,
    folder: str | Path,
    rates_nearest: Sequence[float],
    rates_attention: Sequence[float],
    entropy_weights: Sequence[float],
    seeds: Sequence[int] = (0,),
    snapshots: Sequence[int] = (),
) -> list[Trial]:
    """Sweep every method of `METHODS` over its learning rates and entropy weights, see `experiments.sweeps.sweep`.

    Args:
        settings: all but the kind, the learning rate, the entropy weight and the seed; a method without residual levels
            has the last of its scales alone.
        entropy_weights: of attention; the nearest neighbour has none.
        snapshots: steps at which the methods of one level keep their state, with the first seed.
    Returns the trials: of each method those with the first seed, then seed by seed the others.
    Raises:
        ValueError: the paper's setting is not among the trials.
    """
    trials = []
    for method, (kind, residual) in METHODS.items():
        own = replace(settings, kind=kind, scales=settings.scales if residual else settings.scales[-1:])
        place = Path(folder) / "".join(letter if letter.isalnum() else "-" for letter in method).strip("-")
        rates, weights = (rates_attention, entropy_weights) if kind == "attention" else (rates_nearest, (0.0,))
        pairs = list(itertools.product(rates, weights))
        trials += _fit_method(method, own, latents, place, pairs, seeds, () if residual else snapshots)
    return trials


def _fit_method(
    method: str,
    settings: QuantizerSettings,
    latents: Tensor,
    folder: Path,
    pairs: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    snapshots: Sequence[int],
) -> list[Trial]:
    """The trials of one method over PAIRS of learning rate and entropy weight."""
    paper = _paper_pair(settings.kind)
    if paper not in pairs:
        raise ValueError(f"expected the paper's (learning rate, entropy weight) {paper} in the sweep, got {pairs}")

    def train(pair: tuple[float, float], seed: int) -> dict[str, Any]:
        own = replace(settings, learning_rate=pair[0], entropy_weight=pair[1], seed=seed)
        trial = fit_trial(method, own, latents, folder, snapshots if seed == seeds[0] else ())
        return {"trial": trial, "pair": pair, "error": trial.quantization_error}

    rows = sweep(train, pairs, seeds, "error", paper)
    again = sorted(rows[len(set(pairs)) :], key=lambda row: (seeds.index(row["trial"].settings.seed), row["pair"]))
    return [row["trial"] for row in (*rows[: len(set(pairs))], *again)]


def _paper_pair(kind: str) -> tuple[float, float]:
    """The paper's learning rate (5e-4) and, for attention, the release's entropy weight (0.05)."""
    return QuantizerSettings.learning_rate, QuantizerSettings.entropy_weight if kind == "attention" else 0.0


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the lowest quantization error on the held-out latents."""
    return min(trials, key=lambda trial: trial.quantization_error)


def paper_setting(trials: Sequence[Trial]) -> Trial:
    """The first trial at the paper's learning rate and entropy weight; ValueError where the sweep left it out."""
    tried = [(trial.settings.learning_rate, trial.settings.entropy_weight) for trial in trials]
    for trial, pair in zip(trials, tried, strict=True):
        if pair == _paper_pair(trial.settings.kind):
            return trial
    paper = _paper_pair(trials[0].settings.kind)
    raise ValueError(f"expected the paper's (learning rate, entropy weight) {paper} in the sweep, got {tried}")


def chosen(trials: Sequence[Trial], method: str, setting: str) -> list[Trial]:
    """The trials of a METHOD at `BEST` or at `PAPER`, one a seed; both are chosen with the first seed alone."""
    own = [trial for trial in trials if trial.method == method]
    if not own:
        raise ValueError(f"expected a method of {sorted({t.method for t in trials})}, got {method!r}")
    first = [trial for trial in own if trial.settings.seed == own[0].settings.seed]
    model = {BEST: best, PAPER: paper_setting}[setting](first)
    return [trial for trial in own if replace(trial.settings, seed=0) == replace(model.settings, seed=0)]


# --- files ------------------------------------------------------------------------------------------------------------
def save_trials(trials: Sequence[Trial], folder: str | Path, vae: str) -> None:
    """Write the trials, and the name of the VAE whose latents they quantize, as FOLDER, replacing what was there."""
    rows = []
    with atomic_folder(folder) as new:
        for number, trial in enumerate(trials):
            states = {"": trial.quantizer} | {f"-step-{step}": state for step, state in trial.snapshots}
            for mark, quantizer in states.items():
                tensors = {name: value.detach().cpu().contiguous() for name, value in quantizer.state_dict().items()}
                save_file(tensors, new / f"{number:03d}{mark}.safetensors")
            scores = {"quantization_error": trial.quantization_error, "utilization": trial.utilization}
            steps = [step for step, _ in trial.snapshots]
            rows.append({"method": trial.method, "settings": asdict(trial.settings), **scores, "snapshots": steps})
        channels = trials[0].quantizer.latent_channels
        write_json(new / TRIALS, {"vae": vae, "latent_channels": channels, "trials": rows})


def load_trials(folder: str | Path) -> tuple[list[Trial], str]:
    """The trials that `save_trials` wrote, in the same order, and their VAE; FOLDER may be an embedded name, "emoji".

    Raises ValueError where there are none.
    """
    known = EMBEDDED_QUANTIZERS.get(str(folder))
    folder = embedded(known) if known else Path(folder)
    if not (folder / TRIALS).exists():
        raise ValueError(
            f"expected a folder that the notebook 01_fit_quantizers wrote, got {folder}, which holds no {TRIALS}"
        )
    contents, trials = read_json(folder / TRIALS), []
    for number, row in enumerate(contents["trials"]):
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in row["settings"].items()}
        settings = QuantizerSettings(**values)
        state = [
            _with_state(settings, contents["latent_channels"], folder / f"{number:03d}{mark}")
            for mark in ("", *(f"-step-{step}" for step in row["snapshots"]))
        ]
        snapshots = tuple(zip(row["snapshots"], state[1:], strict=True))
        scores = (row["quantization_error"], row["utilization"])
        trials.append(Trial(row["method"], settings, state[0], *scores, snapshots=snapshots))
    return trials, contents["vae"]


def _with_state(settings: QuantizerSettings, channels: int, file: Path) -> ResidualQuantizer:
    """A quantizer of these settings with the weights of FILE.safetensors, frozen."""
    with torch.random.fork_rng(devices=[]):  # fresh weights that are overwritten: the caller's randomness stays
        quantizer = settings.build_quantizer(channels)
    load_checked(quantizer, read_weights(f"{file}.safetensors"), f"{file}.safetensors")
    return quantizer.eval().requires_grad_(False)
