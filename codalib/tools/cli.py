"""The `codalib` command: one sub-command a task, each with its own --help."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from codalib.base.hardware import set_threads

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
    module, function = COMMANDS[command][0].split(".")
    if command != "run":  # which chooses for each notebook, when it starts
        try:
            set_threads()
        except ValueError as error:
            parser.error(str(error))
    return getattr(importlib.import_module(f"codalib.tools.{module}"), function)(arguments[1:]) or 0
