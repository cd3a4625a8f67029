"""Fit a quantizer on latents alone: the start of the tokenizer's training, and how quantizers are compared."""

import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from codalib.base.files import atomic_write
from codalib.base.hardware import to_device
from codalib.base.seeds import sample_generators
from codalib.models.data_start import start_from_data
from codalib.models.loss_weights import LossWeights
from codalib.models.losses import weighted_sum
from codalib.models.quantizer import ResidualQuantizer
from codalib.training.execution import build_adamw
from codalib.training.settings import QuantizerSettings
from codalib.training.trainer import Stage, Trainer

log = logging.getLogger(__name__)


def outline(latents: Tensor) -> list:
    """Their shape and three averages to four decimals: the last bits of latents, which another number of threads or
    another machine rounds differently, do not make another run of it. The third depends on the latents' order."""
    values = latents.double().flatten()
    waves = torch.arange(len(values), device=values.device).double().sin()
    averages = values.mean(), values.square().mean(), (values * waves).mean()
    return [list(latents.shape), *(f"{average.item():.4f}" for average in averages)]


class QuantizerStage(Stage):
    """Quantize latents; the quantization and entropy terms."""

    def __init__(
        self,
        settings: QuantizerSettings,
        latents: Tensor,
        source: str,
        folder: str | Path,
        snapshots: Sequence[int],
    ):
        super().__init__(settings)
        self.latents, self.snapshots = latents, snapshots
        self.weights = LossWeights(quantization=settings.quantization_weight, entropy=settings.entropy_weight)
        self.quantizer = settings.build_quantizer(latents.shape[1]).to(self.device)
        optimizer = build_adamw(self.quantizer.parameters(), settings, weight_decay=settings.weight_decay)
        if settings.start == "data":
            start_from_data(self.quantizer, latents, settings.seed)
        inputs = {"latents": outline(latents), "source": source} | ({"snapshots": list(snapshots)} if snapshots else {})
        self.trainer = Trainer(settings, folder, self.accelerator, self.quantizer, {"quantizer": optimizer}, **inputs)

    def batches(self, first: int) -> Iterator[Tensor]:
        for number in itertools.count(first):
            (rng,) = sample_generators(self.settings.seed, [number])
            yield self.latents[torch.randint(len(self.latents), (self.settings.batch_size,), generator=rng)]

    def train_step(self, micro_batches: list[Tensor], step: int) -> dict[str, Tensor]:
        if step in self.snapshots:
            self.save_snapshot(step)
        for i, batch in enumerate(micro_batches):
            output = self.quantizer(to_device(batch, self.device))
            terms = {"quantization": output.quantization_loss, "entropy": output.entropy_loss}
            loss = weighted_sum(terms, self.weights)
            last = i == len(micro_batches) - 1
            self.trainer.update(loss, terms, "quantizer", list(self.quantizer.parameters()), last)
        return terms | {"loss": loss}

    def save_snapshot(self, step: int) -> None:
        with atomic_write(self.snapshot(step), "wb") as file:
            file.write(save({name: value.detach().cpu() for name, value in self.quantizer.state_dict().items()}))

    def snapshot(self, step: int) -> Path:
        """Among the checkpoints of these settings and inputs: those of another run in the same folder are not ours."""
        return self.trainer.checkpoints / f"snapshot-{step}.safetensors"

    def run(self) -> None:
        """Train, or resume; then the snapshots into the folder. What was trained without keeping them trains anew."""
        newest = self.trainer.newest()
        done = int(newest.name.removeprefix("step-")) if newest else 0
        if any(step < done and not self.snapshot(step).exists() for step in self.snapshots):
            log.warning("%s was trained without its snapshots, and is trained again", self.trainer.folder)
            shutil.rmtree(self.trainer.checkpoints)
            self.trainer.checkpoints.mkdir()
        self.trainer.run(self, self.settings.kind)
        for step in self.snapshots:
            with atomic_write(self.trainer.folder / self.snapshot(step).name, "wb") as file:
                file.write(self.snapshot(step).read_bytes())


def fit_quantizer(
    settings: QuantizerSettings,
    latents: Tensor,
    folder: str | Path,
    snapshots: Sequence[int] = (),
    source: str = "",
) -> ResidualQuantizer:
    """Train a quantizer on latents (N, C, H, W) alone, with the quantization and entropy terms of Eq. 9-11.

    The image terms of Eq. 9 are left out, which makes a step two orders of magnitude cheaper: the way to compare
    quantizers on a frozen VAE and to give `train_tokenizer` a start. Resumes what `folder` holds; returns the averaged
    weights where `settings.ema` asks for them. The weights after each number of steps in `snapshots` (0: before
    training; not averaged) stay in `folder` as snapshot-STEP.safetensors. `source` is a digest of the images behind the
    latents, of which `outline` does not see a single one: another one's run in `folder` is not resumed.
    """
    if odd := [step for step in snapshots if not 0 <= step < settings.steps]:
        raise ValueError(f"snapshots after {odd} steps asked for, expected from 0 to below {settings.steps}, the steps")
    stage = QuantizerStage(settings, latents, source, folder, snapshots)
    stage.run()
    return stage.quantizer.eval()
