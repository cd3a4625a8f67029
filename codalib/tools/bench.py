"""Time and peak memory of the quantizers: `codalib bench` measures them into reports/bench/ and runs notebooks/bench.

Each case runs in a process of its own, so that its peak memory is its own. Its result is cached in runs/bench/, a file
a case, as long as the code, the machine and torch stay the same: a run that was stopped goes on where it was.
"""

import argparse
import ctypes
import gc
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from codalib.base.files import atomic_write, read_json, write_json
from codalib.base.hardware import machine, peak_memory
from codalib.base.paths import project_folder, reports_folder, runs_folder
from codalib.tools.bench_cases import PRODUCTS_A_LOGIT, SEED, Case, rates, wait_for, workload
from codalib.workflow.manifest import Run, library_versions

log = logging.getLogger(__name__)


CODES = (1024, 4096, 16384, 65536, 262144)
BATCH = 4  # where the codes vary
BATCHES = (1, 2, 4, 8, 16)  # where the tokens vary
BACKENDS = ("reference", "tiled", "compiled")
REPEATS = 3
WARM_CODES = 64  # a small problem that loads libraries, thread pools and the compiler before memory is looked at
LONGEST = 900  # seconds that one case may take
COLUMNS = (  # of results.csv; seconds and bytes
    *("task", "implementation", "device", "scales", "codes", "batch", "tokens", "state", "seconds", "slowest_seconds"),
    *("floor_seconds", "peak_bytes", "idle_bytes", "load"),
)
MEASURED = "measured"  # the state of a case with numbers; any other says why there are none
SOURCES = (  # what makes the numbers
    "kernels/assignment.py",
    "kernels/triton_assignment.py",
    "models/quantizer.py",
    "tools/bench.py",
    "tools/bench_cases.py",
)


def plan(devices: Sequence[str] = ("cpu",), quick: bool = False) -> list[Case]:
    """The cases of a whole benchmark, or the few tiny ones that show that it runs."""
    if quick:
        tiny = {"codes": 96, "scales": "tiny"}
        return [
            Case("rates", "rates", 96, 1, "tiny"),
            Case("step", "reference", batch=2, **tiny),
            Case("step", "tiled", batch=1, **tiny),
            Case("step", "tiled", batch=2, **tiny),
            Case("encode", "attention", batch=2, **tiny),
        ]
    cases = []
    for device in devices:
        backends = (*BACKENDS, "triton") if device == "cuda" else BACKENDS
        cases.append(Case("rates", "rates", CODES[2], BATCH, device=device))
        cases.append(Case("compiling", "compiled", WARM_CODES, 1, "tiny", device))
        cases += [Case("step", x, codes, BATCH, device=device) for codes in CODES for x in ("released", *backends)]
        cases += [Case("step", x, CODES[2], batch, device=device) for batch in BATCHES for x in ("released", *backends)]
        cases += [Case("step", x, CODES[3], batch, device=device) for batch in BATCHES for x in backends[1:]]
        for codes in CODES:
            implementations = ("products", "attention", "nearest", "library")
            cases += [Case("encode", x, codes, BATCH, device=device) for x in implementations]
            cases += [Case("residual", x, codes, BATCH, "equal", device) for x in ("nearest", "library")]
        if device == "cuda":
            cases += [Case("step", x, CODES[3], 12, "FLUX", device) for x in ("released", *backends)]
    return list(dict.fromkeys(cases))


def chosen(cases: Sequence[Case], only: str | None) -> list[Case]:
    """The cases in whose names the pattern ONLY is found (None: all), and their devices' rates, for the floors."""
    if only is None:
        return list(cases)
    found = [case for case in cases if re.search(only, case.name)]
    if not found:
        raise SystemExit(f"expected a pattern of some case, such as {cases[-1].name}, got {only!r}")
    devices = {case.device for case in found}
    return [case for case in cases if case in found or (case.task == "rates" and case.device in devices)]


# --- how it is measured -----------------------------------------------------------------------------------------------
def measure(case: Case, repeats: int = REPEATS) -> dict[str, Any]:
    """Seconds (the best and the worst of `repeats` after a warm-up) and bytes of peak memory above the idle process.

    Run it in a fresh process. The idle process has its libraries, thread pools and compiler loaded by a small problem;
    on a GPU the memory is that of the GPU.
    """
    device, load = torch.device(case.device), os.getloadavg()[0]
    if case.task == "rates":
        return {"state": MEASURED, "rates": rates(device), "load": load}
    if case.task == "compiling":
        return {"state": MEASURED, "seconds": _seconds_of_compiling(case), "load": load}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile does not work here")
        try:
            workload(replace(case, codes=WARM_CODES, batch=1))()
        except UserWarning as warning:
            return {"state": f"not run: {warning}"}
    idle = _start_of_memory(device)
    work = workload(case)
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return {
        "state": MEASURED,
        "seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "peak_bytes": _peak_memory(device) - idle,
        "idle_bytes": idle,
        "load": load,
    }


def _seconds_of_compiling(case: Case) -> float | None:
    """What the first use of the compiled backend takes with an empty cache on disk; None without a compiler."""
    step = replace(case, task="step")
    workload(replace(step, implementation="tiled"))()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        warnings.filterwarnings("error", message="torch.compile does not work here")
        start = time.perf_counter()
        try:
            workload(step)()
        except UserWarning:
            return None
        return time.perf_counter() - start


def _start_of_memory(device: torch.device) -> int:
    """Bytes in use now, from which on the peak is counted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not sys.platform.startswith("linux"):
        return peak_memory()  # the highest so far: a peak below what loading took then reads as 0
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the work could use it unseen
    except AttributeError:
        log.info("The C library has no malloc_trim: memory that loading left behind is used again unseen.")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return _status_bytes("VmRSS")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") if sys.platform.startswith("linux") else peak_memory()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# --- all of it --------------------------------------------------------------------------------------------------------
def run(cases: Sequence[Case], cache: Path, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """One row a case: measured now, each in a process of its own, or read from CACHE where nothing changed since.

    A case on a GPU that fails says so in its state; one on a processor raises RuntimeError.
    """
    fingerprint, rows = _fingerprint(repeats), []
    for case in tqdm(cases, desc="benchmark", unit="case"):
        file = cache / f"{case.name}.json"
        old = read_json(file) if file.exists() else {}
        if old.get("fingerprint") != fingerprint:
            result = {"state": case.too_large} if case.too_large else _measure_apart(case, repeats)
            old = {"fingerprint": fingerprint, "result": result}
            write_json(file, old)
        rows.append(asdict(case) | {"tokens": case.tokens} | old["result"])
    return rows


def _measure_apart(case: Case, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        arguments = [f"--{key}={value}" for key, value in asdict(case).items()]
        command = [sys.executable, "-m", "codalib", "bench", f"--result={result}", f"--repeats={repeats}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": threads()}
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=environment)
        except subprocess.TimeoutExpired:
            return {"state": f"stopped after {LONGEST} s"}
        if child.returncode == -9:
            return {"state": "killed by the system, probably for its memory"}
        if child.returncode != 0 and case.device != "cpu":
            log.warning("%s failed:\n%s", case.name, child.stderr[-2000:])
            last = next(iter(child.stderr.strip().splitlines()[-1:]), f"status {child.returncode}")
            return {"state": f"failed: {last}"}
        if child.returncode != 0:
            raise RuntimeError(f"The case {case.name} ended with status {child.returncode}:\n{child.stderr[-2000:]}")
        return read_json(result)


def threads() -> str:
    """Of every case: OMP_NUM_THREADS where it is set, otherwise as many as there are cores."""
    return os.environ.get("OMP_NUM_THREADS") or str(machine()["cores"])


def _fingerprint(repeats: int) -> str:
    """Changes when the code that is measured, the machine, its threads or torch do."""
    sources = [Path(__file__).parents[1] / name for name in SOURCES]
    state = [machine(), library_versions()["torch"], threads(), repeats]
    return hashlib.sha256(b"".join(x.read_bytes() for x in sources) + repr(state).encode()).hexdigest()


def write_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[dict[str, str]]]:
    """Write results.csv, each case with its floor, and rates.csv into FOLDER; returns what `Run.finish` takes."""
    import pandas as pd  # it has no place in the process of a case

    rates = {row["device"]: dict(row["rates"]) for row in rows if row["task"] == "rates"}
    for row in rows:
        if row["task"] == "compiling":
            rates[row["device"]]["compile_seconds"] = row.get("seconds")
    cases = [(Case(**{name: row[name] for name in Case.__annotations__}), row) for row in rows]
    cases = [(case, row) for case, row in cases if case.task in PRODUCTS_A_LOGIT]
    frame = pd.DataFrame([row | {"floor_seconds": case.floor_seconds(rates[case.device])} for case, row in cases])
    tables = {"results": frame.reindex(columns=COLUMNS), "rates": pd.DataFrame(rates).T.rename_axis("device")}
    for name, table in tables.items():
        with atomic_write(folder / f"{name}.csv") as file:
            table.to_csv(file, index=name == "rates", float_format="%.6g")
    texts = {"results": ("Time and memory", "One row a case; seconds and bytes.")}
    texts["rates"] = ("Rates", "Operations a second; compile_seconds in seconds.")
    rows = [{"file": f"{name}.csv", "title": title, "caption": caption} for name, (title, caption) in texts.items()]
    return {"tables": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not yet measured, write the CSV and the page."""
    parser = argparse.ArgumentParser(prog="codalib bench", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, into runs/bench-quick")
    parser.add_argument("--only", help="pattern in the cases' names, such as 'step-.*-16384-4-MAR-cuda' (all)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"of which the best counts ({REPEATS})")
    one = parser.add_argument_group("one case in this process, its result as JSON")
    one.add_argument("--result", type=Path, help="file of the result")
    for name, kind in Case.__annotations__.items():
        one.add_argument(f"--{name}", type=kind)
    given = parser.parse_args(arguments)
    if given.result:
        case = Case(**{name: getattr(given, name) for name in Case.__annotations__})
        try:
            result = measure(case, given.repeats)
        except torch.OutOfMemoryError:  # of the GPU; a processor's system kills the process
            result = {"state": "out of memory"}
        write_json(given.result, result)
        return 0
    from codalib.workflow.execute import execute  # what it loads has no place in the process of a case

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    cache = runs_folder("bench-quick" if given.quick else "bench").resolve()
    folder = cache / "page" if given.quick else reports_folder("bench").resolve()
    cases = chosen(plan(devices, given.quick), given.only)
    settings = {"repeats": given.repeats, "quick": given.quick, "threads": threads(), "cases": len(cases)}
    record = Run(folder, "bench", settings, seed=SEED)
    record.finish(write_rows(run(cases, cache, given.repeats), folder))
    notebook, own = project_folder() / "notebooks/bench.ipynb", {"folder": str(folder), "output": str(cache / "plots")}
    log.info("The results: %s", execute(notebook, "smoke", own, page=folder / "index.html"))
    return 0
