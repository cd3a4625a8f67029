"""Threads: fixed by the user, or as many as others leave free, with faked loads."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codalib.base import hardware


@pytest.fixture
def machine(monkeypatch):
    """Four cores whose other processes keep `load` of them busy; no number of threads is fixed."""
    load = {"others": 0.0}
    for name in ("CODALIB_THREADS", "CODALIB_STAGES", "OMP_NUM_THREADS", *hardware.PASSIVE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "usable_cores", lambda: 4)
    monkeypatch.setattr(hardware, "SAMPLE_SECONDS", 0)
    monkeypatch.setattr(hardware.LoadMeter, "others", lambda self: load["others"])
    yield load
    for name in ("CODALIB_THREADS", "CODALIB_STAGES", "OMP_NUM_THREADS", *hardware.PASSIVE):
        os.environ.pop(name, None)


@pytest.mark.parametrize(("others", "threads"), [(0.0, 4), (0.2, 4), (0.7, 3), (1.0, 3), (2.1, 2), (9.0, 1)])
def test_as_many_threads_as_cores_are_free(machine, others, threads):
    machine["others"] = others
    assert hardware.set_threads() == threads
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    machine["others"] = 0.0
    assert hardware.set_threads() == 4  # our own choice fixes nothing for a process started from this one


@pytest.mark.parametrize(("others", "threads"), [(0.0, 2), (1.0, 2), (2.1, 2), (3.0, 1)])
def test_stages_side_by_side_share_the_cores(machine, others, threads):
    os.environ["CODALIB_STAGES"] = "2"
    machine["others"] = others  # of which one may be the other stage
    assert hardware.set_threads() == threads


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"CODALIB_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1"}, 2),
        ({"CODALIB_THREADS": "1", "OMP_NUM_THREADS": "8"}, 1),
    ],
)
def test_a_fixed_number_is_respected(machine, monkeypatch, variables, threads):
    os.environ |= variables
    assert hardware.set_threads() == threads == hardware.fixed_threads()


@pytest.mark.parametrize("name", ["CODALIB_THREADS", "CODALIB_STAGES"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_is_one_sentence(machine, name, value):
    os.environ[name] = value
    with pytest.raises(ValueError, match=f"expected a whole number of at least 1 in {name}, got"):
        hardware.set_threads()


def test_slow_steps_choose_the_threads_anew(machine, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    watch = hardware.ThreadWatch()
    machine["others"] = 3.0
    for seconds in (5.0, 0.3, 0.4, 2.0, 0.3, 2.0, 2.0):  # a warm-up, and never three slow steps in a row
        watch.step(seconds)
    assert chosen == []
    watch.step(2.0)
    assert chosen == [1]
    assert (
        "a step takes 2.00 s, the fastest took 0.30 s, and others use 3.0 cores: 1 threads instead of 4" in caplog.text
    )
    os.environ["OMP_NUM_THREADS"] = "4"
    watch = hardware.ThreadWatch()
    for seconds in (0.3, 2.0, 2.0, 2.0, 2.0):
        watch.step(seconds)
    assert chosen == [1]


def test_a_quota_bounds_the_cores(monkeypatch):
    for quota, cores in ((150_000.0, 2), (50_000.0, 1), (-1.0, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
        monkeypatch.setattr(hardware, "_quota", lambda quota=quota: (quota, 100_000.0))
        assert hardware.usable_cores() == cores


def test_the_load_of_others_leaves_out_our_own(monkeypatch):
    meter = hardware.LoadMeter()
    readings = iter([(10.0, 107.0, 52.0)])
    meter._start = (0.0, 100.0, 50.0)
    monkeypatch.setattr(hardware.LoadMeter, "_read", lambda self: next(readings))
    assert meter.others() == pytest.approx(0.5)


def test_the_hardware_is_known_where_resource_and_fcntl_are_missing():
    code = (
        "import psutil, sys; sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "import codalib.base.files, codalib.base.hardware as hardware; hardware.machine()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="sessions share no cores in groups here")
def test_low_priority_counts_beside_other_sessions_too():
    code = (
        "import os; os.nice(2); from codalib.base.hardware import keep_niceness; keep_niceness(); "
        "print(open('/proc/self/autogroup').read())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert found.stdout.strip().endswith(f"nice {min(os.nice(0) + 2, 19)}"), found.stderr
