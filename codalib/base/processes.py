"""Run one function on several processes of this machine, one a GPU, from a notebook or a script."""

import copy
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from accelerate import Accelerator
from torch import nn

from codalib.base.files import read_json, write_json
from codalib.base.hardware import note_peaks, peaks, set_up_gpu

log = logging.getLogger(__name__)


def launch(function: Callable[..., None], processes: int, *arguments) -> None:
    """Call FUNCTION(*arguments) on each of PROCESSES processes, which find each other; with 1, here.

    Inside, `accelerate.Accelerator()` knows the process's number and its GPU (or the CPU, where there is none). The
    processes are started anew rather than forked, so that a notebook may have used the GPU before. FUNCTION must be
    importable (not defined in a notebook); what it finds out it writes to files.

    Raises ValueError for more processes than GPUs; an error in any process ends all of them and is raised here.
    """
    check_environment()
    gpus = torch.cuda.device_count()
    if processes < 1 or (gpus and processes > gpus):
        raise ValueError(f"processes is {processes}, expected 1 to {gpus or 'any number'}: one a GPU of this machine")
    if processes == 1:
        function(*arguments)
        return
    # A module that a GPU holds would be opened by every process on that same GPU.
    arguments = tuple(copy.deepcopy(own).cpu() if isinstance(own, nn.Module) else own for own in arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        with tempfile.TemporaryDirectory() as folder:  # for what each process says at its end
            given = function, arguments, processes, port, Path(folder)
            torch.multiprocessing.start_processes(_work, given, nprocs=processes, start_method="spawn")
            for rank in range(processes):
                note_peaks(rank, read_json(Path(folder) / f"{rank}.json"))
    except torch.multiprocessing.ProcessRaisedException as error:
        reason = str(error).strip().splitlines()[-1]  # of the traceback that torch hands over as text
        raise RuntimeError(f"process {error.error_index + 1} of {processes} stopped: {reason}") from error
    except torch.multiprocessing.ProcessExitedException as error:
        reason = f"{error.signal_name or f'exit status {error.exit_code}'}, most often for want of memory"
        raise RuntimeError(
            f"process {error.error_index + 1} of {processes} was ended from outside: {reason}"
        ) from error


def _work(rank: int, function: Callable[..., None], arguments: tuple, processes: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # of the OMP_NUM_THREADS that it inherits
    function(*arguments)
    write_json(folder / f"{rank}.json", peaks())
    # Not after an error: the others may wait in a collective, and taking the group apart would wait for them.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_environment() -> None:
    """Read what a batch system says of this process's place: alone, a lone LOCAL_RANK or RANK is taken away.

    Raises ValueError where several processes are told of and they could not find each other.
    """
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    found = {name: os.environ[name] for name in sizes if os.environ.get(name)}
    wrong = {name: value for name, value in found.items() if not value.isdecimal() or value == "0"}
    several = {name: value for name, value in found.items() if value != "1"}
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if wrong or (several and missing):
        absent = ", ".join(missing) or "such number"
        told = ", ".join(f"{name}={value}" for name, value in (wrong or several).items())
        raise ValueError(
            f"expected one process, or several with {', '.join(needed)}, got {told} and no {absent}: "
            "start one task and set the notebook's `processes`, or start with torchrun"
        )
    if not several:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


def synchronised(module: nn.Module) -> nn.Module:
    """MODULE with batch statistics that all processes share, where there are several and they have GPUs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return module
    if not torch.cuda.is_available():
        log.warning("SyncBatchNorm needs GPUs: the discriminator's batch statistics are each process's own")
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Have all processes carry on with the mean of their running batch statistics, where each has its own.

    Called after every step they are one set, that of a checkpoint, so that a resumed run goes on as an uninterrupted
    one. Those of SyncBatchNorm are one set already.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    statistics = [x for layer in layers for x in (layer.running_mean, layer.running_var)]
    if statistics:
        joined = torch.cat([x.flatten() for x in statistics])
        torch.distributed.all_reduce(joined)
        joined /= torch.distributed.get_world_size()
        for own, mean in zip(statistics, joined.split([x.numel() for x in statistics]), strict=True):
            own.copy_(mean.view_as(own))


def make_accelerator() -> Accelerator:
    """This process's place among the others, and its device.

    It knows no precision, since accelerate holds one for the whole life of a process, and a notebook fits a quantizer
    in float32, trains in bfloat16 and measures in float32: `autocast` is each loop's own.
    """
    check_environment()
    return Accelerator(mixed_precision="no", cpu=not set_up_gpu())
