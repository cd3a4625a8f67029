"""Codes to be pointed at in a page without a kernel: the codebook level by level, and images' tokens as maps.

Both are grids of cells with a level slider; `templates/codes.html.j2` holds them, `page.js` tells of the cell under the
pointer or the arrow keys.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from codalib.models.tokens import Tokens
from codalib.reporting.display import code_colours
from codalib.reporting.figures import data_uri
from codalib.reporting.levels import sheet, sources
from codalib.reporting.pages import fill

COLUMNS = 32  # codes beside each other, at most
UNUSED = 0.8  # a pale grey in [-1, 1]; what changes nothing is at 0
TILE = 24  # pixels of a code's picture
BRIGHTEST = 0.99  # quantile of a level's differences that is drawn at full contrast


def contrast(effects: Tensor) -> float:
    """What a level's differences of images (n, 3, h, w) are multiplied by, so that all but the largest fit [-1, 1]."""
    return 1 / max(effects.abs().flatten().sort().values[int(BRIGHTEST * (effects.numel() - 1))].item(), 1e-6)


def codebook_atlas(effects: Sequence[Tensor], codes: Tensor, counts: Tensor, scales: Sequence[int]) -> str:
    """The codes of each level in the order given, as HTML; pale cells are codes that the level does not use.

    Args:
        effects: what the codes of a level that it uses add to an image, (m, 3, h, w) with m from 1 to n, see
            `reporting.explorer.code_effects`; grey stands for no change, and a level's contrast is stretched.
        codes: (levels, n), the codes that are shown at each level, its m used ones first.
        counts: (levels, K), how often each level uses each code.
        scales: side of each level's token grid.
    """
    columns, views, pictures = min(COLUMNS, math.ceil(math.sqrt(2 * codes.shape[1]))), [], []
    for level, (own, shown, uses) in enumerate(zip(effects, codes, counts, strict=True), start=1):
        tiles, stretch = torch.full((len(shown), 3, TILE, TILE), UNUSED), contrast(own)
        tiles[: len(own)] = F.interpolate(own * stretch, size=(TILE, TILE), mode="bilinear", antialias=True)
        pictures.append(sheet(tiles, columns))
        view = _view(level, 0, shown, uses) | {"columns": columns, "rows": math.ceil(len(shown) / columns)}
        views.append(view | {"note": f"contrast {stretch:.1f} times"})
    return _fill([[one] for one in sources(pictures)], views, ["codes"], ["codebook"], scales)


def map_pictures(codes: Tensor, side: int) -> Tensor:
    """Tokens of one level, (N, p, p), as pictures of coloured cells (N, 3, side, side) in [-1, 1]."""
    colours = torch.stack([torch.tensor(code_colours(own)) for own in codes.cpu().numpy()])  # (N, p, p, 3)
    return F.interpolate(colours.permute(0, 3, 1, 2) / 127.5 - 1, size=(side, side), mode="nearest")


def token_maps(
    tokens: Tokens, decoded: Sequence[Tensor], names: Sequence[str], counts: Tensor | None = None, pixelated: int = 128
) -> str:
    """Each image's tokens of each level as a map of cells beside what the levels so far decode to, as HTML.

    Args:
        tokens: of N images; a code has one colour throughout, which means nothing else.
        decoded: images (N, 3, h, w) in [-1, 1] after 1, 2, ... levels; another number of levels raises ValueError.
        names: of the images.
        counts: (levels, K), how often each level uses each code over a data set; None says nothing of it.
        pixelated: smaller pictures are enlarged without smoothing.
    """
    if len(decoded) != len(tokens) or any(len(own) != tokens.images for own in (*decoded, names)):
        got = f"{len(decoded)} levels of {[len(batch) for batch in decoded]} images and {len(names)} names"
        raise ValueError(f"expected {len(tokens)} levels of {tokens.images} images, each with a name, got {got}")
    views, maps, pictures = [], [], []
    for level, (codes, batch) in enumerate(zip(tokens, decoded, strict=True), start=1):
        for number, (own, picture) in enumerate(zip(codes.cpu(), batch, strict=True)):
            uses = None if counts is None else counts[level - 1]
            views.append(_view(level, number, own.flatten(), uses) | {"columns": len(own), "rows": len(own)})
            maps.append(data_uri(Image.fromarray(code_colours(own.numpy()))))
            pictures.append(sheet(picture[None], 1, margin=0))
    sides = [list(pair) for pair in zip(maps, sources(pictures), strict=True)]
    return _fill(sides, views, ["tokens", "decoded so far"], names, tokens.scales)


def _view(level: int, image: int, codes: Tensor, uses: Tensor | None) -> dict[str, Any]:
    view = {"level": level, "image": image, "codes": codes.tolist()}
    return view if uses is None else view | {"uses": uses[codes].tolist(), "total": int(uses.sum())}


def _fill(
    pictures: Sequence[list[str]], views: Sequence[dict], boards: list[str], names: Sequence[str], scales: Sequence[int]
) -> str:
    """The template, with one entry of PICTURES (a picture a board) for each view."""
    whole = [view | {"pictures": own} for view, own in zip(views, pictures, strict=True)]
    return fill("codes.html.j2", views=whole, boards=boards, names=names, scales=list(scales))
