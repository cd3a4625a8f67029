"""One picture: from a file of any mode, depth and size to a square tensor."""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from codalib.base.files import printable
from codalib.base.paths import fetched

log = logging.getLogger(__name__)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half as many pixels as are read at most: no fault

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
# Warned of:
UNREAD_SUFFIXES = {".avif", ".heic", ".heif", ".jp2", ".jxl", ".pbm", ".pgm", ".ppm", ".psd", ".svg", ".tga"}
# What Pillow raises where a file is broken.
BROKEN = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error, zlib.error)
WHITES = (1, 255, 4095, 65535)  # the value of white: of floats, of 8, 12 and 16 bits
OVERSHOOT = 0.5  # of white: how far floats may lie outside [0, white], as resampling leaves them
BITS, PHOTOMETRIC, BLACK, WHITE = 258, 262, 340, 341  # TIFF's tags; 280 and 281 are but statistics of the pixels
ELONGATED = 8  # a picture this many times as long as wide is resized only where the crop lies


class DataError(ValueError):
    """The data is not what a run needs; the message says what was found, what was expected and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableImage(ValueError):
    """A file that cannot be shown; the message says why, without the file's name."""


def visible(name: str) -> bool:
    """Whether a file or folder is the user's: not of an editor, a notebook server or an archive (`._name`)."""
    return not name.startswith((".", "__MACOSX"))


def warn_of_unread(names: Sequence[str], place: str) -> None:
    """Say that the pictures NAMES of PLACE, of kinds that are not read, are left out; nothing for none."""
    if names:
        words = "%d pictures of %s are of kinds that are not read and are left out (%s, ...): save them as PNG"
        log.warning(words, len(names), printable(place), printable(names[0]))


def read_rgb(source: str | bytes, guessed: Callable[[str], None] = log.warning) -> Image.Image:
    """The picture of a file, given by its path or its bytes, by `to_rgb`.

    Raises:
        UnreadableImage: no image, a broken one, one with too many pixels or without a range of values.
        ValueError: a Git LFS pointer.
    """
    try:
        with Image.open(source if isinstance(source, str) else io.BytesIO(source)) as image:
            return to_rgb(image, guessed)
    except (Image.DecompressionBombError, MemoryError) as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UnreadableImage(f"too large, {most} million pixels are read at most: make it smaller") from error
    except BROKEN as error:
        if isinstance(error, UnidentifiedImageError) and isinstance(source, str):
            fetched(source)
        raise UnreadableImage(str(error)) from error


def to_rgb(image: Image.Image, guessed: Callable[[str], None] = log.warning) -> Image.Image:
    """An image of any mode, upright (EXIF) and as RGB: transparency on white, deeper grey scaled to 8 bits.

    Black and white of 16- and 32-bit grey are what the format or TIFF's tags (bits, SMinSampleValue, SMaxSampleValue)
    say. Else black is 0 and white the smallest of 1 (floats alone), 255, 4095 and 65535 that holds the values, and
    GUESSED is told so unless the floats are at most 1.
    """
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's convert would clip at 255
        return Image.fromarray(_grey(image, guessed)).convert("RGB")
    png = any(str(tile[3]).endswith(";16B") for tile in getattr(image, "tile", ()))
    depth = 16 if png else np.ravel(_tags(image).get(BITS, 8)).max()
    if depth > 8 and 0 < (highest := _highest(image)) < 16:  # Pillow keeps the upper 8 of 16 bits
        raise ValueError(f"12 bits or less in its {depth} a colour ({highest} of 255 is left): save it in 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _highest(image: Image.Image) -> int:
    """The highest value of its colours, whatever its transparency."""
    highest = np.reshape(image.getextrema(), (-1, 2))[:, 1]
    return max(value for value, band in zip(highest.tolist(), image.getbands(), strict=True) if band != "A")


def _tags(image: Image.Image) -> dict:
    return getattr(image, "tag_v2", {})


def _grey(image: Image.Image, guessed: Callable[[str], None]) -> np.ndarray:
    """Grey of more than 8 bits as uint8 (h, w), upright."""
    values = np.asarray(ImageOps.exif_transpose(image), dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite (NaN or infinite)")
    black, white = _range(image, values, guessed)
    grey = (values - black) / (white - black)
    if _tags(image).get(PHOTOMETRIC) == 0:  # white is stored as 0
        grey = 1 - grey
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = 1
    return (grey.clip(0, 1) * 255).round().astype(np.uint8)


def _range(image: Image.Image, values: np.ndarray, guessed: Callable[[str], None]) -> tuple[float, float]:
    """The values of black and white of a grey image; see `to_rgb`."""
    tags, floats = _tags(image), image.mode == "F"
    if WHITE in tags:
        return float(np.ravel(tags.get(BLACK, 0))[0]), float(np.ravel(tags[WHITE])[0])
    bits = 16 if image.format == "PNG" else int(np.ravel(tags.get(BITS, 0))[0])
    low, high = values.min(), values.max()
    if image.format == "PNG" or 0 < bits < 16:
        if bits == 16 and 0 < high <= WHITES[2]:
            guessed(
                f"holds 16 bits and comes out dark, as its highest value is {high:g}: if white is less, save 8 bits"
            )
        return 0.0, 2.0**bits - 1
    slack = 1 + OVERSHOOT if floats else 1
    white = next((white for white in (WHITES if floats else WHITES[1:]) if high <= slack * white), None)
    if white is None or low < (1 - slack) * white:
        raise ValueError(
            f"its values go from {low:g} to {high:g}, expected 0 to 1, 255, 4095 or 65535: save it in 8 bits"
        )
    if white > 1 and high > 0 and (bits, white) != (16, 65535):
        guessed(f"does not say its range of values: {white} is taken as white, as its highest value is {high:g}")
    return 0.0, float(white)


def square(image: Image.Image, side: int, resolution: int, generator: torch.Generator | None) -> Image.Image:
    """The shorter side brought to `side` pixels (Lanczos), then a square of `resolution` pixels.

    It lies at random with a generator (training), in the centre without (evaluation).
    """
    width, height = image.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    room = [length - resolution for length in size]
    if generator is None:
        left, top = (space // 2 for space in room)
    else:
        left, top = (int(torch.randint(space + 1, (), generator=generator)) for space in room)
    box = left, top, left + resolution, top + resolution
    if max(size) > ELONGATED * side:  # the whole would take gigabytes; up to rounding the same
        steps = width / size[0], height / size[1]
        part = [min(at * steps[i % 2], image.size[i % 2]) for i, at in enumerate(box)]
        return image.resize((resolution, resolution), Image.Resampling.LANCZOS, part)
    return (image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)).crop(box)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> float (3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
