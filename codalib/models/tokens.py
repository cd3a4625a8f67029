"""Tokens: the indices of B images, one grid a level, coarse to fine."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Tokens(list[Tensor]):
    """The tokens of B images: a list of one (B, p, p) int64 tensor of indices a level, coarse to fine.

    Whatever takes the levels takes it; it also knows the size of its codebook, and shows itself in a notebook.

    levels: the tensors. codebook_size: K, of which the indices are numbers.
    """

    def __init__(self, levels: Iterable[Tensor], codebook_size: int):
        super().__init__(levels)
        self.codebook_size = codebook_size

    @property
    def scales(self) -> tuple[int, ...]:
        """The side of each level's grid."""
        return tuple(level.shape[-1] for level in self)

    @property
    def images(self) -> int:
        """B."""
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
        """The share of the codebook that the levels use together, in [0, 1]."""
        codes = torch.cat([level.flatten() for level in self])
        return len(codes[codes >= 0].unique()) / self.codebook_size

    def take(self, images: slice | Sequence[int] | Tensor) -> "Tokens":
        """The tokens of some of the images, as indexing takes them."""
        return Tokens((level[images] for level in self), self.codebook_size)

    def with_token(self, level: int, row: int, column: int, code: int) -> "Tokens":
        """A copy in which one token of every image is another; a code of -1 masks it (see `decode(partial=True)`).

        Raises ValueError for a place outside the level's grid and for a code outside [-1, K).
        """
        if not 0 <= level < len(self):
            raise ValueError(f"level {level} got, expected 0 to {len(self) - 1}")
        p = self.scales[level]
        if not (0 <= row < p and 0 <= column < p):
            raise ValueError(f"row {row} and column {column} got, expected 0 to {p - 1} at level {level}")
        if not -1 <= code < self.codebook_size:
            raise ValueError(f"code {code} got, expected -1 (hidden) to {self.codebook_size - 1}")
        levels = [part.clone() for part in self]
        levels[level][:, row, column] = code
        return Tokens(levels, self.codebook_size)
