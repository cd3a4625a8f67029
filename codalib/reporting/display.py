"""What a tokenizer, tokens and a training log look like at the end of a notebook's cell: small pieces of HTML.

Each function takes the object that it shows and returns HTML that stands alone: tables, and pictures as data in the
page. `codalib/__init__.py` registers them with IPython.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from codalib.reporting.tables import html_table, number

TILE = 56  # pixels of a picture in a strip
SHOWN_CODES = 16  # in a tokenizer's strip
SHOWN_MAPS = 12  # levels in a strip of tokens
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of the hue by it keep the colours of neighbouring codes apart
SPARK = (120, 24)  # pixels of a curve in a log's table
BOOKKEEPING = ("step", "seconds", "rate")  # of a log's row, not terms


def to_bytes(image: Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] -> (h, w, 3) uint8, clipped."""
    return ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def png(pixels: np.ndarray, side: int | None = None) -> bytes:
    """(h, w, 3) uint8 as a PNG; SIDE enlarges it to that many pixels without smoothing."""
    picture = Image.fromarray(pixels)
    if side is not None:
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def picture(data: bytes, alt: str, side: int = TILE) -> str:
    """A PNG as an <img>, SIDE pixels a side."""
    source = base64.b64encode(data).decode("ascii")
    return (
        f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt)}" title="{html.escape(alt)}" '
        f'width="{side}" height="{side}" style="margin:1px;image-rendering:pixelated;display:inline-block">'
    )


def strip(images: Sequence[str]) -> str:
    """Pictures beside each other, in a new line where they do not fit."""
    return f'<div style="line-height:0">{"".join(images)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], markup: Sequence[str] = ()) -> str:
    """A plain table; MARKUP names the columns whose cells are HTML already."""
    return html_table(pd.DataFrame(rows, columns=header), markup=markup)


def code_colours(codes: np.ndarray) -> np.ndarray:
    """Codes (h, w) -> (h, w, 3) uint8: a colour a code, the same everywhere; a masked code, -1, is grey."""
    hue = np.round((codes.astype(np.float64) * GOLDEN % 1) * 255).astype(np.uint8)
    saturation = np.where(codes < 0, 0, 150).astype(np.uint8)
    value = np.where(codes < 0, 225, 215 - 70 * (codes % 3 == 1)).astype(np.uint8)
    return np.asarray(Image.merge("HSV", [Image.fromarray(part) for part in (hue, saturation, value)]).convert("RGB"))


def token_map(level: Tensor, side: int = TILE) -> bytes:
    """One image's tokens of one level, (p, p), as a PNG of coloured cells."""
    return png(code_colours(level.cpu().numpy()), side)


def tokens_html(tokens: Any) -> str:
    """The levels of `Tokens` as a table: grid, tokens and bits an image, codes in use; and the first image's maps."""
    rows, bits = [], 0.0
    for place, (level, used) in enumerate(zip(tokens, tokens.used, strict=True), start=1):
        p = level.shape[-1]
        bits += p * p * tokens.bits_a_token
        rows.append((place, f"{p} x {p}", p * p, f"{bits:,.0f}", f"{used:,}"))
    images = f"{tokens.images} image" + "s" * (tokens.images != 1)
    head = (
        f"<b>Tokens</b> of {images}: {len(tokens)} levels, {tokens.per_image:,} tokens and {bits:,.0f} bits an image, "
        f"codes 0 to {tokens.codebook_size - 1:,}, {tokens.utilization:.1%} of them in use here"
    )
    maps = [
        picture(token_map(level[0]), f"level {place}: {level.shape[-1]} x {level.shape[-1]} codes")
        for place, level in list(enumerate(tokens, start=1))[:SHOWN_MAPS]
    ]
    return f"<div>{head}{strip(maps)}{table(['level', 'grid', 'tokens', 'bits so far', 'different codes'], rows)}</div>"


@torch.no_grad()
def tokenizer_html(tokenizer: Any) -> str:
    """A `CodaTokenizer`'s parts and sizes, and what its first codes look like: a whole latent grid of each, decoded."""
    vae, quantizer = tokenizer.vae, tokenizer.quantizer
    side, bits = tokenizer.resolution, tokenizer.num_tokens * math.log2(quantizer.codebook_size)
    adapters = sum(p.numel() for name, p in vae.named_parameters() if "lora" in name)
    in_vae = sum(p.numel() for p in vae.parameters()) - adapters
    rows = [
        ("VAE", f"{vae.downsampling}x, {vae.latent_channels} latent channels", number(in_vae)),
        ("adapters", "LoRA on its convolutions" if adapters else "none", number(adapters)),
        ("quantizer", quantizer.kind, number(sum(p.numel() for p in quantizer.parameters()))),
    ]
    head = (
        f"<b>CodaTokenizer</b>: images (B, 3, {side}, {side}) to {len(quantizer.scales)} levels of sides "
        f"{', '.join(map(str, quantizer.scales))}: {tokenizer.num_tokens:,} tokens of "
        f"{quantizer.codebook_size:,} codes, "
        f"{bits:,.0f} bits an image, {3 * 8 * side * side / bits:.1f} times fewer than its pixels"
    )
    body = f"{head}{table(['part', 'what', 'parameters'], rows)}"
    if hasattr(quantizer, "code_values"):
        values = quantizer.code_values[:SHOWN_CODES]
        grid = values[:, :, None, None].expand(-1, -1, 4, 4)  # the smallest that shows the colour off the edges
        codes = [
            picture(png(to_bytes(image)), f"code {code}, alone on a whole grid")
            for code, image in enumerate(vae.decode(grid))
        ]
        body += f"the first {len(codes)} codes, each alone on a whole grid{strip(codes)}"
    return f"<div>{body}</div>"


def log_html(rows: Sequence[Mapping[str, float]]) -> str:
    """A training log as a table: each term's first, lowest, highest and last value, and its curve."""
    if not rows:
        return "<div><b>Training log</b>: empty, nothing has been logged yet</div>"
    names = dict.fromkeys(name for row in rows for name in row if name not in BOOKKEEPING)
    lines = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        values = [value for _, value in points]
        lines.append((name, *map(number, (values[0], min(values), max(values), values[-1])), _spark(points, name)))
    steps, seconds = rows[-1]["step"], rows[-1].get("seconds", math.nan)
    head = f"<b>Training log</b>: {steps:,} steps in {seconds:,.0f} s, {seconds / steps:.2g} s a step, {len(rows)} rows"
    return f"<div>{head}{table(['term', 'first', 'lowest', 'highest', 'last', 'curve'], lines, ['curve'])}</div>"


def _spark(points: Sequence[tuple[float, float]], name: str) -> str:
    """A small curve as SVG, its ends the log's first and last step."""
    width, height = SPARK
    steps, values = np.array(points, dtype=float).T
    across = (steps - steps[0]) / max(steps[-1] - steps[0], 1)
    up = (values - values.min()) / max(values.max() - values.min(), 1e-12)
    line = " ".join(
        f"{x * (width - 2) + 1:.1f},{(1 - y) * (height - 4) + 2:.1f}" for x, y in zip(across, up, strict=True)
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(name)} over the steps">'
        f'<polyline points="{line}" fill="none" stroke="#0072B2" stroke-width="1.5"/></svg>'
    )
