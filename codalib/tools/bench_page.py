"""The benchmark's CSV, plots and page, from the rows that `tools.bench` measured."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from codalib.base.files import atomic_write
from codalib.base.hardware import machine
from codalib.reporting import pages
from codalib.reporting.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save_figure, styled
from codalib.tools.bench_cases import CHANNELS, SCALES, WIDTH
from codalib.workflow.manifest import library_versions, source_version

PRODUCTS_A_LOGIT = {"step": 4 * WIDTH + CHANNELS, "encode": WIDTH, "residual": CHANNELS + 1}  # multiply-adds
EXPONENTIALS_A_LOGIT = {"step": 3, "encode": 0, "residual": 0}  # one forward, two backward
LABELS = {
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
SHORT = {"reference": "plain", "released": "released", "library": "library"}
TASKS = {"step": "Forward and backward", "encode": "Encoding", "residual": "Plain residual quantization"}
TITLE = "The quantizers' time and memory"
LEAST_BYTES = 1e5  # what is drawn for no growth above the idle process, on a logarithmic axis


# What the page begins with: (codes, images, scales) of the steps, and of the encoding.
GLANCE_STEPS = ((16384, 4, "MAR"), (65536, 16, "MAR"), (262144, 4, "MAR"), (65536, 12, "FLUX"))
GLANCE_ENCODING = (65536, 4, "MAR")
COLUMNS = (
    *("task", "implementation", "device", "scales", "codes", "batch", "tokens", "state", "seconds", "slowest_seconds"),
    *("floor_seconds", "peak_bytes", "idle_bytes", "load"),
)


def write_page(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[dict[str, str]]]:
    """Write results.csv, rates.csv, the plots (PNG, SVG) and index.html, one file that stands alone, into FOLDER.

    Returns the tables and figures as `runs.Run.finish` takes them.
    """
    frame, rates = _with_floors(rows)
    with atomic_write(folder / "results.csv") as file:
        frame.to_csv(file, index=False, float_format="%.6g")
    with atomic_write(folder / "rates.csv") as file:
        pd.DataFrame(rates).T.rename_axis("device").to_csv(file, float_format="%.6g")
    body, figures = [f"<h1>{TITLE}</h1>", _introduction(frame)], []
    for device in frame["device"].unique():
        body += _sections(frame[frame["device"] == device], rates[device], folder, device, figures)
    body += [f"<h2>All measurements</h2><details><summary>{len(frame)} cases</summary>{_table(frame)}</details>"]
    with atomic_write(folder / "index.html") as file:
        file.write(pages.page(TITLE, "\n".join(body), footer=_footer()))
    tables = [
        {"file": "results.csv", "title": "Time and memory", "caption": "One row a case; seconds and bytes."},
        {"file": "rates.csv", "title": "Rates", "caption": "Operations a second; compile_seconds in seconds."},
    ]
    return {"tables": tables, "figures": figures}


def _with_floors(rows: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """The measurements, each with the least time that its products and exponentials take, and each device's rates."""
    rates = {row["device"]: dict(row["rates"]) for row in rows if row["task"] == "rates"}
    for row in rows:
        if row["task"] == "compiling":
            rates[row["device"]]["compile_seconds"] = row["seconds"]
    cases = [row for row in rows if row["task"] in TASKS]
    frame = pd.DataFrame(cases).reindex(columns=[name for name in COLUMNS if name != "floor_seconds"])
    floors = [_floor(row, rates[row.device]) for row in frame.itertuples()]
    frame.insert(COLUMNS.index("floor_seconds"), "floor_seconds", floors)
    return frame, rates


def _floor(row: Any, rates: Mapping[str, float]) -> float:
    logits = row.tokens * row.codes
    products = 2 * PRODUCTS_A_LOGIT[row.task] * logits / rates["products"]
    return products + EXPONENTIALS_A_LOGIT[row.task] * logits / rates["exponentials"]


# --- plots ------------------------------------------------------------------------------------------------------------
@styled
def scaling(frame: pd.DataFrame, x: str) -> Figure:
    """Time and peak memory against "codes" or "tokens", one line an implementation; dashed is the floor of the time.

    Args:
        frame: measured rows of one task, with the columns of results.csv.
    """
    figure = Figure(figsize=(4.8, 6.2), layout="constrained")  # narrow, so that its letters stay large on a phone
    upper, lower = figure.subplots(2, 1, sharex=True)
    for (task, implementation), (label, colour) in LABELS.items():
        rows = _line(frame, task, implementation, x)
        if len(rows):
            upper.plot(rows[x], rows["seconds"], "o-", color=colour, label=label, markersize=3)
            lower.plot(rows[x], rows["peak_bytes"].clip(lower=LEAST_BYTES) / 1e6, "o-", color=colour, markersize=3)
    floor = frame.drop_duplicates(x).sort_values(x)
    upper.plot(floor[x], floor["floor_seconds"], "--", color=GREY, label="floor of the time")
    upper.set(ylabel="seconds")
    lower.set(ylabel="peak memory, MB")
    for axes in (upper, lower):
        _logarithmic(axes, x, frame[x])
    upper.set_xlabel("")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def roofline(frame: pd.DataFrame, rates: Mapping[str, float]) -> Figure:
    """Logits a second of each implementation of the step against codes, below the roofs that the rates set."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (task, implementation), (label, colour) in LABELS.items():
        rows = _line(frame, task, implementation, "codes")
        if len(rows):
            speed = rows["tokens"] * rows["codes"] / rows["seconds"] / 1e6
            axes.plot(rows["codes"], speed, "o-", color=colour, label=label, markersize=3)
    products = rates["products"] / (2 * PRODUCTS_A_LOGIT["step"])
    exponentials = rates["exponentials"] / EXPONENTIALS_A_LOGIT["step"]
    roofs = {"roof of the products": products, "roof of the exponentials": exponentials}
    roofs["roof of both"] = 1 / (1 / products + 1 / exponentials)
    for (name, height), style in zip(roofs.items(), (":", "-.", "--"), strict=True):
        axes.axhline(height / 1e6, linestyle=style, color=GREY, label=name)
    axes.set(ylabel="million logits a second")
    _logarithmic(axes, "codes", frame["codes"])
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _line(frame: pd.DataFrame, task: str, implementation: str, x: str) -> pd.DataFrame:
    rows = frame[(frame["task"] == task) & (frame["implementation"] == implementation) & frame["seconds"].notna()]
    return rows.sort_values(x)


def _logarithmic(axes: Axes, name: str, values: pd.Series) -> None:
    ticks = sorted(values.unique())
    axes.set(xscale="log", yscale="log", xlabel="codes in the codebook" if name == "codes" else "tokens")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)


# --- page -------------------------------------------------------------------------------------------------------------
def _introduction(frame: pd.DataFrame) -> str:
    gpu = (
        ""
        if "cuda" in set(frame["device"])
        else "**No GPU was at hand: no GPU figure exists.** The Triton kernels are tested in Triton's interpreter on "
        "the processor, which says nothing of their speed.\n\n"
    )
    return pages.markdown(
        f"{gpu}Every case ran in a process of its own. The time is the best of the repeats after a warm-up, without "
        "compilation; the memory is the highest resident memory above that of the idle process, whose libraries and "
        "compiler are loaded. *Released algorithm* is the algorithm of the authors' release, written anew from its "
        "description; *plain formula* computes the same with whole (tokens x codes) matrices, but fewer of them; "
        "*tiled*, *compiled* and *triton* are the backends that hold none. The *floor* is the time that the matrix "
        "products and the exponentials of the algorithm take by themselves at the rates measured in this run. The "
        f"queries have {WIDTH} numbers, the values {CHANNELS}; parameters and latents are random. *Load* is the number "
        "of processes that wanted a core, averaged over the last minute: well above the number of cores, other work "
        f"slowed the case. The sides of the levels are, with MAR scales, {_sides('MAR')}; with FLUX scales, "
        f"{_sides('FLUX')}; with equal scales, {_sides('equal')}."
    )


def _sides(scales: str) -> str:
    return " ".join(str(p) for p in SCALES[scales])


def _sections(
    frame: pd.DataFrame, rates: Mapping[str, float], folder: Path, device: str, figures: list[dict[str, str]]
) -> list[str]:
    """The part of one device; FIGURES gets an entry for each plot that is written."""
    name = machine()["gpu"] if device == "cuda" else machine()["processor"]
    body = [f"<h2>{pages.inline(f'On {name}')}</h2>", _glance(frame), _rates(rates)]
    for task, title in TASKS.items():
        of_task = frame[frame["task"] == task]
        for scales in of_task["scales"].unique():
            rows = of_task[of_task["scales"] == scales]
            sweeps = {"codes": rows.groupby("batch"), "tokens": rows.groupby("codes")}
            for x, groups in sweeps.items():
                for fixed, group in groups:
                    if group[x].nunique() > (2 if x == "codes" else 1):
                        heading = f"{title}, {scales} scales"
                        body += _sweep(group, x, fixed, heading, rates, folder, f"{device}_{task}", figures)
            if rows["codes"].nunique() == rows["tokens"].nunique() == 1:
                body += [f"<h3>{title}, {scales} scales</h3>", _ratios(rows)]
    return body


def _sweep(
    frame: pd.DataFrame,
    x: str,
    fixed: int,
    title: str,
    rates: Mapping[str, float],
    folder: Path,
    stem: str,
    figures: list[dict[str, str]],
) -> list[str]:
    at = f"{fixed} images" if x == "codes" else f"{fixed:,} codes"

    def plot(drawing: Figure, name: str, caption: str) -> str:
        alt = f"{caption} Logarithmic axes; the numbers stand in a table."
        figures.append(save_figure(drawing, folder, name) | {"caption": caption, "alt": alt})
        return pages.figure(folder / f"{name}.png", caption, alt)

    caption = f"{title}: time and peak memory against {x}, {at}, float32. Missing points were not run: see the table."
    drawing = scaling(frame[frame["seconds"].notna()], x)
    body = [f"<h3>{title}, over {x}, {at}</h3>", plot(drawing, f"{stem}_{x}_{fixed}", caption), _ratios(frame)]
    if x == "tokens":
        body.append(_growth(frame))
    elif frame["task"].iloc[0] == "step":
        caption = f"{title}: logits (tokens x codes) a second below the roofs that the measured rates set, {at}."
        body.append(plot(roofline(frame, rates), f"{stem}_roofline_{fixed}", caption))
    return body


def _glance(frame: pd.DataFrame) -> str:
    """The main numbers in sentences: each step against the plain formula, the encoding against the bare products."""
    lines = []
    for codes, batch, scales in GLANCE_STEPS:
        rows = _at(frame, "step", codes, batch, scales)
        plain = rows.get("reference")
        parts = [] if plain is None else [f"plain formula {_spent(plain)}"]
        for name in (name for name in ("tiled", "compiled", "triton") if name in rows):
            row = rows[name]
            faster = "" if plain is None else f" (**{_times(plain, row, 'seconds')}x faster, "
            less = "" if plain is None else f"{_times(plain, row, 'peak_bytes')}x less memory**)"
            parts.append(f"*{name}* {_spent(row)}{faster}{less}")
        if parts:
            tokens = batch * sum(p * p for p in SCALES[scales])
            size = f"{codes:,} codes, {batch} images ({scales} scales, {tokens:,} tokens)"
            lines.append(f"- Forward and backward, {size}: {'; '.join(parts)}.")
    codes, batch, scales = GLANCE_ENCODING
    rows = _at(frame, "encode", codes, batch, scales)
    bare = rows.pop("products", None)
    for name, row in rows.items():
        line = f"Encoding, {codes:,} codes, {batch} images: *{LABELS['encode', name][0]}* {_spent(row)}"
        if bare is not None:
            line += f", **{_times(row, bare, 'seconds')} times** the matrix products alone"
        lines.append(f"- {line}.")
    return pages.markdown("\n".join(lines))


def _at(frame: pd.DataFrame, task: str, codes: int, batch: int, scales: str) -> dict[str, pd.Series]:
    """The measured rows of one size by implementation."""
    here = (frame["task"] == task) & (frame["codes"] == codes) & (frame["batch"] == batch)
    rows = frame[here & (frame["scales"] == scales) & frame["seconds"].notna()]
    return {row["implementation"]: row for _, row in rows.iterrows()}


def _spent(row: pd.Series) -> str:
    return f"{row['seconds']:.2f} s and {max(row['peak_bytes'], 0) / 1e6:,.0f} MB"


def _times(more: pd.Series, less: pd.Series, column: str) -> str:
    least = 1e6 if column == "peak_bytes" else 0  # below a megabyte it is noise
    ratio = more[column] / max(less[column], least)
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def _rates(rates: Mapping[str, float]) -> str:
    compiling = rates.get("compile_seconds")
    compiled = "" if compiling is None else f"Compiling took {compiling:.0f} s, once for all sizes; torch keeps it."
    return pages.markdown(
        f"Rates measured in this run: matrix products of inner width {WIDTH} {rates['products'] / 1e9:,.0f} GFLOP/s "
        f"(large square ones {rates['square_products'] / 1e9:,.0f}), exponentials {rates['exponentials'] / 1e9:.2f} "
        f"billion a second. {compiled}"
    )


def _ratios(frame: pd.DataFrame) -> str:
    """Each case with its ratios to the materialising versions of the same case, to the bare products and the floor."""
    varying = [x for x in ("codes", "tokens") if frame[x].nunique() > 1] or ["codes", "tokens"]
    rows, missing = [], []
    for _, group in frame.groupby(["codes", "tokens"]):
        by_name = group.set_index("implementation")
        for name, row in by_name.iterrows():
            cells = {x: f"{row[x]:,}" for x in varying} | {"implementation": LABELS[row["task"], name][0]}
            if pd.isna(row["seconds"]):
                rows.append(cells | {"seconds": None, "MB": None})
                size = f"{row['codes']:,} codes, {row['tokens']:,} tokens"
                missing.append(f"{cells['implementation']}, {size} ({row['state']})")
                continue
            cells |= {"seconds": f"{row['seconds']:.3f}", "MB": f"{row['peak_bytes'] / 1e6:,.0f}"}
            cells["floor x"] = f"{row['seconds'] / row['floor_seconds']:.2f}"
            if "products" in by_name.index:
                cells["products x"] = f"{row['seconds'] / by_name.loc['products', 'seconds']:.2f}"
            for other in ("reference", "released", "library"):
                if other != name and other in by_name.index and not pd.isna(by_name.loc[other, "seconds"]):
                    base, label = by_name.loc[other], SHORT[other]
                    cells[f"{label}: time x"] = _times(base, row, "seconds")
                    cells[f"{label}: memory x"] = _times(base, row, "peak_bytes")
            rows.append(cells)
    shown = pd.DataFrame(rows)
    text = "*floor x*: the time in floors. "
    if "products x" in shown:
        text += "*products x*: the time in that of the matrix products alone. "
    named = [label for other, label in SHORT.items() if f"{label}: time x" in shown]
    if named:
        text += f"*{', '.join(named)}*: how many times as much time and memory these take, where they were run. "
    if missing:
        text += f"Without numbers: {'; '.join(missing)}."
    return pages.table(shown) + _quiet(text)


def _quiet(text: str) -> str:
    return f'<p class="quiet">{pages.inline(text)}</p>'


def _growth(frame: pd.DataFrame) -> str:
    """What one more token costs in memory: the slope of a line through the peaks, against a row of logits."""
    lines, codes = [], frame["codes"].iloc[0]
    for implementation, rows in frame[frame["seconds"].notna()].groupby("implementation", sort=False):
        if len(rows) > 1:
            slope, _ = np.polyfit(rows["tokens"], rows["peak_bytes"], 1)
            label = LABELS[rows["task"].iloc[0], implementation][0]
            lines.append(f"- *{label}* grows by {slope / 1024:,.1f} KiB a token")
    return pages.markdown(
        f"Memory a token (a line through the points); one row of {codes:,} logits is {4 * codes / 1024:,.0f} KiB:\n\n"
        + "\n".join(lines)
    )


def _table(frame: pd.DataFrame) -> str:
    shown = frame.drop(columns=["idle_bytes"]).rename(columns={"peak_bytes": "peak MB"})
    shown["peak MB"] = (shown["peak MB"] / 1e6).map("{:,.1f}".format, na_action="ignore")
    for name in ("seconds", "slowest_seconds", "floor_seconds"):
        shown[name] = shown[name].map("{:.4f}".format, na_action="ignore")
    shown["load"] = shown["load"].map("{:.1f}".format, na_action="ignore")
    return pages.table(shown.rename(columns=lambda name: name.replace("_", " ")), prose=["state"])


def _footer() -> str:
    here, versions, source = machine(), library_versions(), source_version()
    commit = (source["commit"] or "unknown")[:12] + (", with changes" if source["dirty"] else "")
    return pages.inline(
        f"{here['processor']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB; GPU: "
        f"{here['gpu'] or 'none'}; Python {versions['python']}, torch {versions['torch']}; commit {commit}; "
        f"{datetime.now(UTC):%Y-%m-%d}. `manifest.json` beside this page says more of the machine, `results.csv` and "
        "`rates.csv` hold the numbers. Reproduce with `make bench`."
    )
