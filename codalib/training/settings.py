"""The settings of the training stages, each default stated once, with its unit and source."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from codalib.datasets.token_cache import TokenCache
from codalib.models.adapters import ADAPTED_LAYERS
from codalib.models.library_quantizers import LIBRARY_KINDS
from codalib.models.loss_weights import LossWeights
from codalib.models.maskgit import PRESETS, MaskGIT
from codalib.models.masks import MASK_RATIOS
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.quantizer_kinds import quantizer_from_config


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What every training stage has; a stage's own settings extend it."""

    steps: int  # optimiser steps
    batch_size: int  # images a process and micro-batch
    accumulation: int = 1  # micro-batches a step
    learning_rate: float = 5e-4
    warmup_steps: int = 0  # linear, before the cosine
    final_learning_rate: float = 0.0  # at the cosine's end, as a share of learning_rate
    weight_decay: float = 0.005
    betas: tuple[float, float] = (0.5, 0.9)
    clip: float = 10.0  # gradient norm
    ema: float = 0.9999  # decay of the weights' average, ramped as (1 + step) / (10 + step); 0: none
    ema_start: int = 0  # steps before the average begins; until then it is the weights themselves
    precision: str = "auto"  # "auto" (bfloat16 where the hardware multiplies it), "float32" or "bfloat16"
    seed: int = 0
    workers: int = 0  # data loading processes
    log_every: int = 10  # steps
    checkpoint_every: int = 500  # steps
    evaluate_every: int = 0  # steps; 0: only at the end

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}, expected 'auto', 'float32' or 'bfloat16'")

    def fingerprint(self, **inputs) -> str:
        """Changes with everything that changes the result, so that a checkpoint is never resumed by another run."""
        outer = {"log_every", "checkpoint_every", "workers"}
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in outer} | inputs
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


# For `TokenizerSettings.adapters`: nothing is adapted, a VAE of the same architecture is trained from random weights.
SCRATCH = "scratch"


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


@dataclass(frozen=True)
class QuantizerSettings(LoopSettings):
    """Settings of `fit_quantizer`; the defaults are the release's for MAR with 65,536 codes."""

    kind: str = (
        "attention"  # "attention" (CODA), "nearest" (the VQ baseline) or one of codalib.models.library_quantizers
    )
    codebook_size: int = 65536  # K
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each level; the last is the latent grid's
    start: str = "random"  # of the codes: "random" (standard normal) or "data" (features of the training latents)
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


CONDITIONS = ("class", "text", "none")


@dataclass(frozen=True)
class MaskGITSettings(LoopSettings):
    """Settings of `train_maskgit`: the paper's (section 5.1), and MaskGIT's where the paper is silent."""

    steps: int = 500_000
    batch_size: int = 256  # on 8 processes the paper's 2,048 a step
    learning_rate: float = 4e-4
    warmup_steps: int = 5000  # the paper names none; a transformer without one diverges at this rate
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.045  # of matrices; none on embeddings, norms and biases
    clip: float = 1.0
    ema: float = 0.9999
    preset: str = "L"  # "L" (the paper's), "S" or "XS"
    width: int | None = None  # None: the preset's
    depth: int | None = None  # layers; None: the preset's
    heads: int | None = None  # None: the preset's
    condition: str = "class"  # "class", "text" or "none"
    level_positions: bool = True  # position embeddings of each level's own; False: one set (ablation)
    code_embeddings: bool = False  # the tokenizer's code values join the learned embeddings
    latent_context: bool = False  # what the visible tokens sum up to joins the embeddings; needs code_embeddings (ours)
    mask_ratio: str = "cosine"  # how the share of masked tokens is drawn: "cosine" or "beta" (12, 3)
    coarse_first: float = 0.0  # share of masks whose visible tokens fill the levels coarse to fine
    label_smoothing: float = 0.1
    dropout: float = 0.1
    condition_dropout: float = 0.1  # share of samples that do not see their condition, for guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition is {self.condition!r}, expected one of {', '.join(CONDITIONS)}")
        if self.preset not in PRESETS or self.mask_ratio not in MASK_RATIOS:
            raise ValueError(
                f"preset {self.preset!r} and mask_ratio {self.mask_ratio!r} got, expected one of {', '.join(PRESETS)} "
                f"and one of {', '.join(MASK_RATIOS)}"
            )
        if self.latent_context and not self.code_embeddings:
            raise ValueError(
                "latent_context is on and code_embeddings off, expected both on: it sums the codes' values"
            )
        for name in ("label_smoothing", "dropout", "condition_dropout", "coarse_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")

    def build_model(self, cache: TokenCache, text_dim: int | None = None) -> MaskGIT:
        """A fresh model of these settings for a cache's tokens."""
        size = {"width": self.width, "depth": self.depth, "heads": self.heads}
        return MaskGIT.preset(
            self.preset,
            cache.codebook_size,
            cache.scales,
            num_classes=len(cache.classes) if self.condition == "class" else None,
            text_dim=text_dim if self.condition == "text" else None,
            dropout=self.dropout,
            level_positions=self.level_positions,
            code_values=cache.code_values if self.code_embeddings else None,
            latent_context=self.latent_context,
            **{name: value for name, value in size.items() if value is not None},
        )
