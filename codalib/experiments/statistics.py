"""The statistics behind a verdict on a claim, and means over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from codalib.experiments.paper import CLAIMS, SMALLEST_GAINS

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds", "does not hold", "undecided", "not tested"
SIGNIFICANCE = 0.05  # of two-sided tests
SEEDS_FOR_A_TEST = 3
DRAWS = 100_000  # of the bootstrap
GROUP_DRAWS = 10_000  # of that of groups alone
SPREAD_SUFFIX = "_std"


def resampled_means(gains: ArrayLike, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means (draws,) of paired gains as other seeds and other images would give them.

    Args:
        gains: (seeds,), or (seeds, groups), a group being images that belong together, as those of one concept.

    Groups are resampled with repetition. So few seeds as three to five, resampled, give intervals that are too short;
    their mean is drawn from Student's t distribution instead, whose tails allow for the few.
    """
    table = np.asarray(gains, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    seeds, groups = table.shape
    rng = np.random.default_rng(seed)
    deviation = table.mean(axis=1).std(ddof=1) / np.sqrt(seeds)
    means = table.mean() + deviation * rng.standard_t(seeds - 1, draws)
    if groups > 1:
        around = table.mean(axis=0) - table.mean()
        for part in np.array_split(means, max(1, draws * groups // 10**7)):  # views: at most 80 MB of counts at once
            part += rng.multinomial(groups, [1 / groups] * groups, len(part)) @ around / groups
    return means


def group_means(values: ArrayLike, groups: Sequence[Any]) -> np.ndarray:
    """Values of images (seeds, images) or (images,) -> means of each group's (seeds, groups), in the groups' order.

    Raises ValueError where there is not one group for each image, or a value is not finite.
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if not np.isfinite(table).all():
        raise ValueError("expected a finite value of each image, got one that is not: make the trial anew")
    names, which = np.unique(np.asarray(groups), return_inverse=True)
    if len(which) != table.shape[1]:
        raise ValueError(f"expected the group of each of {table.shape[1]} images, got {len(which)}")
    return np.stack([table[:, which == i].mean(axis=1) for i in range(len(names))], axis=1)


def group_interval(values: ArrayLike, groups: Sequence[Any], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of images' values (images,), whole groups of images resampled (bootstrap).

    It allows for other images of the same kind, not for another training.
    """
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(which, np.asarray(values, dtype=float)), np.bincount(which)
    counts = np.random.default_rng(seed).multinomial(len(sums), [1 / len(sums)] * len(sums), GROUP_DRAWS)
    low, high = np.quantile(counts @ sums / (counts @ sizes), [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    return float(low), float(high)


def p_value(means: np.ndarray, value: float) -> float:
    """The two-sided p of resampled means against a value; at least one over their number."""
    tail = min((means <= value).mean(), (means >= value).mean())
    return float(min(1.0, max(2 * tail, 1 / len(means))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values for their number: all that stay below a level hold together at that level."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def smallest_gain(part: str) -> float:
    """The smallest gain of interest of a part: that of the metric before its colon. Unknown ones raise ValueError."""
    metric = part.partition(":")[0].partition("@")[0]
    if metric not in SMALLEST_GAINS:
        raise ValueError(f"expected a part of {', '.join(SMALLEST_GAINS)}, got {metric!r}")
    return SMALLEST_GAINS[metric]


def decide(mean: float, low: float, high: float, smallest: float) -> str:
    """The verdict on one part: its mean gain and interval against nothing and against the smallest gain of interest.

    It holds where the gain is above 0 beyond chance and at least the smallest of interest; it does not hold where a
    gain of interest is excluded.
    """
    if low > 0 and mean >= smallest:
        return HOLDS
    return FAILS if high < smallest or high <= 0 else UNDECIDED


def claim_verdict(
    claim: str,
    parts: Mapping[str, ArrayLike],
    effect: str,
    detail: str = "",
    setting: str = "",
    not_tested: str = "",
) -> dict[str, Any]:
    """The verdict on a claim of the paper, computed from what the runs measured.

    Args:
        claim: an id of `paper.CLAIMS`.
        parts: "METRIC" or "METRIC: what is compared" -> paired gains, (seeds,) or (seeds, groups) as in
            `resampled_means`, in the unit of `paper.SMALLEST_GAINS`, positive in the claim's direction. The claim holds
            where every part does, and does not where one does not.
        effect: the measured effect in words and numbers.
        detail: what else a reader should know.
        setting: of a claim that is judged more than once, what this time is, such as "at the paper's setting".
        not_tested: why this run cannot test the claim, and what would; the verdict is then "not tested".

    Below three seeds a part is not tested, and then the claim is not, unless another part already fails. Returns {"id",
    "setting", "verdict", "p": two-sided, before Holm's correction, None where nothing is tested, "parts": each tested
    one's gain, interval and verdict, "effect", "detail"}.
    """
    if claim not in CLAIMS:
        raise ValueError(f"expected a claim of {', '.join(CLAIMS)}, got {claim!r}")
    tables = {name: np.asarray(gains, dtype=float) for name, gains in parts.items()}
    if not tables or not all(table.size and np.isfinite(table).all() for table in tables.values()):
        raise ValueError(f"expected finite gains for each part of claim {claim!r}, got {dict(parts)}")
    found = {"id": claim, "setting": setting, "effect": effect}
    enough = {name: gains for name, gains in tables.items() if len(gains) >= SEEDS_FOR_A_TEST and not not_tested}
    judged = {name: _judge(gains, smallest_gain(name)) for name, gains in enough.items()}
    verdicts = [part["verdict"] for part in judged.values()]
    seeds = min(map(len, tables.values()))
    if len(enough) < len(tables) and FAILS not in verdicts:
        why = not_tested or f"{seeds} seed{'s' * (seeds > 1)}; a test takes {SEEDS_FOR_A_TEST}."
        return found | {"verdict": NOT_TESTED, "p": None, "parts": {}, "detail": f"{detail} {why}".strip()}
    verdict = FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED
    p = 1.0
    if verdict == HOLDS:  # all of them, so the largest
        p = max(part["p"] for part in judged.values())
    elif verdict == FAILS:  # one of several, so Bonferroni's
        p = min(1.0, len(tables) * min(part["p"] for part in judged.values() if part["verdict"] == FAILS))
    seeds = min(map(len, enough.values()))
    why = f"{seeds} seeds; {_in_words(judged, verdict)}."
    return found | {"verdict": verdict, "p": p, "parts": judged, "detail": f"{detail} {why}".strip()}


def _judge(gains: np.ndarray, smallest: float) -> dict[str, Any]:
    means = resampled_means(gains)
    low, high = np.quantile(means, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    verdict = decide(gains.mean(), low, high, smallest)
    p = p_value(means, smallest if verdict == FAILS else 0.0)
    interval = [float(low), float(high)]
    return {"gain": float(gains.mean()), "interval": interval, "smallest": smallest, "p": p, "verdict": verdict}


def _in_words(judged: Mapping[str, Mapping[str, Any]], verdict: str) -> str:
    """The part that decides: of those with the claim's verdict the least certain, or the most certain that fails."""
    decisive = [item for item in judged.items() if item[1]["verdict"] == verdict]
    name, part = (min if verdict == FAILS else max)(decisive, key=lambda item: item[1]["p"])
    low, high = part["interval"]
    which = f"of {len(judged)} parts {name} decides" if len(judged) > 1 else name
    return f"{which}: gain {part['gain']:.3g}, 95 % from {low:.3g} to {high:.3g}, p = {part['p']:.2g}"


def corrected(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same verdicts after Holm's correction over all that were tested; what falls becomes undecided and says so.

    Each gains "adjusted_p". A verdict of an older record, without a p, is not tested.
    """
    tested = [i for i, claim in enumerate(claims) if claim.get("p") is not None]
    adjusted = dict(zip(tested, holm([claims[i]["p"] for i in tested]), strict=True))
    rows = []
    for i, claim in enumerate(claims):
        row = dict(claim) | {"adjusted_p": adjusted.get(i)}
        if i not in adjusted:
            if row["verdict"] != NOT_TESTED:  # of the rules before there were intervals
                row["detail"] = (
                    f"{row['detail']} Its page's verdict is of an earlier rule; the page is to be made anew."
                )
            row["verdict"] = NOT_TESTED
        elif row["verdict"] != UNDECIDED and adjusted[i] >= SIGNIFICANCE:
            row["detail"] = f"{row['detail']} Not beyond chance after Holm's correction (p = {adjusted[i]:.2g})."
            row["verdict"] = UNDECIDED
        rows.append(row)
    return rows


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
