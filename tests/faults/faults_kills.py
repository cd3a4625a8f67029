"""kill -9 at random moments of every stage, in one process and in two; run by `make faults`."""

import os
import random
import time

import pytest
from stages import PARAMETERS, STAGES, Started, outcome

KILLS, KILLS_OF_TWO, SEED = (int(os.environ.get(name, default)) for name, default in PARAMETERS.items())
# Only the quantizer's fit is never started in several processes: it takes minutes on latents alone.
CASES = [(1, name) for name in STAGES] + [(2, name) for name in STAGES if name != "quantizer fit"]


@pytest.mark.parametrize(("processes", "stage"), CASES)
def test_killed_at_random_moments(processes, stage, place, row):
    function, rng = STAGES[stage], random.Random(f"{SEED} {processes} {stage}")
    name = f"{stage.replace(' ', '-')}-{processes}"
    whole = Started(function, place / name, processes)
    assert whole.finish() is None
    seconds, expected = time.monotonic() - whole.began, outcome(place / name)
    kills, runs, killed = (KILLS if processes == 1 else KILLS_OF_TWO), 0, []
    while len(killed) < kills or not runs:
        runs += 1
        folder = place / f"{name}-killed-{runs}"
        while len(killed) < kills:
            run = Started(function, folder, processes)
            if run.wait(rng.uniform(0, seconds)):
                assert run.finish() is None
                seconds = min(seconds, time.monotonic() - run.began)  # the first one may have been a slow one
                break
            killed.append(run.kill(rng))
        assert Started(function, folder, processes).finish() is None
        assert outcome(folder) == expected
    several = f", {killed.count('one of the processes')} of them of one process alone" if processes > 1 else ""
    done = f"{len(killed)} kills{several}, in {runs} run(s) of {seconds:.1f} s: files and log equal bit for bit"
    row(f"kill -9 during {stage}, {processes} process{'es' * (processes > 1)}", "equal to the uninterrupted run", done)
