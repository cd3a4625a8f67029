"""What a person at a notebook looks at, as pictures and numbers: levels, assignments, edits, and samples as they form.

`reporting.widgets` shows what these functions return; they know nothing of widgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codalib.datasets.images import DataError, ImageDataset, evaluation_batches
from codalib.datasets.pictures import UnreadableImage, read_rgb, square, to_tensor
from codalib.evaluation.metrics import psnr
from codalib.models.maskgit import Condition, MaskGIT
from codalib.models.ranking import Ranking, rank_codes
from codalib.models.sampling import Step, generate
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import Tokens


@dataclass(frozen=True)
class LevelView:
    """What the first levels of an image's tokens say."""

    levels: int  # how many
    picture: Tensor  # (3, h, w), about [-1, 1]
    psnr: float  # dB, against the image
    error: float  # mean squared, of the latents
    tokens: int  # of these levels
    bits: float  # of these tokens, log2 K each


@dataclass(frozen=True)
class Explained:
    """An image, its tokens, and how they came about."""

    image: Tensor  # (3, h, w) in [-1, 1]
    tokens: Tokens  # of one image
    ranking: list[Ranking]  # the codes that suit each position best, one a level, for one image
    views: list[LevelView]  # after one level, two, ...


@torch.no_grad()
def explain(tokenizer: CodaTokenizer, image: Tensor, top: int = 20) -> Explained:
    """Encode one image (3, h, w) in [-1, 1] at its posterior's mean, and decode after every level.

    Raises ValueError where the image is not of the tokenizer's resolution.
    """
    device = next(tokenizer.parameters()).device
    latents = tokenizer.vae.encode(image[None].to(device), sample=False)
    ranking = rank_codes(tokenizer.quantizer, latents, min(top, tokenizer.quantizer.codebook_size))
    tokens = Tokens((level.codes[..., 0] for level in ranking), tokenizer.quantizer.codebook_size)
    partial = torch.cat([tokenizer.quantizer.decode(tokens, levels=k) for k in range(1, len(tokens) + 1)])
    pictures = tokenizer.vae.decode(partial).cpu()
    scores = psnr(image[None].expand_as(pictures), pictures).tolist()
    errors = (partial - latents).square().mean(dim=(1, 2, 3)).tolist()
    views, count = [], 0
    for number, p in enumerate(tokens.scales):
        count += p * p
        bits = count * tokens.bits_a_token
        views.append(LevelView(number + 1, pictures[number], scores[number], errors[number], count, bits))
    return Explained(image, tokens, ranking, views)


@dataclass(frozen=True)
class Assignment:
    """What one level assigns to a place."""

    row: int
    column: int
    code: int  # the one that is taken
    score: float  # its, see `models.ranking.rank_codes`
    second: float  # the next best code's


def through_levels(explained: Explained, top: float, left: float) -> list[Assignment]:
    """What each level assigns to the cell around a place, in fractions of the side from the top and the left.

    The image is to be explained with two codes a position or more.
    """
    assignments = []
    for p, ranking in zip(explained.tokens.scales, explained.ranking, strict=True):
        row, column = (min(p - 1, int(part * p)) for part in (top, left))
        first, second = ranking.scores[0, row, column, :2].tolist()
        assignments.append(Assignment(row, column, int(ranking.codes[0, row, column, 0]), first, second))
    return assignments


def read_image(data: bytes, resolution: int, name: str = "the file") -> Tensor:
    """An image file's bytes -> (3, r, r) in [-1, 1], the middle of it; DataError where it is not an image."""
    try:
        picture = read_rgb(data)
    except UnreadableImage as error:
        raise DataError(f"{name} cannot be read as an image ({error}): give a PNG, JPEG or WebP file") from error
    return to_tensor(square(picture, resolution, resolution, None))


@torch.no_grad()
def code_counts(tokenizer: CodaTokenizer, images: ImageDataset, batch_size: int = 64) -> Tensor:
    """How often each image of a data set uses each code, over all levels: (N, K) int32; 0 for an unreadable image."""
    device = next(tokenizer.parameters()).device
    counts = torch.zeros(len(images), tokenizer.quantizer.codebook_size, dtype=torch.int32)
    for batch in evaluation_batches(images, batch_size):
        tokens = tokenizer.encode(batch["image"].to(device), sample=False)
        codes = torch.cat([level.flatten(1) for level in tokens], dim=1).cpu()  # (B, L)
        own = torch.zeros(len(codes), counts.shape[1], dtype=torch.int32)
        counts[batch["index"]] = own.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.int32))
    return counts


@torch.no_grad()
def code_effects(tokenizer: CodaTokenizer, mean: Tensor, codes: Sequence[Tensor], batch_size: int = 64) -> list[Tensor]:
    """What codes change in an image at each level, one (n, 3, w, w) of differences in [-2, 2] a level.

    The image is decoded from latents that are MEAN at each position, once with a code at the level's middle position
    (bicubically upsampled, as ever) and once without. Cut out is the window of three cells around it, at most all.

    Args:
        mean: (C,), such as the mean of a data set's latents.
        codes: (n,) int64 a level.
    """
    quantizer, vae, side = tokenizer.quantizer, tokenizer.vae, tokenizer.resolution
    values = quantizer.code_values
    base = mean.to(values.device)[None, :, None, None].expand(-1, -1, *2 * quantizer.scales[-1:])
    plain, known, effects = vae.decode(base).clamp(-1, 1), {}, []
    for p, own in zip(quantizer.scales, codes, strict=True):
        width = min(side, round(3 * side / p))
        start = max(0, min(side - width, round((p // 2 + 0.5) * side / p - width / 2)))
        window = (..., slice(start, start + width), slice(start, start + width))
        new = [code for code in own.tolist() if (p, code) not in known]
        for part in (new[first : first + batch_size] for first in range(0, len(new), batch_size)):
            grid = values.new_zeros(len(part), p, p, quantizer.latent_channels)
            grid[:, p // 2, p // 2] = values[part]
            added = quantizer.upsample(grid.flatten(0, 2), p)
            found = (vae.decode(base + added).clamp(-1, 1) - plain)[window].cpu()
            known |= {(p, code): picture for code, picture in zip(part, found, strict=True)}
        effects.append(torch.stack([known[p, code] for code in own.tolist()]))
    return effects


def images_of_code(counts: Tensor, code: int, most: int = 6) -> list[tuple[int, int]]:
    """The images that use CODE most, as (number, times), of `code_counts`; fewer than MOST where fewer use it."""
    times, numbers = counts[:, code].sort(descending=True, stable=True)
    return [(n, t) for n, t in zip(numbers[:most].tolist(), times[:most].tolist(), strict=True) if t]


@dataclass(frozen=True)
class Frame:
    """A moment of `unmask`, of B images."""

    number: int  # the step, from 1
    unmasked: Tensor  # (B,) tokens that are known
    known: Tensor  # (B, 3, h, w): what they alone decode to
    guess: Tensor  # (B, 3, h, w): with this step's draw for all others


@torch.no_grad()
def unmask(
    model: MaskGIT, tokenizer: CodaTokenizer, condition: Condition = None, most: int | None = None, **settings: Any
) -> tuple[Tokens, list[Frame]]:
    """Generate images and keep the pictures on the way.

    Args:
        condition: see `models.sampling.generate`.
        most: frames that are returned, evenly over the steps, the last one among them; None: all.
        settings: of `models.sampling.generate`.
    """
    steps: list[Step] = []
    tokens = generate(model, condition, on_step=steps.append, **settings)
    if most is not None and most < len(steps):
        steps = [steps[int(i)] for i in torch.linspace(0, len(steps) - 1, most).round()]
    frames = []
    for step in steps:
        unmasked = sum((level >= 0).flatten(1).sum(dim=1) for level in step.indices)
        known = tokenizer.decode(step.indices, partial=True).cpu()
        frames.append(Frame(step.number + 1, unmasked.cpu(), known, tokenizer.decode(step.drawn).cpu()))
    return tokens, frames
