"""The machine: processor, memory, devices, the precision it is fast in, and how many threads it has free."""

import logging
import math
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

THREADS = "CODALIB_THREADS"  # in the environment: a fixed number, or "auto" (not set: OMP_NUM_THREADS, else "auto")
STAGES = "CODALIB_STAGES"  # stages of a profile that run side by side: "auto" takes at most a stage's share of cores
# GNU's and Intel's OpenMP: a thread that waits sleeps after a moment. A step of the emoji tokenizer on 2 cores, in s:
# quiet 0.72 without spinning, 0.58 with 1,000 spins, 0.47 by default; beside one other process 1.1, 1.3 and 1.9.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
SAMPLE_SECONDS = 0.25  # over which the load of others is measured at a start
SLOW, SLOW_STEPS = 3.0, 3  # times the fastest step, and so many such steps in a row: the threads are chosen anew


def machine() -> dict[str, Any]:
    """The processor's name, usable cores, memory in bytes and, where torch is loaded, the GPU's name (None: there is
    none) and whether the machine multiplies bfloat16, which the precision "auto" of the training stages then takes.
    With a GPU also which float32 operations are done in TF32, see `set_up_gpu`."""
    lines = _cpuinfo().splitlines()
    processor = platform.processor() or platform.machine()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {"processor": processor, "cores": usable_cores(), "memory_bytes": memory, "gpu": _gpu("get_device_name")}
    found |= {"bfloat16": has_bfloat16() if "torch" in sys.modules else None}
    return found | ({"tf32": _tf32()} if found["gpu"] else {})


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def compute_device() -> str:
    """Where a notebook computes: "cuda" where torch sees a GPU, which is then set up, else "cpu"."""
    return "cuda" if set_up_gpu() else "cpu"


def gpu_count() -> int:
    """The GPUs that torch can use; a driver that is too old for it still lists them."""
    import torch  # here alone: what reads results needs no torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def set_up_gpu() -> bool:
    """Whether torch sees a GPU; how it then computes in float32, and that convolutions take the fastest algorithm.

    Float32 convolutions are done in TF32, as torch does by default and so the release; float32 matrix products are not:
    a code is chosen by logits that differ by less than TF32's 10 bits. Elsewhere speed comes of bfloat16.
    """
    import torch  # here alone, as above

    if not torch.cuda.is_available():
        return False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return True


def _tf32() -> dict[str, bool]:
    import torch  # here alone, as above

    products = torch.get_float32_matmul_precision() != "highest"
    return {"matrix products": products, "convolutions": torch.backends.cudnn.allow_tf32}


def to_device(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """TENSOR on a device; on its way to a GPU from pinned memory, so that the host does not wait for the copy."""
    if getattr(device, "type", device) == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware; emulated, it is ten times slower than float32."""
    import torch  # here alone, as above

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


def chosen_precision(precision: str) -> str:
    """What "auto" is on this machine; "float32" and "bfloat16" are themselves."""
    return ("bfloat16" if has_bfloat16() else "float32") if precision == "auto" else precision


def _gpu(query: str) -> Any:
    torch = sys.modules.get("torch")  # a run that never loaded torch used no GPU
    return getattr(torch.cuda, query)() if torch is not None and torch.cuda.is_available() else None


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource  # here alone: Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Of each process that this one has launched, by its rank, the `peaks` at its end, the largest of all launches.
RANK_PEAKS: dict[int, dict[str, int | None]] = {}


def peaks() -> dict[str, int | None]:
    """The largest memory of this process so far in bytes, resident and, of torch's tensors, of its GPU (None: none)."""
    return {"peak_memory_bytes": peak_memory(), "peak_gpu_memory_bytes": _gpu("max_memory_allocated")}


def note_peaks(rank: int, found: dict[str, int | None]) -> None:
    """Remember the peaks of a launched process beside those of the same rank before."""
    before = RANK_PEAKS.get(rank, found)
    RANK_PEAKS[rank] = {name: max(value or 0, before[name] or 0) or None for name, value in found.items()}


# --- threads ----------------------------------------------------------------------------------------------------------
def usable_cores() -> int:
    """The cores that this process may use: by its affinity, and by the quota of its cgroup, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _quota()
    return max(1, min(cores, math.ceil(quota / period))) if quota > 0 and period > 0 else cores


def _quota() -> tuple[float, float]:
    """Microseconds of processor time in a period of so many (cgroup version 2, then 1); a quota of -1: no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
            return (-1.0, 1.0) if quota == "max" else (float(quota), float(period))
        return tuple(float((group / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except OSError:
        return -1.0, 1.0


def fixed_threads() -> int | None:
    """What CODALIB_THREADS, or else OMP_NUM_THREADS, fixes; None: the number is chosen. ValueError for no number."""
    name = THREADS if os.environ.get(THREADS) else "OMP_NUM_THREADS"
    value = os.environ.get(name, "").split(",")[0].strip()  # OpenMP takes a list, one number a nested level
    if value == ("auto" if name == THREADS else ""):
        return None
    return _count(name, value)


def stages_side_by_side() -> int:
    """How many stages of a profile share this machine's cores: 1, or what `codalib run --exclusive` has put there."""
    return _count(STAGES, os.environ.get(STAGES) or "1")


def _count(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"expected a whole number of at least 1 in {name}, got {value!r}: correct or unset it")
    return int(value)


def set_threads() -> int:
    """Set the OpenMP variables of this process and those it starts, before torch is loaded, and return the number.

    Threads that spin while they wait make a step many times slower as soon as another process wants a core: they sleep
    instead, and there are as many as cores are free now. A result is the same bit for bit only with the same number.
    """
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)
    number = fixed_threads()
    if number is None:
        os.environ[THREADS] = "auto"  # what is set next is our choice and fixes nothing
        meter = LoadMeter()
        time.sleep(SAMPLE_SECONDS)
        number = meter.free_cores()
    os.environ["OMP_NUM_THREADS"] = str(number)
    return number


def keep_niceness() -> None:
    """Have this process's niceness count beside other sessions' processes, where the system groups sessions.

    Linux with autogroups shares a core out between sessions first, and a kernel is a session of its own: niceness alone
    counts within it. Nothing is done where there are no such groups.
    """
    group = Path("/proc/self/autogroup")
    if group.exists():
        with suppress(OSError):  # in a container it may be read-only
            group.write_text(str(os.nice(0)))


class LoadMeter:
    """Measures how many cores other processes have used since it was made."""

    def __init__(self) -> None:
        self._start = self._read()

    def _read(self) -> tuple[float, float, float]:
        """The clock, and processor seconds of all processes on this one's cores and of this one with its children."""
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        cores = [core for number, core in enumerate(psutil.cpu_times(percpu=True)) if number in allowed]
        busy = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in cores)
        own = psutil.Process()
        times = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
        return time.monotonic(), busy, sum(one.user + one.system for one in times)

    def others(self) -> float:
        """Cores that others have kept busy, on average."""
        before, now = self._start, self._read()
        seconds = max(now[0] - before[0], 1e-3)
        return max(0.0, (now[1] - before[1] - (now[2] - before[2])) / seconds)

    def free_cores(self) -> int:
        """At least 1, at most this stage's share; a core that others use less than a quarter of the time is free."""
        share = usable_cores() // stages_side_by_side()
        return max(1, min(share, usable_cores() - math.ceil(self.others() - 0.25)))


class ThreadWatch:
    """Chooses torch's threads anew where steps become several times slower than the fastest, unless they are fixed."""

    def __init__(self) -> None:
        self._meter: LoadMeter | None = None
        self._fixed, self._best, self._slow = fixed_threads() is not None, math.inf, 0

    def step(self, seconds: float) -> None:
        """Tell of one step's duration."""
        import torch  # here alone, as above

        self._best = min(self._best, seconds)
        if self._fixed or seconds <= SLOW * self._best:
            self._slow, self._meter = 0, None
            return
        self._slow, self._meter = self._slow + 1, self._meter or LoadMeter()
        if self._slow < SLOW_STEPS:
            return
        before, number = torch.get_num_threads(), self._meter.free_cores()
        if number != before:
            torch.set_num_threads(number)
            words = "a step takes %.2f s, the fastest took %.2f s, and others use %.1f cores: %d threads instead of %d"
            log.warning(words, seconds, self._best, self._meter.others(), number, before)
        self._slow, self._meter = 0, None
