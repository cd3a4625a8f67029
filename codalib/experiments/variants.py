"""Tokenizers that are compared: of those that differ in one thing each (Table 4) and of other methods (Figure 1c)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from codalib.base.hardware import compute_device
from codalib.base.processes import launch
from codalib.datasets.images import ImageDataset
from codalib.evaluation.reconstruction import image_scores
from codalib.experiments.sweeps import BEST, PAPER, read_rows, sweep, write_rows
from codalib.models.checkpoints import load_tokenizer
from codalib.models.library_quantizers import LIBRARY_KINDS
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import SCRATCH, FitSettings, TokenizerSettings
from codalib.training.tokenizer import train_and_save
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


@dataclass(frozen=True)
class TokenizerTrials:
    """Trains the tokenizers that are compared: of one VAE, on the same images, each after the same start on latents.

    The learning rate is chosen by the error of the pixels of images on which nothing is trained and no verdict looks;
    of several, the best is bracketed. What an interrupted run has finished is not trained again.
    """

    vae: str  # as `load_vae` takes it
    train: ImageDataset
    choose: ImageDataset
    val: ImageDataset
    folder: Path  # of the run
    fit: FitSettings
    latents: Tensor | None  # (N, C, H, W) of the training images; None: no start on latents
    processes: int

    def variants(
        self, variants: Mapping[str, TokenizerSettings], learning_rates: Sequence[float], seeds: Sequence[int]
    ) -> list[dict[str, Any]]:
        """The rows of `sweep` for each of `tokenizer_variants`, written as `sweeps.VARIANTS` too."""

        def train(name: str, settings: TokenizerSettings, rate: float, seed: int) -> dict[str, Any]:
            own = replace(settings, learning_rate=rate, seed=seed)
            start = f"{own.codebook_size}-{own.norm}-seed-{seed}"
            place, log = self._train(name, own, start, max(1, self.fit.fit_steps // 20))
            scores = {key.removeprefix("val_"): value for key, value in log[-1].items() if key.startswith("val_")}
            cost = {"seconds": log[-1]["seconds"], "choose_error": self.choose_error(place, own)}
            return variant_row(name, own, place) | cost | scores

        return self._sweeps(train, variants, learning_rates, seeds, papers=variants)

    def baselines(
        self,
        methods: Mapping[str, TokenizerSettings],
        learning_rates: Sequence[float],
        seeds: Sequence[int],
        operations: Mapping[str, int],
    ) -> list[dict[str, Any]]:
        """The rows of `sweep` for each of `baseline_tokenizers`, written as `sweeps.VARIANTS` too.

        `operations` are those of one image's training, by method.
        """

        def train(name: str, settings: TokenizerSettings, rate: float, seed: int) -> dict[str, Any]:
            own = replace(settings, learning_rate=rate, seed=seed)
            place, log = self._train(name, own, f"{own.kind}-{len(own.scales)}-seed-{seed}", own.log_every)
            return variant_row(name, own, place) | {
                "steps": own.steps,
                "seconds": log[-1]["seconds"],
                "tokens": sum(p * p for p in own.scales),
                "operations_a_step": own.batch_size * own.accumulation * self.processes * operations[name],
                "choose_error": self.choose_error(place, own),
                "val_psnr": log[-1]["val_psnr"],
            }

        return self._sweeps(train, methods, learning_rates, seeds, papers=BUDGET)

    def _train(
        self, name: str, own: TokenizerSettings, start: str, log_every: int
    ) -> tuple[str, list[dict[str, float]]]:
        """One tokenizer after its START on latents; returns where it lies below the run's folder, and its log."""
        quantizer = None
        if self.latents is not None and own.adapters != SCRATCH:
            settings = self.fit.quantizer(own, log_every)
            place, source = self.folder / "fits" / start, self.train.content_digest
            quantizer = fit_quantizer(settings, self.latents, place, source=source)
        place = f"{name.replace(', ', '-').replace(' ', '-')}-rate-{own.learning_rate:g}-seed-{own.seed}"
        arguments = own, self.vae, self.train, self.val, self.folder / place, quantizer
        launch(train_and_save, self.processes, *arguments)
        return f"{place}/tokenizer", read_log(self.folder / place)

    def choose_error(self, place: str, settings: TokenizerSettings) -> float:
        """The weighted L1 and L2 of a tokenizer's pixels over the choosing images; infinite where it is not finite."""
        tokenizer = load_tokenizer(self.folder / place).to(compute_device())
        scores = image_scores(tokenizer, self.choose)[0]
        error = settings.l1_weight * scores["l1"].mean() + settings.l2_weight * scores["l2"].mean()
        return error.nan_to_num(float("inf")).item()

    def _sweeps(
        self,
        train: Callable[[str, TokenizerSettings, float, int], dict[str, Any]],
        methods: Mapping[str, TokenizerSettings],
        learning_rates: Sequence[float],
        seeds: Sequence[int],
        papers: Sequence[str] | Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """PAPERS are the methods that are trained with the other seeds at the paper's learning rate too."""
        rows = []
        for name, own in methods.items():
            paper = TokenizerSettings.learning_rate if name in papers else None
            several = len(learning_rates) > 1
            rows += sweep(partial(train, name, own), learning_rates, seeds, "choose_error", paper, several)
        write_rows(rows, self.folder)
        return rows


def trials_table(rows: Sequence[dict[str, Any]], *without: str) -> pd.DataFrame:
    """What `TokenizerTrials` trained, as a table; the columns WITHOUT and the paths left out."""
    table = pd.DataFrame(rows).drop(columns=["tokenizer", *without])
    table["settings"] = table["settings"].map(", ".join)
    return table


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
        rows = read_rows(folder)
    return [
        {"table": table, "method": _word(row[field]), "setting": setting}
        | {name: row[name] for name in ("learning_rate", "seed", "tokenizer")}
        for setting in (BEST, PAPER)
        for field, table in TABLES.items()
        for row in rows
        if row["method"] in (BASE, _name(field, row[field])) and setting in row["settings"]
    ]


def baseline_rows(folder: str | None) -> list[dict[str, Any]]:
    """The tokenizers of `baseline_tokenizers` that 01_train_baselines trained, at their best: one row a seed.

    Args:
        folder: what that notebook wrote, below `runs_folder()`; None: the embedded tokenizer alone.
    Returns rows of "method", "seed", "tokenizer" (its path), "tokens", "codebook_size", and where it was trained here
    "learning_rate", "steps", "seconds", "petaflop" (10^15 operations of its training).
    """
    if folder is None:
        quantizer = CodaTokenizer.from_pretrained("emoji").quantizer
        size = {"tokens": quantizer.num_tokens, "codebook_size": quantizer.codebook_size}
        return [{"method": "CODA", "seed": 0, "tokenizer": "emoji"} | size]
    rows = [row for row in read_rows(folder) if BEST in row["settings"]]
    kept = ("method", "seed", "tokens", "codebook_size", "tokenizer", "learning_rate", "steps", "seconds")
    return [
        {name: row[name] for name in kept} | {"petaflop": row["operations_a_step"] * row["steps"] / PETA}
        for row in rows
    ]


def baseline_curves(folder: str | None) -> list[dict[str, Any]]:
    """The validations during training of the tokenizers of `baseline_rows`, none where FOLDER is None.

    Rows of "method", "seed", "steps" and "petaflop" so far, and "val_psnr".
    """
    if folder is None:
        return []
    return [
        {"method": row["method"], "seed": row["seed"], "steps": line["step"], "val_psnr": line["val_psnr"]}
        | {"petaflop": row["operations_a_step"] * line["step"] / PETA}
        for row in read_rows(folder)
        if BEST in row["settings"]
        for line in read_log(Path(row["tokenizer"]).parent)
        if "val_psnr" in line
    ]
