"""Pretrain a continuous VAE: the stage behind the embedded default, and for whoever has no VAE of their own."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from codalib.base.hardware import to_device
from codalib.datasets.images import ImageDataset, evaluation_batches, share_content_digests, training_batches
from codalib.evaluation.metrics import finite_psnr, psnr
from codalib.models.loss_weights import LossWeights
from codalib.models.losses import kl_divergence, reconstruction_terms, weighted_sum
from codalib.models.vae import ContinuousVAE
from codalib.training.execution import build_adamw, prepare_vae
from codalib.training.settings import PretrainSettings
from codalib.training.trainer import Stage, Trainer, checksum

INITIAL_LOGVAR = -6.0  # of the posterior: sampling noise far below the latents' spread, so that early steps learn


def build_autoencoder(settings: PretrainSettings, resolution: int) -> AutoencoderKL:
    """A diffusers AutoencoderKL of these settings with a posterior that starts narrow."""
    levels = len(settings.widths)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.widths,
        layers_per_block=settings.blocks,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.groups,
        sample_size=resolution,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        autoencoder.quant_conv.bias[settings.latent_channels :] = INITIAL_LOGVAR
    return autoencoder


class _Posterior(nn.Module):
    """Encode, sample, decode and keep the posterior's moments: one forward for the process group."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.autoencoder.encode(images).latent_dist
        return self.autoencoder.decode(posterior.sample()).sample, posterior.mean, posterior.logvar


class VaeStage(Stage):
    """Encode, sample, decode; L1, L2 and KL."""

    def __init__(
        self,
        settings: PretrainSettings,
        train: ImageDataset,
        val: ImageDataset,
        folder: str | Path,
        start: ContinuousVAE | None,
    ):
        super().__init__(settings)
        self.train, self.val, self.weights = train, val, LossWeights(kl=settings.kl_weight)
        autoencoder = (
            build_autoencoder(settings, train.resolution) if start is None else copy.deepcopy(start.autoencoder)
        )
        self.model = _Posterior(autoencoder.train().requires_grad_(True)).to(self.device)
        prepare_vae(autoencoder, settings, self.device)
        optimizer = build_adamw(self.model.parameters(), settings, weight_decay=settings.weight_decay)
        self.parallel = self.accelerator.prepare(self.model)
        share_content_digests(train, val)
        inputs = {"data": [train.inputs, val.inputs]}
        inputs["start"] = None if start is None else checksum(*start.state_dict().values())
        self.trainer = Trainer(settings, folder, self.accelerator, self.model, {"VAE": optimizer}, **inputs)

    def batches(self, first: int) -> Iterator[dict]:
        own = self.settings
        return training_batches(self.train, own.batch_size, own.seed, first, self.rank, self.world_size, own.workers)

    def train_step(self, micro_batches: list[dict], step: int) -> dict[str, Tensor]:
        for i, batch in enumerate(micro_batches):
            images = to_device(batch["image"], self.device)
            last = i == len(micro_batches) - 1
            with self.gradients_apart(not last, self.parallel):
                with self.autocast():
                    reconstruction, mean, logvar = self.parallel(images)
                terms = reconstruction_terms(images, reconstruction) | {"kl": kl_divergence(mean, logvar)}
                loss = weighted_sum(terms, self.weights)
                self.trainer.update(loss, terms, "VAE", list(self.model.parameters()), last)
        return terms | {"loss": loss}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        vae = ContinuousVAE(self.model.autoencoder)
        rows = [
            finite_psnr(psnr(batch["image"], vae(batch["image"].to(self.device), sample=False).cpu()), batch["image"])
            for batch in evaluation_batches(self.val, self.settings.batch_size, workers=self.settings.workers)
        ]
        return {"val_psnr": torch.cat(rows).mean().item()}


def pretrain_vae(
    settings: PretrainSettings,
    train: ImageDataset,
    val: ImageDataset,
    folder: str | Path,
    start: ContinuousVAE | None = None,
) -> ContinuousVAE:
    """Train a continuous VAE on L1, L2 and KL, resuming what `folder` holds, and return it with its latent scale set.

    The scale is 1 / std of the training latents, so that normalised latents have unit variance (the paper's VAEs bring
    theirs along). Logs the terms and, at every evaluation, `val_psnr` in dB over `val`. With `start` it goes on from
    that VAE's weights, whose architecture then replaces the settings'.
    """
    stage = VaeStage(settings, train, val, folder, start)
    stage.trainer.run(stage, "VAE")
    vae = ContinuousVAE(stage.model.autoencoder).eval().requires_grad_(False)
    vae.autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None)  # of `start`, no longer true
    vae.autoencoder.register_to_config(scaling_factor=1 / latent_std(vae, train, settings.batch_size))
    return vae


@torch.no_grad()
def latent_std(vae: ContinuousVAE, dataset: ImageDataset, batch_size: int, batches: int = 32) -> float:
    """The standard deviation of sampled latents over some seeded training images."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    stream = training_batches(dataset, batch_size, seed=0)
    return (
        torch.cat([vae.encode(next(stream)["image"].to(device), generator=generator) for _ in range(batches)])
        .std()
        .item()
    )
