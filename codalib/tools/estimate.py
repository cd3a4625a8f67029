"""Training on one's own images: settings for a run of minutes, and what it will take, measured before it starts."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from codalib.datasets.images import ImageDataset
from codalib.evaluation.latents import encode_images
from codalib.models.quantizer import FLUX_SCALES, MAR_SCALES
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.tools.operations import KeptForBackward, StepMemory
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import QuantizerSettings, TokenizerSettings
from codalib.training.tokenizer import train_tokenizer
from codalib.training.trainer import read_log

log = logging.getLogger(__name__)


LEVELS = 10  # the paper's
FIT_BATCH = 32  # latents a step, while fitting on latents alone
STEPS_OF_FIT = 1.5  # steps on latents for each step on images, where the run's length is chosen here
LONGEST_FIT = 1500  # of those
MEMORY_FRACTION = 0.9  # of the free memory that a run may take
TIME_FRACTION = 0.75  # of the minutes that training may take; the rest is for loading, measuring and drawing
TIMED_STEPS = 5  # the first, which sets things up, is not counted
GIB = 2**30


class DoesNotFit(ValueError):
    """A run that this machine has not the memory or the time for; the message says what to change."""


def scales_for(side: int) -> tuple[int, ...]:
    """Ten levels' sides for a latent grid of SIDE: the release's for 16 and 32, else rising alike.

    In between 1 and SIDE they grow by one factor, but by one at least; small grids end in levels of the whole grid.
    """
    if side < 1:
        raise ValueError(f"expected a latent grid of side 1 or more, got {side}")
    if side in (MAR_SCALES[-1], FLUX_SCALES[-1]):
        return MAR_SCALES if side == MAR_SCALES[-1] else FLUX_SCALES
    scales: list[int] = []
    for level in range(LEVELS):
        grown = round(side ** (level / (LEVELS - 1)))
        scales.append(min(side, max(grown, scales[-1] + 1 if scales else 1)))
    return tuple(scales)


def brief_settings(
    vae: ContinuousVAE, resolution: int, codebook_size: int, batch_size: int, steps: int, seed: int = 0
) -> tuple[QuantizerSettings, TokenizerSettings]:
    """Settings of a run of minutes, for the fit on latents alone and for the training on images.

    They are those of the profile emoji: against the paper's (days on GPUs) a higher learning rate, a shorter average,
    and lower weights of quantization and entropy, which would otherwise cost detail in so few steps; the perceptual and
    the adversarial weight are those of EfficientNet's distance and discriminator, which lie in a Python package.
    """
    scales = scales_for(vae.latent_side(resolution))
    shared = {"codebook_size": codebook_size, "scales": scales, "seed": seed}
    fit = QuantizerSettings(
        steps=min(LONGEST_FIT, max(1, round(STEPS_OF_FIT * steps))),
        batch_size=FIT_BATCH,
        learning_rate=0.01,
        entropy_weight=0.02,
        ema=0.0,
        log_every=20,
        checkpoint_every=500,
        **shared,
    )
    train = TokenizerSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=0.002,
        rank=16,
        quantization_weight=0.1,
        entropy_weight=0.002,
        perceptual_weight=0.03,
        adversarial_weight=0.1,
        perceptual_network="perceptual_effnet",
        discriminator_network="effnet",
        ema=0.98,
        log_every=5,
        checkpoint_every=100,
        **shared,
    )
    return fit, train


@dataclass(frozen=True)
class Estimate:
    """What `estimate` measured on this machine."""

    batch_size: int  # images a step
    fixed_bytes: int  # of the process whatever the batch
    bytes_an_image: int  # that a step keeps for its backward pass
    free_bytes: int  # that the process may still take, and what it has
    seconds_a_step: float  # on images; nan where the memory does not suffice
    seconds_a_fit_step: float  # on latents
    seconds_an_image: float  # to encode it
    bytes_checkpointed: int = 0  # `bytes_an_image` with gradient_checkpointing; 0: not measured

    @property
    def bytes_needed(self) -> int:
        return self.fixed_bytes + self.batch_size * self.bytes_an_image

    @property
    def largest_batch(self) -> int:
        """Images a step that the memory takes; 0 where it takes none."""
        return self._largest(self.bytes_an_image)

    def _largest(self, bytes_an_image: int) -> int:
        return max(0, int((MEMORY_FRACTION * self.free_bytes - self.fixed_bytes) // bytes_an_image))

    def minutes(self, steps: int, fit_steps: int, images: int) -> float:
        """Of a run with so many steps on IMAGES images, loading and measuring reckoned in."""
        work = steps * self.seconds_a_step + fit_steps * self.seconds_a_fit_step + images * self.seconds_an_image
        return work / TIME_FRACTION / 60

    def steps_within(self, minutes: float, images: int) -> int:
        """Steps on images that fit into so many minutes, with the steps on latents that `brief_settings` adds."""
        seconds = TIME_FRACTION * 60 * minutes - images * self.seconds_an_image
        with_fit = seconds / (self.seconds_a_step + STEPS_OF_FIT * self.seconds_a_fit_step)
        if STEPS_OF_FIT * with_fit > LONGEST_FIT:
            with_fit = (seconds - LONGEST_FIT * self.seconds_a_fit_step) / self.seconds_a_step
        return max(0, int(with_fit))

    def check_memory(self) -> None:
        """Raise DoesNotFit where a step would take more than the memory that is free."""
        if self.bytes_needed > MEMORY_FRACTION * self.free_bytes:
            advice = (
                f"batch_size {self.largest_batch} fits"
                if self.largest_batch
                else "not even batch_size 1 fits: take a smaller resolution, or a machine with more memory"
            )
            checkpointed = self._largest(self.bytes_checkpointed) if self.bytes_checkpointed else 0
            if checkpointed > self.largest_batch:
                advice += f"; with gradient_checkpointing batch_size {checkpointed} fits"
            raise DoesNotFit(
                f"a step of batch_size {self.batch_size} takes about {self.bytes_needed / GIB:.1f} GiB, and "
                f"{MEMORY_FRACTION:.0%} of the {self.free_bytes / GIB:.1f} GiB that are free may be taken: {advice}"
            )

    def check_time(self, minutes: float, steps: int, fit_steps: int, images: int) -> None:
        """Raise DoesNotFit where the run would take more than so many minutes."""
        needed = self.minutes(steps, fit_steps, images)
        if needed > minutes:
            fitting = self.steps_within(minutes, images)
            advice = (
                f"steps {fitting} fits, or give minutes {math.ceil(needed)}"
                if fitting
                else f"give more minutes: encoding {images} images and one step take "
                f"{self.minutes(1, 1, images):.1f}; or set limit to take fewer images"
            )
            raise DoesNotFit(f"{steps} steps take about {needed:.1f} minutes, {minutes:g} were given: {advice}")


def estimate(
    fit: QuantizerSettings, settings: TokenizerSettings, vae: ContinuousVAE, train: ImageDataset, folder: str | Path
) -> Estimate:
    """Measure a few real steps: first the memory, of one image, then the time of whole batches if they fit.

    FOLDER receives their checkpoints and is removed afterwards.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    few = {"checkpoint_every": TIMED_STEPS, "log_every": 1, "steps": TIMED_STEPS}
    val = train.subset([0])
    try:
        started = time.monotonic()
        count = min(len(train), FIT_BATCH)
        latents = encode_images(vae, train, count)
        an_image = (time.monotonic() - started) / count
        fit_quantizer(replace(fit, **few), latents, folder / "fit")
        one = replace(settings, **few | {"steps": 1, "batch_size": 1, "compile": False})  # it would hide the tensors
        plain, checkpointed = _bytes_an_image(one, vae, train, val, folder)
        kept = checkpointed if settings.gradient_checkpointing else plain
        paces = math.nan, _pace(folder / "fit"), an_image
        fixed, free = _memory()
        found = Estimate(settings.batch_size, fixed, kept, free, *paces, checkpointed)
        if found.bytes_needed > MEMORY_FRACTION * found.free_bytes:
            return found
        train_tokenizer(replace(settings, **few), vae, train, val, folder / "batch")
        found = replace(found, seconds_a_step=_pace(folder / "batch"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("%.2f s a step, %.1f GiB", found.seconds_a_step, found.bytes_needed / GIB)
    return found


def _bytes_an_image(
    one: TokenizerSettings, vae: ContinuousVAE, train: ImageDataset, val: ImageDataset, folder: Path
) -> tuple[int, int]:
    """What a step of one image keeps for its backward pass, without and with gradient_checkpointing."""
    with KeptForBackward() as kept, StepMemory(CodaTokenizer) as plain:
        train_tokenizer(replace(one, gradient_checkpointing=False), vae, train, val, folder / "one")
    with StepMemory(CodaTokenizer) as again:
        train_tokenizer(replace(one, gradient_checkpointing=True), vae, train, val, folder / "checkpointed")
    return kept.most, kept.most - max(0, plain.most - again.most)


def _pace(folder: Path) -> float:
    """Seconds a step, the first left out."""
    rows: Sequence[dict[str, float]] = read_log(folder)
    return (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])


def _memory() -> tuple[int, int]:
    """Bytes that this process holds, and those it may take in all; the GPU's where there is one."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_allocated(), free + torch.cuda.memory_reserved()
    memory = psutil.Process().memory_info().rss
    return memory, psutil.virtual_memory().available + memory
