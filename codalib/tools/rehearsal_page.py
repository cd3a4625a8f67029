"""What a rehearsal found, as Markdown for a terminal and for rehearsal.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from codalib.reporting.tables import clock, markdown_table, number, size

TABLE2_BATCH = 256  # images, at which the paper's Table 2 counts iterations


def page(found: Mapping[str, Any]) -> str:
    """The text of what `tools.rehearsal.rehearse` returns."""
    parts = (_heading, _changes, _parameters, _work, _forecast, _before)
    return "\n\n".join(part(found) for part in parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(pd.DataFrame(rows, columns=header), aligned=True)


def _heading(found: Mapping[str, Any]) -> str:
    channels, side, _ = found["latents"]
    lines = [
        f"# Rehearsal of {found['profile']}",
        "",
        f"VAE {found['vae']}, {channels} x {side} x {side} latents, {found['tokens']:,} tokens an image. Two training",
        "steps with all terms, a checkpoint, an interruption, a resume, an evaluation, a save, a load.",
        "",
    ]
    if found["random_weights"]:
        lines.append(f"- RANDOM WEIGHTS: those of {', '.join(found['random_weights'])} are not here.")
    else:
        lines.append(f"- The weights of {found['vae']} are the real ones.")
    for network, other in found["stand_ins"].items():
        lines.append(f"- STAND-IN: {other} for {network}, whose weights are not here.")
    if found["random_weights"] or found["stand_ins"]:
        lines += ["", "Losses and pictures mean nothing then; sizes, memory and work do (a stand-in's are its own)."]
    return "\n".join(lines)


def _changes(found: Mapping[str, Any]) -> str:
    rows = [(name, str(old), str(new)) for name, (old, new) in found["changes"].items()]
    return _table(("Changed for the rehearsal", "profile", "here"), rows)


def _parameters(found: Mapping[str, Any]) -> str:
    rows = [(row["part"], row["parameters"], row["trained"]) for row in found["parameters"]]
    rows.append(("sum", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    texts = [(part, f"{count:,}", f"{trained:,}" if trained else "") for part, count, trained in rows]
    return _table(("What is built", "parameters", "of them trained"), texts)


def _work(found: Mapping[str, Any]) -> str:
    images, gpu = found["batch"], found["peak_gpu_memory_bytes"]
    parts = [
        _table(
            ("One training step, an image", "10^12 operations"),
            [(name, f"{count / 1e12:.3f}") for name, count in found["operations"].items()],
        ),
        _table(
            ("Loss terms at step 2", "value"), [(name, number(value)) for name, value in found["terms"][-1].items()]
        ),
        _table(("Checked", ""), [(name, "yes" if ok else "NO") for name, ok in found["checks"].items()]),
        f"Here, on {found['machine']['gpu'] or found['machine']['processor']}: {found['seconds_a_step']:.1f} s a step "
        f"of {images} image{'s' * (images > 1)}, with gradient_checkpointing "
        f"{found['seconds_a_step_checkpointed']:.1f} s;\npeak memory {size(found['peak_memory_bytes'])}"
        f"{f', of the GPU {size(gpu)}' if gpu else ''}; {clock(found['seconds'])} in all.\n"
        f"Kept for the backward pass: {size(found['kept_for_backward'])} an image in {found['precision']}.",
    ]
    return "\n\n".join(parts)


def _forecast(found: Mapping[str, Any]) -> str:
    real = found["forecast"]
    images, gpus = real["images_a_step"], real["processes"]
    rows = [
        (
            f"{row['steps']:,}",
            f"{row['steps'] * images // TABLE2_BATCH:,}",
            f"{row['tflops']:,.0f}",
            _duration(row["gpu_hours"]),
            _duration(row["gpu_hours"] / gpus),
        )
        for row in real["rows"]
    ]
    header = ("steps", "iterations of 256", "TFLOP/s of the GPU", "on one GPU", f"on {gpus} GPU{'s' * (gpus > 1)}")
    return (
        f"The real run: {images} images a step, {real['operations_a_step'] / 1e15:.2f} x 10^15 operations. At "
        f"{real['utilisation']:.0%} of a GPU's data sheet,\nan assumption:\n\n{_table(header, rows)}\n\n"
        "Reading images and talking between GPUs come on top.\n"
        f"Memory of each GPU at its batch_size of {real['batch_size']}: about {size(real['gpu_memory_bytes'])} "
        f"({size(real['gpu_memory_bytes_an_image'])} an image);\n"
        f"with gradient_checkpointing about {size(real['gpu_memory_bytes_checkpointed'])} "
        f"({size(real['gpu_memory_bytes_checkpointed_an_image'])} an image). cuDNN's workspace comes on top."
    )


def _before(found: Mapping[str, Any]) -> str:
    missing = found["missing"]
    if not missing["networks"] and not missing["folders"]:
        return "All that the real run needs is here."
    lines = ["Before the real run:", ""]
    if missing["networks"]:
        lines.append(f"- make fetch PROFILE={found['profile']}  (missing: {', '.join(missing['networks'])})")
    return "\n".join([*lines, *(f"- images that are not here: {folder}" for folder in missing["folders"])])


def _duration(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.2g} min"
