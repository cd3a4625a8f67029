"""Tokens changed by hand: one replaced or masked, and those kept that lie outside a box."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codalib.models.sampling_inputs import MASKED
from codalib.models.tokens import Tokens


def with_token(tokens: Tokens, level: int, row: int, column: int, code: int) -> Tokens:
    """A copy in which one token of every image is another; a code of -1 masks it (see `decode(partial=True)`).

    Raises ValueError for a place outside the level's grid and for a code outside [-1, K).
    """
    if not 0 <= level < len(tokens):
        raise ValueError(f"expected a level from 0 to {len(tokens) - 1}, got {level}")
    p = tokens.scales[level]
    if not (0 <= row < p and 0 <= column < p):
        raise ValueError(f"expected row and column from 0 to {p - 1} at level {level}, got {row} and {column}")
    if not -1 <= code < tokens.codebook_size:
        raise ValueError(f"expected a code from -1 (masked) to {tokens.codebook_size - 1}, got {code}")
    levels = [part.clone() for part in tokens]
    levels[level][:, row, column] = code
    return Tokens(levels, tokens.codebook_size)


def keep_outside(
    indices: Sequence[Tensor], box: tuple[float, float, float, float], coarse_kept: int = 0
) -> list[Tensor]:
    """For `generate(fixed=...)`: mask the tokens whose cell meets a box, at every level, and keep the others.

    Args:
        indices: an image's, one (B, p, p) a level.
        box: top, left, bottom, right as fractions of the side, in [0, 1].
        coarse_kept: this many levels, the coarsest, are kept whole: they hold the layout and the colours, and a coarse
            cell reaches far beyond a small box.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"expected a box with 0 <= top < bottom <= 1 and 0 <= left < right <= 1, got {box}")
    kept = []
    for number, level in enumerate(indices):
        p = level.shape[-1]
        starts, ends = torch.arange(p) / p, (torch.arange(p) + 1) / p
        rows, columns = (starts < bottom) & (ends > top), (starts < right) & (ends > left)
        inside = (rows[:, None] & columns).to(level.device)  # (p, p)
        kept.append(level.clone() if number < coarse_kept else level.masked_fill(inside, MASKED))
    return kept
