"""The settings of the training stages: each default with its unit and source.

They stand here alone, but for what the quantizers' constructors take from Python too; tests hold both to the release.
Sources: the paper (arXiv:2503.17760, section 5.1), the authors' released code ("release"), MaskGIT (arXiv:2202.04200);
without one the value is ours. A notebook takes any field by name, as a parameter of its own or in `settings`.
"""

import dataclasses
import hashlib
import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

from codalib.base.seeds import check_seed
from codalib.datasets.token_cache import CacheSettings, TokenCache
from codalib.models.adapters import ADAPTED_LAYERS, ADAPTED_PARTS
from codalib.models.checks import check_list, check_positive, check_quantizer, check_range, check_whole
from codalib.models.loss_weights import ADAPTIVE_LAYERS, LossWeights
from codalib.models.maskgit import PRESETS, MaskGIT
from codalib.models.masks import MASK_RATIOS
from codalib.models.quantizer import BACKENDS, NORMS, ResidualQuantizer
from codalib.models.quantizer_kinds import KINDS, quantizer_from_config
from codalib.pretrained.registry import has_weights

EXECUTION = ("compile", "gradient_checkpointing")  # fields that decide the time and the memory, but no result


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What every training stage has; a stage's own settings extend it."""

    steps: int  # optimiser steps
    batch_size: int  # images a process and micro-batch
    accumulation: int = 1  # micro-batches a step
    learning_rate: float = 5e-4  # of all AdamW optimisers, before the cosine (paper)
    warmup_steps: int = 0  # linear, before the cosine (release)
    final_learning_rate: float = 0.0  # at the cosine's end, as a fraction of learning_rate (release)
    weight_decay: float = 0.005  # of the quantizer and the adapters (release)
    betas: tuple[float, float] = (0.5, 0.9)  # of AdamW (release)
    clip: float = 10.0  # largest norm of the gradients (release)
    ema: float = 0.9999  # decay of the weights' average, ramped as (1 + step) / (10 + step) (release); 0: none
    ema_start: int = 0  # steps before the average begins; until then it is the weights themselves
    precision: str = "auto"  # "auto" (bfloat16 where the hardware multiplies it), "float32" or "bfloat16"
    seed: int = 0  # of everything random
    workers: int = 0  # processes that load images
    log_every: int = 10  # steps between lines of the log
    checkpoint_every: int = 500  # steps between checkpoints
    evaluate_every: int = 0  # steps between validations; 0: only at the end
    compile: bool = False  # the VAE's and the transformer's code by torch.compile: minutes at the start, then faster
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third slower

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch_size", "accumulation", "log_every", "checkpoint_every"), 1)
        for name in (*least, "warmup_steps", "ema_start", "evaluate_every", "workers"):
            check_whole(least.get(name, 0), **{name: getattr(self, name)})
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            check_range(0, math.inf, **{name: getattr(self, name)})
        check_positive(clip=self.clip)
        check_range(0, 1, ema=self.ema)
        check_seed(self.seed)
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"expected precision 'auto', 'float32' or 'bfloat16', got {self.precision!r}")

    def deciding(self) -> dict[str, Any]:
        """The fields by name, as `asdict` gives them, without those that say how alone the work is done.

        Names of finished trials are made of them: a field that joins `EXECUTION` leaves every name as it is.
        """
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in EXECUTION}

    def fingerprint(self, **inputs) -> str:
        """Changes with everything that changes the result, so that a checkpoint is never resumed by another run."""
        outer = {"log_every", "checkpoint_every", "workers"}
        values = {k: v for k, v in self.deciding().items() if k not in outer} | inputs
        if self.compile:  # fused code rounds otherwise; checkpointing computes the same once more
            values["compile"] = True
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


STARTS = ("random", "data")  # of a quantizer's codes
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

    kind: str = "attention"  # Eq. 7 (paper); "nearest" (the VQ baseline) or one of models.library_quantizers
    codebook_size: int = 65536  # K (paper, Table 2)
    # The side of each level, the last the latent grid's: 680 tokens (release; the paper says only 10 levels).
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    start: str = "random"  # of the codes: "random" (standard normal) or "data" (features of the training latents)
    attention_dim: int = 32  # D, the width of queries and keys (release)
    norm: str | None = "rms"  # of queries and keys: "rms" (paper, Table 4c), "layer" or None
    # Of Eq. 10's second term, the code to its feature (release); of nearest codes VQ-VAE's commitment (0.25 there).
    beta: float = 0.05
    entropy_temperature: float = 0.01  # of the softmax in the entropy term (release)
    backend: str = "auto"  # of the assignment: "auto", "reference", "tiled", "compiled" or "triton"
    quantization_weight: float = 1.0  # of the quantization term, Eq. 10-11 (release)
    entropy_weight: float = 0.05  # of the entropy term (release)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, value, known in (
            ("quantizer kind", self.kind, KINDS),
            ("start", self.start, STARTS),
            ("norm", self.norm, NORMS),
        ):
            if value not in known:
                raise ValueError(f"expected a {what} of {' or '.join(map(str, known))}, got {value!r}")
        check_quantizer(1, self.codebook_size, self.scales, self.beta, self.backend, BACKENDS)
        check_whole(1, attention_dim=self.attention_dim)
        check_positive(entropy_temperature=self.entropy_temperature)
        check_range(0, math.inf, quantization_weight=self.quantization_weight, entropy_weight=self.entropy_weight)

    def build_quantizer(self, latent_channels: int) -> ResidualQuantizer:
        """A fresh quantizer of these settings."""
        own = inspect.signature(KINDS[self.kind]).parameters if self.kind in KINDS else {}
        config = {name: getattr(self, name) for name in own if name != "backend" and hasattr(self, name)}
        return quantizer_from_config(config | {"kind": self.kind, "latent_channels": latent_channels}, self.backend)


@dataclass(frozen=True)
class TokenizerSettings(QuantizerSettings):
    """Settings of `train_tokenizer`; the defaults are the release's for MAR (paper section 5.1, Eq. 9)."""

    adapters: str = "both"  # adapted part of the VAE (paper): "both", "encoder", "decoder", "none"; see also SCRATCH
    rank: int = 32  # of the adapters (paper)
    adapted_layers: tuple[str, ...] = ADAPTED_LAYERS  # parts of the adapted convolutions' names (release, for MAR)
    l1_weight: float = 0.2  # of the absolute error of the pixels (release)
    l2_weight: float = 1.0  # of their squared error (release)
    perceptual_weight: float = 1.0  # (release); 0 leaves the network unloaded
    adversarial_weight: float = 1.0  # times the adaptive weight and the ramp (release); 0 leaves the network unloaded
    perceptual_network: str | None = "auto"  # "perceptual_vgg" (LPIPS: paper), "perceptual_effnet" or what is here
    discriminator_network: str | None = "auto"  # "dino" (paper), "effnet" or what is here
    discriminator_weight_decay: float = 0.0005  # (release)
    # Where the adversarial gradients are weighed: "first_upsample" (release, for MAR) or "last" (VQGAN), the adapters.
    adaptive_layer: str = "first_upsample"
    ema_ramp: int = 2  # training steps for one step of the average's ramp (release)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive_layer not in ADAPTIVE_LAYERS:
            raise ValueError(f"expected adaptive_layer {' or '.join(ADAPTIVE_LAYERS)}, got {self.adaptive_layer!r}")
        if self.adapters not in (*ADAPTED_PARTS, SCRATCH):
            raise ValueError(f"expected adapters of {', '.join((*ADAPTED_PARTS, SCRATCH))}, got {self.adapters!r}")
        check_whole(1, ema_ramp=self.ema_ramp, rank=self.rank)
        check_list(adapted_layers=self.adapted_layers)
        _ = self.weights  # says which is none

    def check_grid(self, side: int) -> None:
        """Raise ValueError where the last level is not the latent grid, which has this side."""
        if self.scales[-1] != side:
            raise ValueError(f"expected scales that end with {side}, the latent grid's side, got {self.scales}")

    def deciding(self) -> dict[str, Any]:
        """As in `LoopSettings`, with the network that "auto" stands for where it is not the one that every copy has."""
        values = super().deciding()
        for name, weights, network in (
            ("perceptual_network", "vgg16_lpips", "perceptual_vgg"),
            ("discriminator_network", "dino_vits16", "dino"),
        ):
            if values[name] == "auto" and has_weights(weights):
                values[name] = network
        return values

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


@dataclass(frozen=True)
class FitSettings:
    """The start of a tokenizer's quantizer on latents alone, before the images (ours; the paper has none)."""

    fit_steps: int = 0  # optimiser steps; 0: no such start, as in the paper
    fit_batch_size: int = 16  # latents a step
    fit_learning_rate: float = 0.005  # before the cosine
    fit_entropy_weight: float = 0.05  # of the entropy term, where the quantization term has weight 1

    def quantizer(self, own: TokenizerSettings, log_every: int) -> QuantizerSettings:
        """Settings of `fit_quantizer` for the quantizer of a tokenizer's settings."""
        shared = {field.name: getattr(own, field.name) for field in dataclasses.fields(QuantizerSettings)}
        fit = {
            "steps": self.fit_steps,
            "batch_size": self.fit_batch_size,
            "learning_rate": self.fit_learning_rate,
            "entropy_weight": self.fit_entropy_weight,
        }
        fixed = {"quantization_weight": 1.0, "accumulation": 1, "ema": 0.0, "evaluate_every": 0, "log_every": log_every}
        return QuantizerSettings(**shared | fit | fixed)


@dataclass(frozen=True)
class EncodingSettings:
    """How training images become a MaskGIT's tokens, once and for all; validation images are encoded once, as are."""

    views: int = CacheSettings.views  # times that each image is encoded, each with a noise (and a crop) of its own
    random_crop: bool = False  # a crop of an enlarged picture, as the tokenizer's training takes it
    flip: bool = CacheSettings.flip  # mirror every second view

    def __post_init__(self) -> None:
        check_whole(1, views=self.views)


CONDITIONS = ("class", "text", "none")


@dataclass(frozen=True)
class MaskGITSettings(LoopSettings):
    """Settings of `train_maskgit`: the paper's (section 5.1), and MaskGIT's where the paper is silent."""

    steps: int = 500_000  # (paper)
    batch_size: int = 256  # on 8 processes the paper's 2,048 a step
    learning_rate: float = 4e-4  # before the cosine (paper; the cosine: ours)
    warmup_steps: int = 5000  # the paper names none; a transformer without one diverges at this rate
    betas: tuple[float, float] = (0.9, 0.96)  # of AdamW (MaskGIT)
    weight_decay: float = 0.045  # of matrices; none on embeddings, norms and biases (MaskGIT)
    clip: float = 1.0  # largest norm of the gradients
    ema: float = 0.9999  # decay of the weights' average, ramped
    preset: str = "L"  # "L" (24 layers of width 768, 16 heads: the paper's 195M parameters), "S" or "XS"
    width: int | None = None  # None: the preset's
    depth: int | None = None  # layers; None: the preset's
    heads: int | None = None  # None: the preset's
    condition: str = "class"  # "class", "text" or "none"
    level_positions: bool = True  # position embeddings of each level's own (paper); False: one set (ablation)
    code_embeddings: bool = False  # the tokenizer's code values join the learned embeddings
    latent_context: bool = False  # what the visible tokens sum up to joins the embeddings; needs code_embeddings (ours)
    mask_ratio: str = "cosine"  # how the fraction of masked tokens is drawn: "cosine" (MaskGIT) or "beta" (12, 3)
    coarse_first: float = 0.0  # probability of a mask whose visible tokens fill the levels coarse to fine
    label_smoothing: float = 0.1  # fraction of the target that is spread over all codes (MaskGIT)
    dropout: float = 0.1  # in the transformer (MaskGIT)
    condition_dropout: float = 0.1  # probability that a sample does not see its condition, for guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition not in CONDITIONS:
            raise ValueError(f"expected condition {' or '.join(CONDITIONS)}, got {self.condition!r}")
        if self.preset not in PRESETS or self.mask_ratio not in MASK_RATIOS:
            raise ValueError(
                f"expected preset {' or '.join(PRESETS)} and mask_ratio {' or '.join(MASK_RATIOS)}, "
                f"got {self.preset!r} and {self.mask_ratio!r}"
            )
        if self.latent_context and not self.code_embeddings:
            raise ValueError("expected code_embeddings with latent_context, which sums the codes' values, got it off")
        for name in ("label_smoothing", "dropout", "condition_dropout", "coarse_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {getattr(self, name)}")

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
