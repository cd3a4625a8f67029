"""`codalib run --executor slurm` on a real Slurm of one machine: a job is cancelled, the same command goes on.

`make test-slurm`, as root, where Debian's slurm-wlm and munge are installed and no Slurm is set up: starts munged,
slurmctld and slurmd with files in a temporary folder, ends them and leaves nothing behind. It takes minutes.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from codalib.base.files import read_json

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
SETTINGS = Path("/etc/slurm")  # where a job looks, whose SLURM_CONF Snakemake's plugin takes away
PATIENCE = 1800  # s
NAME = "on-slurm"
STAGE = "01_train_tokenizer"  # the one that is cancelled
# A few stages of the smoke profile; the one with checkpoints has a GPU too, which Slurm alone believes in.
PROFILE = f"""extends: smoke
stages: [{STAGE}, table2_reconstruction, fig7_reconstructions]
resources:
  all: {{cores: 1, memory: 2, hours: 0.5, partition: short}}
  {STAGE}: {{gpus: 1, memory: 3, partition: gpu}}
{STAGE}:
  steps: 40
  checkpoint_every: 1
  log_every: 1
fig7_reconstructions:
  tokenizer: PROFILE/{STAGE}/tokenizer
"""
SLURM = """ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
GresTypes=gpu
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=6000 Gres=gpu:1 State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
PartitionName=gpu Nodes=ALL MaxTime=01:00:00 State=UP
"""
# What a cluster wants of Snakemake's plugin: this one keeps no accounts, and its jobs are short.
SNAKEMAKE = """slurm-status-command: squeue
slurm-no-account: true
slurm-init-seconds-before-status-checks: 5
seconds-between-status-checks: 5
"""


RUNS: list[subprocess.Popen] = []


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A controller and one machine, this one, as long as the block lasts."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().split(".")[0]
    values = {"folder": folder, "host": host, "cores": os.cpu_count(), "ports": free_ports(2)}
    (folder / "slurm.conf").write_text(SLURM.format(**values))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    files = [SETTINGS / "slurm.conf", SETTINGS / "gres.conf"]
    SETTINGS.mkdir(exist_ok=True)
    own = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
    commands = [["munged", "--foreground", "--force", *own.values(), f"--socket={folder}/munge.socket"]]
    commands += [["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]]
    started = []
    try:
        for file in files:
            file.symlink_to(folder / file.name)
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as output:
                started.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
            time.sleep(2)
            if started[-1].poll() is not None:
                raise SystemExit(f"{command[0]} did not start: {(folder / f'{command[0]}.out').read_text()[-2000:]}")
        until(lambda: "idle" in shown("sinfo", "--noheader", "--format=%T"), "a machine that is idle")
        say("Slurm: " + " | ".join(shown("sinfo", "--noheader", "--format=%P %T %c cores %m MB %G").splitlines()))
        yield
    finally:
        for run in RUNS:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGTERM)
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        for file in files:
            file.unlink()


def shown(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until(condition, what: str, run: subprocess.Popen | None = None):
    """Wait for what CONDITION returns."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > deadline or (run and run.poll() is not None):
            raise SystemExit(f"expected {what}, got none in time")
        time.sleep(0.5)
    return found


def make_project(folder: Path) -> Path:
    """A checkout with the profile of the proof: the library and Snakefile of this one, notebooks and data linked."""
    shutil.copytree(ROOT / "codalib", folder / "codalib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "profiles").mkdir()
    for name in ("notebooks", "data"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "profiles" / f"{NAME}.yaml").write_text(PROFILE)
    shutil.copy(ROOT / "profiles" / "smoke.yaml", folder / "profiles")
    (folder / "snakemake").mkdir()
    (folder / "snakemake" / "config.yaml").write_text(SNAKEMAKE)
    return folder


def start(project: Path, output: Path) -> subprocess.Popen:
    """The one command, which is the same for a first run and for one that goes on."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CODALIB_", "OMP_"))}
    own |= {"PYTHONPATH": str(project), "SNAKEMAKE_PROFILE": str(project / "snakemake")}
    command = [sys.executable, "-m", "codalib", "run", "--profile", NAME, "--executor", "slurm"]
    say("$ codalib " + " ".join(command[3:]))
    options = {"cwd": project, "env": own, "stdout": output.open("w"), "stderr": subprocess.STDOUT}
    RUNS.append(subprocess.Popen(command, **options, start_new_session=True))
    return RUNS[-1]


def jobs() -> list[list[str]]:
    """[number, state, partition, cores, memory, time limit, comment] of each job that has not ended."""
    lines = shown("squeue", "--noheader", "--format=%i|%T|%P|%C|%m|%l|%k").splitlines()
    return [line.split("|") for line in lines]


def steps_logged(stage: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (stage / "log.jsonl").read_text().splitlines()]


def logs_of(runs: Path, stage: str = "") -> list[Path]:
    """The logs of all jobs, or of those of a stage, by the jobs' numbers."""
    return sorted((runs / "logs").glob(f"**/{stage}/*.log" if stage else "**/*.log"), key=lambda path: int(path.stem))


def proof(folder: Path) -> None:
    project = make_project(folder / "project")
    runs = project / "runs" / NAME
    run = start(project, folder / "first.txt")
    checkpoints = runs / STAGE / "checkpoints"
    job = until(lambda: [job for job in jobs() if job[1] == "RUNNING" and STAGE in job[6]], f"a job of {STAGE}", run)[0]
    gpus = re.search(r"TresPerJob=(\S+)", shown("scontrol", "show", "job", job[0]))[1]
    say(f"job {job[0]} of {job[6]}: partition {job[2]}, cores {job[3]}, memory {job[4]}, {gpus}, at most {job[5]}")
    assert (job[2:6], gpus) == (["gpu", "1", "3000M", "30:00"], "gres:gpu:1"), (job, gpus)
    until(lambda: len(list(checkpoints.glob("*/step-*[0-9]"))) > 1, "two checkpoints", run)
    subprocess.run(["scancel", job[0]], check=True)
    say(f"$ scancel {job[0]}, at step {steps_logged(runs / STAGE)[-1]} of 40")
    status = run.wait(PATIENCE)
    said = (folder / "first.txt").read_text()
    say(f"exit status {status}, and last: {said.strip().splitlines()[-1]}")
    assert status != 0
    assert "The same command goes on" in said
    assert steps_logged(runs / STAGE)[-1] < 40
    run = start(project, folder / "second.txt")
    status = run.wait(PATIENCE)
    say(f"exit status {status}")
    assert status == 0, (folder / "second.txt").read_text()[-3000:]
    assert steps_logged(runs / STAGE) == list(range(1, 41))
    first = re.search(r"\| (\d+)/40 \[00:00<", logs_of(runs, STAGE)[-1].read_text())[1]
    say(f"{STAGE} went on from step {first} of 40")
    assert int(first) > 0
    for stage in (STAGE, "table2_reconstruction", "fig7_reconstructions"):
        assert read_json(runs / stage / "manifest.json")["state"] == "finished"
    say("logs: " + ", ".join(str(path.relative_to(project)) for path in logs_of(runs)))
    title = re.search(r"<title>(.*?)</title>", (project / "reports" / NAME / "index.html").read_text())[1]
    say(f"report: reports/{NAME}/index.html, {title!r}")
    run = start(project, folder / "third.txt")
    status = run.wait(PATIENCE)
    said = (folder / "third.txt").read_text()
    say(f"exit status {status}: nothing was left to do" if "Nothing to be done" in said else said[-500:])
    assert status == 0
    assert not jobs()


def main() -> int:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    there = (SETTINGS / "slurm.conf").exists()
    if missing or there or os.geteuid() != 0:
        told = f"no {', '.join(missing)}" if missing else f"{SETTINGS}/slurm.conf" if there else "another user"
        print(
            f"expected root and a Slurm that is not set up yet, got {told}: `apt-get install slurm-wlm munge` elsewhere"
        )
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-") as place:
        folder = Path(place)
        try:
            with cluster(folder):
                proof(folder)
        except BaseException:
            for pattern in ("*.txt", "slurm*.log", "project/runs/*/logs/*/*/*.log"):
                for path in folder.glob(pattern):
                    lines = [line[:200] for line in path.read_text(errors="replace").splitlines()]
                    print(f"--- {path.name}", *lines[-40:], sep="\n")
            raise
    say("proven")
    return 0


if __name__ == "__main__":
    sys.exit(main())
