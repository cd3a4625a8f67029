"""Measured numbers beside the paper's: verdicts on its claims, tables of both, and numbers as people read them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr  # the distribution function of Student's t

from codalib.paper import CLAIMS, COLUMNS, Table

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
SIGNIFICANCE = 0.05
SEEDS_FOR_A_TEST = 3  # below this the seeds are only compared in sign
TEST = "one-sided t-test"
DESCRIPTIONS = ("ratio", "codebook_size", "iterations", "parameters", "steps")  # columns that say what a method is
SHARES = ("utilization", "accuracy", "precision", "recall", "copies")  # columns with these words are shown in percent
PAPER_PREFIX, SPREAD_SUFFIX = "paper_", "_std"


def judge(
    claim: str, improvements: Sequence[float], effect: str, margin: float = 0.0, detail: str = "", setting: str = ""
) -> dict[str, str]:
    """The verdict on a claim of the paper, computed from what the runs measured.

    Args:
        claim: an id of `paper.CLAIMS`.
        improvements: one number a seed, positive where the claim's direction was found; of a claim in several parts the
            smallest of its parts.
        effect: the measured effect in words and numbers.
        margin: a mean improvement no larger than this, either way, decides nothing.
        detail: what else a reader should know.
        setting: of a claim that is judged more than once, what this time is, such as "at the paper's setting".

    From three seeds on, a one-sided t-test of the improvements against 0 decides (p < 0.05); below that, all seeds must
    agree. Returns {"id", "setting", "verdict", "effect", "detail"} for `Run.finish`.
    """
    if claim not in CLAIMS:
        raise ValueError(f"There is no claim {claim!r}; paper.py has {', '.join(CLAIMS)}.")
    values = np.asarray(improvements, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"Claim {claim!r} needs a finite improvement for each seed, got {list(improvements)}.")
    if len(values) >= SEEDS_FOR_A_TEST and not np.allclose(values, values[0]):
        count = len(values)
        statistic = values.mean() / (values.std(ddof=1) / math.sqrt(count))
        chance = {"better": stdtr(count - 1, -statistic), "worse": stdtr(count - 1, statistic)}
        better, worse = chance["better"] < SIGNIFICANCE, chance["worse"] < SIGNIFICANCE
        how = f"{count} seeds, {TEST}, p = {min(chance.values()):.2g}."
    else:
        better, worse = (values > 0).all(), (values <= 0).all()
        how = f"{len(values)} seeds, no test." if len(values) > 1 else "One seed, so its spread is not known."
    decided = abs(values.mean()) > margin or not margin
    verdict = HOLDS if better and decided else FAILS if worse and decided else UNDECIDED
    detail = f"{detail} {how}".strip()
    return {"id": claim, "setting": setting, "verdict": verdict, "effect": effect, "detail": detail}


def tested(result: Mapping[str, str]) -> bool:
    """Whether a test over seeds is behind a verdict of `judge`; else it only says which way the numbers point."""
    return TEST in result.get("detail", "")


def over_seeds(rows: Sequence[Mapping[str, Any]], by: Sequence[str] = ("method",)) -> list[dict[str, Any]]:
    """One row for all rows that agree in BY: the means of their numbers, and with several rows each one's `X_std`.

    A column "seed" goes; "seeds" says how many rows there were.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    merged = []
    for values, group in groups.items():
        line: dict[str, Any] = dict(zip(by, values, strict=True)) | {"seeds": len(group)}
        for name in group[0]:
            if name in by or name == "seed":
                continue
            own = [row[name] for row in group]
            if any(value is None or isinstance(value, str | bool) for value in own):
                line[name] = own[0] if all(value == own[0] for value in own) else None
                continue
            same = all(value == own[0] for value in own)  # exactly, without the rounding of a mean
            line[name] = float(own[0] if same else np.mean(own))
            if len(own) > 1:
                line[name + SPREAD_SUFFIX] = 0.0 if same else float(np.std(own, ddof=1))
        merged.append(line)
    return merged


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


def markdown_table(frame: pd.DataFrame) -> str:
    """A table of texts in Markdown's pipe form."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(re.sub(r"([|])", r"\\\1", cell) for cell in line) + " |" for line in lines)


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
