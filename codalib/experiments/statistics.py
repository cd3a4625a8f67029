"""The statistics behind a verdict on a claim, and means over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr  # the distribution function of Student's t

from codalib.experiments.paper import CLAIMS

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
SIGNIFICANCE = 0.05
SEEDS_FOR_A_TEST = 3  # below this the seeds are only compared in sign
TEST = "one-sided t-test"
SPREAD_SUFFIX = "_std"


def claim_verdict(
    claim: str, improvements: Sequence[float], effect: str, margin: float = 0.0, detail: str = "", setting: str = ""
) -> dict[str, str]:
    """The verdict on a claim of the paper, computed from what the runs measured.

    Args:
        claim: an id of `paper.CLAIMS`.
        improvements: one number a seed, positive where the claim's direction was found; of a claim in several parts the
            smallest of its parts.
        effect: the measured effect in words and numbers.
        margin: a mean improvement no larger than this, either way, decides nothing.
        detail: what else a reader should know.
        setting: of a claim that is judged more than once, what this time is, such as "at the paper's setting".

    From three seeds on, a one-sided t-test of the improvements against 0 decides (p < 0.05); below that, all seeds must
    agree. Returns {"id", "setting", "verdict", "effect", "detail"} for `Run.finish`.
    """
    if claim not in CLAIMS:
        raise ValueError(f"expected a claim of {', '.join(CLAIMS)}, got {claim!r}")
    values = np.asarray(improvements, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected a finite improvement for each seed of claim {claim!r}, got {list(improvements)}")
    if len(values) >= SEEDS_FOR_A_TEST and not np.allclose(values, values[0]):
        count = len(values)
        statistic = values.mean() / (values.std(ddof=1) / math.sqrt(count))
        chance = {"better": stdtr(count - 1, -statistic), "worse": stdtr(count - 1, statistic)}
        better, worse = chance["better"] < SIGNIFICANCE, chance["worse"] < SIGNIFICANCE
        how = f"{count} seeds, {TEST}, p = {min(chance.values()):.2g}."
    else:
        better, worse = (values > 0).all(), (values <= 0).all()
        how = f"{len(values)} seeds, no test." if len(values) > 1 else "One seed, so its spread is not known."
    decided = abs(values.mean()) > margin or not margin
    verdict = HOLDS if better and decided else FAILS if worse and decided else UNDECIDED
    detail = f"{detail} {how}".strip()
    return {"id": claim, "setting": setting, "verdict": verdict, "effect": effect, "detail": detail}


def tested(result: Mapping[str, str]) -> bool:
    """Whether a test over seeds is behind a verdict of `claim_verdict`; else it only compares signs."""
    return TEST in result.get("detail", "")


def over_seeds(rows: Sequence[Mapping[str, Any]], by: Sequence[str] = ("method",)) -> list[dict[str, Any]]:
    """One row for all rows that agree in BY: the means of their numbers, and with several rows each one's `X_std`.

    A column "seed" goes; "seeds" says how many rows there were.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    merged = []
    for values, group in groups.items():
        line: dict[str, Any] = dict(zip(by, values, strict=True)) | {"seeds": len(group)}
        for name in group[0]:
            if name in by or name == "seed":
                continue
            own = [row[name] for row in group]
            if any(value is None or isinstance(value, str | bool) for value in own):
                line[name] = own[0] if all(value == own[0] for value in own) else None
                continue
            same = all(value == own[0] for value in own)  # exactly, without the rounding of a mean
            line[name] = float(own[0] if same else np.mean(own))
            if len(own) > 1:
                line[name + SPREAD_SUFFIX] = 0.0 if same else float(np.std(own, ddof=1))
        merged.append(line)
    return merged
