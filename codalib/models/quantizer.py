"""CODA's quantizer: latents <-> indices of codes over a residual pyramid (Eq. 4-8, 10, 11 of arXiv:2503.17760).

`softmax_assignment` is the formula, backend "reference". The other backends compute the same in `codalib.kernels`
without a tokens x codes matrix in memory, and tests hold them to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codalib.kernels import assignment as kernels
from codalib.kernels.assignment import ENTROPY_EPS, Assignment
from codalib.models.checks import check_indices, check_latents, check_positive, check_quantizer
from codalib.models.tokens import Tokens

MAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # 680 tokens; the release's levels for 16 x 16 latents
FLUX_SCALES = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # 2,240 tokens; the release's levels for 32 x 32 latents
BACKENDS = ("reference", *kernels.BACKENDS)
NORMS = ("rms", "layer", None)  # of queries and keys
NORM_EPS = 1e-5


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer makes of latents (B, C, H, W)."""

    quantized: Tensor  # (B, C, H, W): the sum of all levels, with a gradient to the latents
    indices: Tokens  # one (B, p, p) int64 a level, coarse to fine, values in [0, K)
    quantization_loss: Tensor  # (): Eq. 10-11, the mean over the levels
    entropy_loss: Tensor  # (): the mean over the levels, in nats; 0 for the nearest neighbour


class Level(NamedTuple):
    """What one level makes of its N = B p p features; the last two are scalars."""

    value: Tensor  # (N, C), with a gradient to the features
    indices: Tensor  # (N,) int64
    quantization_loss: Tensor
    entropy: Tensor


def softmax_assignment(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, entropy_temperature: float
) -> Assignment:
    """The formula of Eq. 7-8 and of the entropy: queries (N, D), keys (K, D), values (K, C), scale 1 / sqrt(D)."""
    logits = (queries * scale) @ keys.T  # (N, K)
    scores = logits.softmax(dim=-1)  # Eq. 7: A = softmax(Q K^T / sqrt(D))
    indices = logits.argmax(dim=-1)  # (N,)
    hard = F.embedding(indices, values)  # Eq. 8: onehot(A) V, one code's value a feature ...
    soft = scores @ values.detach()
    value = hard + (soft - soft.detach())  # ... straight through: its gradient reaches the logits as that of A V

    log_sharp = (logits / entropy_temperature).log_softmax(dim=-1)
    sharp = log_sharp.exp()
    mean = sharp.mean(dim=0)  # (K,)
    # The entropy term of Eq. 9: each feature confident of its code, all codes wanted equally often.
    entropy = (mean * (mean + ENTROPY_EPS).log()).sum() - (sharp * log_sharp).sum(dim=-1).mean()
    return Assignment(value, hard, indices, entropy)


class ResidualQuantizer(nn.Module):
    """The residual scheme of Eq. 4-5, pooled and upsampled to each scale as in VAR; the VQ baseline's too.

    Computes in float32 (float64 for float64 latents), also under autocast: at an entropy temperature of 0.01 the
    rounding of bfloat16 logits would be as large as the logits' differences.

    A subclass defines `project_codes()`, what features are compared with (K, any) and the codes' values (K, C), once a
    pass for all levels; `choose(features (N, C), keys, backend)`, indices (N,) without gradients; and
    `assign(features, keys, values, backend)`, a `Level` with gradients and the same indices.
    """

    kind: str  # its name in `quantizer_kinds`: what `quantizer_from_config` builds

    def __init__(self, latent_channels: int, codebook_size: int, scales: Sequence[int], beta: float, backend: str):
        super().__init__()
        scales = check_quantizer(latent_channels, codebook_size, scales, beta, backend, BACKENDS)
        self.latent_channels, self.codebook_size, self.scales = latent_channels, codebook_size, scales
        self.beta, self.backend = beta, backend
        # Standard normal: the scale of normalised latents, for both quantizers alike. VQ's usual uniform(-1/K, 1/K)
        # starts with all codes in one clump near 0, from which the nearest neighbour frees only a few.
        self.codebooks = nn.Embedding(codebook_size, latent_channels)  # the released name

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: the sum of p^2 over the levels."""
        return sum(p * p for p in self.scales)

    @property
    def code_values(self) -> Tensor:
        """What each code adds to the latents, (K, C): its vector; with attention the projected values of Eq. 8."""
        return self.project_codes()[1].detach().float()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, C, H, W), H = W = scales[-1]; each level assigns its cells of what is left over."""
        residual = self.checked(latents)
        backend = self._backend_for(residual)
        quantized, levels = torch.zeros_like(residual), []
        with torch.autocast(latents.device.type, enabled=False):
            keys, values = self.project_codes()
            for p in self.scales:
                level = self.assign(self.pool(residual, p), keys, values, backend)
                upsampled = self.upsample(level.value, p)
                # With its gradient, as in the release: a level answers for the residual that it leaves to later ones.
                residual = residual - upsampled  # Eq. 4
                quantized = quantized + upsampled  # Eq. 5
                levels.append(level)
            grids = (level.indices.view(-1, p, p) for level, p in zip(levels, self.scales, strict=True))
            losses = ([level.quantization_loss for level in levels], [level.entropy for level in levels])
            return QuantizerOutput(
                quantized, Tokens(grids, self.codebook_size), *(torch.stack(terms).mean() for terms in losses)
            )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tokens:
        """Latents (B, C, H, W) -> indices, one (B, p, p) int64 a level, coarse to fine; not finite, ValueError."""
        residual = self.checked(latents, finite=True)
        backend = self._backend_for(residual)
        indices = []
        with torch.autocast(latents.device.type, enabled=False):
            keys, values = self.project_codes()
            for p in self.scales:
                chosen = self.choose(self.pool(residual, p), keys, backend)
                residual = residual - self.upsample(values[chosen], p)
                indices.append(chosen.view(-1, p, p))
        return Tokens(indices, self.codebook_size)

    def decode(self, indices: Sequence[Tensor], levels: int | None = None, partial: bool = False) -> Tensor:
        """Indices -> latents (B, C, H, W); `levels=k` sums the first k levels alone, and needs no more of them.

        Takes one (B, p, p) integer tensor a level, as `encode` gives them; with `partial` an index of -1 is a token
        that is not known, and adds nothing. Raises ValueError on levels, shapes or indices that do not fit.
        """
        count = check_indices(indices, self.scales, self.codebook_size, levels, lowest=-1 if partial else 0)
        with torch.autocast(indices[0].device.type, enabled=False):
            _, values = self.project_codes()
            quantized = values.new_zeros(len(indices[0]), self.latent_channels, self.scales[-1], self.scales[-1])
            for level, p in zip(indices[:count], self.scales, strict=False):
                codes = level.long().flatten()
                added = values[codes.clamp(min=0)].masked_fill((codes < 0)[:, None], 0) if partial else values[codes]
                quantized = quantized + self.upsample(added, p)
        return quantized

    def config(self) -> dict:
        """The settings that `quantizer_from_config` takes, as plain values; the backend is the machine's choice."""
        names = ("kind", "latent_channels", "codebook_size", "scales", "beta")
        return {name: getattr(self, name) for name in names} | {"scales": list(self.scales)}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config().items() if key != "kind")

    def checked(self, latents: Tensor, finite: bool = False) -> Tensor:
        check_latents(latents, self.latent_channels, self.scales[-1], finite)
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    def pool(self, residual: Tensor, p: int) -> Tensor:
        """The features of a level: the residual (B, C, H, W) averaged over a p x p grid, as rows (B p p, C)."""
        if p != residual.shape[-1]:
            residual = F.interpolate(residual, size=(p, p), mode="area")
        return residual.permute(0, 2, 3, 1).reshape(-1, self.latent_channels)

    def upsample(self, values: Tensor, p: int) -> Tensor:
        """The values of a level's codes, rows (B p p, C), on the latent grid (B, C, H, W)."""
        values = values.view(-1, p, p, self.latent_channels).permute(0, 3, 1, 2)
        side = self.scales[-1]
        return values if p == side else F.interpolate(values, size=(side, side), mode="bicubic")

    def _backend_for(self, latents: Tensor) -> str:
        if self.backend == "reference":
            return self.backend
        return kernels.resolve_backend(self.backend, latents.device, len(latents) * self.num_tokens, self.codebook_size)


class CodebookAttention(nn.Module):
    """Q = norm(F W_q) and K = norm(C W_k) of Eq. 6, V = C W_v of Eq. 8, each with a bias; F features, C codes."""

    def __init__(self, channels: int, width: int, norm: str | None):
        super().__init__()
        self.to_q = nn.Linear(channels, width)
        self.to_k = nn.Linear(channels, width)
        self.to_v = nn.Linear(channels, channels)
        if norm not in NORMS:
            raise ValueError(f'expected the norm "rms", "layer" or None, got {norm!r}')
        layer = nn.RMSNorm if norm == "rms" else nn.LayerNorm
        self.norm_q, self.norm_k = (layer(width, eps=NORM_EPS) if norm else nn.Identity() for _ in range(2))

    def queries(self, features: Tensor) -> Tensor:
        return self.norm_q(self.to_q(features))  # (N, C) -> (N, D)

    def keys(self, codes: Tensor) -> Tensor:
        return self.norm_k(self.to_k(codes))  # (K, C) -> (K, D)


class ResidualAttentionQuantizer(ResidualQuantizer):
    """CODA's quantizer: softmax attention over one codebook shared by all levels (Eq. 6-8).

    A feature takes the code of its largest logit; the gradient is that of the softmax over all codes (index
    backpropagation). Parameters carry the released names, and start as torch's `Embedding` and `Linear` do.

    latent_channels: C. codebook_size: K. scales: the side of each level's grid, the last one the latent grid's.
    attention_dim: D. norm: "rms", "layer" or None, of queries and keys. beta: of Eq. 10. entropy_temperature: divides
    the logits for the entropy. backend: "reference" or see `kernels.assignment`.
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
        check_positive(entropy_temperature=entropy_temperature, attention_dim=attention_dim)
        self.attention_dim, self.norm, self.entropy_temperature = attention_dim, norm, entropy_temperature
        self.attn = CodebookAttention(latent_channels, attention_dim, norm)

    def project_codes(self) -> tuple[Tensor, Tensor]:
        return self.attn.keys(self.codebooks.weight), self.attn.to_v(self.codebooks.weight)  # Eq. 6, Eq. 8

    def choose(self, features: Tensor, keys: Tensor, backend: str) -> Tensor:
        queries, scale = self.attn.queries(features), self.attention_dim**-0.5
        if backend == "reference":
            return ((queries * scale) @ keys.T).argmax(dim=-1)
        return kernels.argmax_assign(queries, keys, scale, backend)

    def assign(self, features: Tensor, keys: Tensor, values: Tensor, backend: str) -> Level:
        inputs = self.attn.queries(features), keys, values, self.attention_dim**-0.5, self.entropy_temperature
        out = softmax_assignment(*inputs) if backend == "reference" else kernels.softmax_assign(*inputs, backend)
        loss = (
            F.mse_loss(out.value, features)  # Eq. 11 as in the release: the hard code, the soft gradient
            + F.mse_loss(out.hard.detach(), features)  # Eq. 10: the feature to its code ...
            + self.beta * F.mse_loss(out.hard, features.detach())  # ... and, by beta, the code to its feature
        )
        return Level(out.value, out.indices, loss, out.entropy)

    def config(self) -> dict:
        return super().config() | {n: getattr(self, n) for n in ("attention_dim", "norm", "entropy_temperature")}
