"""The table of the pretrained networks: `codalib features`."""

import argparse
import sys
from collections.abc import Sequence

from codalib.pretrained.registry import network_status, weights_folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Print which pretrained networks are here, and how to get the others."""
    argparse.ArgumentParser(prog="codalib features", description=main.__doc__).parse_args(arguments)
    rows = network_status()
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{sum(row['here'] for row in rows)} of {len(rows)} pretrained networks are here. The weights folder is",
        f"{weights_folder()} (CODALIB_WEIGHTS names another).",
    ]
    for row in rows:
        lines += ["", f"{row['name']:<{width}}  {'here' if row['here'] else 'MISSING'}: {row['purpose']}"]
        lines.append(f"{'':<{width}}  {'path' if row['here'] else 'looked for'}: {row['where']}")
        lines.append(f"{'':<{width}}  licence: {row['licence']}")
        if not row["here"]:
            lines.append(f"{'':<{width}}  to get it: {row['how_to_get']}")
    lines += ["", "codalib fetch NAME ... fetches by name, codalib fetch --profile NAME what a profile needs."]
    sys.stdout.write("\n".join(lines) + "\n")
