"""Measure several models over the same images, the images shared by several processes, each counted once."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from codalib.base.files import read_json, write_json
from codalib.base.processes import make_accelerator
from codalib.base.seeds import SEED_STRIDE
from codalib.datasets.images import ImageDataset, evaluation_batches, load_dataset
from codalib.evaluation.metrics import FrechetDistance, ReconstructionMetrics, build_frechet
from codalib.models.checkpoints import (
    EMBEDDED_GENERATORS,
    EMBEDDED_TOKENIZERS,
    EMOJI_VAE,
    PUBLISHED_VAES,
    find_model,
    load_tokenizer,
    load_vae,
)
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.perceptual import build_perceptual
from codalib.pretrained.registry import find_weights, has_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """What the models of a table are measured on, and by which networks."""

    dataset: str  # "emoji" or "imagefolder:PATH"; its validation split
    resolution: int  # side of the images, pixels
    val_limit: int | None = None  # images; None: all
    batch_size: int = 50  # images a process and batch
    workers: int = 0  # processes that load images, for each process that measures
    frechet: str | None = "auto"  # "rfid" (Inception), "fd_effnet", what is here, or None
    frechet_resolution: int = 224  # side of EfficientNet's input, pixels
    perceptual: str | None = "auto"  # "perceptual_vgg" (LPIPS), "perceptual_effnet", what is here, or None
    seed: int = 0  # of the posterior's noise

    def load_images(self) -> ImageDataset:
        return load_dataset(self.dataset, "val", self.resolution, limit=self.val_limit)


def evaluate_models(
    settings: EvaluationSettings, vaes: dict[str, str], tokenizers: dict[str, str], folder: str | Path
) -> None:
    """Measure continuous VAEs and tokenizers over the same images; run it through `base.processes.launch`.

    Process r of n takes every n-th image, and the measures are added up at the end, so that every image counts once
    however many processes there are. One file a model, `measured/NAME.json` in FOLDER, holds its row and the protocol
    of each number; a model that an interrupted run has measured already is not measured again.

    Args:
        settings: the images and the networks of the measures.
        vaes: name -> what `find_model` and then `load_vae` take.
        tokenizers: name -> what `find_model` and then `models.checkpoints.load_tokenizer` take.
    """
    accelerator = make_accelerator()
    images = settings.load_images()
    images.check_enough_images(accelerator.num_processes)
    perceptual = build_perceptual(settings.perceptual)
    frechet = build_frechet(settings.frechet, settings.frechet_resolution)
    for name, path in {**vaes, **tokenizers}.items():
        file = measured_file(folder, name, path, settings)
        done = file.exists()
        accelerator.wait_for_everyone()  # all have looked before the first writes
        if done:
            continue
        started = time.monotonic()
        model = load_vae(find_model(path)) if name in vaes else load_tokenizer(find_model(path))
        model.to(accelerator.device)
        measures = _measures(settings, model, frechet, perceptual)
        share = accelerator.process_index, accelerator.num_processes
        values = evaluate(model, images, measures, settings.batch_size, settings.seed, *share, settings.workers)
        protocol = measures.protocol()
        frechet = frechet and measures.frechet.with_same_reference()
        row = {"method": name, **_size(model), "images": int(measures.images.compute()), **values}
        if accelerator.is_main_process:
            seconds = round(time.monotonic() - started, 1)
            write_json(file, {"row": row, "protocol": protocol, "seconds": seconds})
            log.info("%s: %d images in %.0f s", name, row["images"], seconds)
        del model
    accelerator.wait_for_everyone()


def read_measured(
    settings: EvaluationSettings, models: Mapping[str, str], folder: str | Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows that `evaluate_models` wrote, in the order of MODELS, and the protocol of each measure."""
    results = [read_json(measured_file(folder, name, path, settings)) for name, path in models.items()]
    protocol = {measure: text for result in results for measure, text in result["protocol"].items()}
    return [result["row"] for result in results], protocol


def measured_file(folder: str | Path, name: str, path: str, settings: EvaluationSettings) -> Path:
    """Where a model's result lies; the name changes with everything that decides the numbers."""
    outer = {"batch_size", "workers"}
    inputs = {key: value for key, value in asdict(settings).items() if key not in outer}
    mark = hashlib.sha256(json.dumps([inputs, file_stamps(path)]).encode()).hexdigest()[:12]
    return Path(folder) / "measured" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{mark}.json"


def file_stamps(name: str) -> list[Any]:
    """The files of a model named as `find_model` takes it, with the times of their last change."""
    if name in EMBEDDED_TOKENIZERS:
        places = [EMBEDDED_TOKENIZERS[name], EMOJI_VAE]
    elif name in EMBEDDED_GENERATORS:
        places = [EMBEDDED_GENERATORS[name]]
    elif name in PUBLISHED_VAES:
        places = [find_weights(name)] if has_weights(name) else []
    else:
        places = [Path(find_model(name)).expanduser()]
    files = [file for place in places for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
    return [*map(str, places), *((file.name, file.stat().st_mtime_ns) for file in files)]


@torch.no_grad()
def evaluate(
    model: CodaTokenizer | ContinuousVAE,
    images: ImageDataset,
    measures: ReconstructionMetrics,
    batch_size: int = 64,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Measure a tokenizer's or a continuous VAE's reconstructions of every image of a data set, once.

    Process RANK of WORLD does its share, and each returns the measures of the whole. The posterior is sampled, as the
    release does, with noise that depends on the seed and the image alone: the numbers change neither with the number
    of processes nor with the batch. The measures are moved to the model's device.
    """
    device = next(model.parameters()).device
    measures.to(device)
    batches = evaluation_batches(images, batch_size, rank, world, workers)
    total = -(-len(range(rank, len(images), world)) // batch_size)
    for batch in tqdm(batches, total=total, desc="measuring", disable=rank > 0, mininterval=2.0):
        pictures = batch["image"].to(device)
        seeds = (seed * SEED_STRIDE + index for index in batch["index"].tolist())
        noise = [torch.Generator().manual_seed(own) for own in seeds]  # on the CPU: the same on every device
        if isinstance(model, ContinuousVAE):
            measures.update(pictures, model(pictures, generator=noise))
        else:
            out = model(pictures, generator=noise)
            measures.update(pictures, out.reconstruction, out.latents, out.quantized, out.indices)
    return measures.compute()


@torch.no_grad()
def evaluate_levels(
    model: CodaTokenizer,
    images: ImageDataset,
    measures: Sequence[ReconstructionMetrics],
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Measure what the first k levels alone give, one set of `measures` for each k from 1 to the number of levels.

    Images are encoded once, with the noise that `measure` gives them. Another number of `measures` raises ValueError.
    """
    if len(measures) != len(model.quantizer.scales):
        raise ValueError(f"{len(measures)} sets of measures got, expected {len(model.quantizer.scales)}, one a level")
    device = next(model.parameters()).device
    for own in measures:
        own.to(device)
    for batch in tqdm(evaluation_batches(images, batch_size), total=-(-len(images) // batch_size), desc="levels"):
        pictures = batch["image"].to(device)
        noise = [torch.Generator().manual_seed(seed * SEED_STRIDE + i) for i in batch["index"].tolist()]
        latents = model.vae.encode(pictures, generator=noise)
        indices = model.quantizer.encode(latents)
        for level, own in zip(range(1, len(model.quantizer.scales) + 1), measures, strict=True):
            quantized = model.quantizer.decode(indices, levels=level)
            own.update(pictures, model.vae.decode(quantized), latents, quantized)
    return [own.compute() for own in measures]


def _measures(
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
