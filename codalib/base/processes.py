"""Run one function on several processes, one a GPU, from a notebook or a script: of this machine, or of several.

On several machines a launcher starts the `codalib` command once a process, see `base.team`.
"""

import copy
import hashlib
import json
import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from accelerate import Accelerator, PartialState
from torch import nn
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException

from codalib.base.files import atomic_write, read_json, write_json
from codalib.base.hardware import gpu_count, note_peaks, peaks, set_up_gpu
from codalib.base.paths import runs_folder
from codalib.base.team import TEAM, Place, Team, TeamError, check_environment, check_processes

log = logging.getLogger(__name__)

PATIENCE = timedelta(days=1)  # for a process that works alone while others wait; a dead one is noticed at once
DISK = 30.0  # s: until what one machine wrote is seen by all
SETTLE = 3.0  # s: until the process that failed first has said so
CALLS = ".calls"  # below the runs: what rank 0 hands out to other machines
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # what another's end looks like


def launch(function: Callable[..., None], processes: int, *arguments) -> None:
    """Call FUNCTION(*arguments) on each of PROCESSES processes, which find each other; with 1, here.

    Inside, `accelerate.Accelerator()` knows the process's number and its GPU (or the CPU, where there is none). The
    processes are started anew rather than forked, so that a notebook may have used the GPU before. FUNCTION must be
    importable (not defined in a notebook); what it finds out it writes to files.

    Where a launcher has started the processes, on any number of machines, theirs is the number: below `codalib` each
    calls FUNCTION, in a script under torchrun each is here already.

    Raises ValueError for more processes than GPUs, or others than the launcher's; an error in any process ends all of
    them and is raised here.
    """
    if place := Place.leading():
        check_processes(processes, place.size)
        _hand_out(Team(place), function, _portable(arguments))
        return
    check_environment()
    if "RANK" in os.environ:
        check_processes(processes, int(os.environ["WORLD_SIZE"]))
        _join()
        function(*arguments)
        return
    gpus = gpu_count()
    if processes < 1 or (gpus and processes > gpus):
        raise ValueError(f"processes is {processes}, expected 1 to {gpus or 'any number'}: one a GPU of this machine")
    if processes == 1:
        function(*arguments)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = Place("127.0.0.1", probe.getsockname()[1], "0", 0, 0, processes, processes, serves=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            context = _start(processes, function, _portable(arguments), place, Path(folder))
            while not context.join():
                pass
            for rank in range(processes):
                note_peaks(rank, read_json(Path(folder) / f"{rank}.json"))
    except ProcessException as error:
        raise TeamError(_reason(error, error.error_index, processes)) from error


def _portable(arguments: tuple) -> tuple:
    """ARGUMENTS for other processes: a module that a GPU holds would be opened by every one on that same GPU."""
    return tuple(copy.deepcopy(own).cpu() if isinstance(own, nn.Module) else own for own in arguments)


def _start(
    processes: int, function: Callable[..., None], arguments: tuple, place: Place, folder: Path, number: int = 0
) -> torch.multiprocessing.ProcessContext:
    """Start PROCESSES of this machine, the first at PLACE; NUMBER is that of a team's call.

    FOLDER receives what each process says at its end, its `peaks`.
    """
    settings = function, arguments, place, folder, number
    return torch.multiprocessing.start_processes(_work, settings, nprocs=processes, join=False, start_method="spawn")


def _work(index: int, function: Callable[..., None], arguments: tuple, place: Place, folder: Path, number: int) -> None:
    rank, local_rank = place.rank + index, place.local_rank + index
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
    store = None
    if number:  # of a team, whose store is there already
        os.environ.pop(TEAM, None)
        store = torch.distributed.PrefixStore(f"group/{number}", Team(place, serves=False).store)
    torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))  # of the OMP_NUM_THREADS it inherits
    _join(store)
    function(*arguments)
    write_json(folder / f"{rank}.json", peaks())
    # Not after an error: the others may wait in a collective, and taking the group apart would wait for them.
    torch.distributed.destroy_process_group()


def _join(store: torch.distributed.Store | None = None) -> None:
    """Join the processes that the environment tells of, each with its own GPU."""
    gpus = gpu_count()
    if not torch.distributed.is_initialized():
        place = {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        if gpus:
            local_rank = int(os.environ["LOCAL_RANK"])
            if local_rank >= gpus:
                raise ValueError(f"expected one process a GPU, got {local_rank + 1} processes and {gpus} GPUs here")
            torch.cuda.set_device(local_rank)
        backend = "nccl" if gpus else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE, **(place if store else {}))
        if backend == "gloo":  # it connects at once: who had nothing to say would be gone before the others reach it
            torch.distributed.barrier()
    PartialState(cpu=not gpus)  # left to itself, accelerate takes a process without a GPU for the only one


def _reason(error: ProcessException, rank: int, processes: int) -> str:
    """One sentence on the process RANK of PROCESSES that ended with ERROR."""
    name = f"process {rank + 1} of {processes}"
    if isinstance(error, ProcessRaisedException):
        last = str(error).strip().splitlines()[-1]  # of the traceback that torch hands over as text
        return f"{name} stopped: {last}"
    reason = f"{error.signal_name or f'exit status {error.exit_code}'}, most often for want of memory"
    return f"{name} was ended from outside: {reason}"


# --- several machines -------------------------------------------------------------------------------------------------
def together(place: Place, command: Callable[[], int]) -> int:
    """Rank 0: COMMAND, in which `launch` reaches all processes. The others: what it launches. Returns the exit status.

    A command of several processes, of any number of machines, ends in all of them, whichever fails.
    """
    # Torchrun's way to end it: what it has started ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    team = Team(place)
    team.show_life()
    if place.rank:
        return _serve(team)
    place.lead()
    log.info("%s, which does the work between the parts of all", place)
    sentence = "the first process was ended"
    try:
        status = command()
        sentence = f"the first process stopped with status {status}" if status else ""
        return status
    finally:
        with suppress(TeamError):  # its own error is on its way
            team.end(sentence)


def _hand_out(team: Team, function: Callable[..., None], arguments: tuple) -> None:
    """Rank 0: have all run FUNCTION, which they find in a file of the disk that they share."""
    file = (runs_folder(CALLS) / secrets.token_hex(8)).resolve()
    contents = pickle.dumps((function, arguments))
    with atomic_write(file, "wb") as opened:
        opened.write(contents)
    try:
        number = team.announce(json.dumps([str(file), hashlib.sha256(contents).hexdigest()]))
        _take_part(team, number, function, arguments)
        for rank, found in enumerate(team.wait_for_all(number)):
            note_peaks(rank, json.loads(found))
    finally:
        file.unlink(missing_ok=True)


def _serve(team: Team) -> int:
    """The others: run what rank 0 hands out, until it ends; the exit status."""
    number = 1
    log.info("%s waits for the first one", team.place)
    try:
        while call := team.next_call(number):
            try:
                _take_part(team, number, *_read_call(team, *json.loads(call)))
            except (OSError, ImportError, AttributeError, pickle.UnpicklingError) as error:
                log.error("%s", team.fail(number, f"{team.place}: {error}"))
            except TeamError as error:  # rank 0 hears of it, and says how all goes on
                log.error("%s", error)
                if team.failure(number) is None:
                    return 1
            number += 1
    except TeamError as error:
        log.error("%s", error)
        return 1
    if sentence := team.leave():
        log.error("%s", sentence)
    return bool(sentence)


def _read_call(team: Team, file: str, digest: str) -> tuple[Callable[..., None], tuple]:
    """The function and the arguments in FILE of the first process, which shows at once whether a disk is shared."""
    until = time.monotonic() + DISK
    while True:
        with suppress(OSError):
            contents = Path(file).read_bytes()
            if hashlib.sha256(contents).hexdigest() == digest:
                return pickle.loads(contents)
        if time.monotonic() > until:
            raise FileNotFoundError(
                f"{file}, which process 1 has written, is not to be seen here: expected one folder of runs on a disk "
                "that all machines share, under one path: set CODALIB_RUNS on each"
            )
        time.sleep(1.0)


def _take_part(team: Team, number: int, function: Callable[..., None], arguments: tuple) -> None:
    """FUNCTION as this rank, in a process of its own; TeamError where it fails here or elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        context = _start(1, function, arguments, team.place, Path(folder), number)
        try:
            while not context.join(0.5):
                team.check(number)
            team.done(number, (Path(folder) / f"{team.place.rank}.json").read_text())
        except ProcessException as error:
            sentence = _reason(error, team.place.rank, team.place.size)
            if any(words in sentence for words in LOST):  # another's end shows here first: what does it say itself?
                sentence = team.failure(number, SETTLE) or (
                    f"{team.place} lost another process: a machine or a process ended without a word; start all "
                    "again, training goes on from its last checkpoint"
                )
            raise TeamError(team.fail(number, sentence)) from error
        except TeamError as error:
            team.fail(number, str(error))
            raise
        finally:
            for process in context.processes:
                process.kill()


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
