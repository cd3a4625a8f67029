"""The training stages: pretrain a continuous VAE, adapt one into a discrete tokenizer."""

import copy
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from codalib.base.processes import make_accelerator
from codalib.datasets.images import ImageDataset, training_batches
from codalib.evaluation.metrics import ReconstructionMetrics
from codalib.models.adapters import add_adapters
from codalib.models.adversary import build_discriminator, frozen, real_and_fake
from codalib.models.baselines import fresh_copy
from codalib.models.checkpoints import load_vae
from codalib.models.loss_weights import adaptive_weight, last_decoder_adapter, ramp
from codalib.models.losses import discriminator_hinge, generator_hinge, reconstruction_terms, weighted_sum
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.perceptual import build_perceptual
from codalib.training.settings import SCRATCH, TokenizerSettings
from codalib.training.trainer import Loop, _checksum, autocast


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
            with frozen(critic) as adversary, autocast(settings.precision, accelerator.device):
                adversarial = generator_hinge(adversary(output.reconstruction))
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
        values = evaluate(
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
    """`train_tokenizer` of the VAE that `load_vae` takes for BASE, saved as FOLDER/tokenizer; for `base.processes`."""
    tokenizer = train_tokenizer(settings, load_vae(base), train, val, folder, quantizer)
    state = PartialState()
    if state.is_main_process:
        own = settings.adapters == SCRATCH  # a VAE of its own is stored with it
        tokenizer.save_pretrained(Path(folder) / "tokenizer", base=None if own else base)
    state.wait_for_everyone()
