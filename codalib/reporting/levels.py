"""Pictures of each number of levels under a slider, two of them compared by a wipe, in a page without a kernel."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from codalib.evaluation.metrics import finite_psnr, psnr
from codalib.reporting.display import to_bytes
from codalib.reporting.figures import data_uri
from codalib.reporting.pages import fill

COLUMNS = 4  # pictures beside each other
MARGIN = 1 / 32  # of a picture's side, around it
BUDGET = 1_200_000  # bytes of one figure's pictures: a page of 5 MB holds several
QUALITIES = (95, 90, 80, 60, 40)  # of WebP, after lossless
PIXELATED = 128  # pixels: smaller pictures are enlarged without smoothing


def level_slider(images: Tensor, series: Mapping[str, Sequence[Tensor]], scales: Sequence[int]) -> str:
    """A level slider and a before/after wipe as HTML, which `pages.page`'s script brings to life.

    It stays hidden where scripts are off, or outside of such a page: put it behind a plain picture (`show_figure`).

    Args:
        images: (N, 3, h, w) in [-1, 1], the first choice of the left side.
        series: label -> images (N, 3, h, w) after 1, 2, ... levels, or one of them for what has no levels. The last
            one is the first choice of the right side.
        scales: side of each level's token grid.

    Pictures are lossless WebP, or as coarse as it takes for all to fit into `BUDGET`. A series of another number of
    levels raises ValueError.
    """
    shown = []
    for name, batches in {"image": [images], **series}.items():
        if len(batches) not in (1, len(scales)):
            raise ValueError(f"expected 1 or {len(scales)} levels of {name!r}, got {len(batches)}")
        for k, batch in enumerate(batches, start=1):
            note = [name]
            if len(batches) > 1:
                note.append(f"{k} of {len(scales)} levels, {sum(p * p for p in scales[:k]):,} tokens an image")
            if name != "image":
                note.append(f"{finite_psnr(psnr(images, batch), images).mean():.1f} dB")
            shown.append({"series": name, "alt": ", ".join(note), "picture": sheet(batch, min(COLUMNS, len(batch)))})
    addresses = sources([one.pop("picture") for one in shown])
    columns = min(COLUMNS, len(images))
    return fill(
        "levels.html.j2",
        pictures=[one | {"source": source} for one, source in zip(shown, addresses, strict=True)],
        series=["image", *series],
        levels=len(scales),
        columns=columns,
        rows=math.ceil(len(images) / columns),
        pixelated=images.shape[-1] <= PIXELATED,
    )


def sheet(images: Tensor, columns: int, margin: int | None = None) -> Image.Image:
    """Images (N, 3, h, w) as one picture of equal cells, a white MARGIN of so many pixels around each."""
    height, width = images.shape[-2:]
    margin = math.ceil(MARGIN * width) if margin is None else margin
    cell = (height + 2 * margin, width + 2 * margin)
    sheet = np.full((cell[0] * math.ceil(len(images) / columns), cell[1] * columns, 3), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = (cell[i] * divmod(place, columns)[i] + margin for i in range(2))
        sheet[top : top + height, left : left + width] = to_bytes(image)
    return Image.fromarray(sheet)


def sources(pictures: Sequence[Image.Image]) -> list[str]:
    """Pictures as data addresses of at most `BUDGET` characters together, each encoded alike."""
    for shrink in (1, 2, 4, 8):
        small = [one.resize((one.width // shrink, one.height // shrink)) if shrink > 1 else one for one in pictures]
        for quality in (None, *QUALITIES):
            sources = [data_uri(picture, quality) for picture in small]
            if sum(map(len, sources)) <= BUDGET:
                return sources
    raise ValueError(f"expected pictures that fit into {BUDGET:,} characters, got {len(pictures)}; show fewer images")
