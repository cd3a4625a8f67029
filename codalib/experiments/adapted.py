"""Does the assignment matter once the VAE is adapted? Tokenizers of both, with all losses, each part adapted or none.

A cell is an assignment (nearest codes, started from data, or attention) and the part of the VAE that is adapted. Each
starts from a quantizer fitted to the VAE's latents at the setting that the factorial of quantizers chose. The learning
rate on images is bracketed on concepts of their own, by Eq. 9's image terms; then every seed is trained at the best and
scored on the validation images, image by image.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codalib.base.files import atomic_folder
from codalib.datasets.images import ImageDataset, evaluation_batches
from codalib.evaluation.generation_metrics import moments
from codalib.evaluation.latents import encode_images, encode_posterior, quantizer_scores
from codalib.evaluation.metrics import FrechetDistance, frechet_distance, kernel_distance
from codalib.evaluation.reconstruction import image_scores
from codalib.experiments.paper import USED
from codalib.experiments.statistics import claim_verdict
from codalib.experiments.trials import Compared, TrialFolder, bracket_trials, data_digest, inputs_key, words
from codalib.models.checks import NonFiniteLoss
from codalib.models.losses import weighted_sum
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.perceptual import PerceptualDistance
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import SCRATCH, QuantizerSettings, TokenizerSettings
from codalib.training.tokenizer import train_tokenizer
from codalib.training.trainer import read_log

PROTOCOL = 1  # part of a trial's name: raised where the same settings come to mean other numbers
CELLS = {  # name -> kind of quantizer, adapted part of the VAE
    "nearest, frozen VAE": ("nearest", "none"),
    "nearest, both adapted": ("nearest", "both"),
    "attention, frozen VAE": ("attention", "none"),
    "attention, encoder adapted": ("attention", "encoder"),
    "attention, decoder adapted": ("attention", "decoder"),
    "attention, both adapted": ("attention", "both"),
}
EVERY_CELL = CELLS | {"nearest, from scratch": ("nearest", SCRATCH)}  # that a trial can be of
DOUBLED = ("nearest, both adapted", "attention, both adapted")
CURVE_IMAGES = 64  # of the choosing images, in the validations during training


@dataclass(frozen=True)
class AdaptedData:
    """Images to train on, to choose on and to judge by, and what is computed of them once."""

    vae: ContinuousVAE
    train: ImageDataset
    choose: ImageDataset
    test: ImageDataset
    perceptual: PerceptualDistance | None
    distance: FrechetDistance

    @classmethod
    def split(
        cls, vae: ContinuousVAE, train: ImageDataset, test: ImageDataset, held_out: float, *networks: Any
    ) -> "AdaptedData":
        """A part of TRAIN's groups (concepts) is held out to choose on, the one that the factorial holds out."""
        rest, choose = train.split_groups(held_out)
        choose.random_crop = False
        return cls(vae, rest, choose.without_unreadable(), test.without_unreadable(), *networks)

    @cached_property
    def digest(self) -> str:
        perceptual, network = getattr(self.perceptual, "name", None), self.distance.name.partition("@")[0]
        settings = PROTOCOL, self.train.resolution, perceptual, network, self.distance.extractor_side
        return data_digest(self.vae, (self.train, self.choose, self.test), *settings)

    @cached_property
    def latents(self) -> Tensor:
        """(N, C, H, W) of the training images."""
        return encode_images(self.vae, self.train, len(self.train))

    @cached_property
    def real(self) -> Tensor:
        """Features (N, D) of the test images themselves."""
        return self.features(self.test)

    @torch.no_grad()
    def features(self, images: ImageDataset) -> Tensor:
        device = next(self.distance.parameters()).device
        parts = [self.distance.inception(batch["image"].to(device)) for batch in evaluation_batches(images, 50)]
        return torch.cat(parts).float().cpu()

    def distances(self, features: Tensor) -> dict[str, float]:
        """The Frechet and the kernel distance of features (N, D) to the test images', under names that say how."""
        frechet, kernel = self.distance.names_of_reconstructions
        return {
            frechet: frechet_distance(*moments(self.real), *moments(features)),
            kernel: kernel_distance(self.real, features),
        }

    @cached_property
    def floor(self) -> dict[str, float]:
        """The same distances of as many other real images: the choosing ones, of other concepts."""
        return self.distances(self.features(self.choose.subset(list(range(min(len(self.choose), len(self.test)))))))


class AdaptedTrials:
    """The trials, each trained once.

    Args:
        settings: what all trials share; kind, adapters, learning rate, entropy weight and seed are a trial's own.
        fits: kind -> fields of `QuantizerSettings` in which the start's fit differs from SETTINGS. The weight of its
            entropy term, relative to the quantization term's, is the one that is trained with on images too.
        trials: where the results lie.
        work: folder of the checkpoints of the trial that runs, and in work/tokenizers of what was trained.
        base: what `load_vae` takes for the VAE, which the tokenizers name.
    """

    def __init__(
        self,
        settings: TokenizerSettings,
        fits: Mapping[str, Mapping[str, Any]],
        data: AdaptedData,
        trials: TrialFolder,
        work: str | Path,
        base: str | None = None,
    ):
        if odd := set(fits) ^ {kind for kind, _ in CELLS.values()}:
            raise ValueError(f"expected the fit of a start for nearest and attention alone, got {', '.join(odd)} wrong")
        self.settings, self.data, self.trials, self.work, self.base = settings, data, trials, Path(work), base
        self.fits = {kind: self._fit_settings(kind, own) for kind, own in fits.items()}

    def _fit_settings(self, kind: str, own: Mapping[str, Any]) -> QuantizerSettings:
        shared = {name: getattr(self.settings, name) for name in QuantizerSettings.__dataclass_fields__}
        fixed = {"kind": kind, "quantization_weight": 1.0, "ema": 0.0, "accumulation": 1, "evaluate_every": 0}
        return QuantizerSettings(**shared | fixed | dict(own))

    def run(self, seeds: Sequence[int], rates: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Every cell: its bracket with the first seed, the best with all; at last `DOUBLED` with twice the steps.

        Yields one result a trial with "setting": "tried", "best" or "twice the steps".
        """
        best = {}
        for cell in CELLS:
            best[cell], tried = bracket_trials(partial(self.trial, cell, seed=seeds[0]), rates, "image_loss")
            yield from tried
        for seed in seeds:  # whole seeds first: a stop leaves fewer seeds of all cells
            for cell in CELLS:
                yield self.trial(cell, best[cell], seed) | {"setting": "best"}
        for cell in DOUBLED:
            yield self.trial(cell, best[cell], seeds[0], 2) | {"setting": "twice the steps"}

    def trial(self, cell: str, rate: float, seed: int, longer: int = 1) -> dict[str, Any]:
        """The result of one trial, from its file or trained now."""
        (kind, adapters), (own, fit) = EVERY_CELL[cell], self.settings_of(cell, rate, seed, longer)

        def make(name: str) -> dict[str, Any]:
            settings = {"settings": own.deciding(), "fit": fit.deciding()}
            return {"cell": cell, "kind": kind, "adapters": adapters, **self._train(own, fit, name), **settings}

        return self.trials.once(self._name(cell, own), self._inputs(own, fit), make)

    def tokenizer(self, cell: str, rate: float, seed: int) -> Path:
        """The folder of a trial's tokenizer, trained again where only its numbers were kept."""
        self.trial(cell, rate, seed)
        own, fit = self.settings_of(cell, rate, seed)
        folder = self._folder(own, fit, name := words(self._name(cell, own)))
        if not folder.exists():
            self._train(own, fit, name)
        return folder

    def keep_tokenizers(self, rows: Sequence[Mapping[str, Any]], cell: str, folder: str | Path) -> int:
        """Copy the tokenizers of a cell at its best to FOLDER/seed-N, in place of older ones; returns how many."""
        best = [row["settings"] for row in rows if row["cell"] == cell and row["setting"] == "best" and "test" in row]
        with atomic_folder(folder) as new:
            for own in best:
                place = self.tokenizer(cell, own["learning_rate"], own["seed"])
                shutil.copytree(place, new / f"seed-{own['seed']}")
        return len(best)

    def _inputs(self, own: TokenizerSettings, fit: QuantizerSettings) -> list[Any]:
        return [PROTOCOL, self.data.digest, own.deciding(), fit.deciding()]

    def _folder(self, own: TokenizerSettings, fit: QuantizerSettings, name: str) -> Path:
        return self.work / "tokenizers" / f"{name}-{inputs_key(self._inputs(own, fit))}"

    @staticmethod
    def _name(cell: str, own: TokenizerSettings) -> str:
        return f"{cell} rate {own.learning_rate:g} steps {own.steps} seed {own.seed}"

    def settings_of(
        self, cell: str, rate: float, seed: int, longer: int = 1
    ) -> tuple[TokenizerSettings, QuantizerSettings]:
        """What a trial is trained with, on images and before on latents."""
        kind, adapters = EVERY_CELL[cell]
        fit = replace(self.fits[kind], seed=seed)
        own = replace(
            self.settings,
            kind=kind,
            adapters=adapters,
            steps=longer * self.settings.steps,
            learning_rate=rate,
            entropy_weight=self.settings.quantization_weight * fit.entropy_weight,
            seed=seed,
        )
        return own, fit

    def _train(self, own: TokenizerSettings, fit: QuantizerSettings, name: str) -> dict[str, Any]:
        data, folder = self.data, self.work / name
        curve_images = data.choose.subset(list(range(min(CURVE_IMAGES, len(data.choose)))))
        started = time.monotonic()
        try:
            start = None  # from scratch there are no latents to start on
            if own.adapters != SCRATCH:
                place = self.work / f"fit-{fit.kind}-{fit.seed}"
                start = fit_quantizer(fit, data.latents, place, source=data.digest)
            tokenizer = train_tokenizer(own, data.vae, data.train, curve_images, folder, start)
        except NonFiniteLoss as error:
            shutil.rmtree(folder, ignore_errors=True)
            return {"choose": {}, "failed": str(error)}
        seconds = round(time.monotonic() - started, 1)
        base = None if own.adapters == SCRATCH else self.base
        tokenizer.save_pretrained(self._folder(own, fit, name), base=base)
        curve = [{"step": row["step"], "psnr": row["val_psnr"]} for row in read_log(folder) if "val_psnr" in row]
        found = {"choose": self._choose(tokenizer), **self._judge(tokenizer), "curve": curve, "seconds": seconds}
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def _choose(self, tokenizer: CodaTokenizer) -> dict[str, float]:
        """The image terms of Eq. 9, weighted and added, on the choosing images; and their PSNR."""
        scores = image_scores(tokenizer, self.data.choose, self.data.perceptual)[0]
        means = {name: values.mean() for name, values in scores.items()}
        terms = {name: value for name, value in means.items() if name not in ("psnr", "ssim")}
        return {"image_loss": weighted_sum(terms, self.settings.weights).item(), "psnr": means["psnr"].item()}

    def _judge(self, tokenizer: CodaTokenizer) -> dict[str, Any]:
        images, features = image_scores(tokenizer, self.data.test, self.data.perceptual, self.data.distance)
        scores, errors = quantizer_scores(tokenizer.quantizer, *encode_posterior(tokenizer.vae, self.data.test))
        means = {name: values.mean().item() for name, values in images.items()}
        kept = {name: values.tolist() for name, values in images.items() if name not in ("l1", "l2")}
        each = {f"test_{name}": [float(f"{value:.5g}") for value in values] for name, values in kept.items()}
        each["test_errors"] = [float(f"{error:.4g}") for error in errors.tolist()]
        return {"test": scores | means | self.data.distances(features)} | each


def finished(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Cell -> its trials at the best, one a seed, of the seeds that every cell has a finished trial of."""
    of_seed: dict[str, dict[int, Mapping[str, Any]]] = {cell: {} for cell in CELLS}
    for row in rows:
        if row["setting"] == "best" and "test" in row:  # a loss that was not finite leaves none
            of_seed[row["cell"]][row["settings"]["seed"]] = row
    seeds = sorted(set.intersection(*map(set, of_seed.values())))
    return {cell: [own[seed] for seed in seeds] for cell, own in of_seed.items()}


def adapted_claims(rows: Sequence[Mapping[str, Any]], data: AdaptedData) -> list[dict[str, Any]]:
    """The verdicts on the claims that the rows of `AdaptedTrials.run` bear on, at the best of each cell.

    Gains of an image's own scores are means over its concept, (seeds, concepts); distances have one gain a seed. On the
    frozen VAE the assignments are compared by the error in its latents; adapted ones, whose encoders differ, by the
    decoded images. No claims where no seed has every cell.
    """
    best = finished(rows)
    if not all(best.values()):
        return []
    frechet = next(iter(data.floor))
    found = Compared(best, [item.group or item.name for item in data.test.items])
    ceiling = data.distances(image_scores(data.vae, data.test, None, data.distance)[1])[frechet]
    own = best["attention, both adapted"][0]["settings"]
    spent = f"all losses, {own['steps']:,} steps of {own['batch_size']} images"
    claims = []
    for part in ("frozen VAE", "both adapted"):
        pair, setting = (f"nearest, {part}", f"attention, {part}"), f"{part}, {spent}"
        parts = {"relative_error": found.error_falls(*pair)}
        if part == "both adapted":
            parts = {"psnr": found.by_group(pair[1], "test_psnr") - found.by_group(pair[0], "test_psnr")}
        text = ", ".join(found.change(name, *pair) for name in ("relative_error", "psnr", frechet))
        parts[frechet] = found.gains(frechet, *pair)
        claims.append(claim_verdict("attention_error", parts, text, setting=setting))
        used = {
            "utilization": found.gains("utilization", *pair),
            "utilization floor": [own - USED for own in found.of(pair[1], "utilization")],
        }
        text = found.change("utilization", *pair)
        claims.append(claim_verdict("attention_utilization", used, text, setting=setting))
    pair = "attention, frozen VAE", "attention, both adapted"
    ends = zip(*(found.of(cell, frechet) for cell in pair), strict=True)
    closed = [(before - after) / (before - ceiling) - 0.5 for before, after in ends]
    text = f"{found.change(frechet, *pair)}, the VAE itself {ceiling:.4g}"
    parts = {frechet: found.gains(frechet, *pair), "gap closed": closed}
    claims.append(claim_verdict("adaptation_closes_gap", parts, text, setting=spent))
    pair = "attention, encoder adapted", "attention, decoder adapted"
    gained = found.by_group(pair[1], "test_psnr") - found.by_group(pair[0], "test_psnr")
    parts = {frechet: found.gains(frechet, *pair), "psnr": gained}
    text = f"{found.change(frechet, *pair)}, {found.change('psnr', *pair)}"
    return [*claims, claim_verdict("decoder_over_encoder", parts, text, setting=spent)]
