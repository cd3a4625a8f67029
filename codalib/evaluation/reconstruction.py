"""Evaluate several models over the same images, the images shared by several processes, each counted once."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from codalib.base.files import write_json
from codalib.base.processes import make_accelerator
from codalib.base.seeds import check_seed, sample_generators
from codalib.datasets.images import ImageDataset, evaluation_batches, load_dataset, share_content_digests
from codalib.evaluation.metrics import (
    FrechetDistance,
    ReconstructionMetrics,
    build_frechet,
    finite_psnr,
    psnr,
    ssim,
)
from codalib.evaluation.results import is_cached, read_results, result_file
from codalib.models.checkpoints import find_model, load_tokenizer, load_vae
from codalib.models.checks import check_whole
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.perceptual import PerceptualDistance, build_perceptual

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """What the models of a table are evaluated on, and by which networks."""

    dataset: str  # "emoji" or "imagefolder:PATH"; its validation split
    resolution: int  # side of the images, pixels
    val_limit: int | None = None  # images; None: all
    batch_size: int = 50  # images a process and batch
    workers: int = 0  # processes that load images, for each process
    frechet: str | None = "auto"  # "rfid" (Inception), "fd_effnet", what is here, or None
    frechet_resolution: int = 224  # side of EfficientNet's input, pixels
    perceptual: str | None = "auto"  # "perceptual_vgg" (LPIPS), "perceptual_effnet", what is here, or None
    seed: int = 0  # of the posterior's noise

    def __post_init__(self) -> None:
        least = ("batch_size", "resolution", "frechet_resolution")
        check_whole(1, **{name: getattr(self, name) for name in least})
        check_whole(0, workers=self.workers)
        check_seed(self.seed)

    def load_images(self) -> ImageDataset:
        return load_dataset(self.dataset, "val", self.resolution, limit=self.val_limit)


def evaluate_models(
    settings: EvaluationSettings, vaes: dict[str, str], tokenizers: dict[str, str], folder: str | Path
) -> None:
    """Evaluate continuous VAEs and tokenizers over the same images; run it through `base.processes.launch`.

    Process r of n takes every n-th image, and the metrics add up at the end: every image counts once. One
    file a model in FOLDER/measured holds its row and the protocol of each number; a model that has its file already is
    not evaluated again.

    Args:
        settings: the images and the networks of the metrics.
        vaes: name -> what `find_model` and then `load_vae` take.
        tokenizers: name -> what `find_model` and then `models.checkpoints.load_tokenizer` take.
    """
    accelerator = make_accelerator()
    images = settings.load_images()
    share_content_digests(images)
    images.check_enough_images(accelerator.num_processes)
    perceptual = build_perceptual(settings.perceptual)
    frechet = build_frechet(settings.frechet, settings.frechet_resolution)
    models = vaes | tokenizers
    for name, file in _result_files(settings, images, models, folder).items():
        if is_cached(file, accelerator):
            continue
        started = time.monotonic()
        path = find_model(models[name])
        model = (load_vae(path) if name in vaes else load_tokenizer(path)).to(accelerator.device)
        metrics = _metrics(settings, model, frechet, perceptual)
        processes = accelerator.process_index, accelerator.num_processes
        values = evaluate(model, images, metrics, settings.batch_size, settings.seed, *processes, settings.workers)
        protocol = metrics.protocol()
        frechet = frechet and metrics.frechet.with_same_reference()
        row = {"method": name, **_size(model), "images": int(metrics.images.compute()), **values}
        if accelerator.is_main_process:
            seconds = round(time.monotonic() - started, 1)
            write_json(file, {"row": row, "protocol": protocol, "seconds": seconds})
            log.info("%s: %d images in %.0f s", name, row["images"], seconds)
        del model
    accelerator.wait_for_everyone()


def read_reconstruction_results(
    settings: EvaluationSettings, models: Mapping[str, str], folder: str | Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows that `evaluate_models` wrote, in the order of MODELS, and the protocol of each metric."""
    return read_results(_result_files(settings, settings.load_images(), models, folder).values())


def _result_files(
    settings: EvaluationSettings, images: ImageDataset, models: Mapping[str, str], folder: str | Path
) -> dict[str, Path]:
    place = Path(folder) / "measured"
    return {name: result_file(place, name, settings, [images], [path]) for name, path in models.items()}


@torch.no_grad()
def evaluate(
    model: CodaTokenizer | ContinuousVAE,
    images: ImageDataset,
    metrics: ReconstructionMetrics,
    batch_size: int = 64,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Evaluate a tokenizer's or a continuous VAE's reconstructions of every image of a data set, once.

    Process RANK of WORLD_SIZE does its part, and each returns the metrics of the whole. The posterior is sampled, as
    the release does, with noise that depends on the seed and the image alone: the numbers change neither with the
    number of processes nor with the batch. The metrics are moved to the model's device; ones that have seen images
    raise ValueError.
    """
    device = next(model.parameters()).device
    metrics.check_unused()
    metrics.to(device)
    batches = evaluation_batches(images, batch_size, rank, world_size, workers)
    total = -(-len(range(rank, len(images), world_size)) // batch_size)
    for batch in tqdm(batches, total=total, desc="evaluating", disable=rank > 0, mininterval=2.0):
        pictures = batch["image"].to(device)
        noise = sample_generators(seed, batch["index"].tolist())
        if isinstance(model, ContinuousVAE):
            metrics.update(pictures, model(pictures, generator=noise))
        else:
            out = model(pictures, generator=noise)
            metrics.update(pictures, out.reconstruction, out.latents, out.quantized, out.indices)
    return metrics.compute()


@torch.no_grad()
def image_scores(
    model: CodaTokenizer | ContinuousVAE,
    images: ImageDataset,
    perceptual: PerceptualDistance | None = None,
    distance: FrechetDistance | None = None,
    seed: int = 0,
    batch_size: int = 50,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Every image's own scores (N,) by name, and the features (N, D) of its reconstruction by DISTANCE's network.

    Scores: "psnr" (dB), "ssim", "l1", "l2" (of pixels in [-1, 1]) and the perceptual distance's name. The noise is that
    of `evaluate`.
    """
    device, found, features = next(model.parameters()).device, [], []
    for batch in evaluation_batches(images, batch_size):
        pictures = batch["image"].to(device)
        noise = sample_generators(seed, batch["index"].tolist())
        out = model(pictures, generator=noise)
        made = (out if isinstance(model, ContinuousVAE) else out.reconstruction).float().clamp(-1, 1)
        difference = (made - pictures).flatten(1)
        scores = {"psnr": finite_psnr(psnr(pictures, made), pictures), "ssim": ssim(pictures, made)}
        scores |= {"l1": difference.abs().mean(1), "l2": difference.square().mean(1)}
        if perceptual is not None:
            scores[perceptual.name] = perceptual(pictures, made)
        found.append({name: values.double().cpu() for name, values in scores.items()})
        if distance is not None:
            features.append(distance.inception(made).float().cpu())
    columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return columns, torch.cat(features) if features else None


class Reconstructions(NamedTuple):
    """N images of a data set, rebuilt by a tokenizer and by a continuous VAE."""

    numbers: list[int]  # (N,) in the data set
    images: Tensor  # (N, 3, h, w) in [-1, 1]
    continuous: Tensor  # (N, 3, h, w), the VAE's
    discrete: Tensor  # (N, 3, h, w), the tokenizer's
    psnr: Tensor  # (2, N) dB: of the VAE, of the tokenizer

    @property
    def loss(self) -> Tensor:
        """How much PSNR the tokenizer loses against the VAE, (N,) dB."""
        return self.psnr[0] - self.psnr[1]


@torch.no_grad()
def reconstruct(tokenizer: CodaTokenizer, vae: ContinuousVAE, batch: Mapping[str, Any], seed: int) -> Reconstructions:
    """A batch of images ("image", "index") rebuilt by both, with the noise of `evaluate`, on the CPU."""
    pictures, numbers = batch["image"].to(next(tokenizer.parameters()).device), batch["index"].tolist()
    made = vae(pictures, generator=sample_generators(seed, numbers))
    ours = tokenizer(pictures, generator=sample_generators(seed, numbers)).reconstruction
    scores = torch.stack([finite_psnr(psnr(pictures, one), pictures) for one in (made, ours)])
    return Reconstructions(numbers, *(one.cpu() for one in (pictures, made, ours, scores)))


def worst_reconstructions(
    tokenizer: CodaTokenizer, vae: ContinuousVAE, images: ImageDataset, count: int, seed: int = 0, batch_size: int = 50
) -> tuple[Reconstructions, Reconstructions, Tensor]:
    """The COUNT images of a tokenizer's lowest PSNR, those of its largest loss against a VAE, and (2, N) of all PSNRs.

    The worst comes first; an image can be in both.
    """
    numbers, scores = [], []
    for batch in evaluation_batches(images, batch_size):
        found = reconstruct(tokenizer, vae, batch, seed)
        numbers, scores = numbers + found.numbers, [*scores, found.psnr]
    continuous, discrete = torch.cat(scores, dim=1)

    def again(keys: Tensor) -> Reconstructions:
        chosen = [numbers[i] for i in keys.argsort(stable=True)[:count].tolist()]
        pictures = torch.stack([images[number]["image"] for number in chosen])
        return reconstruct(tokenizer, vae, {"image": pictures, "index": torch.tensor(chosen)}, seed)

    return again(discrete), again(discrete - continuous), torch.stack([continuous, discrete])


@torch.no_grad()
def evaluate_levels(
    model: CodaTokenizer,
    images: ImageDataset,
    metrics: Sequence[ReconstructionMetrics],
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Evaluate what the first k levels alone give, one set of `metrics` for each k from 1 to the number of levels.

    Images are encoded once, with the noise that `evaluate` gives them. Another number of `metrics` raises ValueError.
    """
    if len(metrics) != len(model.quantizer.scales):
        raise ValueError(f"expected {len(model.quantizer.scales)} sets of metrics, one a level, got {len(metrics)}")
    device = next(model.parameters()).device
    for own in metrics:
        own.check_unused()
        own.to(device)
    for batch in tqdm(evaluation_batches(images, batch_size), total=-(-len(images) // batch_size), desc="levels"):
        pictures = batch["image"].to(device)
        noise = sample_generators(seed, batch["index"].tolist())
        latents = model.vae.encode(pictures, generator=noise)
        indices = model.quantizer.encode(latents)
        for level, own in zip(range(1, len(model.quantizer.scales) + 1), metrics, strict=True):
            quantized = model.quantizer.decode(indices, levels=level)
            own.update(pictures, model.vae.decode(quantized), latents, quantized)
    return [own.compute() for own in metrics]


def _metrics(
    settings: EvaluationSettings,
    model: CodaTokenizer | ContinuousVAE,
    frechet: FrechetDistance | None,
    perceptual: torch.nn.Module | None,
) -> ReconstructionMetrics:
    codes = (None, None)
    if isinstance(model, CodaTokenizer):
        codes = model.quantizer.codebook_size, len(model.quantizer.scales)
    reference = f"the validation images of {settings.dataset}, cropped as the inputs are"
    return ReconstructionMetrics(*codes, frechet=frechet, perceptual=perceptual, reference_set=reference)


def _size(model: CodaTokenizer | ContinuousVAE) -> dict[str, int | None]:
    tokenizer = isinstance(model, CodaTokenizer)
    return {
        "ratio": (model.vae if tokenizer else model).downsampling,
        "codebook_size": model.quantizer.codebook_size if tokenizer else None,
    }
