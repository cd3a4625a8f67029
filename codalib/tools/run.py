"""Run one notebook, or every stage of a profile: `codalib run [notebooks/NAME.ipynb] --profile PROFILE`."""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from codalib.base.hardware import STAGES, THREADS, fixed_threads, gpu_count, usable_cores
from codalib.base.paths import project_folder, reports_folder, runs_folder
from codalib.workflow.execute import check_profile, execute, keep_checked_outputs
from codalib.workflow.profiles import StageError

log = logging.getLogger(__name__)

NICENESS = 15  # of a profile's run beside other work
JOBS = 20  # stages at a time that wait or run on a cluster
SIDE_BY_SIDE = 2  # stages on a processor alone: two threads make a training step 1.3 to 1.5 times as fast, not twice


def run_profile(profile: str, exclusive: bool = False, executor: str | None = None) -> int:
    """Every stage of a profile that is not up to date, in Snakemake's order; returns its exit status.

    By default beside a person's own work: one stage at a time, in one thread, at low priority. EXCLUSIVE takes all
    cores, without a GPU by two stages at a time that need nothing of each other, each with its share of the threads.
    With EXECUTOR "slurm" each stage is a job of the cluster, of what the profile's `resources` say.
    A lock of Snakemake's own would outlive a killed run; `workflow.execute` holds one a notebook that does not.
    """
    check_profile(profile)
    if executor == "slurm":
        return _run_on_slurm(profile)
    threads, cores = fixed_threads(), usable_cores() if exclusive else 1
    stages = 1 if gpu_count() else max(1, min(SIDE_BY_SIDE, cores // (threads or 1)))
    os.environ[STAGES] = str(stages)
    # Snakemake sets OMP_NUM_THREADS for what it starts, which must not pass for a person's choice.
    os.environ[THREADS] = str(threads or ("auto" if exclusive else 1))
    if not exclusive:
        os.nice(NICENESS)
    return _snakemake(profile, "--cores", str(stages * (cores // stages)))


def _run_on_slurm(profile: str) -> int:
    """Every stage as a job; what a cluster wants besides stands in Snakemake's own profile (SNAKEMAKE_PROFILE)."""
    if find_spec("snakemake_executor_plugin_slurm") is None:
        raise StageError(
            "expected snakemake-executor-plugin-slurm with --executor slurm, got none: install the extra `cluster`, "
            "pip install -e '.[cluster]'"
        )
    if shutil.which("sbatch") is None:
        raise StageError("expected Slurm's sbatch with --executor slurm, got none: run it on the cluster's login node")
    logs = runs_folder(profile).resolve() / "logs"
    if os.environ.get(THREADS) == "auto":
        del os.environ[THREADS]  # Snakemake gives each stage its `cores`
    options = ["--executor", "slurm", "--jobs", str(JOBS), "--latency-wait", "60", "--slurm-keep-successful-logs"]
    status = _snakemake(profile, *options, "--slurm-logdir", str(logs), cluster="true")
    if status:
        log.error("Not all stages have ended well; their logs: %s. The same command goes on where each stopped.", logs)
    return status


def _snakemake(profile: str, *options: str, **config: str) -> int:
    command = [sys.executable, "-m", "snakemake", *options, "--nolock", "--rerun-incomplete"]
    command += ["--quiet", "rules", "host", "reason", "--config", f"profile={json.dumps(profile)}"]
    command += [f"{name}={value}" for name, value in config.items()]
    status = subprocess.run(command, cwd=project_folder(), check=False).returncode
    if not status:
        log.info("The results: %s", os.path.relpath(reports_folder(profile) / "index.html"))
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="codalib run", description=__doc__)
    parser.add_argument("notebook", type=Path, nargs="?", help="one notebook; without it every stage of the profile")
    parser.add_argument("--profile", default="smoke", help="a name in profiles/ (smoke)")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter, read as the type that the notebook declares (None or null: none)",
    )
    parser.add_argument(
        "--threads", type=int, help=f"so many threads, as {THREADS} sets; otherwise what cores are free"
    )
    parser.add_argument("--exclusive", action="store_true", help="a whole profile on all cores, at normal priority")
    parser.add_argument("--executor", choices=["slurm"], help="a whole profile as jobs of a cluster, one a stage")
    parser.add_argument("--keep-checked", action="store_true", help="then put the checked cells' outputs into NOTEBOOK")
    options = parser.parse_args(arguments)
    if options.notebook is None and (options.p or options.keep_checked):
        parser.error("-p and --keep-checked are for one notebook, expected its path")
    if (options.exclusive or options.executor) and options.notebook is not None:
        parser.error("--exclusive and --executor are for a whole profile, expected no notebook")
    if options.exclusive and options.executor:
        parser.error("--exclusive is for this machine, expected no --executor")
    if options.keep_checked and (options.profile != "smoke" or options.p):
        parser.error("--keep-checked is for the notebook's own defaults, expected the profile smoke and no -p")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options(arguments)
    if options.threads is not None:
        os.environ[THREADS] = str(options.threads)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    try:
        if options.notebook is None:
            return run_profile(options.profile, options.exclusive, options.executor)
        page = execute(options.notebook, options.profile, texts=dict(options.p))
    except (StageError, OSError, ValueError) as error:
        log.error("%s", error)
        return getattr(error, "status", 1)
    if options.keep_checked:
        keep_checked_outputs(options.notebook, runs_folder(options.profile) / options.notebook.name)
    log.info("page: %s", page)
    return 0
