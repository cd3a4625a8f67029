"""Which tokens MaskGIT learns to predict: the random masks of Eq. 12 of arXiv:2503.17760."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codalib.models.tokens import token_levels

MASK_RATIOS = ("cosine", "beta")
BETA = (12, 3)  # the "beta" mask ratio's parameters, of the same authors' later work; integers, see `sample_mask`


def sample_mask(
    batch: int,
    scales: Sequence[int],
    ratio: str = "cosine",
    coarse_first: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which tokens are masked in training, m of Eq. 12: (B, L) bool, at least one a sample, on the CPU.

    Args:
        ratio: how the fraction of masked tokens is drawn: "cosine", cos(u pi / 2) with u uniform (MaskGIT's), or
            "beta", a Beta(12, 3).
        coarse_first: fraction of the samples in which the visible tokens fill the levels coarse to fine, as decoding in
            that order meets them, instead of lying anywhere (the paper's, 0).
    """
    if ratio not in MASK_RATIOS:
        raise ValueError(f"expected a mask ratio of {', '.join(MASK_RATIOS)}, got {ratio!r}")
    if ratio == "cosine":
        fraction = torch.cos(math.pi / 2 * torch.rand(batch, generator=generator))
    else:  # the a-th smallest of a + b - 1 uniform numbers is a Beta(a, b)
        a, b = BETA
        fraction = torch.rand(batch, a + b - 1, generator=generator).kthvalue(a, dim=1).values
    levels = token_levels(scales)
    masked = (fraction * len(levels)).ceil().long().clamp(1, len(levels))  # (B,)
    order = torch.rand(batch, len(levels), generator=generator)
    in_levels = torch.rand(batch, 1, generator=generator) < coarse_first
    order = torch.where(in_levels, order + levels, order)  # below 1, so that it orders tokens within a level alone
    rank = order.argsort(dim=1).argsort(dim=1)  # (B, L), 0 is unmasked first
    return rank >= len(levels) - masked[:, None]
