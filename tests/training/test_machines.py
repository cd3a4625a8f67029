"""Two "machines" on loopback, as torchrun or srun start them, train as one process does; one of them is killed."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_train_maskgit import random_cache

from codalib.base.processes import launch, together
from codalib.base.team import Place
from codalib.models.masks import sample_mask
from codalib.training import maskgit
from codalib.training.settings import MaskGITSettings
from codalib.training.trainer import read_log

LIMIT = 300  # s: a node that takes longer hangs
# Nothing is drawn at random but the order of the images, which is the same for any number of processes.
SETTINGS = {"width": 16, "depth": 2, "heads": 2, "dropout": 0.0, "condition_dropout": 0.0, "label_smoothing": 0.0}
SETTINGS |= {"steps": 6, "warmup_steps": 2, "ema": 0.5, "learning_rate": 0.01, "precision": "float32"}
SETTINGS |= {"log_every": 1, "checkpoint_every": 2}


def train(batch_size, folder, stalled=None, step=None):
    """MaskGIT on all tokens masked; the process of rank STALLED waits for ever in STEP."""
    drawn = iter(range(1 << 30))

    def all_masked(batch, scales, *drawing, generator=None):
        if generator is not None:  # of the validation
            return sample_mask(batch, scales, generator=generator)
        if PartialState().process_index == stalled and next(drawn) == step:
            (folder / "stalled").touch()
            time.sleep(LIMIT)
        return torch.ones(batch, sum(p * p for p in scales), dtype=torch.bool)

    # Where a gradient is zero but for rounding, AdamW's own eps would make steps of that rounding.
    optimizer = partial(torch.optim.AdamW, eps=1e-4)
    with mock.patch("codalib.training.maskgit.sample_mask", all_masked), mock.patch("torch.optim.AdamW", optimizer):
        settings = MaskGITSettings(batch_size=batch_size, **SETTINGS)
        maskgit.train_and_save(settings, folder.parent / "train", folder.parent / "val", folder, dtype="float32")


def fail():
    if PartialState(cpu=True).process_index == 1:
        raise ValueError("the disk of this machine is full")
    torch.distributed.barrier()


def started_by_codalib(*call):
    """What `codalib run` does under a launcher: rank 0 comes upon a launch, the others wait for it."""

    def command():
        launch(*call)
        return 0

    return together(Place.take(), command)


def here(*call):
    """What a script of one's own does under a launcher."""
    launch(*call)
    return 0


def node(rank, port, output, how, *call):
    """A machine: a group of processes of its own, with the launcher's variables."""
    os.setpgrp()
    AcceleratorState._reset_state(True)  # of the process that this one is a copy of
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(output, "w", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stderr = file  # pytest's, until here
        logging.basicConfig(stream=file, force=True)
        try:
            status = how(*call)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        file.flush()
        os._exit(status)


class Nodes:
    """Two machines that begin with HOW(*call)."""

    def __init__(self, folder, how, *call):
        self.outputs = [folder / f"output-{rank}.txt" for rank in (0, 1)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")  # nothing is imported again
        self.processes = [
            fork.Process(target=node, args=(rank, port, self.outputs[rank], how, *call)) for rank in (0, 1)
        ]
        for process in self.processes:
            process.start()

    def end(self, rank):
        """The exit status of a machine, and what it said."""
        self.processes[rank].join(LIMIT)
        said = self.outputs[rank].read_text()
        assert not self.processes[rank].is_alive(), f"still running: {said}"
        return self.processes[rank].exitcode, said

    def kill(self, rank, marker):
        """kill -9 of a machine, once MARKER is there; returns what the other one said until it ended."""
        deadline = time.monotonic() + LIMIT
        while not marker.exists() and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert marker.exists(), [output.read_text() for output in self.outputs]
        marker.unlink()
        os.killpg(self.processes[rank].pid, signal.SIGKILL)
        status, said = self.end(1 - rank)
        assert status == 1
        return said


def weights(folder):
    return load_file(folder / "generator" / "model.safetensors")


def test_two_machines_of_which_one_is_killed_end_with_the_weights_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    random_cache(tmp_path / "train", count=12)
    random_cache(tmp_path / "val", count=6, seed=1)
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    said = Nodes(tmp_path, started_by_codalib, train, 2, 2, two, 1, 3).kill(1, two / "stalled")
    assert "lost another process: a machine or a process ended without a word; start all again" in said
    nodes = Nodes(tmp_path, started_by_codalib, train, 2, 2, two)
    for rank in (0, 1):
        status, said = nodes.end(rank)
        assert status == 0, said
    assert [row["step"] for row in read_log(two)] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / ".calls").iterdir())

    train(4, one)
    found, expected = weights(two), weights(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", [started_by_codalib, here])
def test_an_error_on_one_machine_ends_both_with_its_sentence(tmp_path, monkeypatch, how):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    nodes = Nodes(tmp_path, how, fail, 2)
    (first, said), (second, theirs) = nodes.end(0), nodes.end(1)
    assert (first, second) == (1, 1)
    assert "ValueError: the disk of this machine is full" in theirs
    if how is started_by_codalib:
        assert "process 2 of 2 stopped: ValueError: the disk of this machine is full" in said
