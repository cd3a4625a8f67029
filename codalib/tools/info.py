"""What a report of trouble needs: `codalib info`."""

import argparse
import shutil
import sys
from collections.abc import Sequence

from codalib.base.hardware import fixed_threads, gpu_count, machine
from codalib.base.paths import project_folder, reports_folder, runs_folder
from codalib.pretrained.registry import network_status, weights_folder
from codalib.workflow.manifest import library_versions, lock_digest, source_version


def main(arguments: Sequence[str] | None = None) -> None:
    """Print versions, the machine, which pretrained networks are here, the folders in use and the disk's free space."""
    argparse.ArgumentParser(prog="codalib info", description=main.__doc__).parse_args(arguments)
    import torch  # here alone: `machine` then knows of GPUs

    found = machine()
    gpus = [torch.cuda.get_device_name(i) for i in range(gpu_count())]
    networks = [row["name"] for row in network_status() if row["here"]]
    source = ", ".join(f"{name} {value}" for name, value in source_version().items())
    rows = {"source": source, "python": sys.version.split()[0], **library_versions()}
    rows |= {"lock": lock_digest() or "other versions than requirements.lock's"}
    rows |= {"processor": f"{found['processor']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB"}
    rows |= {"GPUs": ", ".join(gpus) or "none", "bfloat16": "yes" if found["bfloat16"] else "no"}
    rows |= {"threads": fixed_threads() or "as cores are free", "networks here": ", ".join(networks) or "none"}
    places = {"checkout": project_folder(), "runs": runs_folder(), "reports": reports_folder()}
    for name, place in (places | {"weights": weights_folder()}).items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        rows[name] = f"{place} ({shutil.disk_usage(there).free / 2**30:.0f} GiB free)"
    width = max(map(len, rows))
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in rows.items()))
