"""Tokenizers that differ in one thing each, and the rows of Table 4 that they are."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from codalib.runs import read_json, runs_folder, write_json
from codalib.tokenizer import CodaTokenizer
from codalib.train import TokenizerSettings

BASE = "base"
TABLES = {"adapters": "4a", "codebook_size": "4b", "norm": "4c"}  # what differs -> the table that compares it
VARIANTS = "variants.json"


def tokenizer_variants(
    settings: TokenizerSettings, halves: Sequence[str], codebook_sizes: Sequence[int], norms: Sequence[str | None]
) -> dict[str, TokenizerSettings]:
    """The tokenizers that Table 4 compares: "base" is SETTINGS, each other differs from it in one value.

    Raises ValueError where a variant is the base itself.
    """
    variants = {BASE: settings}
    for field, values in zip(TABLES, (halves, codebook_sizes, norms), strict=True):
        for value in values:
            if getattr(settings, field) == value:
                raise ValueError(f"{field} {value!r} is asked for as a variant and is the base's own: leave it out")
            variants[_name(field, value)] = replace(settings, **{field: value})
    return variants


def _name(field: str, value: Any) -> str:
    return f"{field} {_word(value)}".replace("_", " ")


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def variant_row(name: str, settings: TokenizerSettings, tokenizer: str | Path) -> dict[str, Any]:
    """One trained variant, for `write_variants`; `tokenizer` is its folder, relative to theirs."""
    differs = {field: getattr(settings, field) for field in TABLES}
    return {"method": name, "seed": settings.seed, "tokenizer": str(tokenizer), **differs}


def write_variants(rows: Sequence[dict[str, Any]], folder: str | Path) -> None:
    """Write the list of a folder's variants, for `table_4_rows`."""
    write_json(Path(folder) / VARIANTS, list(rows))


def table_4_rows(folder: str | None) -> list[dict[str, Any]]:
    """Where each row of Tables 4a, 4b and 4c is to be measured: {"table", "method", "seed", "tokenizer"}.

    The base stands in each table, under its own value.

    Args:
        folder: what the notebook 01_train_variants wrote, below `runs_folder()`; None: the embedded tokenizer, which
            is one row of each table.
    """
    if folder is None:
        embedded = CodaTokenizer.from_pretrained("emoji")
        own = {"adapters": embedded.vae.adapter_settings["where"]}
        own |= {field: embedded.quantizer.config()[field] for field in ("codebook_size", "norm")}
        rows = [{"method": BASE, "seed": 0, "tokenizer": "emoji"} | own]
    else:
        place = runs_folder(folder)
        if not (place / VARIANTS).exists():
            raise ValueError(f"{place} holds no {VARIANTS}: expected the folder that 01_train_variants wrote")
        rows = [row | {"tokenizer": str(place / row["tokenizer"])} for row in read_json(place / VARIANTS)]
    return [
        {"table": table, "method": _word(row[field]), "seed": row["seed"], "tokenizer": row["tokenizer"]}
        for field, table in TABLES.items()
        for row in rows
        if row["method"] in (BASE, _name(field, row[field]))
    ]
