"""Quantizers on a frozen VAE's latents: every method on every grid, tuned alike, over several seeds.

A cell of the factorial is a method (nearest or attention, its codes started at random or from data) on a grid (one
full grid, a pyramid, several full grids). Its learning rate, and with attention the weight of the entropy term, are
bracketed on a part of the training images that nothing else uses; then the best and the paper's setting are fitted with
every seed and scored on the validation images. A finished trial is one small JSON file, from which an interrupted
factorial goes on.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codalib.datasets.images import ImageDataset, evaluation_batches
from codalib.evaluation.latents import encode_images, encode_posterior, quantizer_scores
from codalib.evaluation.metrics import FrechetDistance, finite_psnr, frechet_column, psnr
from codalib.experiments.ablation import Fitted, with_weights
from codalib.experiments.bracketing import bracket, bracket_both
from codalib.experiments.paper import USED
from codalib.experiments.statistics import claim_verdict
from codalib.experiments.trials import Compared, TrialFolder, data_digest, words
from codalib.models.checks import NonFiniteLoss
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.registry import read_weights
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import QuantizerSettings

PROTOCOL = 1  # part of a trial's name: raised where the same settings come to mean other numbers
METHODS = {  # name -> kind of quantizer, start of its codes
    "nearest, random start": ("nearest", "random"),
    "nearest, data start": ("nearest", "data"),
    "attention, random start": ("attention", "random"),
    "attention, data start": ("attention", "data"),
}
LEVELS = "nearest, data start"  # the method that says what levels are worth
PAPER_RATE, PAPER_ENTROPY_WEIGHT = 5e-4, 0.05  # paper, section 5.1; the release's configuration


@dataclass(frozen=True)
class FactorialData:
    """Latents (N, C, H, W) to fit on; the posterior's means and two draws of it to choose on and to judge by."""

    train: Tensor
    choose: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    images: Tensor  # (N, 3, h, w): the test images
    vae: ContinuousVAE
    digest: str  # of the images and the VAE's weights, not of the latents, whose last bits are the machine's

    @classmethod
    def encode(
        cls, vae: ContinuousVAE, train: ImageDataset, test: ImageDataset, held_out: float = 0.1, seed: int = 0
    ) -> "FactorialData":
        """Encode the images; a part of TRAIN's groups (concepts) is held out to choose settings on."""
        rest, choose = train.split_groups(held_out, seed)
        test = test.without_unreadable()
        return cls(
            encode_images(vae, rest, len(rest), seed=seed),
            encode_posterior(vae, choose, seed),
            encode_posterior(vae, test, seed),
            torch.cat([batch["image"] for batch in evaluation_batches(test, 64)]),
            vae,
            data_digest(vae, (train, test), PROTOCOL, held_out, seed, train.resolution),
        )

    def reference(self, distance: FrechetDistance) -> FrechetDistance:
        """The distance with the test images as its real ones, for `Factorial.distances`."""
        for images in self.images.split(32):
            distance.update(images, real=True)
        return distance


class Factorial:
    """The trials of a factorial, each fitted once.

    Args:
        settings: what all trials share; kind, start, scales, learning rate, entropy weight and seed are a trial's own.
        data: see `FactorialData`.
        results: folder of the finished trials' JSON files.
        work: folder of the checkpoints of the trial that runs, and of the final ones, for `fitted`.
        scored: steps after which a trial is scored on the choosing images, the last one besides.
        provenance: what each result's file says of the run: commit, machine, versions.
    """

    def __init__(
        self,
        settings: QuantizerSettings,
        data: FactorialData,
        results: str | Path,
        work: str | Path,
        scored: Sequence[int],
        provenance: Mapping[str, Any],
    ):
        self.settings, self.data, self.scored = settings, data, tuple(scored)
        self.trials, self.work = TrialFolder(Path(results), provenance), Path(work)

    def run(
        self,
        grids: Mapping[str, Sequence[int]],
        seeds: Sequence[int],
        rates: Sequence[float],
        entropy_weights: Sequence[float],
        only: Mapping[str, Sequence[str]] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Every cell, cheap grids first, one result a trial as it ends.

        Args:
            grids: name -> sides of the levels.
            only: grid -> the methods that are fitted on it; on the others all are.
            seeds: the first alone for choosing, all for the best and the paper's setting.
            rates, entropy_weights: where the brackets start, a factor of 3 apart.
        """
        methods = dict.fromkeys(grids, METHODS) | dict(only or {})
        if odd := set(methods) - set(grids) | {method for own in methods.values() for method in own} - set(METHODS):
            raise ValueError(f"expected only grids of {', '.join(grids)} with {', '.join(METHODS)}, got {odd}")
        for grid, scales in sorted(grids.items(), key=lambda item: sum(p * p for p in item[1])):
            for method in methods[grid]:
                best = yield from self._choose(method, grid, scales, seeds[0], rates, entropy_weights)
                paper = (PAPER_RATE, PAPER_ENTROPY_WEIGHT if method.startswith("attention") else 0.0)
                for seed in seeds:
                    for setting, (rate, weight) in (("best", best), ("paper", paper)):
                        row = self.trial(method, grid, scales, rate, weight, seed, decoded=True)
                        yield row | {"setting": setting}

    def _choose(
        self,
        method: str,
        grid: str,
        scales: Sequence[int],
        seed: int,
        rates: Sequence[float],
        entropy_weights: Sequence[float],
    ) -> Iterator[dict[str, Any]]:
        tried: list[dict[str, Any]] = []

        def error(rate: float, weight: float = 0.0) -> float:
            tried.append(self.trial(method, grid, scales, rate, weight, seed))
            return tried[-1]["choose"].get("relative_error", float("inf"))

        if method.startswith("attention"):
            best = bracket_both(error, rates, entropy_weights)
        else:
            best = bracket(error, rates), 0.0
        yield from (row | {"setting": "tried"} for row in tried)
        return best

    def trial(
        self,
        method: str,
        grid: str,
        scales: Sequence[int],
        rate: float,
        weight: float,
        seed: int,
        decoded: bool = False,
    ) -> dict[str, Any]:
        """The result of one trial, from its file or fitted now: scores on the choosing and on the test images.

        With DECODED the test images' PSNR after decoding too.
        """
        kind, start = METHODS[method]
        own = replace(
            self.settings,
            kind=kind,
            start=start,
            scales=tuple(scales),
            learning_rate=rate,
            entropy_weight=weight,
            seed=seed,
        )

        def make(name: str) -> dict[str, Any]:
            return {"method": method, "grid": grid, **self._fit(own, name, decoded), "settings": own.deciding()}

        return self.trials.once(
            self._name(method, grid, own),
            [PROTOCOL, self.data.digest, own.deciding(), self.scored],
            make,
            lambda found: not decoded or "test" not in found or "test_psnr" in found,
        )

    def _fit(self, settings: QuantizerSettings, name: str, decoded: bool) -> dict[str, Any]:
        folder, started = self.work / name, time.monotonic()
        try:
            quantizer = self._quantizer(settings, folder)
        except NonFiniteLoss as error:
            shutil.rmtree(folder, ignore_errors=True)
            return {"choose": {}, "failed": str(error)}
        seconds = round(time.monotonic() - started, 1)
        choose = quantizer_scores(quantizer, *self.data.choose)[0]
        test, errors = quantizer_scores(quantizer, *self.data.test)
        found = {"choose": choose, "test": test, "test_errors": [float(f"{error:.4g}") for error in errors.tolist()]}
        if decoded:
            found["test_psnr"] = [round(value, 3) for value in self._psnr(quantizer)]
        curve = [self._at(quantizer, folder, step) for step in self.scored if step < settings.steps]
        if not decoded:
            shutil.rmtree(folder, ignore_errors=True)
        return found | {"curve": curve, "seconds": seconds}

    def _quantizer(self, settings: QuantizerSettings, folder: Path) -> ResidualQuantizer:
        return fit_quantizer(settings, self.data.train, folder, self._snapshots(settings), self.data.digest)

    def _snapshots(self, settings: QuantizerSettings) -> list[int]:
        return [step for step in sorted({0, *self.scored}) if step < settings.steps]

    def fitted(self, method: str, setting: str, row: Mapping[str, Any], moments: bool = False) -> Fitted:
        """The quantizer behind a finished trial, from its folder in `work` or fitted again.

        Args:
            method, setting: what it is called, see `ablation.METHODS`.
            moments: with its states before training and after each number of steps in `scored`.
        """
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in row["settings"].items()}
        settings = replace(self.settings, **values)
        folder = self.work / words(self._name(row["method"], row["grid"], settings))
        quantizer = self._quantizer(settings, folder).requires_grad_(False)
        steps = self._snapshots(settings) if moments else []
        states = (
            with_weights(settings, quantizer.latent_channels, folder / f"snapshot-{n}.safetensors") for n in steps
        )
        return Fitted(method, setting, settings, quantizer, tuple(zip(steps, states, strict=True)))

    def distances(self, row: Mapping[str, Any], distance: FrechetDistance) -> dict[str, float]:
        """The Frechet and the kernel distance of the test images as a finished trial's quantizer gives them.

        Measured once, and kept beside the trial's own file.

        Args:
            distance: with the test images as its real ones, see `FactorialData.reference`.
        """

        def make(_: str) -> dict[str, Any]:
            own = distance.with_same_reference()
            for _, decoded in self._decoded(self.fitted(row["method"], row["setting"], row).quantizer):
                own.update(decoded, real=False)
            return {"distances": own.of_reconstructions()}

        names = {name: row["settings"][name] for name in ("learning_rate", "entropy_weight", "seed")}
        name = self._name(row["method"], row["grid"], replace(self.settings, **names))
        inputs = [PROTOCOL, self.data.digest, row["settings"], distance.name]
        return self.trials.once(f"{name} distances", inputs, make)["distances"]

    @staticmethod
    def _name(method: str, grid: str, settings: QuantizerSettings) -> str:
        rate, weight = settings.learning_rate, settings.entropy_weight
        return f"{grid} {method} rate {rate:g} entropy {weight:g} seed {settings.seed}"

    def _at(self, quantizer: ResidualQuantizer, folder: Path, step: int) -> dict[str, Any]:
        quantizer.load_state_dict(read_weights(folder / f"snapshot-{step}.safetensors"))
        scores = quantizer_scores(quantizer, *self.data.choose)[0]
        return {"step": step} | {name: scores[name] for name in ("relative_error", "utilization", "perplexity")}

    def _psnr(self, quantizer: ResidualQuantizer) -> list[float]:
        """dB of each test image."""
        pairs = self._decoded(quantizer)
        return [value for images, decoded in pairs for value in finite_psnr(psnr(images, decoded), images).tolist()]

    @torch.no_grad()
    def _decoded(self, quantizer: ResidualQuantizer) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and what is decoded from the tokens of the first draw of their latents, in batches."""
        for images, latents in zip(self.data.images.split(32), self.data.test[1].split(32), strict=True):
            quantized = quantizer.decode(quantizer.encode(latents.to(quantizer.codebooks.weight.device)))
            yield images, self.data.vae.decode(quantized).cpu()


def level_rows(
    rows: Sequence[Mapping[str, Any]], grids: Mapping[str, Sequence[int]]
) -> dict[int, list[Mapping[str, Any]]]:
    """Of the rows of `Factorial.run` those that say what levels are worth: number of levels -> trials, fewest first.

    Nearest codes that start from data, on grids that are one full grid or grow to it, finals alone; of two grids with
    as many levels the last stands.
    """
    names = {len(scales): grid for grid, scales in grids.items() if len(scales) == 1 or scales[0] < scales[-1]}
    finals = [row for row in rows if row["method"] == LEVELS and row["setting"] != "tried" and "test" in row]
    found = {levels: [row for row in finals if row["grid"] == names[levels]] for levels in sorted(names)}
    return {levels: own for levels, own in found.items() if own}


def factorial_claims(
    rows: Sequence[Mapping[str, Any]], grids: Mapping[str, Sequence[int]], concepts: Sequence[str]
) -> list[dict[str, Any]]:
    """The verdicts on the claims that the rows of `Factorial.run` bear on, the error image by image.

    Attention is compared with nearest codes that start from data, each at its best and each at the paper's setting; of
    attention's two starts the one whose choosing images have the lower error stands. At the paper's setting both are
    compared from random codes too, as the paper does. `concepts` are those of the test images. Levels are compared on
    the grids that are one full grid or grow to it, with nearest codes; of two with as many levels the last stands.
    """
    claims: list[dict[str, Any]] = []
    for setting, tuned in (("best", "each at its best"), ("paper", "the paper's setting")):
        cells: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["setting"] == setting and "test" in row:
                cells.setdefault(f"{row['grid']}, {row['method']}", []).append(row)
        found = Compared(cells, concepts)
        for grid in grids:
            claims += _attention_claims(found, grid, tuned)
            if setting == "paper":
                claims += _attention_claims(found, grid, f"{tuned}, both from random codes", "random", ["random"])
        claims += _level_claims(found, grids, tuned)
    return claims


def _attention_claims(
    found: Compared, grid: str, tuned: str, start: str = "data", starts: Sequence[str] = ("random", "data")
) -> list[dict[str, Any]]:
    """Attention lowers the error, uses every code and keeps its tokens, on one grid where both methods were fitted.

    START is that of the nearest codes, the better of STARTS that of attention's.
    """
    own = [name for name in (f"{grid}, attention, {one} start" for one in starts) if name in found.rows]
    nearest = f"{grid}, nearest, {start} start"
    if not own or nearest not in found.rows:
        return []
    pair = nearest, min(own, key=lambda name: found.rows[name][0]["choose"]["relative_error"])
    setting = f"{grid}, frozen VAE, {tuned}"
    text = f"{found.change('relative_error', *pair)} ({pair[1].removeprefix(grid + ', ')})"
    error = claim_verdict("attention_error", {"relative_error": found.error_falls(*pair)}, text, setting=setting)
    used = {
        "utilization": found.gains("utilization", *pair),
        "utilization floor": [own - USED for own in found.of(pair[1], "utilization")],
    }
    used = claim_verdict("attention_utilization", used, found.change("utilization", *pair), setting=setting)
    kept = {"token_change": [a - b for a, b in zip(*(found.of(name, "token_change") for name in pair), strict=True)]}
    kept = claim_verdict("sparse_assignment", kept, found.change("token_change", *pair), setting=setting)
    return [error, used, kept]


def _level_claims(found: Compared, grids: Mapping[str, Sequence[int]], tuned: str) -> list[dict[str, Any]]:
    """Residual levels lower the error: from the fewest to the most, and each step between grids that end alike.

    Each step lowers the Frechet distance too, where every row has one.
    """
    rows = [row for own in found.rows.values() for row in own]
    names = {levels: f"{own[0]['grid']}, {LEVELS}" for levels, own in level_rows(rows, grids).items()}
    if len(names) < 2:
        return []
    ends, setting = (names[min(names)], names[max(names)]), f"frozen VAE, nearest codes, data start, {tuned}"
    text, parts = found.change("relative_error", *ends), {"relative_error": found.error_falls(*ends)}
    claims = [claim_verdict("residual_error", parts, text, setting=setting)]
    if len(names) > 2:
        steps = {f"{few} to {many} levels": (names[few], names[many]) for few, many in pairwise(names)}
        parts = {f"relative_error: {step}": found.error_falls(*pair) for step, pair in steps.items()}
        metrics = ["relative_error"]
        columns = {frechet_column(row["test"]) for name in names.values() for row in found.rows[name]}
        if len(columns) == 1 and None not in columns:
            metrics += columns
            parts |= {f"{metrics[1]}: {step}": found.gains(metrics[1], *pair) for step, pair in steps.items()}
        text = f"at {', '.join(map(str, names))} levels, each trained: " + "; ".join(
            f"{metric} " + ", ".join(f"{np.mean(found.of(name, metric)):.4g}" for name in names.values())
            for metric in metrics
        )
        claims.append(claim_verdict("levels_monotone", parts, text, setting=setting))
    return claims
