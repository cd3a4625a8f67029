"""Tokens: the indices of B images, one grid a level, coarse to fine; and as one sequence of all levels."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Tokens(list[Tensor]):
    """The tokens of B images: a list of one (B, p, p) int64 tensor of indices in [0, K) a level, coarse to fine."""

    def __init__(self, levels: Iterable[Tensor], codebook_size: int):
        super().__init__(levels)
        self.codebook_size = codebook_size

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(level.shape[-1] for level in self)

    @property
    def images(self) -> int:
        return len(self[0])

    @property
    def per_image(self) -> int:
        """Tokens of one image: the sum of p^2 over the levels."""
        return sum(p * p for p in self.scales)

    @property
    def bits_a_token(self) -> float:
        """log2 K: what a token costs where all codes are equally likely."""
        return math.log2(self.codebook_size)

    @property
    def used(self) -> list[int]:
        """How many different codes each level uses; masked tokens, -1, are none."""
        return [len(level[level >= 0].unique()) for level in self]

    @property
    def utilization(self) -> float:
        """The fraction of the codebook that the levels use together, in [0, 1]."""
        codes = torch.cat([level.flatten() for level in self])
        return len(codes[codes >= 0].unique()) / self.codebook_size


def join_levels(indices: Sequence[Tensor]) -> Tensor:
    """One (B, p, p) a level -> the sequence (B, L), coarse to fine, each map row by row."""
    return torch.cat([level.flatten(1) for level in indices], dim=1)


def split_levels(tokens: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """The sequence (B, L) -> one (B, p, p) a level; raises ValueError where L is not the sum of p^2."""
    sizes = [p * p for p in scales]
    if tokens.shape[1] != sum(sizes):
        raise ValueError(f"expected sequences of {sum(sizes)} tokens for scales {tuple(scales)}, got {tokens.shape[1]}")
    return [part.unflatten(1, (p, p)) for part, p in zip(tokens.split(sizes, dim=1), scales, strict=True)]


def token_levels(scales: Sequence[int]) -> Tensor:
    """The level of each position of the sequence, (L,) int64 counted from 0."""
    return torch.tensor([level for level, p in enumerate(scales) for _ in range(p * p)])
