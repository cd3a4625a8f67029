"""kill -9 at random moments of every stage, in one process and in two; run by `make faults`."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress

import psutil
import pytest
import stages
from conftest import DEFAULTS
from stages import STAGES, outcome

KILLS, KILLS_OF_TWO, SEED = (int(os.environ.get(name, default)) for name, default in DEFAULTS.items())
LIMIT = 300  # s: a run that takes longer hangs
# Only the quantizer's fit is never started in several processes: it takes minutes on latents alone.
CASES = [(1, name) for name in STAGES] + [(2, name) for name in STAGES if name != "quantizer fit"]


class Started:
    """A stage in a forked process (nothing is imported again), and in as many as it launches itself."""

    def __init__(self, function, folder, processes=1, **named):
        marker, self.output = folder.with_suffix(".began"), folder.with_suffix(".txt")
        marker.unlink(missing_ok=True)
        arguments = (function, processes, marker, self.output, folder)
        self.process = multiprocessing.get_context("fork").Process(target=stages.child, args=arguments, kwargs=named)
        self.process.start()
        while not marker.exists() and self.process.is_alive():
            time.sleep(0.005)
        self.began = time.monotonic()

    def wait(self, seconds=LIMIT):
        """Whether it ended by itself in SECONDS."""
        self.process.join(max(0.0, seconds))
        return not self.process.is_alive()

    def kill(self, rng):
        """All its processes as a power failure does, or one of those that it launched as the kernel does for memory."""
        ranks = [p for p in psutil.Process(self.process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        if ranks and rng.random() < 0.5:
            with suppress(psutil.NoSuchProcess):
                rng.choice(ranks).kill()
            assert self.wait(), "the others go on for ever where one process was killed"
            return "one of the processes"
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.wait()
        return "all"

    def finish(self):
        """Wait for its end; what it said last, and None where it went well."""
        assert self.wait(), f"still running after {LIMIT} s"
        return None if self.process.exitcode == 0 else self.output.read_text(errors="replace").splitlines()[-1]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    assert Started(stages.make_caches, folder).finish() is None
    return folder


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
                break
            killed.append(run.kill(rng))
        assert Started(function, folder, processes).finish() is None
        assert outcome(folder) == expected
    several = f", {killed.count('one of the processes')} of them of one process alone" if processes > 1 else ""
    done = f"{len(killed)} kills{several}, in {runs} run(s) of {seconds:.1f} s: files and log equal bit for bit"
    row(f"kill -9 during {stage}, {processes} process{'es' * (processes > 1)}", "equal to the uninterrupted run", done)
