"""The processes that a launcher (torchrun, accelerate launch, srun) started on several machines: how they speak.

Rank 0 does what was typed. The others wait for what it hands out through `base.processes.launch`, run it as their rank
and wait again, until it says that it has ended. They speak through torch's key-value store (`TCPStore`) at the
launcher's MASTER_ADDR and MASTER_PORT, and notice there who has fallen silent.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # "True": torchrun itself serves the store at MASTER_ADDR
TEAM = "CODALIB_TEAM"  # in the environment of rank 0 and of what it starts: its place, as JSON
POLL, BEAT, SILENCE = 0.2, 1.0, 30.0  # s: between two looks, between two signs of life, without one until it is lost
CONNECT, LEAVE = timedelta(minutes=5), 5.0  # to wait for the store, and for the others to read that all has ended


class TeamError(RuntimeError):
    """What was started together cannot go on together; one sentence says why."""


def check_environment() -> None:
    """Read what a batch system says of this process's place: alone, a lone LOCAL_RANK or RANK is taken away.

    Raises ValueError where several processes are told of and they could not find each other.
    """
    found = {name: os.environ[name] for name in SIZES if os.environ.get(name)}
    wrong = {name: value for name, value in found.items() if not value.isdecimal() or value == "0"}
    several = {name: value for name, value in found.items() if value != "1"}
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if wrong or (several and missing):
        absent = ", ".join(missing) or "such number"
        told = ", ".join(f"{name}={value}" for name, value in (wrong or several).items())
        raise ValueError(
            f"expected one process, or several with {', '.join(NEEDED)}, got {told} and no {absent}: "
            "start one task and set the notebook's `processes`, or start with torchrun"
        )
    if not several:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that were started together."""

    address: str
    port: int
    attempt: str  # torchrun starts all again, under the next number
    rank: int
    local_rank: int
    size: int
    local_size: int
    serves: bool  # whether this process serves the store

    @classmethod
    def take(cls) -> "Place | None":
        """This process's place by the launcher's variables, which are taken away: what it starts is alone.

        None where it is alone itself. Raises ValueError as `check_environment` does.
        """
        check_environment()
        if "RANK" not in os.environ:
            return None
        env = os.environ
        place = cls(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            env.get("TORCHELASTIC_RESTART_COUNT", "0"),
            int(env["RANK"]),
            int(env["LOCAL_RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_WORLD_SIZE", "1")),
            serves=env["RANK"] == "0" and env.get(AGENT) != "True",
        )
        for name in (*SIZES, *NEEDED, "LOCAL_WORLD_SIZE", AGENT):
            env.pop(name, None)
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost connection one sentence is ours, pages are torch's
        return place

    @classmethod
    def leading(cls) -> "Place | None":
        """Rank 0's place, in its process and in those that it starts; None: nobody was started beside it."""
        return cls(**json.loads(os.environ[TEAM])) if os.environ.get(TEAM) else None

    def lead(self) -> None:
        """Have this process and those that it starts be rank 0."""
        os.environ[TEAM] = json.dumps(asdict(self) | {"serves": False})

    def __str__(self) -> str:
        return f"process {self.rank + 1} of {self.size} on {socket.gethostname()}"


def launched_processes() -> int | None:
    """How many processes a launcher started; None: no launcher did."""
    place = Place.leading()
    return place and place.size


def check_processes(processes: int, started: int) -> None:
    """Raise ValueError where PROCESSES are wanted and a launcher has started others."""
    if processes != started:
        raise ValueError(
            f"processes is {processes}, expected {started}, as many as the launcher has started: start so many, or "
            f"give `processes {started}` and the accumulation that keeps the images of a step"
        )


class Team:
    """What the process at PLACE says to the others, and hears from them.

    Raises TeamError where the store cannot be reached, in every method.
    """

    def __init__(self, place: Place, serves: bool | None = None):
        from torch.distributed import PrefixStore, TCPStore  # here alone: what is alone needs no torch

        self.place = place
        self._heard: dict[int, tuple[bytes, float]] = {}  # rank -> its last sign of life and when it was new
        with self._reaching():
            store = TCPStore(
                place.address,
                place.port,
                is_master=place.serves if serves is None else serves,
                wait_for_workers=False,
                timeout=CONNECT,
            )
            self.store = PrefixStore(f"codalib/{place.attempt}", store)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch's, by the kind of failure
            if isinstance(error, TeamError):
                raise
            raise TeamError(
                f"{self.place} does not reach {self.place.address}:{self.place.port}, where all meet: the machine of "
                "the first process, or what was started on it, has ended; start all again, training goes on from its "
                "last checkpoint"
            ) from error

    def show_life(self) -> None:
        """Give signs of life until the process ends, from a thread with a connection of its own."""
        own = Team(self.place, serves=False)
        own._say(f"host/{own.place.rank}", socket.gethostname())

        def beat() -> None:
            for number in range(1 << 62):
                try:
                    own._say(f"life/{own.place.rank}", str(number))
                except TeamError:  # whoever looks at the store says so
                    return
                time.sleep(BEAT)

        threading.Thread(target=beat, daemon=True).start()

    def watch(self) -> None:
        """Raise TeamError where one has been silent for SILENCE seconds: rank 0 looks at all, all look at rank 0."""
        now = time.monotonic()
        for rank in range(1, self.place.size) if self.place.rank == 0 else (0,):
            sign = self._read(f"life/{rank}") or b""
            if self._heard.get(rank, (None, now))[0] != sign:
                self._heard[rank] = sign, now
            elif now - self._heard[rank][1] > (SILENCE if sign else CONNECT.total_seconds()):
                host = (self._read(f"host/{rank}") or b"a machine that never came").decode()
                raise TeamError(
                    f"process {rank + 1} of {self.place.size} on {host} has given no sign of life for "
                    f"{now - self._heard[rank][1]:.0f} s: start all again, training goes on from its last checkpoint"
                )

    # --- one call: a number, a text that describes it, and how it ended -----------------------------------------------
    def announce(self, text: str) -> int:
        """Rank 0: hand out a call; returns its number."""
        with self._reaching():
            number = self.store.add("calls", 1)
        self._say(f"call/{number}", text)
        return number

    def next_call(self, number: int) -> str | None:
        """The others: wait for call NUMBER; None where there is none any more."""
        while not (call := self._read(f"call/{number}")):
            if self._read("end") is not None:
                return None
            self.watch()
            time.sleep(POLL)
        return call.decode()

    def fail(self, number: int, sentence: str) -> str:
        """End call NUMBER everywhere; returns the sentence of the first that failed."""
        with self._reaching():
            return self.store.compare_set(f"failed/{number}", "", sentence).decode()

    def failure(self, number: int, seconds: float = 0.0) -> str | None:
        """The sentence with which call NUMBER failed, waited for so long; None: it has not."""
        until = time.monotonic() + seconds
        while not (sentence := self._read(f"failed/{number}")) and time.monotonic() < until:
            time.sleep(POLL)
        return sentence and sentence.decode()

    def check(self, number: int) -> None:
        """Raise TeamError where call NUMBER has failed somewhere, all has ended, or one is silent."""
        if sentence := self.failure(number):
            raise TeamError(sentence)
        if (end := self._read("end")) is not None:
            raise TeamError(end.decode() or "the first process has ended")
        self.watch()

    def done(self, number: int, text: str) -> None:
        """Say that this process is done with call NUMBER, and TEXT."""
        self._say(f"done/{number}/{self.place.rank}", text)

    def wait_for_all(self, number: int) -> list[str]:
        """What each process said when it was done with call NUMBER, waited for; TeamError as `check`."""
        said = []
        for rank in range(self.place.size):
            while (text := self._read(f"done/{number}/{rank}")) is None:
                self.check(number)
                time.sleep(POLL)
            said.append(text.decode())
        return said

    # --- the end ------------------------------------------------------------------------------------------------------
    def end(self, sentence: str = "") -> None:
        """Rank 0: say that all has ended, with an error or "", and wait a little until the others have read it."""
        self._say("end", sentence)
        until = time.monotonic() + LEAVE
        for rank in range(1, self.place.size):
            while self._read(f"left/{rank}") is None and time.monotonic() < until:
                time.sleep(POLL)

    def leave(self) -> str:
        """The others: take leave; returns what rank 0 said at the end."""
        sentence = (self._read("end") or b"").decode()
        self._say(f"left/{self.place.rank}", "yes")
        return sentence

    def _say(self, key: str, text: str) -> None:
        with self._reaching():
            self.store.set(key, text)

    def _read(self, key: str) -> bytes | None:
        with self._reaching():
            return self.store.get(key) if self.store.check([key]) else None
