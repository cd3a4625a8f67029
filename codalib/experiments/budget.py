"""How long does a tokenizer from random weights take to what an adapted VAE reaches? (The paper's six times, Table 2.)

The adapted tokenizer has the paper's short training; those from scratch, VQGAN's way (arXiv:2012.09841), go on for many
times as long, and their curves are searched for the quality that it has at its end. Its VAE had a training of its own,
which the paper does not count, and here a start on latents, which the paper does not have: the steps are compared
without these and with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from codalib.experiments.adapted import AdaptedTrials
from codalib.experiments.paper import SIX_TIMES
from codalib.experiments.statistics import claim_verdict
from codalib.experiments.trials import bracket_trials

ADAPTED, SCRATCH = "attention, both adapted", "nearest, from scratch"  # of `adapted.EVERY_CELL`


def budget_trials(
    adapted: AdaptedTrials,
    rate: float,
    scratch: Mapping[str, AdaptedTrials],
    rates: Sequence[float],
    seeds: Sequence[int],
    longer: int,
) -> Iterator[dict[str, Any]]:
    """The adapted tokenizer at its RATE, and each from SCRATCH with LONGER times as many steps, for every seed.

    The rates from scratch are bracketed in trainings as long as the adapted one's. Yields one result a trial with
    "method", a name of SCRATCH or `ADAPTED`, and "setting", "tried" or "best".
    """
    best = {}
    for name, trials in scratch.items():
        best[name], tried = bracket_trials(partial(trials.trial, SCRATCH, seed=seeds[0]), rates, "image_loss")
        yield from (row | {"method": name} for row in tried)
    for seed in seeds:  # whole seeds first: a stop leaves fewer seeds of all
        yield adapted.trial(ADAPTED, rate, seed) | {"method": ADAPTED, "setting": "best"}
        for name, trials in scratch.items():
            yield trials.trial(SCRATCH, best[name], seed, longer) | {"method": name, "setting": "best"}


def steps_to_reach(curve: Sequence[Mapping[str, float]], wanted: float) -> tuple[float, bool]:
    """The step at which a curve of "step" and "psnr", straight between its points, reaches WANTED dB.

    Returns the step and whether it was reached: where it was not, the last step stands for it, a lower bound.
    """
    above = [row["psnr"] >= wanted for row in curve]
    if True not in above:
        return float(curve[-1]["step"]), False
    first = above.index(True)
    if first == 0:
        return float(curve[0]["step"]), True
    before, after = curve[first - 1], curve[first]
    part = (wanted - before["psnr"]) / (after["psnr"] - before["psnr"])
    return before["step"] + (after["step"] - before["step"]) * part, True


def budget_claims(rows: Sequence[Mapping[str, Any]], vae_steps: float) -> list[dict[str, Any]]:
    """The verdicts on the paper's six times fewer steps, by method: of the adapted tokenizer its steps on images alone,
    then with those of its start on latents, then with the VAE's own VAE_STEPS too, all in steps of as many images.

    A curve that never gets there gives a lower bound: where that is already more than six times, the claim holds; else
    it is not tested.
    """
    finals = [row for row in rows if row["setting"] == "best"]
    adapted = [row for row in finals if row["method"] == ADAPTED]
    goals = {row["settings"]["seed"]: row["curve"][-1] for row in adapted}
    start = max(row["fit"]["steps"] * row["fit"]["batch_size"] / row["settings"]["batch_size"] for row in adapted)
    counts = {
        "steps on images alone": 0.0,
        "the start on latents counted": start,
        "the start on latents and the VAE's own training counted": start + vae_steps,
    }
    claims = []
    for name in dict.fromkeys(row["method"] for row in finals if row["method"] != ADAPTED):
        curves = {row["settings"]["seed"]: row["curve"] for row in finals if row["method"] == name}
        found = [steps_to_reach(curves[seed], goal["psnr"]) for seed, goal in goals.items()]
        reached = all(there for _, there in found)
        for what, counted in counts.items():
            spent = [goal["step"] + counted for goal in goals.values()]
            ratios = [steps / own for (steps, _), own in zip(found, spent, strict=True)]
            effect = f"{'' if reached else 'more than '}{np.mean(ratios):.3g} times the steps to the same PSNR"
            open_ = not reached and min(ratios) <= SIX_TIMES
            why = "The tokenizer from scratch was stopped before it got there; a test lets it go on." if open_ else ""
            parts = {"iterations": [ratio / SIX_TIMES - 1 for ratio in ratios]}
            claims.append(claim_verdict("training_budget", parts, effect, setting=f"{name}, {what}", not_tested=why))
    return claims


def budget_curves(
    rows: Sequence[Mapping[str, Any]], operations: Mapping[str, float], vae_steps: float, vae_operations: float
) -> list[dict[str, Any]]:
    """The curves of the first seed for a figure: "method", "steps", "petaflop" (10^15 operations) and "val_psnr".

    The adapted tokenizer stands there twice, without and with the VAE's own training. Its start on latents, whose steps
    pass no image through a network, is not counted.

    Args:
        operations, vae_operations: of one step, by method.
    """
    finals = [row for row in rows if row["setting"] == "best"]
    first = finals[0]["settings"]["seed"]
    lines = []
    for row in (own for own in finals if own["settings"]["seed"] == first):
        name, cost = row["method"], operations[row["method"]]
        starts = {name: 0} | ({f"{name}, with the VAE's training": vae_steps} if name == ADAPTED else {})
        lines += [
            {
                "method": label,
                "steps": before + point["step"],
                "petaflop": (before * vae_operations + point["step"] * cost) / 1e15,
                "val_psnr": point["psnr"],
            }
            for label, before in starts.items()
            for point in row["curve"]
        ]
    return lines
