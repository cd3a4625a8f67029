import os
import signal
import time

import pytest
import torch
from accelerate import PartialState

from codalib.base import hardware
from codalib.base.processes import check_environment, launch, make_accelerator


def write_number(folder):
    state = PartialState()
    total = torch.tensor(state.process_index + 1.0)
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    said = f"{state.num_processes} {total.item():g}, {torch.get_num_threads()} threads"
    (folder / f"{state.process_index}").write_text(said)


def write_patience(folder):
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    (folder / "patience").write_text(str(group.options._timeout.total_seconds()))


def fail():
    raise RuntimeError("the work itself failed")


def fail_while_the_other_waits():
    state = PartialState()
    torch.distributed.destroy_process_group = lambda: time.sleep(600)  # as NCCL's may, while others wait
    if state.process_index == 1:
        raise RuntimeError("the work itself failed")
    torch.distributed.barrier()


def be_killed():
    if PartialState().process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def write_device_and_change(folder, module):
    (folder / f"{PartialState().process_index}").write_text(str(next(module.parameters()).device))
    torch.nn.init.zeros_(module.weight)


def test_an_error_in_one_process_ends_those_that_wait_for_it():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="process 2 of 2 stopped: RuntimeError: the work itself failed"):
        launch(fail_while_the_other_waits, 2)
    with pytest.raises(RuntimeError, match="process 2 of 2 was ended from outside: SIGKILL, most often for want of"):
        launch(be_killed, 2)
    assert time.monotonic() - start < 180


def test_modules_are_handed_over_as_copies_on_the_processor(tmp_path):
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    launch(write_device_and_change, 2, tmp_path, module)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["cpu", "cpu"]
    assert torch.equal(module.weight, before)


def test_processes_find_each_other_and_say_what_they_took(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # listed by a driver that is too old for torch
    monkeypatch.setattr(hardware, "RANK_PEAKS", {1: {"peak_memory_bytes": 2**50, "peak_gpu_memory_bytes": 7}})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of all together, on a machine with GPUs as well
    launch(write_number, 2, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("01", "2 3, 1 threads")
    assert "RANK" not in os.environ
    first, second = hardware.RANK_PEAKS[0], hardware.RANK_PEAKS[1]
    assert 50e6 < first["peak_memory_bytes"] < 50e9
    assert first["peak_gpu_memory_bytes"] is None
    assert second == {"peak_memory_bytes": 2**50, "peak_gpu_memory_bytes": 7}  # the largest of both launches


def test_one_may_work_alone_for_hours_while_the_others_wait(tmp_path):
    launch(write_patience, 2, tmp_path)
    assert float((tmp_path / "patience").read_text()) >= 12 * 3600


def test_one_process_is_this_one():
    seen = []
    launch(seen.append, 1, os.getpid())
    assert seen == [os.getpid()]


def test_an_error_in_a_process_is_raised_here():
    with pytest.raises(RuntimeError, match=r"process \d of 2 stopped: RuntimeError: the work itself failed"):
        launch(fail, 2)
    with pytest.raises(ValueError, match="processes is 0"):
        launch(fail, 0)


NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored at the end, whatever the code took away
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [{}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}],
)
def test_one_process_is_alone_whatever_a_batch_system_left(environment, variables):
    for name, value in variables.items():
        environment.setenv(name, value)
    check_environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "got WORLD_SIZE=2 and no RANK, MASTER_ADDR, MASTER_PORT: start one task",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "got SLURM_STEP_NUM_TASKS=4 and no RANK"),
        ({"WORLD_SIZE": "two"}, "got WORLD_SIZE=two"),
    ],
)
def test_several_processes_that_cannot_find_each_other_are_one_sentence(environment, variables, words):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        make_accelerator()
