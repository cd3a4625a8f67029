"""Measured numbers beside the paper's: verdicts on its claims, tables of both, and numbers as people read them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from codalib.experiments.paper import COLUMNS, Table
from codalib.experiments.statistics import SPREAD_SUFFIX

DESCRIPTIONS = ("ratio", "codebook_size", "iterations", "parameters", "steps")  # columns that say what a method is
SHARES = ("utilization", "accuracy", "precision", "recall", "copies")  # columns with these words are shown in percent
PAPER_PREFIX = "paper_"


def spread(values: Sequence[float], unit: str = "") -> str:
    """Some seeds' values in words: their mean, and with several their standard deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else None
    return number(float(np.mean(values)), spread=deviation) + unit


def beside_paper(
    rows: Sequence[Mapping[str, Any]], table: Table, columns: Mapping[str, str | None], whole: bool = False
) -> pd.DataFrame:
    """The run's ROWS, each measure next to the paper's column for the same method.

    Args:
        rows: {"method": name, measure: number}. What follows a comma in a name is a remark: "CODA MAR 16384, released
            weights" stands beside the paper's "CODA MAR 16384".
        columns: measure of the run -> column of the paper's table, None where the paper has none of the kind. One of
            `DESCRIPTIONS` is what a method is and not how well it does: ours or the paper's, in one column.
        whole: show the methods of TABLE that the run has not measured too, ours after those of the same name.

    Returns a frame with "method", then each measure, with its `X_std` where the rows have one, followed by
    "paper_COLUMN"; gaps are NaN.
    """
    published = {row.method: row.published() for row in table}

    def named(row: Mapping[str, Any]) -> str:  # names of the paper's hold commas too
        return row["method"] if row["method"] in published else row["method"].partition(",")[0]

    def line(row: Mapping[str, Any]) -> dict[str, Any]:
        theirs, values = published.get(named(row), {}), {"method": row["method"]}
        for measure, column in columns.items():
            values[measure] = row.get(measure)
            if measure + SPREAD_SUFFIX in row:
                values[measure + SPREAD_SUFFIX] = row[measure + SPREAD_SUFFIX]
            if measure in DESCRIPTIONS and values[measure] is None:
                values[measure] = theirs.get(column)
            elif measure not in DESCRIPTIONS and column:
                values[PAPER_PREFIX + column] = theirs.get(column)
        return values

    if not whole:
        return pd.DataFrame([line(row) for row in rows])
    order = list(published)
    measured = {named(row) for row in rows if row["method"] in published}  # these have a line of their own
    everything = [*({"method": method} for method in order if method not in measured), *rows]
    place = {method: i for i, method in enumerate(order)}
    return pd.DataFrame([line(row) for row in sorted(everything, key=lambda r: place.get(named(r), len(order)))])


def label(column: str) -> str:
    """A column of a CSV file as readers know it: `paper_rfid` -> "rFID (paper)"."""
    if column.startswith(PAPER_PREFIX):
        return f"{label(column.removeprefix(PAPER_PREFIX))} (paper)"
    return COLUMNS[column][0] if column in COLUMNS else column.replace("_", " ").capitalize()


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table for people: labels, rounded numbers, shares as percent, `X` and `X_std` in one column."""
    shown = pd.DataFrame(index=frame.index)
    for column in frame.columns:
        if column.endswith(SPREAD_SUFFIX) and column.removesuffix(SPREAD_SUFFIX) in frame:
            continue
        spread = frame.get(column + SPREAD_SUFFIX, pd.Series([None] * len(frame), index=frame.index))
        share = any(word in column for word in SHARES)
        shown[label(column)] = [number(value, share, noise) for value, noise in zip(frame[column], spread, strict=True)]
    return shown


def number(value: Any, share: bool = False, spread: Any = None) -> str:
    """A value in three significant digits (a shorter or whole one as it is, a SHARE in percent), with its SPREAD."""
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if share:
        text = f"{100 * value:.1f}".removesuffix(".0")
    elif float(value).is_integer():
        text = f"{int(value):,}"
    elif abs(value) >= 1e-4 and float(f"{value:.4g}") == value:  # a setting, or a number published so
        text = f"{value:.4g}"
    elif abs(value) < 1e-4:
        text = f"{value:.2g}"
    else:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    unit = " %" if share else ""
    if spread is None or pd.isna(spread):
        return text + unit
    return f"{text} ± {100 * spread if share else spread:.2g}{unit}"


def markdown_table(frame: pd.DataFrame, aligned: bool = False) -> str:
    """A table of texts in Markdown's pipe form; ALIGNED pads its cells for a terminal."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    lines = [[re.sub(r"([|])", r"\\\1", cell) for cell in line] for line in lines]
    if aligned:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines[1] = ["-" * width for width in widths]
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(frame: pd.DataFrame) -> Any:
    """A table of sentences for a notebook: whole, in lines that wrap, without the index."""
    return frame.style.hide(axis="index").set_properties(**{"text-align": "left", "white-space": "normal"})


def verdicts(claims: Sequence[Mapping[str, str]]) -> Any:
    """What `judge` returned, as a table for a notebook; columns that are empty throughout are left out."""
    frame = pd.DataFrame(claims, columns=["id", "setting", "verdict", "effect", "detail"]).rename(
        columns={"id": "claim"}
    )
    return prose(frame.loc[:, [name == "verdict" or frame[name].any() for name in frame]])


def clock(seconds: float | None) -> str:
    """Seconds as people say them, "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: int | None) -> str:
    """Bytes as people say them, "" for None."""
    if not count:
        return ""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
