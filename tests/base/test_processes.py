import os

import pytest
import torch
from accelerate import PartialState

from codalib.base.processes import launch


def write_number(folder):
    state = PartialState(cpu=True)
    total = torch.tensor(state.process_index + 1.0)
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    (folder / f"{state.process_index}").write_text(f"{state.num_processes} {total.item():g}")


def fail():
    raise RuntimeError("the work itself failed")


def test_processes_find_each_other(tmp_path):
    launch(write_number, 2, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2 3", "1": "2 3"}
    assert "RANK" not in os.environ


def test_one_process_is_this_one():
    seen = []
    launch(seen.append, 1, os.getpid())
    assert seen == [os.getpid()]


def test_an_error_in_a_process_is_raised_here():
    with pytest.raises(RuntimeError, match=r"process \d of 2 stopped: RuntimeError: the work itself failed"):
        launch(fail, 2)
    with pytest.raises(ValueError, match="processes is 0"):
        launch(fail, 0)
