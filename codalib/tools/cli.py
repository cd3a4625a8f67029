"""The `codalib` command: one sub-command a task, each with its own --help."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from functools import partial

from codalib.base.hardware import set_threads
from codalib.base.team import Place

COMMANDS = {  # name -> (module and function in codalib.tools, what it does)
    "run": ("run.main", "run a notebook, or every stage of a profile, and write the report"),
    "fetch": ("fetch.main", "download pretrained weights, or say where each file belongs"),
    "features": ("features.main", "list the pretrained networks, and whether their weights are here"),
    "info": ("info.main", "versions, devices, networks and free disk, for a report of trouble"),
    "rehearse": (
        "rehearsal.main",
        "two steps of a profile's training with random weights: memory, work, hours on a GPU",
    ),
    "bench": ("bench.main", "time and memory of the quantizers"),
    "encode": ("tokens.encode", "images to tokens, in shards"),
    "decode": ("tokens.decode", "tokens to images"),
}
CLOCKED = ("run", "rehearse")  # whose messages begin with the time
TOGETHER = ("run", "encode")  # on all the processes that a launcher starts, on several machines perhaps


def main(arguments: Sequence[str] | None = None) -> int:
    """Call the named sub-command with the rest of the ARGUMENTS; returns the exit status."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="codalib",
        description="CODA, reproduced (arXiv 2503.17760). Each command has its own --help.",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(arguments[:1]).command
    try:
        place = Place.take() if command in TOGETHER else None
        if command != "run" or (place and place.rank):  # a run chooses for each notebook, when it starts
            set_threads()
    except ValueError as error:
        parser.error(str(error))
    line = f"{'%(asctime)s ' if command in CLOCKED or place else ''}%(message)s"
    logging.basicConfig(level=logging.INFO, format=line, datefmt="%H:%M:%S", stream=sys.stderr)
    if place is None:
        return call(command, arguments[1:])
    from codalib.base.processes import together  # here alone: torch takes seconds to load

    return together(place, partial(call, command, arguments[1:]))


def call(command: str, arguments: Sequence[str]) -> int:
    """Call a sub-command; returns the exit status."""
    module, function = COMMANDS[command][0].split(".")
    return getattr(importlib.import_module(f"codalib.tools.{module}"), function)(arguments) or 0
