"""Tokenizers that are compared: of those that differ in one thing each (Table 4) and of other methods (Figure 1c)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from codalib.experiments.sweeps import BEST, GENERATORS, PAPER, VARIANTS, read_rows
from codalib.models.library_quantizers import LIBRARY_KINDS
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.settings import SCRATCH, TokenizerSettings
from codalib.training.trainer import read_log

BASE = "base"
BUDGET = "VQGAN-style", "CODA"  # whose training budgets the paper compares
VQ_BETA = 0.25  # of VQ's commitment term (arXiv:1711.00937)
TABLES = {"adapters": "4a", "codebook_size": "4b", "norm": "4c"}  # what differs -> the table that compares it
PETA = 1e15


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
                raise ValueError(f"expected {field} other than the base's as a variant, got {value!r}: leave it out")
            variants[_name(field, value)] = replace(settings, **{field: value})
    return variants


def _name(field: str, value: Any) -> str:
    return f"{field} {_word(value)}".replace("_", " ")


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def baseline_tokenizers(
    settings: TokenizerSettings, kinds: Sequence[str], levels: int, longer: int
) -> dict[str, TokenizerSettings]:
    """CODA as SETTINGS have it, and what it is compared with, under one name each.

    "VQGAN-style" is the VAE's own architecture, trained from random weights with one code a position
    (arXiv:2012.09841), for LONGER times as many steps. The others quantize the frozen encoder's latents in their own
    way and adapt the decoder alone: VQ with one code a position, and KINDS of `models.library_quantizers.LIBRARY_KINDS`
    with LEVELS codes a position. "CODA, decoder adapted" is the same with CODA's quantizer.
    """
    if odd := [kind for kind in kinds if kind not in LIBRARY_KINDS]:
        raise ValueError(f"expected baselines of {', '.join(LIBRARY_KINDS)}, got {odd}")
    side = settings.scales[-1:]
    frozen = replace(settings, adapters="decoder")
    nearest = {"kind": "nearest", "scales": side, "beta": VQ_BETA, "entropy_weight": 0.0}
    return {
        "CODA": settings,
        "CODA, decoder adapted": frozen,
        "VQGAN-style": replace(settings, adapters=SCRATCH, steps=longer * settings.steps, **nearest),
        "VQ": replace(frozen, **nearest),
    } | {LIBRARY_KINDS[kind]: replace(frozen, kind=kind, scales=side * levels, entropy_weight=0.0) for kind in kinds}


def variant_row(name: str, settings: TokenizerSettings, tokenizer: str | Path) -> dict[str, Any]:
    """One trained variant, for `write_rows`; `tokenizer` is its folder, relative to theirs."""
    row = {"method": name, "seed": settings.seed, "learning_rate": settings.learning_rate, "tokenizer": str(tokenizer)}
    return row | {field: getattr(settings, field) for field in TABLES}


def table_4_rows(folder: str | None) -> list[dict[str, Any]]:
    """The tokenizers of Tables 4a, 4b and 4c.

    The base stands in each table, under its own value.

    Args:
        folder: what the notebook 01_train_variants wrote, below `runs_folder()`; None: the embedded tokenizer, which
            is one row of each table.
    Returns rows of "table", "method", "setting" (`BEST` or `PAPER`), "learning_rate" (None where it is not known),
    "seed", "tokenizer" (its path).
    """
    if folder is None:
        embedded = CodaTokenizer.from_pretrained("emoji")
        own = {"adapters": embedded.vae.adapter_settings["where"]}
        own |= {field: embedded.quantizer.config()[field] for field in ("codebook_size", "norm")}
        rows = [{"method": BASE, "settings": [BEST], "learning_rate": None, "seed": 0, "tokenizer": "emoji"} | own]
    else:
        rows = _trained_tokenizers(folder)
    return [
        {"table": table, "method": _word(row[field]), "setting": setting}
        | {name: row[name] for name in ("learning_rate", "seed", "tokenizer")}
        for setting in (BEST, PAPER)
        for field, table in TABLES.items()
        for row in rows
        if row["method"] in (BASE, _name(field, row[field])) and setting in row["settings"]
    ]


def pixel_error(log: Sequence[dict[str, float]], settings: TokenizerSettings) -> float:
    """The mean weighted L1 and L2 of the last tenth of a training log: what the trials of a method are chosen by."""
    values = [settings.l1_weight * row["l1"] + settings.l2_weight * row["l2"] for row in log if "l1" in row]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def baseline_rows(folder: str | None, setting: str = BEST) -> list[dict[str, Any]]:
    """The tokenizers of `baseline_tokenizers` that 01_train_baselines trained: one row a method and seed.

    Args:
        folder: what that notebook wrote, below `runs_folder()`; None: the embedded tokenizer alone.
        setting: those that stand for `BEST` or for `PAPER`.
    Returns rows of "method", "seed", "tokenizer" (its path), "tokens", "codebook_size", and where it was trained here
    "learning_rate", "steps", "seconds", "petaflop" (10^15 operations of its training).
    """
    if folder is None:
        quantizer = CodaTokenizer.from_pretrained("emoji").quantizer
        size = {"tokens": quantizer.num_tokens, "codebook_size": quantizer.codebook_size}
        return [{"method": "CODA", "seed": 0, "tokenizer": "emoji"} | size]
    rows = [row for row in _trained_tokenizers(folder) if setting in row["settings"]]
    kept = ("method", "seed", "tokens", "codebook_size", "tokenizer", "learning_rate", "steps", "seconds")
    return [
        {name: row[name] for name in kept} | {"petaflop": row["operations_a_step"] * row["steps"] / PETA}
        for row in rows
    ]


def baseline_curves(folder: str | None, setting: str = BEST) -> list[dict[str, Any]]:
    """The validations during training of the tokenizers of `baseline_rows`, none where FOLDER is None.

    Rows of "method", "seed", "steps" and "petaflop" so far, and "val_psnr".
    """
    if folder is None:
        return []
    return [
        {"method": row["method"], "seed": row["seed"], "steps": line["step"], "val_psnr": line["val_psnr"]}
        | {"petaflop": row["operations_a_step"] * line["step"] / PETA}
        for row in _trained_tokenizers(folder)
        if setting in row["settings"]
        for line in read_log(Path(row["tokenizer"]).parent)
        if "val_psnr" in line
    ]


def steps_to_reach(curves: Sequence[dict[str, Any]], slow: str, fast: str) -> tuple[list[float], bool]:
    """How many times the steps of FAST the method SLOW takes to the final PSNR of FAST, seed by seed.

    The curve is straight between its points. Returns the ratios, and whether all were reached: where one was not, the
    last step of SLOW stands for it, a lower bound.
    """
    ratios, reached = [], True
    for seed in sorted({row["seed"] for row in curves}):
        quick, long = (
            sorted((row["steps"], row["val_psnr"]) for row in curves if (row["method"], row["seed"]) == (name, seed))
            for name in (fast, slow)
        )
        if not quick or not long:
            continue
        wanted = quick[-1][1]
        step = next((step for step, value in long if value >= wanted), None)
        if step is None:
            reached, step = False, long[-1][0]
        else:
            place = [at for at, _ in long].index(step)
            if place:
                (before, low), (after, high) = long[place - 1], long[place]
                step = before + (after - before) * (wanted - low) / (high - low)
        ratios.append(step / quick[-1][0])
    return ratios, reached


def generator_rows(folder: str) -> list[dict[str, Any]]:
    """The MaskGITs that 02_compare_tokenizers trained on several tokenizers, the one that is compared first.

    Rows of `sweep` with "method", "tokenizer" (as `models.checkpoints.find_model` takes it), "generator" (its path).
    """
    return read_rows(folder, GENERATORS, "02_compare_tokenizers")


def _trained_tokenizers(folder: str) -> list[dict[str, Any]]:
    return read_rows(folder, VARIANTS, "01_train_variants or 01_train_baselines")
