"""Fit a quantizer on latents alone: the start of the tokenizer's training, and how quantizers are compared."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from codalib.base.files import atomic_write
from codalib.base.processes import make_accelerator
from codalib.evaluation.latents import latent_scores
from codalib.models.loss_weights import LossWeights
from codalib.models.losses import weighted_sum
from codalib.models.quantizer import ResidualQuantizer
from codalib.training.settings import QuantizerSettings
from codalib.training.trainer import Loop, _checksum


def fit_quantizer(
    settings: QuantizerSettings,
    latents: Tensor,
    folder: str | Path,
    val_latents: Tensor | None = None,
    snapshots: Sequence[int] = (),
) -> ResidualQuantizer:
    """Train a quantizer on latents (N, C, H, W) alone, with the quantization and entropy terms of Eq. 9-11.

    The image terms of Eq. 9 are left out, which makes a step two orders of magnitude cheaper: the way to compare
    quantizers on a frozen VAE and to give `train_tokenizer` a start. Resumes what `folder` holds; returns the averaged
    weights where `settings.ema` asks for them. The weights after each number of steps in `snapshots` (0: before
    training; not averaged) stay in `folder` as snapshot-STEP.safetensors.
    """
    if odd := [step for step in snapshots if not 0 <= step < settings.steps]:
        raise ValueError(f"snapshots after {odd} steps asked for, expected from 0 to below {settings.steps}, the steps")
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator()
    quantizer = settings.build_quantizer(latents.shape[1]).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        quantizer.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
    )
    inputs = {"latents": _checksum(latents)} | ({"snapshots": list(snapshots)} if snapshots else {})
    loop = Loop(settings, folder, accelerator, quantizer, {"quantizer": optimizer}, **inputs)
    weights = LossWeights(quantization=settings.quantization_weight, entropy=settings.entropy_weight)

    def batches(first: int):
        while True:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + first)
            yield latents[torch.randint(len(latents), (settings.batch_size,), generator=generator)]
            first += 1

    def train_step(micro_batches: list[Tensor], step: int) -> dict[str, Tensor]:
        if step in snapshots:
            with atomic_write(Path(folder) / f"snapshot-{step}.safetensors", "wb") as file:
                file.write(save({name: value.detach().cpu() for name, value in quantizer.state_dict().items()}))
        for i, batch in enumerate(micro_batches):
            output = quantizer(batch.to(accelerator.device))
            terms = {"quantization": output.quantization_loss, "entropy": output.entropy_loss}
            loss = weighted_sum(terms, weights)
            loop.update(loss, terms, "quantizer", list(quantizer.parameters()), last=i == len(micro_batches) - 1)
        return terms | {"loss": loss}

    loop.run(
        batches,
        train_step,
        None if val_latents is None else lambda: latent_scores(quantizer, val_latents),
        settings.kind,
    )
    loop.load_averaged()
    return quantizer.eval()
