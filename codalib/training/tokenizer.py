"""The tokenizer's training stage: adapt a continuous VAE into a discrete tokenizer (Eq. 9-11 of arXiv:2503.17760)."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from codalib.base.hardware import to_device
from codalib.base.processes import average_statistics
from codalib.datasets.images import ImageDataset, share_content_digests, training_batches
from codalib.evaluation.metrics import ReconstructionMetrics
from codalib.evaluation.reconstruction import evaluate
from codalib.models.adapters import add_adapters
from codalib.models.adversary import build_discriminator, frozen, real_and_fake
from codalib.models.baselines import fresh_copy
from codalib.models.checkpoints import load_vae
from codalib.models.loss_weights import adaptive_weight, adaptive_weight_layer, ramp
from codalib.models.losses import discriminator_hinge, generator_hinge, reconstruction_terms, weighted_sum
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.perceptual import PerceptualEffNet, build_perceptual
from codalib.training.execution import build_adamw, prepare_vae
from codalib.training.settings import SCRATCH, TokenizerSettings
from codalib.training.trainer import Stage, TimeLimit, Trainer, checksum

FeatureMaps = tuple[list[Tensor], list[Tensor]]  # of real images and of their reconstructions


def untrained_tokenizer(settings: TokenizerSettings, vae: ContinuousVAE) -> CodaTokenizer:
    """What `train_tokenizer` starts from: a copy of the VAE, with adapters or new weights, and a fresh quantizer.

    The quantizer draws its weights from torch's generator before the VAE does.
    """
    quantizer = settings.build_quantizer(vae.latent_channels)
    if settings.adapters == SCRATCH:
        return CodaTokenizer(fresh_copy(vae), quantizer)
    adapted = add_adapters(copy.deepcopy(vae), settings.adapters, settings.rank, settings.adapted_layers)
    return CodaTokenizer(adapted, quantizer)


class TokenizerStage(Stage):
    """Reconstruct images through the codes; a step of the tokenizer, then one of the discriminator."""

    def __init__(
        self,
        settings: TokenizerSettings,
        vae: ContinuousVAE,
        train: ImageDataset,
        val: ImageDataset,
        folder: str | Path,
        quantizer: ResidualQuantizer | None,
    ):
        super().__init__(settings)
        val.check_enough_images(self.world_size)
        share_content_digests(train, val)
        self.train, self.val, self.weights = train, val, settings.weights
        self.tokenizer = self.build_tokenizer(vae, quantizer)
        self.trained = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.perceptual = build_perceptual(settings.perceptual_network, self.weights.perceptual)
        self.discriminator = build_discriminator(settings.discriminator_network, self.weights.adversarial)
        networks = self.perceptual, self.discriminator
        for network in networks:
            if network is not None:
                network.to(self.device)
        optimizers = {"generator": self.optimizer(self.trained, settings.weight_decay)}
        if self.discriminator is not None:
            heads = list(self.discriminator.heads.parameters())
            optimizers["discriminator"] = self.optimizer(heads, settings.discriminator_weight_decay)
        self.parallel = self.accelerator.prepare(self.tokenizer)
        self.parallel_discriminator = self.discriminator and self.accelerator.prepare(self.discriminator)
        self.trainer = Trainer(
            settings,
            folder,
            self.accelerator,
            self.tokenizer,
            optimizers,
            {} if self.discriminator is None else {"discriminator": self.discriminator},
            settings.ema_ramp,
            data=[train.inputs, val.inputs],
            vae=[checksum(*vae.state_dict().values()), vae.scale, vae.shift],
            start=None if quantizer is None else checksum(*quantizer.state_dict().values()),
            networks=[None if network is None else network.name for network in networks],
        )

    def build_tokenizer(self, vae: ContinuousVAE, start: ResidualQuantizer | None) -> CodaTokenizer:
        tokenizer = untrained_tokenizer(self.settings, vae)
        if start is not None:
            ours, theirs = tokenizer.quantizer.config(), start.config()
            if theirs != ours:
                raise ValueError(f"expected a quantizer of the settings, {ours}, got {theirs}")
            tokenizer.quantizer.load_state_dict(start.state_dict())
        tokenizer.to(self.device)
        prepare_vae(tokenizer.vae.autoencoder, self.settings, self.device)
        return tokenizer

    def optimizer(self, parameters: list[Tensor], weight_decay: float) -> torch.optim.AdamW:
        return build_adamw(parameters, self.settings, weight_decay=weight_decay)

    @property
    def adaptive_layer(self) -> Tensor | None:
        """Where the gradients of the adaptive weight are compared; None where no part of the decoder is trained."""
        if self.settings.adapters == SCRATCH:
            return self.tokenizer.vae.autoencoder.decoder.conv_out.weight  # VQGAN's own choice
        return adaptive_weight_layer(self.tokenizer.vae, self.settings.adaptive_layer)

    def batches(self, first: int) -> Iterator[dict]:
        own = self.settings
        return training_batches(self.train, own.batch_size, own.seed, first, self.rank, self.world_size, own.workers)

    def train_step(self, micro_batches: list[dict], step: int) -> dict[str, Tensor]:
        for i, batch in enumerate(micro_batches):
            images, last = to_device(batch["image"], self.device), i == len(micro_batches) - 1
            with self.gradients_apart(not last, self.parallel, self.parallel_discriminator):
                terms, reconstruction, maps = self.generator_step(images, step, last)
                if self.discriminator is not None:
                    terms |= self.discriminator_step(images, reconstruction, maps, last)
        return {name: torch.as_tensor(value) for name, value in terms.items()}

    def generator_step(
        self, images: Tensor, step: int, last: bool
    ) -> tuple[dict[str, Tensor], Tensor, FeatureMaps | None]:
        with self.autocast():
            output = self.parallel(images)
        # The images' losses are differentiated by the reconstruction first, so that each frozen network is gone back
        # through once; then all goes back through the decoder together.
        seen = output.reconstruction.detach().requires_grad_()
        seen = seen.view_as(seen)  # no leaf, which torch's count of operations (`codalib rehearse`) cannot hook
        maps, factors = self.feature_maps(images, seen), {}
        terms = reconstruction_terms(images, seen, None if maps else self.perceptual)
        if maps:
            terms[self.perceptual.name] = self.perceptual.between(*maps).mean()
        gradient = self.gradient(weighted_sum(terms, self.weights), seen)
        if self.discriminator is not None:
            with frozen(self.parallel_discriminator) as discriminator, self.autocast():
                adversarial = generator_hinge(discriminator(seen, maps=maps and maps[1]))
            against = self.gradient(adversarial, seen)
            # Without an adapted decoder nothing of it is trained: the gradients are then compared at its input.
            where = output.quantized if self.adaptive_layer is None else self.adaptive_layer
            adaptive = torch.zeros(())
            if where.requires_grad:  # nearest codes on a frozen VAE learn from the quantization term alone
                both = ((output.reconstruction * own).sum() for own in (gradient, against))
                adaptive = adaptive_weight(*both, where)
            terms["adversarial"] = adversarial
            factors["adversarial"] = adaptive * ramp(step, self.settings.steps)
            gradient = gradient + self.weights.adversarial * factors["adversarial"] * against
        latent = {"quantization": output.quantization_loss, "entropy": output.entropy_loss}
        terms |= latent
        loss = (output.reconstruction * gradient).sum() + weighted_sum(latent, self.weights)  # its gradient is Eq. 9's
        self.trainer.update(loss, terms, "generator", self.trained, last)
        whole = weighted_sum(terms, self.weights, factors)
        logged = terms | {"loss": whole} | {f"{name}_factor": value for name, value in factors.items()}
        return logged, output.reconstruction, maps

    def feature_maps(self, images: Tensor, reconstruction: Tensor) -> FeatureMaps | None:
        """What the perceptual distance and the discriminator both see, where they are one network in one precision."""
        alike = isinstance(self.perceptual, PerceptualEffNet) and self.discriminator is not None
        if not alike or self.discriminator.name != "discriminator_effnet" or self.bfloat16:
            return None
        with torch.no_grad():
            real = self.perceptual.feature_maps(images)
        return real, self.perceptual.feature_maps(reconstruction)

    @staticmethod
    def gradient(loss: Tensor, images: Tensor) -> Tensor:
        return torch.autograd.grad(loss, images, retain_graph=True)[0]

    def discriminator_step(
        self, images: Tensor, reconstruction: Tensor, maps: FeatureMaps | None, last: bool
    ) -> dict[str, Tensor]:
        with self.autocast():
            real, fake = real_and_fake(self.parallel_discriminator, images, reconstruction, maps=maps)
        terms = {"discriminator": discriminator_hinge(real, fake)}
        heads = list(self.discriminator.heads.parameters())
        self.trainer.update(terms["discriminator"], terms, "discriminator", heads, last)
        if last:
            average_statistics(self.discriminator)
        return terms

    def evaluate(self) -> dict[str, float]:
        own = self.settings
        metrics = ReconstructionMetrics(own.codebook_size, len(own.scales), frechet=None).to(self.device)
        place = self.rank, self.world_size
        values = evaluate(self.tokenizer, self.val, metrics, own.batch_size, own.seed, *place, own.workers)
        names = [name for name in values if name.startswith("perplexity_level_")]
        return {f"val_{name}": values[name] for name in ("psnr", "quantization_error", "utilization", *names)}


def train_tokenizer(
    settings: TokenizerSettings,
    vae: ContinuousVAE,
    train: ImageDataset,
    val: ImageDataset,
    folder: str | Path,
    quantizer: ResidualQuantizer | None = None,
    limit: TimeLimit | None = None,
) -> CodaTokenizer:
    """Adapt a continuous VAE into a discrete tokenizer with the losses of Eq. 9-11, resuming what `folder` holds.

    Args:
        vae: frozen and without adapters; it is copied. With `adapters=SCRATCH` its architecture alone is taken.
        quantizer: a start for the quantizer, of the settings' kind and size (from `fit_quantizer`); None starts from
            scratch, as the paper does.
        limit: minutes after which it may end early, see `training.trainer.TimeLimit`.
    Returns:
        The tokenizer with averaged weights, frozen.
    Raises:
        NonFiniteLoss: a term is not finite.
    """
    stage = TokenizerStage(settings, vae, train, val, folder, quantizer)
    stage.trainer.run(stage, "tokenizer", limit)
    return stage.tokenizer.eval().requires_grad_(False)


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
