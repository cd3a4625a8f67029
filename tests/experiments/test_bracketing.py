"""A sweep ends with its best inside."""

import math

import pytest

from codalib.experiments.bracketing import bracket, bracket_both


def counted(score):
    calls = []

    def call(*values):
        calls.append(values)
        return score(*values)

    return call, calls


@pytest.mark.parametrize("optimum", [0.0011, 0.01, 3.0])
def test_the_best_has_a_worse_neighbour_on_both_sides(optimum):
    score, calls = counted(lambda value: abs(math.log(value / optimum)))
    best = bracket(score, [0.005, 0.015, 0.045])
    tried = sorted(value for (value,) in calls)
    assert tried[0] < best < tried[-1]
    assert abs(math.log(best / optimum)) <= math.log(3) / 2 + 1e-3
    assert len(set(calls)) == len(calls)


def test_a_fit_that_diverges_is_the_worst():
    assert bracket(lambda value: math.nan if value > 0.02 else -value, [0.005, 0.015, 0.045]) == 0.015
    with pytest.raises(ValueError, match="expected a finite score"):
        bracket(lambda value: math.inf, [0.1, 0.3], highest=1.0)


def test_a_sweep_ends_at_its_bounds():
    assert bracket(lambda value: value, [0.01, 0.03]) == 0.0  # no entropy term at all is a value too
    assert bracket(lambda value: -value, [0.01, 0.03], highest=0.1) == 0.09
    with pytest.raises(ValueError, match="expected rising values above 0"):
        bracket(abs, [0.3, 0.1])


def test_two_values_are_found_together_and_no_pair_is_tried_twice():
    score, calls = counted(lambda one, two: math.log(one / 0.05) ** 2 + math.log(two / 0.0005) ** 2)
    one, two = bracket_both(score, [0.005, 0.015, 0.045], [0.002, 0.006, 0.018])
    assert len(set(calls)) == len(calls)
    for other in ((one * 3, two), (one / 3, two), (one, two * 3), (one, two / 3)):
        assert score(*other) >= score(one, two)
