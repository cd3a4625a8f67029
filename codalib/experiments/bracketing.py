"""Sweeps that go on until their best is inside: no hyper-parameter is chosen at the edge of what was tried."""

import math
from collections.abc import Callable, Sequence

FLOOR = 1e-4  # below it a sweep goes to its lowest value at once


def bracket(
    score: Callable[[float], float],
    start: Sequence[float],
    factor: float = 3.0,
    lowest: float = 0.0,
    highest: float = math.inf,
) -> float:
    """The value of the least score, with a worse neighbour a FACTOR away on both sides.

    Args:
        score: of one value; called once a value. NaN and infinity count as the worst.
        start: rising values, a FACTOR apart, tried first; more are tried beyond the edge where the best lies.
        lowest, highest: the sweep ends there. With `lowest` 0 the value 0 itself is tried, once, below the least value.
    Raises ValueError where no value has a finite score.
    """
    if not start or list(start) != sorted(start) or start[0] <= 0 or factor <= 1:
        raise ValueError(f"expected rising values above 0 and a factor above 1, got {list(start)} and {factor}")
    found = {value: _finite(score(value)) for value in start}
    while True:
        best = min(found, key=lambda value: found[value])
        if found[best] == math.inf:
            raise ValueError(f"expected a finite score for one of {sorted(found)}, got none")
        least, most = min(found), max(found)
        if best == most and most * factor <= highest:
            above = _round(most * factor)
            found[above] = _finite(score(above))
        elif best == least and least > lowest and least / factor >= lowest:
            below = _round(least / factor) if least / factor > FLOOR else lowest
            found[below] = _finite(score(below))
        else:
            return best


def bracket_both(
    score: Callable[[float, float], float],
    first: Sequence[float],
    second: Sequence[float],
    factor: float = 3.0,
    rounds: int = 3,
) -> tuple[float, float]:
    """The same for two values, one after the other until neither moves; SCORE is called once a pair."""
    known: dict[tuple[float, float], float] = {}

    def once(one: float, two: float) -> float:
        if (one, two) not in known:
            known[one, two] = score(one, two)
        return known[one, two]

    two = second[len(second) // 2]
    one = None
    for _ in range(rounds):
        moved = bracket(lambda value, two=two: once(value, two), first, factor)
        again = bracket(lambda value, one=moved: once(one, value), second, factor)
        if (moved, again) == (one, two):
            break
        one, two = moved, again
        first = _around(one, factor)
        second = _around(two, factor) if two else second
    return one, two


def _around(value: float, factor: float) -> list[float]:
    return [_round(value / factor), value, _round(value * factor)]


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
