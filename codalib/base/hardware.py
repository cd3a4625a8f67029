"""The machine: processor, memory, devices, and the precision it is fast in."""

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor's name, usable cores, memory in bytes and, where torch is loaded, the GPU's name (None: there is
    none) and whether the machine multiplies bfloat16, which the precision "auto" of the training stages then takes."""
    lines = _cpuinfo().splitlines()
    processor = platform.processor() or platform.machine()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {"processor": processor, "cores": cores, "memory_bytes": memory, "gpu": _gpu("get_device_name")}
    return found | {"bfloat16": has_bfloat16() if "torch" in sys.modules else None}


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def compute_device() -> str:
    """Where a notebook computes: "cuda" where torch sees a GPU, else "cpu"."""
    import torch  # here alone: what reads results needs no torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware; emulated, it is ten times slower than float32."""
    import torch  # here alone, as above

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


def _gpu(query: str) -> Any:
    torch = sys.modules.get("torch")  # a run that never loaded torch used no GPU
    return getattr(torch.cuda, query)() if torch is not None and torch.cuda.is_available() else None


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
