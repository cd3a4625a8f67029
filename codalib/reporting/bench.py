"""The benchmark in tables and plots, from the rows that `codalib bench` measured."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from codalib.base.files import read_json
from codalib.base.paths import MANIFEST, project_folder
from codalib.reporting.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, styled
from codalib.reporting.tables import read_table

STEP_PRODUCTS, STEP_EXPONENTIALS = 144, 3  # multiply-adds and exponentials a logit, as tools.bench_cases counts them
LABELS = {  # (task, implementation) -> name, colour
    ("step", "released"): ("released algorithm", VERMILION),
    ("step", "reference"): ("plain formula", ORANGE),
    ("step", "tiled"): ("tiled", SKY),
    ("step", "compiled"): ("compiled", BLUE),
    ("step", "triton"): ("triton", GREEN),
    ("encode", "library"): ("vector-quantize-pytorch, nearest", VERMILION),
    ("encode", "nearest"): ("nearest neighbour", SKY),
    ("encode", "attention"): ("attention", BLUE),
    ("encode", "products"): ("matrix products alone", GREY),
    ("residual", "library"): ("vector-quantize-pytorch, residual", PURPLE),
    ("residual", "nearest"): ("residual nearest neighbour", GREEN),
}
BASELINES = {"reference": "plain", "released": "released", "library": "library"}  # what the others are compared with
TASKS = {"step": "Forward and backward", "encode": "Encoding", "residual": "Plain residual quantization"}
LEAST_DRAWN = 1e5  # bytes: drawn for no growth above the idle process, on a logarithmic axis
LEAST_COMPARED = 1e6  # bytes: less is noise in a ratio


# --- what was measured ------------------------------------------------------------------------------------------------
def read_bench(folder: str | Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """The measured cases, the rates a device, and the manifest of a run of `codalib bench`.

    FOLDER is below the checkout unless it is absolute.
    """
    folder = project_folder() / folder
    frame, rates = read_table(folder / "results.csv"), read_table(folder / "rates.csv", index_col="device")
    return frame, rates, read_json(folder / MANIFEST)


def which_run(manifest: Mapping[str, Any]) -> str:
    """One sentence: the machine, the versions, the commit and the day of a benchmark."""
    here, versions = manifest["machine"], manifest["versions"]
    commit = (manifest["commit"] or "unknown")[:12] + (", with changes" if manifest["dirty"] else "")
    gpu = here["gpu"] or "none, so that no GPU number exists"
    return (
        f"Measured on {manifest['started'][:10]} on {here['processor']}, {here['cores']} cores, "
        f"{here['memory_bytes'] / 2**30:.0f} GiB (GPU: {gpu}) with Python {versions['python']}, torch "
        f"{versions['torch']}, commit {commit}; best of {manifest['parameters']['repeats']} repeats."
    )


def rates_in_words(rates: pd.Series) -> str:
    """The rates of one device, which the floors are made of."""
    compiling = rates.get("compile_seconds", np.nan)
    compiled = "" if pd.isna(compiling) else f" Compiling took {compiling:.0f} s, once for all sizes; torch keeps it."
    return (
        f"Narrow matrix products run at {rates['products'] / 1e9:,.0f} GFLOP/s (large square ones at "
        f"{rates['square_products'] / 1e9:,.0f}), exponentials at {rates['exponentials'] / 1e9:.2f} billion a "
        f"second.{compiled}"
    )


def sweeps(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(title, "codes", "tokens" or "" for a single size, rows) of every sweep that one device's FRAME holds."""
    for (task, scales), rows in frame.groupby(["task", "scales"], sort=False):
        title = f"{TASKS[task]}, {scales} scales"
        for x, fixed, least in (("codes", "batch", 3), ("tokens", "codes", 2)):
            for value, group in rows.groupby(fixed):
                if group[x].nunique() >= least:
                    at = f"{value} images" if x == "codes" else f"{value:,} codes"
                    yield f"{title}, over {x}, {at}", x, group
        if rows["codes"].nunique() == rows["tokens"].nunique() == 1:
            yield title, "", rows


# --- plots ------------------------------------------------------------------------------------------------------------
@styled
def scaling(frame: pd.DataFrame, x: str) -> Figure:
    """Time and peak memory of one task against "codes" or "tokens", one line an implementation, above the time's floor.

    Args:
        frame: rows of one sweep, with the columns of results.csv.
    """
    figure = Figure(figsize=(4.8, 6.2), layout="constrained")  # narrow, so that its letters stay large on a phone
    upper, lower = figure.subplots(2, 1, sharex=True)
    for label, colour, rows in _lines(frame, x):
        upper.plot(rows[x], rows["seconds"], "o-", color=colour, label=label, markersize=3)
        lower.plot(rows[x], rows["peak_bytes"].clip(lower=LEAST_DRAWN) / 1e6, "o-", color=colour, markersize=3)
    measured = frame[frame["seconds"].notna()]
    floor = measured.drop_duplicates(x).sort_values(x)
    upper.plot(floor[x], floor["floor_seconds"], "--", color=GREY, label="floor of the time")
    upper.set(ylabel="seconds")
    lower.set(ylabel="peak memory, MB")
    for axes in (upper, lower):
        _logarithmic(axes, x, measured[x])
    upper.set_xlabel("")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def roofline(frame: pd.DataFrame, rates: pd.Series) -> Figure:
    """Logits a second of each implementation of the step against codes, below the roofs that the rates set."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, colour, rows in _lines(frame, "codes"):
        speed = rows["tokens"] * rows["codes"] / rows["seconds"] / 1e6
        axes.plot(rows["codes"], speed, "o-", color=colour, label=label, markersize=3)
    products, exponentials = rates["products"] / (2 * STEP_PRODUCTS), rates["exponentials"] / STEP_EXPONENTIALS
    roofs = {"roof of the products": products, "roof of the exponentials": exponentials}
    roofs["roof of both"] = 1 / (1 / products + 1 / exponentials)
    for (name, height), style in zip(roofs.items(), (":", "-.", "--"), strict=True):
        axes.axhline(height / 1e6, linestyle=style, color=GREY, label=name)
    axes.set(ylabel="million logits a second")
    _logarithmic(axes, "codes", frame["codes"])
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _lines(frame: pd.DataFrame, x: str) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for (task, implementation), (label, colour) in LABELS.items():
        rows = frame[(frame["task"] == task) & (frame["implementation"] == implementation) & frame["seconds"].notna()]
        if len(rows):
            yield label, colour, rows.sort_values(x)


def _logarithmic(axes: Axes, name: str, values: pd.Series) -> None:
    ticks = sorted(values.unique())
    axes.set(xscale="log", yscale="log", xlabel="codes in the codebook" if name == "codes" else "tokens")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)


# --- tables -----------------------------------------------------------------------------------------------------------
def ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Each case of a sweep with its ratios to the floor, the bare products and the versions that hold (tokens x codes).

    "floor x": the time in floors; "products x": in that of the matrix products alone; "plain: time x" and the like: how
    many times as much time and memory that version takes. A case without numbers says why.
    """
    varying = [x for x in ("codes", "tokens") if frame[x].nunique() > 1] or ["codes", "tokens"]
    rows = []
    for _, group in frame.groupby(["codes", "tokens"]):
        by_name = group.set_index("implementation")
        seconds, memory = by_name["seconds"], by_name["peak_bytes"]
        others = {BASELINES[name]: name for name in BASELINES if not pd.isna(seconds.get(name))}
        for name, row in by_name.iterrows():
            cells = {x: f"{row[x]:,}" for x in varying} | {"implementation": LABELS[row["task"], name][0]}
            if pd.isna(row["seconds"]):
                rows.append(cells | {"seconds": row["state"]})
                continue
            cells |= {"seconds": f"{seconds[name]:.3f}", "MB": f"{memory[name] / 1e6:,.0f}"}
            cells["floor x"] = f"{seconds[name] / row['floor_seconds']:.2f}"
            if "products" in seconds:
                cells["products x"] = f"{seconds[name] / seconds['products']:.2f}"
            for label, other in others.items():
                if other != name:
                    cells[f"{label}: time x"] = _times(seconds[other] / seconds[name])
                    cells[f"{label}: memory x"] = _times(memory[other] / max(memory[name], LEAST_COMPARED))
            rows.append(cells)
    return pd.DataFrame(rows)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def memory_a_token(frame: pd.DataFrame) -> pd.DataFrame:
    """KiB that one more token costs each implementation of a sweep over tokens: the slope of a line through the peaks.

    One row of logits, which the materialising versions hold several times, stands last.
    """
    rows = []
    for label, _, own in _lines(frame, "tokens"):
        if len(own) > 1:
            slope, _ = np.polyfit(own["tokens"], own["peak_bytes"], 1)
            rows.append({"implementation": label, "KiB a token": f"{slope / 1024:,.1f}"})
    codes = frame["codes"].iloc[0]
    return pd.DataFrame(
        [*rows, {"implementation": f"one row of {codes:,} logits", "KiB a token": f"{codes / 256:,.0f}"}]
    )
