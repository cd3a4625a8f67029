"""Measured numbers beside the paper's: verdicts on its claims, tables of both, and numbers as people read them."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from codalib.base.files import atomic_write
from codalib.experiments.paper import Table, title_and_direction
from codalib.experiments.statistics import SPREAD_SUFFIX

DESCRIPTIONS = ("ratio", "codebook_size", "iterations", "parameters", "steps")  # columns that say what a method is
# Columns with these words are shown in percent.
FRACTIONS = ("utilization", "accuracy", "precision", "recall", "copies", "_change")
PAPER_PREFIX = "paper_"
pd.options.display.html.use_mathjax = False  # cells hold names of folders and classes, no formulas
for _limit in ("max_rows", "max_columns", "max_colwidth"):  # a table shows all it has, a page scrolls
    pd.set_option(f"display.{_limit}", None)


def spread(values: Sequence[float], unit: str = "") -> str:
    """Some seeds' values in words: their mean, and with several their standard deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else None
    return number(float(np.mean(values)), spread=deviation) + unit


def beside_paper(
    rows: Sequence[Mapping[str, Any]], table: Table, columns: Mapping[str, str | None], whole: bool = False
) -> pd.DataFrame:
    """The run's ROWS, each metric next to the paper's column for the same method.

    Args:
        rows: {"method": name, metric: number}. What follows a comma in a name is a remark: "CODA MAR 16384, released
            weights" stands beside the paper's "CODA MAR 16384".
        columns: metric of the run -> column of the paper's table, None where the paper has none of the kind. One of
            `DESCRIPTIONS` is what a method is and not how well it does: ours or the paper's, in one column.
        whole: show the methods of TABLE that the run has not measured too, ours after those of the same name.

    Returns a frame with "method", then each metric, with its `X_std` where the rows have one, followed by
    "paper_COLUMN"; gaps are NaN.
    """
    published = {row.method: row.published() for row in table}

    def named(row: Mapping[str, Any]) -> str:  # names of the paper's hold commas too
        return row["method"] if row["method"] in published else row["method"].partition(",")[0]

    def line(row: Mapping[str, Any]) -> dict[str, Any]:
        theirs, values = published.get(named(row), {}), {"method": row["method"]}
        for metric, column in columns.items():
            values[metric] = row.get(metric)
            if metric + SPREAD_SUFFIX in row:
                values[metric + SPREAD_SUFFIX] = row[metric + SPREAD_SUFFIX]
            if metric in DESCRIPTIONS and values[metric] is None:
                values[metric] = theirs.get(column)
            elif metric not in DESCRIPTIONS and column:
                values[PAPER_PREFIX + column] = theirs.get(column)
        return values

    if not whole:
        return pd.DataFrame([line(row) for row in rows])
    order = list(published)
    measured = {named(row) for row in rows if row["method"] in published}  # these have a line of their own
    everything = [*({"method": method} for method in order if method not in measured), *rows]
    place = {method: i for i, method in enumerate(order)}
    return pd.DataFrame([line(row) for row in sorted(everything, key=lambda r: place.get(named(r), len(order)))])


def save_table(frame: pd.DataFrame, folder: str | Path, file: str, title: str, caption: str) -> dict[str, str]:
    """Write a table as FILE, CSV, into FOLDER; returns its entry among the results of a run."""
    with atomic_write(Path(folder) / file) as opened:
        frame.to_csv(opened, index=False)
    return {"file": file, "title": title, "caption": caption}


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """A table of a run, with OPTIONS of `pandas.read_csv`; ValueError where the file is none."""
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:
        raise ValueError(f"{path} is not a table ({error}): remove it and run its stage again") from error


def label(column: str) -> str:
    """A column of a CSV file as readers know it: `paper_rfid` -> "rFID (paper)"."""
    if column.startswith(PAPER_PREFIX):
        return f"{label(column.removeprefix(PAPER_PREFIX))} (paper)"
    return title_and_direction(column)[0]


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table for people: labels, rounded numbers, fractions as percent, `X` and `X_std` in one column."""
    shown = pd.DataFrame(index=frame.index)
    for column in frame.columns:
        if column.endswith(SPREAD_SUFFIX) and column.removesuffix(SPREAD_SUFFIX) in frame:
            continue
        spread = frame.get(column + SPREAD_SUFFIX, pd.Series([None] * len(frame), index=frame.index))
        fraction = any(word in column for word in FRACTIONS)
        shown[label(column)] = [
            number(value, fraction, noise) for value, noise in zip(frame[column], spread, strict=True)
        ]
    return shown


def number(value: Any, fraction: bool = False, spread: Any = None) -> str:
    """A value in three significant digits (a shorter or whole one as it is, a FRACTION in percent), with its SPREAD."""
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if fraction:
        text = f"{100 * value:.1f}".removesuffix(".0")
    elif float(value).is_integer():
        text = f"{int(value):,}"
    elif abs(value) >= 1e-4 and float(f"{value:.4g}") == value:  # a setting, or a number published so
        text = f"{value:.4g}"
    elif abs(value) < 1e-4:
        text = f"{value:.2g}"
    else:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    unit = " %" if fraction else ""
    if spread is None or pd.isna(spread):
        return text + unit
    noise = 100 * spread if fraction else spread
    return f"{text} ± {noise:{',.0f' if abs(noise) >= 100 else '.2g'}}{unit}"


def prose(frame: pd.DataFrame) -> Any:
    """A table of sentences for a notebook: whole, in lines that wrap, without the index."""
    return (
        frame.style.format(escape="html")
        .hide(axis="index")
        .set_properties(**{"text-align": "left", "white-space": "normal"})
    )


def verdicts(claims: Sequence[Mapping[str, str]]) -> Any:
    """What `claim_verdict` returned, as a table for a notebook; columns that are empty throughout are left out."""
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


# --- writers ----------------------------------------------------------------------------------------------------------
def html_table(frame: pd.DataFrame, prose: Sequence[str] = (), markup: Sequence[str] = ()) -> str:
    """A table as HTML in a box that scrolls inside itself.

    Args:
        frame: cells are shown as they are, so numbers are formatted before; missing ones become a dash.
        prose: columns of sentences, which wrap.
        markup: columns whose cells are HTML already.
    """
    kinds = [_kind(frame[name], name in prose) for name in frame.columns]
    names = list(zip(frame.columns, kinds, strict=True))
    head = "".join(f'<th{kind} scope="col">{html.escape(str(name))}</th>' for name, kind in names)
    rows = []
    for row in frame.itertuples(index=False):
        cells = zip(names, row, strict=True)
        texts = (f"<td{kind}>{_cell(cell, name in markup)}</td>" for (name, kind), cell in cells)
        rows.append(f"<tr>{''.join(texts)}</tr>")
    body = "\n".join(rows)
    return (
        '<div class="scroll" tabindex="0">'  # focusable, so that the keyboard can scroll it
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _kind(column: pd.Series, prose: bool) -> str:
    """The CSS class of a column, as an attribute; numbers need none."""
    if prose:
        return ' class="prose"'
    numbers = column.dropna().map(lambda cell: bool(re.match(r"^[-\u2212+]?[\d.,]+\s?\S{0,3}$", str(cell))))
    return "" if len(numbers) and numbers.all() else ' class="text"'


def _cell(cell: object, markup: bool) -> str:
    if pd.isna(cell) or cell == "":
        return "–"  # noqa: RUF001 an en dash for a number that is not there
    return str(cell) if markup else html.escape(str(cell))


def markdown_table(frame: pd.DataFrame, aligned: bool = False) -> str:
    """A table of texts in Markdown's pipe form; ALIGNED pads its cells for a terminal."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    lines = [[re.sub(r"([|])", r"\\\1", cell) for cell in line] for line in lines]
    if aligned:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines[1] = ["-" * width for width in widths]
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
