"""Quantizers: latents <-> indices of codes, over the scales of a residual pyramid (Eq. 1-8 of arXiv:2503.17760).

`ResidualAttentionQuantizer` (CODA) and `ResidualNearestQuantizer` (the VQ baseline) share one residual scheme and
differ in how a level assigns its features to codes. With a single scale, equal to the latent grid, they are the plain
attention quantizer and plain VQ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codalib.kernels.assignment import (
    BACKENDS,
    argmax_assign,
    nearest_assign,
    resolve_backend,
    softmax_assign,
    top_assign,
    top_nearest,
)
from codalib.models.tokens import Tokens

MAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # 680 tokens; the release's levels for 16 x 16 latents
FLUX_SCALES = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # 2,240 tokens; the release's levels for 32 x 32 latents
NORM_EPS = 1e-5


class Ranking(NamedTuple):
    """The codes that suit features best, see `ResidualQuantizer.ranking`."""

    scores: Tensor  # (B, p, p, top)
    codes: Tensor  # (B, p, p, top) int64


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer makes of latents (B, C, H, W)."""

    quantized: Tensor  # (B, C, H, W): the sum of all levels, with a gradient to the latents
    indices: Tokens  # one (B, p, p) int64 a level, coarse to fine, values in [0, K)
    quantization_loss: Tensor  # (): Eq. 10-11, the mean over the levels
    entropy_loss: Tensor  # (): the mean over the levels, in nats; 0 for the nearest neighbour


class Level(NamedTuple):
    """What one level makes of its N = B p p features."""

    value: Tensor  # (N, C), with a gradient to the features
    indices: Tensor  # (N,) int64
    quantization_loss: Tensor  # ()
    entropy: Tensor  # ()


class ResidualQuantizer(nn.Module):
    """The residual scheme that both quantizers share (Eq. 4-5 of arXiv:2503.17760).

    Level l averages the residual over the cells of a p_l x p_l grid, assigns each cell to a code of the one shared
    codebook, upsamples the codes' values bicubically to H x W, adds them to the sum and takes them from the residual.

    Computes in float32 (float64 for float64 latents), also under autocast: at an entropy temperature of 0.01 the
    rounding of bfloat16 logits would be as large as the logits' differences.
    """

    kind: str  # "attention" or "nearest": what `quantizer_from_config` builds

    def __init__(
        self, latent_channels: int, codebook_size: int, scales: Sequence[int], beta: float, backend: str = "auto"
    ):
        super().__init__()
        scales = tuple(int(p) for p in scales)
        if not scales or min(scales) < 1 or max(scales) != scales[-1]:
            raise ValueError(
                f"scales {scales} got, expected sides of at least 1, the last (the latent grid) the largest"
            )
        if latent_channels < 1 or codebook_size < 1:
            raise ValueError(
                f"latent_channels {latent_channels} and codebook_size {codebook_size} got; expected both at least 1"
            )
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self.latent_channels, self.codebook_size, self.scales = latent_channels, codebook_size, scales
        self.beta, self.backend = beta, backend
        # Standard normal: the scale of normalised latents, for both quantizers alike. VQ's usual uniform(-1/K, 1/K)
        # starts with all codes in one clump near 0, from which the nearest neighbour frees only a few.
        self.codebooks = nn.Embedding(codebook_size, latent_channels)  # the released name

    # -- what a subclass defines -------------------------------------------------------------------------------------

    def _project_codes(self) -> tuple[Tensor, Tensor]:
        """What features are compared with, (K, any), and the codes' values (K, C): once a pass, for all levels."""
        raise NotImplementedError

    def _choose(self, features: Tensor, keys: Tensor, backend: str) -> Tensor:
        """Features (N, C) -> indices (N,), without gradients."""
        raise NotImplementedError

    def _assign(self, features: Tensor, keys: Tensor, values: Tensor, backend: str) -> Level:
        """Features (N, C) -> a level, with gradients; the indices are those of `_choose`."""
        raise NotImplementedError

    def _rank(self, features: Tensor, keys: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Features (N, C) -> scores and codes, both (N, top), the surest code first."""
        raise NotImplementedError

    # -- the shared scheme -------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: the sum of p^2 over the levels."""
        return sum(p * p for p in self.scales)

    @property
    def code_values(self) -> Tensor:
        """What each code adds to the latents, (K, C): its vector; with attention the projected values of Eq. 6."""
        return self._project_codes()[1].detach().float()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, C, H, W), H = W = scales[-1]; raises ValueError on any other shape."""
        residual = self._checked_latents(latents)
        backend = self._backend_for(residual)
        quantized, levels = torch.zeros_like(residual), []
        with torch.autocast(latents.device.type, enabled=False):
            keys, values = self._project_codes()
            for p in self.scales:
                level = self._assign(self._features(residual, p), keys, values, backend)
                upsampled = self._upsample(level.value, p)
                # With its gradient, as in the release: a level answers for the residual that it leaves to later ones.
                quantized, residual = quantized + upsampled, residual - upsampled
                levels.append(level)
            return QuantizerOutput(
                quantized=quantized,
                indices=Tokens(
                    (level.indices.view(-1, p, p) for level, p in zip(levels, self.scales, strict=True)),
                    self.codebook_size,
                ),
                quantization_loss=torch.stack([level.quantization_loss for level in levels]).mean(),
                entropy_loss=torch.stack([level.entropy for level in levels]).mean(),
            )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tokens:
        """Latents (B, C, H, W) -> indices, one (B, p, p) int64 a level, coarse to fine."""
        residual = self._checked_latents(latents)
        backend = self._backend_for(residual)
        indices = []
        with torch.autocast(latents.device.type, enabled=False):
            keys, values = self._project_codes()
            for p in self.scales:
                chosen = self._choose(self._features(residual, p), keys, backend)
                residual = residual - self._upsample(values[chosen], p)
                indices.append(chosen.view(-1, p, p))
        return Tokens(indices, self.codebook_size)

    def decode(self, indices: Sequence[Tensor], levels: int | None = None, partial: bool = False) -> Tensor:
        """Indices -> latents (B, C, H, W); `levels=k` sums the first k levels alone.

        Takes one (B, p, p) integer tensor a level, as `encode` gives them; the first k suffice with `levels=k`. With
        `partial` an index of -1 is a token that is not known: it adds nothing.
        Raises ValueError on a wrong number of levels, a wrong shape, or an index outside [0, K).
        """
        indices = self._checked_indices(indices, levels, lowest=-1 if partial else 0)
        with torch.autocast(indices[0].device.type, enabled=False):
            _, values = self._project_codes()
            quantized = values.new_zeros(len(indices[0]), self.latent_channels, self.scales[-1], self.scales[-1])
            for level, p in zip(indices, self.scales, strict=False):
                codes = level.flatten()
                added = values[codes.clamp(min=0)].masked_fill((codes < 0)[:, None], 0) if partial else values[codes]
                quantized = quantized + self._upsample(added, p)
        return quantized

    @torch.no_grad()
    def ranking(self, latents: Tensor, top: int = 50) -> list[Ranking]:
        """The codes that suit each feature best, with their scores (see `confidence`), one `Ranking` a level.

        A level's features are what the levels before it leave; the first code is the one that `encode` takes.
        """
        residual = self._checked_latents(latents)
        ranked = []
        with torch.autocast(latents.device.type, enabled=False):
            keys, values = self._project_codes()
            for p in self.scales:
                features = self._features(residual, p)
                scores, codes = self._rank(features, keys, top)
                ranked.append(Ranking(scores.view(-1, p, p, top), codes.view(-1, p, p, top)))
                chosen = self._choose(features, keys, self._backend_for(residual))
                residual = residual - self._upsample(values[chosen], p)
        return ranked

    def confidence(self, latents: Tensor, top: int = 50) -> list[Tensor]:
        """How sure the assignment is (Fig. 5 of arXiv:2503.17760): one (B, p, p, top) a level, the surest code first.

        Attention: the `top` largest softmax scores, falling, in [0, 1]. Nearest neighbour: the `top` least Euclidean
        distances, rising, in units of the latents.
        """
        return [level.scores for level in self.ranking(latents, top)]

    def config(self) -> dict:
        """The settings that rebuild this quantizer through `quantizer_from_config`, as plain values.

        The backend is not among them: it is a choice of the machine, not of the model.
        """
        return {
            "kind": self.kind,
            "latent_channels": self.latent_channels,
            "codebook_size": self.codebook_size,
            "scales": list(self.scales),
            "beta": self.beta,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config().items() if key != "kind")

    def _features(self, residual: Tensor, p: int) -> Tensor:
        if p != residual.shape[-1]:
            residual = F.interpolate(residual, size=(p, p), mode="area")
        return residual.permute(0, 2, 3, 1).reshape(-1, self.latent_channels)  # (B, C, p, p) -> (N, C)

    def _upsample(self, values: Tensor, p: int) -> Tensor:
        values = values.view(-1, p, p, self.latent_channels).permute(0, 3, 1, 2)  # (N, C) -> (B, C, p, p)
        side = self.scales[-1]
        return values if p == side else F.interpolate(values, size=(side, side), mode="bicubic")

    def _backend_for(self, latents: Tensor) -> str:
        return resolve_backend(self.backend, latents.device, len(latents) * self.num_tokens, self.codebook_size)

    def _checked_latents(self, latents: Tensor) -> Tensor:
        side = self.scales[-1]
        expected = (self.latent_channels, side, side)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != expected or len(latents) == 0:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} got, expected (B, {self.latent_channels}, {side}, {side}): "
                "the last scale is the latent grid; give latents of that size or build the quantizer with other scales"
            )
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    def _checked_indices(self, indices: Sequence[Tensor], levels: int | None, lowest: int = 0) -> list[Tensor]:
        count = len(self.scales) if levels is None else levels
        if not 1 <= count <= len(self.scales):
            raise ValueError(f"levels={levels} got, expected 1 to {len(self.scales)}, the number of scales")
        if not count <= len(indices) <= len(self.scales):
            raise ValueError(
                f"indices of {len(indices)} levels got, expected {count}: one (B, p, p) tensor for each scale in "
                f"{self.scales[:count]}"
            )
        indices = list(indices[:count])
        for number, (level, p) in enumerate(zip(indices, self.scales, strict=False)):
            expected = (len(indices[0]), p, p)
            if (
                tuple(level.shape) != expected
                or level.is_floating_point()
                or level.dtype == torch.bool
                or not len(level)
            ):
                raise ValueError(
                    f"indices of level {number} are {level.dtype} of shape {tuple(level.shape)}, expected integers of "
                    f"shape (B, {p}, {p}) with one B for all levels"
                )
            low, high = level.min().item(), level.max().item()
            if low < lowest or high >= self.codebook_size:
                raise ValueError(
                    f"indices of level {number} lie in [{low}, {high}], expected [{lowest}, {self.codebook_size - 1}]: "
                    "they were made with another codebook, or hold a mask token"
                )
        return [level.long() for level in indices]


class CodebookAttention(nn.Module):
    """The projections of Eq. 6: queries of the features; keys and values of the codes."""

    def __init__(self, channels: int, width: int, norm: str | None):
        super().__init__()
        self.to_q = nn.Linear(channels, width)
        self.to_k = nn.Linear(channels, width)
        self.to_v = nn.Linear(channels, channels)
        if norm == "rms":
            self.norm_q, self.norm_k = nn.RMSNorm(width, eps=NORM_EPS), nn.RMSNorm(width, eps=NORM_EPS)
        elif norm == "layer":
            self.norm_q, self.norm_k = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        elif norm is None:
            self.norm_q, self.norm_k = nn.Identity(), nn.Identity()
        else:
            raise ValueError(f'norm {norm!r} got, expected "rms", "layer" or None')

    def queries(self, features: Tensor) -> Tensor:
        return self.norm_q(self.to_q(features))  # (N, C) -> (N, D)

    def keys(self, codes: Tensor) -> Tensor:
        return self.norm_k(self.to_k(codes))  # (K, C) -> (K, D)


class ResidualAttentionQuantizer(ResidualQuantizer):
    """CODA's quantizer: softmax attention over one codebook shared by all levels (Eq. 6-8 of arXiv:2503.17760).

    A feature takes the code of its largest logit; the gradient is that of the softmax over all codes (index
    backpropagation). Parameters carry the released names: `codebooks.weight`, `attn.to_q.weight`, ...; they start as
    torch's `Embedding` and `Linear` do.

    latent_channels: C. codebook_size: K. scales: the side of each level's grid, the last one the latent grid's.
    attention_dim: D. norm: "rms", "layer" or None, of queries and keys. beta: weight of the last term of Eq. 10.
    entropy_temperature: divides the logits for the entropy. backend: see `kernels.assignment`.
    """

    kind = "attention"

    def __init__(
        self,
        latent_channels: int = 16,
        codebook_size: int = 65536,
        scales: Sequence[int] = MAR_SCALES,
        attention_dim: int = 32,
        norm: str | None = "rms",
        beta: float = 0.05,
        entropy_temperature: float = 0.01,
        backend: str = "auto",
    ):
        super().__init__(latent_channels, codebook_size, scales, beta, backend)
        if entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature {entropy_temperature} got, expected a number above 0")
        self.attention_dim, self.norm, self.entropy_temperature = attention_dim, norm, entropy_temperature
        self.attn = CodebookAttention(latent_channels, attention_dim, norm)

    def _project_codes(self) -> tuple[Tensor, Tensor]:
        return self.attn.keys(self.codebooks.weight), self.attn.to_v(self.codebooks.weight)

    def _choose(self, features: Tensor, keys: Tensor, backend: str) -> Tensor:
        return argmax_assign(self.attn.queries(features), keys, self.attention_dim**-0.5, backend)

    def _rank(self, features: Tensor, keys: Tensor, top: int) -> tuple[Tensor, Tensor]:
        logits, codes, log_sums = top_assign(self.attn.queries(features), keys, top, self.attention_dim**-0.5)
        return (logits - log_sums[:, None]).exp(), codes

    def _assign(self, features: Tensor, keys: Tensor, values: Tensor, backend: str) -> Level:
        queries = self.attn.queries(features)
        scale = self.attention_dim**-0.5
        assigned = softmax_assign(queries, keys, values, scale, self.entropy_temperature, backend)
        loss = (
            F.mse_loss(assigned.value, features)  # Eq. 11
            + F.mse_loss(assigned.hard.detach(), features)  # Eq. 10
            + self.beta * F.mse_loss(assigned.hard, features.detach())
        )
        return Level(assigned.value, assigned.indices, loss, assigned.entropy)

    def config(self) -> dict:
        return super().config() | {
            "attention_dim": self.attention_dim,
            "norm": self.norm,
            "entropy_temperature": self.entropy_temperature,
        }


class ResidualNearestQuantizer(ResidualQuantizer):
    """The VQ baseline: the nearest code, straight-through on the features (Eq. 1-2 of arXiv:2503.17760).

    Its loss is that of VQ-VAE: mse(code, sg[feature]) + beta * mse(sg[code], feature). Over several scales the
    straight-through gradients of the levels add up to exactly the identity, so `quantized` has the gradient of Eq. 2.

    The codes start standard normal, as those of the attention quantizer, so that a comparison starts from one
    distribution; `initialise_from` takes them from data instead.
    """

    kind = "nearest"

    def __init__(
        self,
        latent_channels: int = 16,
        codebook_size: int = 65536,
        scales: Sequence[int] = MAR_SCALES,
        beta: float = 0.25,
        backend: str = "auto",
    ):
        super().__init__(latent_channels, codebook_size, scales, beta, backend)

    def _project_codes(self) -> tuple[Tensor, Tensor]:
        return self.codebooks.weight, self.codebooks.weight

    def _choose(self, features: Tensor, keys: Tensor, backend: str) -> Tensor:
        return nearest_assign(features, keys, backend)

    def _rank(self, features: Tensor, keys: Tensor, top: int) -> tuple[Tensor, Tensor]:
        return top_nearest(features, keys, top)

    def _assign(self, features: Tensor, keys: Tensor, values: Tensor, backend: str) -> Level:
        indices = nearest_assign(features.detach(), keys.detach(), backend)
        codes = F.embedding(indices, values)
        loss = F.mse_loss(codes, features.detach()) + self.beta * F.mse_loss(codes.detach(), features)
        # Eq. 2 in an order whose value is the code without rounding.
        return Level(codes.detach() + (features - features.detach()), indices, loss, loss.new_zeros(()))

    @torch.no_grad()
    def initialise_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Replace the codes by features drawn from `latents` (B, C, H, W), a run of codes for each level.

        Each level gets a share of the codebook in proportion to its p (a level of more tokens gets more codes, but the
        coarse ones are not starved), draws it from the features of its residual, with repetition only where there are
        fewer features than codes, and quantizes with the codes drawn so far before the next level draws.
        """
        residual = self._checked_latents(latents)
        backend = self._backend_for(residual)
        shares = torch.tensor(self.scales, dtype=torch.float64).cumsum(0)
        ends = (shares / shares[-1] * self.codebook_size).round().long().tolist()
        start = 0
        for p, end in zip(self.scales, ends, strict=True):
            features = self._features(residual, p)
            repeats = -(-(end - start) // len(features))
            order = torch.cat([torch.randperm(len(features), generator=generator) for _ in range(max(repeats, 1))])
            self.codebooks.weight[start:end] = features[order[: end - start].to(features.device)]
            if end > 0:
                known = self.codebooks.weight[:end]
                residual = residual - self._upsample(known[nearest_assign(features, known, backend)], p)
            start = end


QUANTIZERS = {cls.kind: cls for cls in (ResidualAttentionQuantizer, ResidualNearestQuantizer)}


def quantizer_from_config(config: dict, backend: str = "auto") -> ResidualQuantizer:
    """The quantizer of a `config()`, with fresh parameters; raises ValueError on an unknown kind or setting."""
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in QUANTIZERS:
        raise ValueError(f"quantizer kind {kind!r} got, expected one of {', '.join(QUANTIZERS)}")
    try:
        return QUANTIZERS[kind](**settings, backend=backend)
    except TypeError as error:
        raise ValueError(f"quantizer settings {sorted(settings)} do not fit kind {kind!r}: {error}") from error
