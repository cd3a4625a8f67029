"""Checks of what callers hand to the models, and of the losses, apart from the formulas: one error, one sentence."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

IMAGE_BOUND = 2.0  # of values around [-1, 1]: a decoder overshoots; ImageNet's normalisation reaches 2.6
LEAST_TEMPERATURE = 1e-30  # logits divided by less overflow


def check_latents(latents: Tensor, channels: int, side: int, finite: bool = False) -> None:
    """Latents are (B, channels, side, side) with B at least 1, and FINITE: for that the host waits for a GPU."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != (channels, side, side) or len(latents) == 0:
        raise ValueError(
            f"expected latents of shape (B, {channels}, {side}, {side}), got {tuple(latents.shape)}: the last scale is "
            "the latent grid; give latents of that size or build the quantizer with other scales"
        )
    if finite and not latents.isfinite().all():
        raise ValueError(
            "expected finite latents, got NaN or infinite ones: look at the images, at the VAE's weights, and at its "
            "precision (float16 overflows)"
        )


def check_list(**settings: Any) -> None:
    """Each of the named settings is a list or tuple, not a text."""
    for name, value in settings.items():
        if isinstance(value, str):
            raise ValueError(f"expected {name} as a list, got the text {value!r}: put it in a list")


def whole_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The sides of the levels as whole numbers; ValueError for a text, and for a side that is none."""
    check_list(scales=scales)
    if any(isinstance(p, str | bool) or int(p) != p for p in scales):
        raise ValueError(f"expected scales that are whole numbers, such as (1, 2, 4), got {scales!r}")
    return tuple(int(p) for p in scales)


def check_indices(indices: Sequence[Tensor], scales: Sequence[int], codes: int, levels: int | None, lowest: int) -> int:
    """One integer (B, p, p) for each of the first LEVELS scales (None: all), values in [lowest, codes); how many."""
    if (theirs := getattr(indices, "codebook_size", codes)) != codes:  # of `models.tokens.Tokens`
        raise ValueError(f"expected tokens of {codes} codes, got tokens of {theirs}: they are another tokenizer's")
    count = len(scales) if levels is None else levels
    if not 1 <= count <= len(scales):
        raise ValueError(f"expected levels from 1 to {len(scales)}, the number of scales, got {levels}")
    if not count <= len(indices) <= len(scales):
        raise ValueError(
            f"expected indices of {count} levels, one (B, p, p) tensor for each scale in {tuple(scales[:count])}, "
            f"got {len(indices)}"
        )
    for number, (level, p) in enumerate(zip(indices[:count], scales, strict=False)):
        fits = isinstance(level, Tensor) and tuple(level.shape) == (len(indices[0]), p, p) and len(level) > 0
        if not fits or level.is_floating_point() or level.dtype == torch.bool:
            raise ValueError(
                f"expected indices of level {number} to be integers of shape (B, {p}, {p}) with one B for all levels, "
                f"got a {type(level).__name__} of {level.dtype} and shape {tuple(level.shape)}"
            )
    extremes = torch.stack([torch.stack(level.aminmax()).long() for level in indices[:count]]).tolist()  # one wait
    for number, (low, high) in enumerate(extremes):
        if low < lowest or high >= codes:
            raise ValueError(
                f"expected indices of level {number} in [{lowest}, {codes - 1}], got [{low}, {high}]: they were made "
                "with another codebook, or hold a mask token"
            )
    return count


def check_condition(
    condition: Any, batch: int, num_classes: int | None, text_dim: int | None, wait: bool = False
) -> None:
    """The condition is of the model's kind (labels, text or none), for BATCH samples, and in range.

    Labels on a GPU are looked at with WAIT alone, since the host waits for it.
    """
    expected = "labels" if num_classes is not None else "text" if text_dim is not None else "no condition"
    got = "no condition" if condition is None else "labels" if isinstance(condition, Tensor) else "text"
    if got == "text" and not hasattr(condition, "embeddings"):
        got = f"a {type(condition).__name__}, neither a tensor of labels nor a TextCondition"
    if got != expected:
        raise ValueError(f"expected {expected} as the condition, which the model was built for, got {got}")
    if condition is None:
        return
    if got == "labels" and (condition.ndim != 1 or condition.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"expected labels (B,) of int64, got {condition.dtype} of shape {tuple(condition.shape)}")
    count = len(condition.embeddings) if got == "text" else len(condition)
    if count != batch:
        raise ValueError(f"expected one condition for each of {batch} samples, got {count}")
    if got == "text" and condition.embeddings.shape[-1] != text_dim:
        raise ValueError(
            f"expected text embeddings of width {text_dim}, got {condition.embeddings.shape[-1]}: use the text encoder "
            "that the model was trained with"
        )
    if got == "labels" and count and (wait or condition.device.type == "cpu"):
        low, high = condition.min().item(), condition.max().item()
        if low < 0 or high >= num_classes:
            raise ValueError(f"expected labels from 0 to {num_classes - 1}, got {low if low < 0 else high}")


def check_quantizer(
    channels: int, codes: int, scales: Sequence[int], beta: float, backend: str, backends: Sequence[str]
) -> tuple[int, ...]:
    """The settings that all quantizers share; returns the scales."""
    scales = whole_scales(scales)
    check_range(0, math.inf, beta=beta)
    if not scales or min(scales) < 1 or max(scales) != scales[-1]:
        raise ValueError(f"expected scales of at least 1, the last (the latent grid's side) the largest, got {scales}")
    if channels < 1 or codes < 1:
        raise ValueError(f"expected latent_channels and codebook_size of at least 1, got {channels} and {codes}")
    if backend not in backends:
        raise ValueError(f"expected a backend of {', '.join(backends)}, got {backend!r}")
    return scales


def check_fixed(fixed: Sequence[Tensor], batch: int, scales: Sequence[int], codes: int) -> None:
    """Tokens that sampling keeps: one (batch, p, p) a level, values in [-1, codes), -1 where they are to be drawn."""
    expected = [(batch, p, p) for p in scales]
    if [tuple(level.shape) for level in fixed] != expected:
        raise ValueError(f"expected fixed tokens of shapes {expected}, got {[tuple(x.shape) for x in fixed]}")
    if any(level.is_floating_point() or level.dtype == torch.bool for level in fixed):
        raise ValueError(f"expected fixed tokens of int64, got {fixed[0].dtype}: convert them")
    extremes = torch.stack([torch.stack(level.aminmax()).long() for level in fixed]).tolist()  # one wait
    low, high = min(row[0] for row in extremes), max(row[1] for row in extremes)
    if low < -1 or high >= codes:
        raise ValueError(
            f"expected fixed tokens from -1 (to be drawn) to {codes - 1}, got [{low}, {high}]: do they come from "
            "another tokenizer?"
        )


class NonFiniteLoss(RuntimeError):
    """A term of the loss is not a number, or infinite."""


def check_finite(terms: Mapping[str, Tensor], step: int, last_checkpoint: object | None) -> None:
    """Raise `NonFiniteLoss`, naming the term, the step and the last good checkpoint, if a term is not finite."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    if bool(torch.isfinite(values).all()):  # one transfer for all terms
        return
    named = zip(terms, values.tolist(), strict=True)
    bad = ", ".join(f"{name} = {value:g}" for name, value in named if not math.isfinite(value))
    where = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was written yet"
    raise NonFiniteLoss(
        f"at step {step} the loss is not finite ({bad}); {where}: "
        "resume from it with a lower learning rate or a smaller weight of that term"
    )


def check_width(width: int, heads: int, num_classes: int | None, text_dim: int | None) -> None:
    """The settings of MaskGIT that must fit each other."""
    if width % heads:
        raise ValueError(f"expected a width that the {heads} heads divide, got {width}")
    if num_classes is not None and text_dim is not None:
        raise ValueError("expected num_classes or text_dim, got both: the condition is a class or a text")


def check_sampling(
    training: bool,
    conditional: bool,
    temperature: float,
    choice_temperature: float,
    guidance: float,
    order: str,
    orders: Sequence[str],
) -> None:
    """What `generate` is asked for, and of which model."""
    if training:
        raise ValueError("expected a model in evaluation mode, got one in training mode: call model.eval() first")
    if order not in orders:
        raise ValueError(f"expected an order of {', '.join(orders)}, got {order!r}")
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        words = f"expected a temperature above 0, from {LEAST_TEMPERATURE:g} on (near 0: the likeliest token)"
        raise ValueError(f"{words}, got {temperature}")
    check_range(0, math.inf, choice_temperature=choice_temperature)
    if not 0 <= guidance < math.inf or (guidance and not conditional):
        raise ValueError(f"expected guidance of 0 (none) or more, and 0 for a model without condition, got {guidance}")


def check_tokens(tokens: Tensor, length: int) -> None:
    """MaskGIT's sequences are (B, length)."""
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise ValueError(f"expected tokens of shape (B, {length}), got {tuple(tokens.shape)}")


def check_images(images: Tensor, channels: int, side: int | None = None) -> None:
    """Images are floating (B, channels, h, w), or (B, channels, side, side), with B at least 1, around [-1, 1]."""
    expected = ("h", "w") if side is None else (side, side)
    if images.ndim != 4 or images.shape[1] != channels or (side is not None and tuple(images.shape[2:]) != expected):
        shape = ", ".join(map(str, (channels, *expected)))
        raise ValueError(f"expected images of shape (B, {shape}), got {tuple(images.shape)}")
    if not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"expected one image at least, floating and in [-1, 1], got {len(images)} of {images.dtype}: of 8 bits, "
            "divide by 127.5 and subtract 1"
        )
    if images.device.type == "cpu":  # a GPU is not waited for
        low, high = (value.item() for value in images.detach().aminmax())
        if not (low >= -IMAGE_BOUND and high <= IMAGE_BOUND):  # NaN too
            raise ValueError(
                f"expected images in [-1, 1], got values from {low:g} to {high:g}: divide 8 bits by 127.5 and subtract "
                "1, and undo any other normalisation"
            )


def check_positive(**settings: float) -> None:
    """Each of the named settings is a number above 0."""
    for name, value in settings.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"expected {name} above 0, got {value!r}")


def check_whole(least: int, **settings: int) -> None:
    """Each of the named settings is a whole number of at least LEAST."""
    for name, value in settings.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")


def check_range(low: float, high: float, **settings: float) -> None:
    """Each of the named settings is a number from LOW to HIGH."""
    for name, value in settings.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high or value == math.inf:
            raise ValueError(f"expected {name} from {low:g} to {high:g}, got {value!r}")
