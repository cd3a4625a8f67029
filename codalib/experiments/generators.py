"""Whose tokens make the better pictures? MaskGITs, trained alike on the tokens of several tokenizers of one VAE.

The tokenizers are trained as in `experiments.adapted`. A generator's learning rate is bracketed in shorter trainings by
its loss on held-out concepts; then each seed trains at the best in full, and its samples are judged by the validation
images, beside what a perfect model of the tokens would give and what one that knows nothing of an image would.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from codalib.base.files import read_json, write_json
from codalib.base.hardware import compute_device
from codalib.datasets.token_cache import CacheSettings, TokenCache, cache_tokens
from codalib.evaluation.generation import (
    BASELINES,
    GenerationSettings,
    SamplerConfig,
    evaluate_maskgit,
    read_generation_results,
)
from codalib.evaluation.metrics import frechet_column
from codalib.experiments.adapted import AdaptedTrials
from codalib.experiments.paper import gain
from codalib.experiments.statistics import claim_verdict
from codalib.experiments.trials import TrialFolder, bracket_trials, inputs_key, words
from codalib.models.checkpoints import load_tokenizer
from codalib.models.checks import NonFiniteLoss
from codalib.training.maskgit import train_maskgit
from codalib.training.settings import EncodingSettings, MaskGITSettings
from codalib.training.trainer import read_log

PROTOCOL = 1  # part of a trial's name: raised where the same settings come to mean other numbers
FLOOR, SHUFFLED = "training images", "shuffled tokens"  # of `BASELINES`


@dataclass(frozen=True)
class TokenizerTrial:
    """Which of `AdaptedTrials` gives a tokenizer; its SEED is that of all generators' tokenizers."""

    trials: AdaptedTrials
    cell: str
    rate: float
    seed: int

    def inputs(self) -> list[Any]:
        """All that decides the tokenizer."""
        own, fit = self.trials.settings_of(self.cell, self.rate, self.seed)
        return [self.trials.data.digest, own.deciding(), fit.deciding()]

    def folder(self) -> Path:
        """Where it lies; trained first if it does not."""
        return self.trials.tokenizer(self.cell, self.rate, self.seed)


class GeneratorTrials:
    """The trials, each trained once.

    Args:
        settings: what all trainings share; learning rate, steps of the bracket and seed are a trial's own.
        evaluation: the seed is a trial's own.
        samplers: name -> configuration; every final generator is sampled by the first, the one of fewest steps, and
            those of the first tokenizer by all, since many steps take long.
        tokenizers: name -> where it comes from; all of one VAE and the same images.
        trials: where the results lie.
        work: folder of the token caches, checkpoints and features, and in work/generators of what was trained.
    """

    def __init__(
        self,
        settings: MaskGITSettings,
        encoding: EncodingSettings,
        evaluation: GenerationSettings,
        samplers: Mapping[str, SamplerConfig],
        tokenizers: Mapping[str, TokenizerTrial],
        trials: TrialFolder,
        work: str | Path,
    ):
        self.settings, self.encoding, self.evaluation, self.samplers = settings, encoding, evaluation, samplers
        self.tokenizers, self.trials, self.work = tokenizers, trials, Path(work)
        self.caches = cache(self._caches)

    def run(self, seeds: Sequence[int], rates: Sequence[float], bracket_steps: int) -> Iterator[dict[str, Any]]:
        """The baselines of every tokenizer, its bracket with the first seed, and the best with all seeds.

        Yields one result a trial with "setting": "baselines", "tried" or "best".
        """
        best = {}
        for name in self.tokenizers:
            yield self.baselines(name) | {"setting": "baselines"}
            short = partial(self.trial, name, seed=seeds[0], steps=bracket_steps)
            best[name], tried = bracket_trials(short, rates, "val_loss")
            yield from tried
        for seed in seeds:  # whole seeds first: a stop leaves fewer seeds of all tokenizers
            for name in self.tokenizers:
                yield self.trial(name, best[name], seed) | {"setting": "best"}

    def baselines(self, name: str) -> dict[str, Any]:
        """What needs no generator: real images, the tokenizer's reconstructions, and those of shuffled tokens."""

        def make(_: str) -> dict[str, Any]:
            return {"tokenizer": name} | self._judge(name, None, self.evaluation.seed)

        inputs = [PROTOCOL, self.tokenizers[name].inputs(), asdict(self.evaluation)]
        return self.trials.once(f"{name} baselines", inputs, make)

    def trial(self, name: str, rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
        """One generator: with STEPS one of the bracket, trained for so many and not sampled from."""
        own = replace(self.settings, learning_rate=rate, seed=seed, steps=steps or self.settings.steps)

        inputs = [PROTOCOL, self.tokenizers[name].inputs(), own.deciding(), asdict(self.encoding)]

        def make(file: str) -> dict[str, Any]:
            model = self.work / "generators" / f"{file}-{inputs_key(inputs)}"
            found = {"tokenizer": name, "settings": own.deciding(), "encoding": asdict(self.encoding)}
            found |= self._train(own, name, model)
            if steps is None and "failed" not in found:
                found |= self._judge(name, model, seed)
            return found

        samplers = {key: asdict(own) for key, own in self._samplers(name).items()}
        judged = None if steps else [asdict(self.evaluation), samplers]
        return self.trials.once(f"{name} rate {rate:g} steps {own.steps} seed {seed}", [*inputs, judged], make)

    def _samplers(self, name: str) -> dict[str, SamplerConfig]:
        return dict(list(self.samplers.items())[: None if name == next(iter(self.tokenizers)) else 1])

    def _caches(self, name: str) -> list[TokenCache]:
        """The tokens of the images to train on, with their views, and of those to choose on."""
        chosen, data = self.tokenizers[name], self.tokenizers[name].trials.data
        tokenizer = load_tokenizer(chosen.folder()).to(compute_device())
        train = data.train.subset(list(range(len(data.train))))
        train.random_crop = self.encoding.random_crop
        plain = CacheSettings(seed=chosen.seed)
        views = replace(plain, views=self.encoding.views, flip=self.encoding.flip)
        place = self.work / "tokens" / words(name)
        parts = ("train", train, views), ("choose", data.choose, plain)
        return [TokenCache.open(cache_tokens(tokenizer, images, place / part, own)) for part, images, own in parts]

    def _train(self, own: MaskGITSettings, name: str, model_folder: Path) -> dict[str, Any]:
        """Trains into the folder, the curve beside the weights; a trial that stops while it is judged finds both."""
        done = model_folder / "trained.json"
        if done.exists():
            return read_json(done)
        folder = self.work / model_folder.name
        try:
            model = train_maskgit(own, *self.caches(name), folder)
        except NonFiniteLoss as error:
            shutil.rmtree(folder, ignore_errors=True)
            return {"choose": {}, "failed": str(error)}
        model.save_pretrained(model_folder)
        log = read_log(folder)
        curve = [{key: row[key] for key in ("step", "val_loss", "val_accuracy")} for row in log if "val_loss" in row]
        size = sum(p.numel() for p in model.parameters())
        write_json(done, {"choose": curve[-1], "curve": curve, "seconds": log[-1]["seconds"], "parameters": size})
        shutil.rmtree(folder)
        return read_json(done)

    def _judge(self, name: str, generator: Path | None, seed: int) -> dict[str, Any]:
        """ "judged": the rows of `evaluate_maskgit` by name, of the samplers or, without a generator, the baselines."""
        methods = {} if generator is None else self._samplers(name)
        baselines = tuple(BASELINES) if generator is None else ()
        place, model = str(self.tokenizers[name].folder()), generator and str(generator)
        evaluation = replace(self.evaluation, seed=seed), model, place, methods, self.work / "judged", baselines
        evaluate_maskgit(*evaluation)
        rows, protocol = read_generation_results(*evaluation)
        return {"judged": {row["method"]: row for row in rows}, "protocol": protocol}


def beyond_floor(rows: Sequence[Mapping[str, Any]], sampler: str) -> list[dict[str, Any]]:
    """How much closer each tokenizer's samples are than shuffled tokens, beyond as many real images.

    Args:
        rows: of `GeneratorTrials.run`.
    Returns a row for each tokenizer and each of the Frechet and the kernel distance: "tokenizer", "distance", and of it
    "samples" (the mean over seeds), "shuffled tokens", "real images" and "times closer" (None where the samples are not
    farther than the real images).
    """
    table = []
    for base in (row for row in rows if row["setting"] == "baselines"):
        judged = [row["judged"][sampler] for row in _finals(rows, base["tokenizer"])]
        for metric in _distances(judged[0]):
            own = _mean(judged, metric)
            shuffled, floor = (base["judged"][method][metric] for method in (SHUFFLED, FLOOR))
            line = {"tokenizer": base["tokenizer"], "distance": metric, "samples": own}
            line |= {"shuffled tokens": shuffled, "real images": floor}
            table.append(line | {"times closer": (shuffled - floor) / (own - floor) if own > floor else None})
    return table


def generator_claims(rows: Sequence[Mapping[str, Any]], few: str, many: str | None) -> list[dict[str, Any]]:
    """The verdicts on MaskGIT's gain from the first tokenizer's tokens over the others', and on more steps of decoding.

    Args:
        rows: of `GeneratorTrials.run`.
        few, many: the samplers of few and of many steps; None: one number of steps alone.
    """
    names = [row["tokenizer"] for row in rows if row["setting"] == "baselines"]
    found = {name: [row["judged"] for row in _finals(rows, name)] for name in names}
    metrics = _distances(found[names[0]][0][few])

    def gains(metric: str, before: Sequence[Mapping], after: Sequence[Mapping]) -> list[float]:
        return [gain(metric, one[metric], two[metric]) for one, two in zip(before, after, strict=True)]

    def drawn(name: str, sampler: str) -> list[Mapping[str, Any]]:
        return [judged[sampler] for judged in found[name]]

    claims, (ours, *others) = [], names
    if others:
        parts = {
            f"{metric}: {name}": gains(metric, drawn(name, few), drawn(ours, few))
            for metric in metrics
            for name in others
        }
        effect = f"{metrics[0]} " + ", ".join(f"{_mean(drawn(name, few), metrics[0]):.4g} ({name})" for name in names)
        claims.append(claim_verdict("generation_gains", parts, effect, setting="generators trained here"))
    if many:
        parts = {metric: gains(metric, drawn(ours, few), drawn(ours, many)) for metric in metrics}
        means = (f"{_mean(drawn(ours, sampler), metrics[0]):.4g} ({sampler})" for sampler in (few, many))
        effect = f"{metrics[0]} {' -> '.join(means)}"
        claims.append(claim_verdict("more_steps", parts, effect, setting="generators trained here"))
    return claims


def _finals(rows: Sequence[Mapping[str, Any]], tokenizer: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["tokenizer"] == tokenizer and row["setting"] == "best"]


def _distances(row: Mapping[str, Any]) -> list[str]:
    """The Frechet and the kernel distance among a row's columns."""
    frechet = frechet_column(row)
    return [frechet, "kid" if frechet == "fid" else frechet.replace("fd_", "kd_")]


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float:
    return torch.tensor([row[metric] for row in rows], dtype=torch.float64).mean().item()
