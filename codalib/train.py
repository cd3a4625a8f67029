"""The training stages: pretrain a continuous VAE, adapt one into a discrete tokenizer."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch import Tensor, nn

from codalib.baselines import LIBRARY_KINDS
from codalib.data import ImageDataset, evaluation_batches, training_batches
from codalib.discriminator import build_discriminator, frozen, real_and_fake
from codalib.evaluate import measure
from codalib.loop import Loop, LoopSettings, autocast, make_accelerator
from codalib.losses import (
    LossWeights,
    adaptive_weight,
    build_perceptual,
    discriminator_hinge,
    generator_hinge,
    kl_divergence,
    ramp,
    reconstruction_terms,
    weighted_sum,
)
from codalib.metrics import ReconstructionMetrics, psnr
from codalib.quantize import ResidualQuantizer, quantizer_from_config
from codalib.runs import atomic_write
from codalib.tokenizer import CodaTokenizer
from codalib.vae import ADAPTED_LAYERS, ContinuousVAE, add_adapters, fresh_copy, last_decoder_adapter, load_vae

# For `TokenizerSettings.adapters`: nothing is adapted, a VAE of the same architecture is trained from random weights.
SCRATCH = "scratch"
INITIAL_LOGVAR = -6.0  # of the posterior: sampling noise far below the latents' spread, so that early steps learn


@dataclass(frozen=True)
class PretrainSettings(LoopSettings):
    """Settings of `pretrain_vae`; the defaults that differ from the tokenizer's are those common for VAEs."""

    widths: tuple[int, ...] = (16, 32, 64, 160)  # channels at each resolution; one fewer halvings
    blocks: int = 1  # residual blocks a resolution
    groups: int = 8  # of the group normalisations
    latent_channels: int = 16
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    kl_weight: float = 1e-6  # a nat, summed over an image's latents (latent diffusion's)


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
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator()
    autoencoder = build_autoencoder(settings, train.resolution) if start is None else copy.deepcopy(start.autoencoder)
    model = _Posterior(autoencoder.train().requires_grad_(True)).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
    )
    parallel = accelerator.prepare(model)
    loop = Loop(
        settings,
        folder,
        accelerator,
        model,
        {"VAE": optimizer},
        data=train.name,
        images=len(train),
        start=None if start is None else _checksum(*start.state_dict().values()),
    )
    weights = LossWeights(kl=settings.kl_weight)

    def batches(first: int):
        return training_batches(
            train,
            settings.batch_size,
            settings.seed,
            first,
            accelerator.process_index,
            accelerator.num_processes,
            settings.workers,
        )

    def train_step(micro_batches: list[dict], step: int) -> dict[str, Tensor]:
        for i, batch in enumerate(micro_batches):
            images = batch["image"].to(accelerator.device)
            with autocast(settings.precision, accelerator.device):
                reconstruction, mean, logvar = parallel(images)
            terms = reconstruction_terms(images, reconstruction) | {"kl": kl_divergence(mean, logvar)}
            loss = weighted_sum(terms, weights)
            loop.update(loss, terms, "VAE", list(model.parameters()), last=i == len(micro_batches) - 1)
        return terms | {"loss": loss}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        vae = ContinuousVAE(model.autoencoder)
        rows = [
            psnr(batch["image"], vae(batch["image"].to(accelerator.device), sample=False).cpu())
            for batch in evaluation_batches(val, settings.batch_size, workers=settings.workers)
        ]
        return {"val_psnr": torch.cat(rows).mean().item()}

    loop.run(batches, train_step, evaluate, "VAE")
    loop.load_averaged()
    vae = ContinuousVAE(model.autoencoder).eval().requires_grad_(False)
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


@dataclass(frozen=True)
class QuantizerSettings(LoopSettings):
    """Settings of `fit_quantizer`; the defaults are the release's for MAR with 65,536 codes."""

    kind: str = "attention"  # "attention" (CODA), "nearest" (the VQ baseline) or one of codalib.baselines
    codebook_size: int = 65536  # K
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each level; the last is the latent grid's
    attention_dim: int = 32  # D
    norm: str | None = "rms"  # "rms", "layer" or None
    beta: float = 0.05  # of the commitment term, Eq. 10
    entropy_temperature: float = 0.01
    backend: str = "auto"  # of the assignment
    quantization_weight: float = 1.0
    entropy_weight: float = 0.05

    def build_quantizer(self, latent_channels: int) -> ResidualQuantizer:
        """A fresh quantizer of these settings."""
        names = ["kind", "codebook_size", "scales"]
        if self.kind not in LIBRARY_KINDS:
            names.append("beta")
        if self.kind == "attention":
            names += ["attention_dim", "norm", "entropy_temperature"]
        config = {name: getattr(self, name) for name in names}
        return quantizer_from_config(config | {"latent_channels": latent_channels}, self.backend)


@dataclass(frozen=True)
class TokenizerSettings(QuantizerSettings):
    """Settings of `train_tokenizer`; the defaults are the release's for MAR (paper section 5.1, Eq. 9)."""

    adapters: str = "both"  # part of the VAE that is adapted: "both", "encoder", "decoder", "none"; see also SCRATCH
    rank: int = 32  # of the adapters
    adapted_layers: tuple[str, ...] = ADAPTED_LAYERS  # a convolution is adapted when its name contains one of these
    l1_weight: float = 0.2
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0
    adversarial_weight: float = 1.0  # times the adaptive weight and the ramp
    perceptual_network: str | None = "auto"  # "perceptual_vgg" (LPIPS), "perceptual_effnet" or what is here
    discriminator_network: str | None = "auto"  # "dino", "effnet" or what is here
    discriminator_weight_decay: float = 0.0005

    @property
    def weights(self) -> LossWeights:
        return LossWeights(
            l1=self.l1_weight,
            l2=self.l2_weight,
            perceptual=self.perceptual_weight,
            quantization=self.quantization_weight,
            entropy=self.entropy_weight,
            adversarial=self.adversarial_weight,
        )


@torch.no_grad()
def encode_images(
    vae: ContinuousVAE, dataset: ImageDataset, images: int, batch_size: int = 64, seed: int = 0
) -> Tensor:
    """Sampled, normalised latents (N, C, H, W) of N = `images` images, in seeded order, on the CPU.

    Beyond one pass over the data set the images come again, with other crops.
    """
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    stream = training_batches(dataset, batch_size, seed)
    count = -(-images // batch_size)
    parts = [vae.encode(next(stream)["image"].to(device), generator=generator).cpu() for _ in range(count)]
    return torch.cat(parts)[:images]


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


@torch.no_grad()
def latent_scores(quantizer: ResidualQuantizer, latents: Tensor, batch_size: int = 64) -> dict[str, float]:
    """`quantization_error` (mean squared) and `utilization` of a quantizer on latents (N, C, H, W)."""
    device = next(quantizer.parameters()).device
    error, used = 0.0, torch.zeros(quantizer.codebook_size, dtype=torch.bool)
    for batch in latents.split(batch_size):
        indices = quantizer.encode(batch.to(device))
        error += (quantizer.decode(indices).cpu() - batch).square().sum().item()
        used[torch.cat([level.flatten() for level in indices]).cpu()] = True
    return {"quantization_error": error / latents.numel(), "utilization": used.double().mean().item()}


def untrained_tokenizer(settings: TokenizerSettings, vae: ContinuousVAE) -> CodaTokenizer:
    """What `train_tokenizer` starts from: a copy of the VAE, with adapters or new weights, and a fresh quantizer.

    The quantizer draws its weights from torch's generator before the VAE does.
    """
    quantizer = settings.build_quantizer(vae.latent_channels)
    if settings.adapters == SCRATCH:
        return CodaTokenizer(fresh_copy(vae), quantizer)
    adapted = add_adapters(copy.deepcopy(vae), settings.adapters, settings.rank, settings.adapted_layers)
    return CodaTokenizer(adapted, quantizer)


def train_tokenizer(
    settings: TokenizerSettings,
    vae: ContinuousVAE,
    train: ImageDataset,
    val: ImageDataset,
    folder: str | Path,
    quantizer: ResidualQuantizer | None = None,
) -> CodaTokenizer:
    """Adapt a continuous VAE into a discrete tokenizer with the losses of Eq. 9-11, resuming what `folder` holds.

    Args:
        vae: frozen and without adapters; it is copied. With `adapters=SCRATCH` its architecture alone is taken.
        quantizer: a start for the quantizer, of the settings' kind and size (from `fit_quantizer`); None starts from
            scratch, as the paper does.
    Returns:
        The tokenizer with averaged weights, frozen.
    Raises:
        NonFiniteLoss: a term is not finite.
    """
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator()
    val.check_share(accelerator.num_processes)
    tokenizer = untrained_tokenizer(settings, vae)
    if quantizer is not None:
        ours, theirs = tokenizer.quantizer.config(), quantizer.config()
        if theirs != ours:
            raise ValueError(f"the given quantizer is {theirs}, the settings ask for {ours}")
        tokenizer.quantizer.load_state_dict(quantizer.state_dict())
    tokenizer.to(accelerator.device)
    if settings.adapters == SCRATCH:
        anchor = tokenizer.vae.autoencoder.decoder.conv_out.weight  # VQGAN's own choice
    else:
        anchor = last_decoder_adapter(tokenizer.vae)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    weights = settings.weights
    perceptual = build_perceptual(settings.perceptual_network, weights.perceptual)
    discriminator = build_discriminator(settings.discriminator_network, weights.adversarial)
    optimizers = {
        "generator": torch.optim.AdamW(
            trained, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )
    }
    if perceptual is not None:
        perceptual.to(accelerator.device)
    if discriminator is not None:
        discriminator.to(accelerator.device)
        optimizers["discriminator"] = torch.optim.AdamW(
            discriminator.heads.parameters(),
            settings.learning_rate,
            settings.betas,
            weight_decay=settings.discriminator_weight_decay,
        )
    parallel = accelerator.prepare(tokenizer)
    critic = None if discriminator is None else accelerator.prepare(discriminator)
    loop = Loop(
        settings,
        folder,
        accelerator,
        tokenizer,
        optimizers,
        {} if discriminator is None else {"discriminator": discriminator},
        data=train.name,
        images=len(train),
        vae=_checksum(*vae.state_dict().values()),
        start=None if quantizer is None else _checksum(*quantizer.state_dict().values()),
        networks=[None if network is None else network.name for network in (perceptual, discriminator)],
    )

    def batches(first: int):
        return training_batches(
            train,
            settings.batch_size,
            settings.seed,
            first,
            accelerator.process_index,
            accelerator.num_processes,
            settings.workers,
        )

    def generator_step(images: Tensor, step: int, last: bool) -> tuple[dict[str, Tensor], Tensor]:
        with autocast(settings.precision, accelerator.device):
            output = parallel(images)
        terms = reconstruction_terms(images, output.reconstruction, perceptual)
        factors = {}
        if discriminator is not None:
            with frozen(critic) as judge, autocast(settings.precision, accelerator.device):
                adversarial = generator_hinge(judge(output.reconstruction))
            # Without an adapted decoder nothing of it is trained: the gradients are then compared at its input.
            adaptive = adaptive_weight(
                weighted_sum(terms, weights), adversarial, output.quantized if anchor is None else anchor
            )
            terms["adversarial"] = adversarial
            factors["adversarial"] = adaptive * ramp(step, settings.steps)
        terms |= {"quantization": output.quantization_loss, "entropy": output.entropy_loss}
        loss = weighted_sum(terms, weights, factors)
        loop.update(loss, terms, "generator", trained, last)
        return terms | {"loss": loss} | {
            f"{name}_factor": value for name, value in factors.items()
        }, output.reconstruction

    def discriminator_step(images: Tensor, reconstruction: Tensor, last: bool) -> dict[str, Tensor]:
        with autocast(settings.precision, accelerator.device):
            real, fake = real_and_fake(critic, images, reconstruction)
        terms = {"discriminator": discriminator_hinge(real, fake)}
        loop.update(terms["discriminator"], terms, "discriminator", list(discriminator.heads.parameters()), last)
        return terms

    def train_step(micro_batches: list[dict], step: int) -> dict[str, Tensor]:
        for i, batch in enumerate(micro_batches):
            images, last = batch["image"].to(accelerator.device), i == len(micro_batches) - 1
            terms, reconstruction = generator_step(images, step, last)
            if discriminator is not None:
                terms |= discriminator_step(images, reconstruction, last)
        return {name: torch.as_tensor(value) for name, value in terms.items()}

    def evaluate() -> dict[str, float]:
        measures = ReconstructionMetrics(settings.codebook_size, len(settings.scales), frechet=None)
        share = accelerator.process_index, accelerator.num_processes
        values = measure(
            tokenizer,
            val,
            measures.to(accelerator.device),
            settings.batch_size,
            settings.seed,
            *share,
            settings.workers,
        )
        return {f"val_{name}": values[name] for name in ("psnr", "quantization_error", "utilization")}

    loop.run(batches, train_step, evaluate, "tokenizer")
    loop.load_averaged()
    return tokenizer.eval().requires_grad_(False)


def train_and_save(
    settings: TokenizerSettings,
    base: str | Path,
    train: ImageDataset,
    val: ImageDataset,
    folder: str | Path,
    quantizer: ResidualQuantizer | None = None,
) -> None:
    """`train_tokenizer` of the VAE that `load_vae` takes for BASE, saved as FOLDER/tokenizer; for `codalib.launch`."""
    tokenizer = train_tokenizer(settings, load_vae(base), train, val, folder, quantizer)
    state = PartialState()
    if state.is_main_process:
        own = settings.adapters == SCRATCH  # a VAE of its own is stored with it
        tokenizer.save_pretrained(Path(folder) / "tokenizer", base=None if own else base)
    state.wait_for_everyone()


def _checksum(*tensors: Tensor) -> str:
    """Changes when the tensors do: their shapes and two sums, enough to tell runs apart."""
    parts = [(tuple(t.shape), t.double().sum().item(), t.double().abs().sum().item()) for t in tensors]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
