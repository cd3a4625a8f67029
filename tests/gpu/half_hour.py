"""What a GPU is asked in half an hour: tests, golden values, time and memory of the kernels, of steps and of sampling.

    python tests/gpu/half_hour.py --out OUT [--back FOLDER] [--minutes 9.5] [--tiny]

From a bare machine without a network; the package and its dependencies are installed. Each call works for so many
minutes, resumes what the last one left, and ends with status 0 when all is done, else with 3: call it again. What was
found lies in OUT, which is to stay from call to call: `summary.md` with the card's name, `parts.json`, a log a part,
and `reports/` with the benchmark's pages and finished trials. `--back` names a folder that gets it in three files, the
first two and results.tar.gz, at the end of each call. `--tiny` rehearses all of it in tiny sizes, on a processor too.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESUMING = ("bench, first", "bench", "emoji-long")  # parts that go on where they were stopped
LEAST = 20.0  # s: with less left no part begins
WARM, TIMED = 3, 10  # steps
VARIANTS = {  # how a training step is made -> settings that differ
    "plain formula of the assignment": {"backend": "reference"},
    "default": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
}
FIRST_CASES = "step-(released|reference|tiled|triton)-(16384|65536|262144)-4-MAR-cuda"  # what is wanted most
SAMPLING = {"sampling": "eager", "sampling, CUDA graph": "compiled"}
MODELS = {"MAR": ("imagenet-mar-16384", 16), "FLUX": ("imagenet-flux-65536", 8)}  # profile, images a step


# --- parts ------------------------------------------------------------------------------------------------------------
def parts(out: Path, tiny: bool) -> dict[str, list[str]]:
    """Name -> command, in the order of what is wanted first."""
    python, own = sys.executable, [sys.executable, str(Path(__file__)), "--out", str(out), *(["--tiny"] * tiny)]
    golden = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
    tests = [*golden, "tests/test_gpu.py", "tests/kernels", "tests/models", "-m", "gpu"]
    bench = [python, "-m", "codalib", "bench", *(["--quick"] * tiny)]
    commands = {
        "machine": [python, "-m", "codalib", "info"],
        "tests": [*golden, "tests/models/test_quantizer.py", "-k", "golden"] if tiny else tests,
        "bench, first": [*bench, "--only", "step-tiled" if tiny else FIRST_CASES],
    }
    for model in ("MAR",) if tiny else MODELS:
        for variant in list(VARIANTS)[: 2 if tiny else None]:
            commands[f"step {model}, {variant}"] = [*own, "--step", model, variant]
    commands |= {name: [*own, "--sampling", how] for name, how in SAMPLING.items()}
    commands["bench"] = bench
    stage = ["notebooks/01_quantizer_factorial.ipynb"] if tiny else ["--profile", "emoji-long", "--exclusive"]
    commands["emoji-long"] = [python, "-m", "codalib", "run", *stage]
    return commands


def environment(out: Path, tiny: bool) -> dict[str, str]:
    found = dict(os.environ) | {"CODALIB_REPORTS": str(out / "reports"), "CODALIB_RUNS": str(out / "runs")}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    return found if tiny else found | {"CODALIB_TEST_GPU": "1"}


def run_part(name: str, command: list[str], out: Path, seconds: float, tiny: bool) -> int | None:
    """Run a part until it ends or its SECONDS are over; its status, None where it goes on the next time.

    Then the part and all that it started are killed: a process that stays would keep the card's memory.
    """
    with open(out / f"{name.replace(' ', '-').replace(',', '')}.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(out, tiny), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            for signal_, wait in ((signal.SIGINT, 10.0), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(wait)
            return None


# --- what is measured here --------------------------------------------------------------------------------------------
def timed(work: Callable[[], object], images: int, tiny: bool) -> dict[str, float | str | None]:
    """Images a second and peak memory of WORK, which takes so many images a call."""
    import torch

    cuda = torch.cuda.is_available()
    warm, calls = (1, 2) if tiny else (WARM, TIMED)
    try:
        for _ in range(warm):
            work()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / calls
    except torch.cuda.OutOfMemoryError:
        return {"images_a_second": None, "note": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"images_a_second": images / seconds, "seconds": seconds, "peak_bytes": peak}


def training_step(model: str, variant: str, work: Path, tiny: bool) -> dict[str, float | str | None]:
    """One step of the tokenizer's training at the paper's size: random weights of the published architecture, noise."""
    from codalib.datasets.images import load_dataset
    from codalib.models.checkpoints import load_vae
    from codalib.tools.rehearsal import RandomImages, base_vae, rehearsal_settings, training_parameters
    from codalib.training.settings import TokenizerSettings
    from codalib.training.tokenizer import TokenizerStage

    profile, batch = MODELS[model]
    shutil.rmtree(work, ignore_errors=True)
    if tiny:
        settings = TokenizerSettings(steps=100, batch_size=2, codebook_size=64, scales=(1, 2, 4, 8), rank=2)
        base, data = "emoji", [load_dataset("emoji", split, 64, limit=8) for split in ("train", "val")]
    else:
        parameters = training_parameters(profile)
        settings = replace(rehearsal_settings(parameters, batch), steps=10_000, checkpoint_every=10_000)
        base, _ = base_vae(parameters["vae"], work / "vae", 0)
        data = [RandomImages(parameters["resolution"], seed, "random images") for seed in (0, 1)]
    settings = replace(settings, **VARIANTS[variant])
    stage = TokenizerStage(settings, load_vae(base), *data, work / "run", None)
    step, calls = iter(range(settings.steps)), WARM + TIMED
    batches = iter(list(itertools.islice(stage.batches(0), calls)))  # drawn before the clock runs
    found = timed(lambda: stage.train_step([next(batches)], next(step)), settings.batch_size, tiny)
    networks = ", ".join(own.name for own in (stage.perceptual, stage.discriminator) if own is not None)
    return found | {"batch": settings.batch_size, "precision": settings.precision, "networks": networks}


def sampling(how: str, tiny: bool) -> dict[str, float | str | None]:
    """Tokens of MaskGIT-L drawn in 8 steps with guidance, random weights."""
    import torch

    from codalib.base.hardware import compute_device
    from codalib.kernels.decoding import compile_decoding
    from codalib.models.maskgit import MaskGIT
    from codalib.models.quantizer import MAR_SCALES
    from codalib.models.sampling import generate

    batch, device = 2 if tiny else 64, compute_device()
    size = {"width": 32, "depth": 1, "heads": 2} if tiny else {}
    model = MaskGIT.preset("L", 16384, MAR_SCALES, num_classes=1000, **size).to(device).eval().requires_grad_(False)
    labels = torch.arange(batch, device=device)
    if how == "compiled":
        compile_decoding(model)

    def draw() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            generate(model, labels, steps=8, guidance=2.0)

    return timed(draw, batch, tiny) | {"batch": batch}


# --- all of it --------------------------------------------------------------------------------------------------------
def write_summary(out: Path, found: dict[str, dict]) -> None:
    """`summary.md`: the card, the parts and how they ended, and what was measured."""
    lines = [f"# {card()}", "", "| part | how it ended | seconds | images a second | peak memory, GB | |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in found.items():
        rate, peak = row.get("images_a_second"), row.get("peak_bytes")
        cells = [name, row["state"], f"{row['seconds_here']:.0f}", f"{rate:.1f}" if rate else ""]
        cells += [f"{peak / 1e9:.1f}" if peak else "", row.get("note") or row.get("networks", "")]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bring_back(out: Path, folder: Path) -> None:
    """Few files for machines that return few: the summary, the parts, and an archive of logs, reports and cases."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "results.tar.gz", "w:gz") as tar:
        for path in (*out.glob("*.log"), out / "reports", out / "runs" / "bench"):
            if path.exists():
                tar.add(path, path.relative_to(out))
    for name in ("summary.md", "parts.json"):
        if (out / name).exists():
            shutil.copy(out / name, folder)


def card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + ", no GPU"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found and of what goes on from it")
    parser.add_argument("--back", type=Path, help="folder that gets the results in three files")
    parser.add_argument("--minutes", type=float, default=9.5, help="that one call may take (9.5)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a processor too")
    parser.add_argument("--step", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("--sampling", choices=SAMPLING.values(), help=argparse.SUPPRESS)
    given = parser.parse_args()
    ends = time.monotonic() + 60 * given.minutes
    out = given.out.resolve()
    if given.step or given.sampling:
        row = (
            training_step(*given.step, out / "work", given.tiny) if given.step else sampling(given.sampling, given.tiny)
        )
        print(f"\n{json.dumps(row)}")
        return 0
    import torch

    if not given.tiny and not torch.cuda.is_available():
        parser.error("expected a GPU that torch sees, got none: --tiny rehearses on a processor")
    results = out / "reports" / "emoji-long" / "results"
    if not results.exists():  # what is finished is not run again
        shutil.copytree(ROOT / "reports" / "emoji-long" / "results", results)
    file = out / "parts.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, command in parts(out, given.tiny).items():
        if found.get(name, {}).get("state", "").startswith("ended"):
            continue
        if (left := ends - time.monotonic() - LEAST / 2) < LEAST / 2:
            break
        began = time.monotonic()
        status = run_part(name, command, out, left, given.tiny)
        row = {"state": "goes on" if status is None else "ended" if status == 0 else f"ended with status {status}"}
        if status is None and name not in RESUMING and time.monotonic() - began > 0.8 * 60 * given.minutes:
            row["state"] = "ended: longer than a call"  # it would start anew, and again
        row["seconds_here"] = found.get(name, {}).get("seconds_here", 0.0) + time.monotonic() - began
        if status == 0 and ("--step" in command or "--sampling" in command):
            log = (out / f"{name.replace(' ', '-').replace(',', '')}.log").read_text(encoding="utf-8")
            row |= json.loads(log.strip().splitlines()[-1])
        found[name] = row
        file.write_text(json.dumps(found, indent=1))
        write_summary(out, found)
        print(f"{name}: {row['state']}, {row['seconds_here']:.0f} s", flush=True)
    done = len(found) == len(parts(out, given.tiny)) and all(row["state"].startswith("ended") for row in found.values())
    if given.back:
        bring_back(out, given.back)
    print(f"see {out / 'summary.md'}" + ("" if done else "; call again to go on"))
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
