"""kill -9 of one of two machines that torchrun started, in the middle of a notebook; run by `make faults`."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
from stages import LIMIT, outcome

from codalib.base.paths import project_folder

STEPS = 8
SENTENCES = ("lost another process", "does not reach", "no sign of life", "the first process")


def command(folder):
    notebook = project_folder() / "notebooks" / "01_train_tokenizer.ipynb"
    given = {"output": folder, "steps": STEPS, "checkpoint_every": 1, "log_every": 1}
    parameters = [text for name, value in given.items() for text in ("-p", name, str(value))]
    return ["-m", "codalib", "run", str(notebook), *parameters]


class Machine:
    """A torchrun of its own, and all that it starts."""

    def __init__(self, folder, port, name):
        self.output = folder.with_name(f"{folder.name}-{name}.txt")
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "faults", *command(folder)]
        with self.output.open("w") as file:
            self.process = subprocess.Popen([sys.executable, *launcher], stdout=file, stderr=subprocess.STDOUT)

    def tree(self):
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def said(self):
        lines = self.output.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if any(words in line for words in SENTENCES)), lines[-1:])


def two_machines(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Machine(folder, port, name) for name in ("first", "second")]


def result(folder):
    return outcome(folder / "tokenizer")["files"], outcome(folder)["log"]


def kill(folder, number, step):
    """Kill a machine after STEP; the seconds until the other one has ended, and its sentence."""
    machines = two_machines(folder)
    while not list(folder.glob(f"checkpoints/*/step-*{step}")):
        assert all(machine.process.poll() is None for machine in machines), [machine.said() for machine in machines]
        time.sleep(0.1)
    victim, other = machines[number], machines[1 - number]
    left = other.tree()
    for process in victim.tree():
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert other.process.wait(LIMIT) != 0
    _, alive = psutil.wait_procs(left, LIMIT)
    assert not alive, "processes of the other machine go on"
    return time.monotonic() - began, other.said()


def test_each_of_two_machines_is_killed(tmp_path, row, monkeypatch):
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"CODALIB_THREADS": "1"}
    subprocess.run([sys.executable, *command(whole), "-p", "processes", "2"], check=True, env=environment)
    said = [kill(folder, number, step) for number, step in ((0, 2), (1, 4))]
    for machine in two_machines(folder):
        assert machine.process.wait(LIMIT) == 0, machine.said()
    assert result(folder) == result(whole)
    sentences = "; ".join(f"after {seconds:.0f} s with {sentence!r}" for seconds, sentence in said)
    done = f"each machine killed once, the other ended {sentences}; weights and log equal bit for bit to one machine's"
    row("kill -9 of one of two machines under torchrun, tokenizer training", "the other ends, then equal", done)
