"""What a rehearsal found, as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from codalib.reporting.tables import clock, size

TABLE2_BATCH = 256  # images, at which the paper's Table 2 counts iterations


def page(found: Mapping[str, Any]) -> str:
    """The page of what `tools.rehearsal.rehearse` returns."""
    return "\n".join(
        [
            *_heading(found),
            "",
            *_table(
                ("What is built", "parameters", "of them trained"),
                [
                    (r["part"], f"{r['parameters']:,}", f"{r['trained']:,}" if r["trained"] else "")
                    for r in _with_sum(found)
                ],
            ),
            "",
            *_work(found),
            "",
            *_ahead(found),
            "",
            *_before(found),
        ]
    )


def _heading(found: Mapping[str, Any]) -> list[str]:
    channels, side, _ = found["latents"]
    lines = [
        f"Rehearsal of {found['profile']}: VAE {found['vae']}, {channels} x {side} x {side} latents, "
        f"{found['tokens']:,} tokens an image.",
        "Two training steps with all terms, a checkpoint, an interruption, a resume, an evaluation, a save, a load.",
    ]
    if found["random_weights"]:
        lines += ["", f"RANDOM WEIGHTS: those of {', '.join(found['random_weights'])} are not here."]
    else:
        lines += ["", f"The weights of {found['vae']} are the real ones."]
    lines += [
        f"STAND-IN: {other} for {network}, whose weights are not here." for network, other in found["stand_ins"].items()
    ]
    if found["random_weights"] or found["stand_ins"]:
        lines.append("Losses and pictures mean nothing then; sizes, memory and work do (a stand-in's are its own).")
    lines += [
        "",
        *_table(
            ("Changed for the rehearsal", "profile", "here"),
            [(name, str(old), str(new)) for name, (old, new) in found["changes"].items()],
        ),
    ]
    return lines


def _with_sum(found: Mapping[str, Any]) -> list[dict]:
    rows = found["parameters"]
    return [*rows, {"part": "sum", **{key: sum(row[key] for row in rows) for key in ("parameters", "trained")}}]


def _work(found: Mapping[str, Any]) -> list[str]:
    operations, machine = found["operations"], found["machine"]
    terms = found["terms"][-1]
    lines = _table(
        ("One training step, an image", "10^12 operations"),
        [(name, f"{operations[name] / 1e12:.3f}") for name in ("convolutions", "matrix products", "an image")]
        + [("  of it, assigning tokens to codes", f"{operations['of which the assignment'] / 1e12:.3f}")],
    )
    lines += ["", *_table(("Loss terms at step 2", "value"), [(name, f"{value:.4g}") for name, value in terms.items()])]
    lines += ["", *_table(("Checked", ""), [(name, "yes" if ok else "NO") for name, ok in found["checks"].items()])]
    lines += [
        "",
        f"Here, on {machine['gpu'] or machine['processor']}: {found['seconds_a_step']:.1f} s a step of "
        f"{found['batch']} image{'s' * (found['batch'] > 1)}; peak memory {size(found['peak_memory_bytes'])}"
        + (f", of the GPU {size(found['peak_gpu_memory_bytes'])}" if found["peak_gpu_memory_bytes"] else "")
        + f"; {clock(found['seconds'])} in all.",
        f"Kept for the backward pass: {size(found['kept_for_backward'])} an image in {found['precision']}.",
    ]
    return lines


def _ahead(found: Mapping[str, Any]) -> list[str]:
    ahead = found["forecast"]
    images, gpus = ahead["images_a_step"], ahead["processes"]
    lines = [
        f"The real run: {images} images a step, {ahead['operations_a_step'] / 1e15:.2f} x 10^15 operations. At "
        f"{ahead['utilisation']:.0%} of a GPU's data sheet, an assumption:",
        "",
        *_table(
            ("steps", "iterations of 256", "TFLOP/s of the GPU", "on one GPU", f"on {gpus} GPU{'s' * (gpus > 1)}"),
            [
                (
                    f"{row['steps']:,}",
                    f"{row['steps'] * images // TABLE2_BATCH:,}",
                    f"{row['tflops']:,.0f}",
                    _days(row["gpu_hours"]),
                    _days(row["gpu_hours"] / gpus),
                )
                for row in ahead["rows"]
            ],
        ),
        "",
        "Reading images and talking between GPUs come on top.",
        f"Memory of each GPU at its batch_size of {ahead['batch_size']}: about {size(ahead['gpu_memory_bytes'])} "
        f"({size(ahead['gpu_memory_bytes_an_image'])} an image); cuDNN's workspace comes on top.",
    ]
    return lines


def _before(found: Mapping[str, Any]) -> list[str]:
    missing = found["missing"]
    if not missing["networks"] and not missing["folders"]:
        return ["All that the real run needs is here."]
    lines = ["Before the real run:"]
    if missing["networks"]:
        lines.append(f"  make fetch PROFILE={found['profile']}  (missing: {', '.join(missing['networks'])})")
    lines += [f"  images that are not here: {folder}" for folder in missing["folders"]]
    return lines


def _days(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.2g} min"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return [lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])]
