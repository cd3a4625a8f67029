"""Parallel decoding of MaskGIT (section 4.3 of arXiv:2503.17760, arXiv:2202.04200): pure functions, seeded by sample.

From a sequence that is masked but for what is fixed, each step draws a token for every masked position, keeps the most
confident of them and masks the rest again; how many are kept is the schedule's. Confidence is the drawn token's
log-probability plus Gumbel noise, whose weight falls linearly to 0 at the last step.

A sample's noise comes from a generator of its own, so that a sample depends on its seed and its condition, and not on
the batch it is drawn in (but for the rounding of sums, whose order depends on a batch's size).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codalib.models.maskgit import Condition, MaskGIT, TextCondition, join_levels, split_levels
from codalib.models.tokens import Tokens

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps done, in (0, 1] -> share of tokens still masked
    "cosine": lambda done: math.cos(done * math.pi / 2),
    "linear": lambda done: 1 - done,
    "square": lambda done: 1 - done * done,
}
GUIDANCE_SCHEDULES = ("constant", "linear")
ORDERS = ("confidence", "coarse-to-fine")
MASKED = -1  # in indices that are handed in or out: a token that is not known
LEVEL_GAP = 1e6  # above any confidence; in float64 confidences keep 10 digits behind it
TILE_LOGITS = 2**24  # logits held at once, twice that with guidance: 64 MiB in float32


class Step(NamedTuple):
    """What `generate` hands to `on_step` after each step."""

    number: int  # from 0
    indices: list[Tensor]  # one (B, p, p) a level, -1 where still masked
    drawn: list[Tensor]  # the same with this step's draw at the masked positions: a whole image


def unmask_counts(tokens: int, steps: int, schedule: str = "cosine") -> list[int]:
    """How many of TOKENS masked tokens each step unmasks: STEPS numbers of at least 1 that sum to TOKENS.

    After t of T steps floor(schedule(t / T) * tokens) are masked, but for the one that each step unmasks at least.
    Raises ValueError on an unknown schedule, on less than one step, and on more steps than tokens.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} got, expected one of {', '.join(SCHEDULES)}")
    if not 1 <= steps <= tokens:
        raise ValueError(
            f"{steps} steps got for {tokens} masked tokens, expected 1 to {tokens}: each unmasks at least one"
        )
    counts, masked = [], tokens
    for step in range(1, steps + 1):
        left = math.floor(SCHEDULES[schedule](step / steps) * tokens + 1e-9) if step < steps else 0
        left = max(min(left, masked - 1), steps - step)
        counts.append(masked - left)
        masked = left
    return counts


def guidance_at(step: int, steps: int, guidance: float, schedule: str = "constant") -> float:
    """The guidance of a step counted from 0; "linear" rises from 0 at the first step to `guidance` at the last."""
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule {schedule!r} got, expected one of {', '.join(GUIDANCE_SCHEDULES)}")
    return guidance if schedule == "constant" or steps == 1 else guidance * step / (steps - 1)


@torch.no_grad()
def generate(
    model: MaskGIT,
    condition: Condition = None,
    batch: int | None = None,
    *,
    steps: int = 8,
    schedule: str = "cosine",
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    guidance: float = 0.0,
    guidance_schedule: str = "constant",
    order: str = "confidence",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    fixed: Sequence[Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tokens:
    """Draw images' tokens: one (B, p, p) int64 a level, which `CodaTokenizer.decode` takes.

    Args:
        model: in evaluation mode.
        condition: labels (B,) or a `TextCondition`; None for a model without one.
        batch: B, where neither `condition` nor `fixed` tells.
        steps: of decoding, 1 to the number of masked tokens.
        schedule: "cosine", "linear" or "square", see `unmask_counts`.
        temperature: divides the logits that tokens are drawn from; near 0 the likeliest is taken.
        choice_temperature: weight of the confidence's Gumbel noise at the start (MaskGIT's 4.5).
        guidance: w of classifier-free guidance; the logits are (1 + w) * conditional - w * unconditional, both from one
            batch. 0 is the conditional model itself, with no second pass.
        guidance_schedule: "constant" or "linear" over the steps, see `guidance_at`.
        order: "confidence" over all levels (the paper's), or "coarse-to-fine": no token is unmasked before those of
            coarser levels, confidence decides within a level. Both unmask the schedule's number at each step.
        generator: one a sample, see `sample_generators`; or one, or None for torch's own, to draw their seeds from.
        fixed: one (B, p, p) a level of tokens that stay as they are, -1 where they are to be drawn (inpainting; with
            another label, class editing). They may differ in number from sample to sample.
        on_step: called after each step, to look on.
    Raises:
        ValueError: a value out of range, a condition that the model was not built for; the message says which.
    """
    _check(model, steps, temperature, guidance, guidance_schedule, order)
    tokens = _start(model, condition, batch, fixed)  # (B, L) on the model's device
    generators = _generators(generator, len(tokens))
    plans = [unmask_counts(int(n), steps, schedule) if n else [0] * steps for n in _masked(model, tokens).sum(1)]
    for step in range(steps):
        weight = guidance_at(step, steps, guidance, guidance_schedule)
        # (2, B, L) on the CPU: one number draws the token, one makes the choice's noise.
        noise = torch.stack([torch.rand(2, model.num_tokens, generator=own) for own in generators], dim=1).to(
            tokens.device
        )
        drawn, confidence = _draw(model, tokens, condition, weight, temperature, noise[0])
        gumbel = -torch.log(-torch.log(noise[1].double().clamp(1e-12, 1 - 1e-12)))
        confidence = confidence + choice_temperature * (1 - (step + 1) / steps) * gumbel
        if order == "coarse-to-fine":
            confidence = confidence - LEVEL_GAP * model.token_levels
        counts = torch.tensor([plan[step] for plan in plans], device=tokens.device)
        masked = _masked(model, tokens)
        rank = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True).argsort(dim=1)
        unmasked = masked & (rank < counts[:, None])
        tokens = torch.where(unmasked, drawn, tokens)
        if on_step is not None:
            seen = tokens.masked_fill(_masked(model, tokens), MASKED)
            on_step(Step(step, split_levels(seen, model.scales), split_levels(drawn, model.scales)))
    return Tokens(split_levels(tokens, model.scales), model.codebook_size)


def keep_outside(
    indices: Sequence[Tensor], box: tuple[float, float, float, float], coarse_kept: int = 0
) -> list[Tensor]:
    """For `generate(fixed=...)`: hide the tokens whose cell meets a box, at every level, and keep the others.

    Args:
        indices: an image's, one (B, p, p) a level.
        box: top, left, bottom, right as shares of the side, in [0, 1].
        coarse_kept: this many levels, the coarsest, are kept whole: they hold the layout and the colours, and a coarse
            cell reaches far beyond a small box.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"box {box} got, expected 0 <= top < bottom <= 1 and 0 <= left < right <= 1")
    kept = []
    for number, level in enumerate(indices):
        p = level.shape[-1]
        starts, ends = torch.arange(p) / p, (torch.arange(p) + 1) / p
        rows, columns = (starts < bottom) & (ends > top), (starts < right) & (ends > left)
        inside = (rows[:, None] & columns).to(level.device)  # (p, p)
        kept.append(level.clone() if number < coarse_kept else level.masked_fill(inside, MASKED))
    return kept


def _draw(
    model: MaskGIT, tokens: Tensor, condition: Condition, guidance: float, temperature: float, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw a token for each masked position: tokens (B, L) with them filled in, and their log-probabilities (B, L).

    The log-probability is that of the guided logits before the temperature: at a low temperature all draws would
    otherwise be equally sure. A token is the first whose cumulative probability exceeds its uniform number.
    """
    masked = _masked(model, tokens)  # (B, L)
    if guidance:
        absent = torch.arange(2 * len(tokens), device=tokens.device) >= len(tokens)
        both = model.features(torch.cat([tokens, tokens]), _twice(condition), absent)
        states = [state[masked] for state in both.chunk(2)]  # conditional, unconditional: (M, D)
    else:
        states = [model.features(tokens, condition)[masked]]
    numbers = uniform[masked]  # (M,)
    chosen, log_probabilities = torch.empty_like(numbers, dtype=torch.long), torch.empty_like(numbers)
    rows = max(1, TILE_LOGITS // model.codebook_size)
    for start in range(0, len(numbers), rows):
        part = slice(start, start + rows)
        logits = model.logits(states[0][part]).float()  # (rows, K)
        if guidance:
            logits = (1 + guidance) * logits - guidance * model.logits(states[1][part]).float()
        cumulative = (logits / temperature).softmax(dim=1).cumsum(dim=1)
        aim = numbers[part, None] * cumulative[:, -1:]  # the last is 1 but for rounding
        token = torch.searchsorted(cumulative, aim, right=True).clamp_(max=model.codebook_size - 1)  # (rows, 1)
        chosen[part] = token[:, 0]
        log_probabilities[part] = logits.log_softmax(dim=1).gather(1, token)[:, 0]
    drawn, confidence = tokens.clone(), torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    drawn[masked], confidence[masked] = chosen, log_probabilities.double()
    return drawn, confidence


def _masked(model: MaskGIT, tokens: Tensor) -> Tensor:
    return tokens == model.mask_token


def _twice(condition: Condition) -> Condition:
    if isinstance(condition, TextCondition):
        return TextCondition(*(torch.cat([part, part]) for part in condition))
    return torch.cat([condition, condition])


def _check(model: MaskGIT, steps: int, temperature: float, guidance: float, guidance_schedule: str, order: str) -> None:
    if model.training:
        raise ValueError("the model is in training mode, expected evaluation mode: call model.eval() first")
    if order not in ORDERS:
        raise ValueError(f"order {order!r} got, expected one of {', '.join(ORDERS)}")
    if temperature <= 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature {temperature} got, expected a number above 0 (near 0: the likeliest token)")
    if guidance < 0:
        raise ValueError(f"guidance {guidance} got, expected 0 (none) or more")
    if guidance and not model.is_conditional:
        raise ValueError(f"guidance {guidance} got for a model without a condition, expected 0")
    guidance_at(0, steps, guidance, guidance_schedule)


def _start(model: MaskGIT, condition: Condition, batch: int | None, fixed: Sequence[Tensor] | None) -> Tensor:
    """The sequences at the start: the mask token but where tokens are fixed."""
    if isinstance(condition, TextCondition):
        batch = len(condition.mask)
    elif condition is not None:
        batch = len(condition)
    elif fixed is not None:
        batch = len(fixed[0])
    if not batch:
        raise ValueError("the number of samples is not known: give labels, captions, fixed tokens or batch")
    model.check_condition(condition, batch)
    device = model.positions.device
    if fixed is None:
        return torch.full((batch, model.num_tokens), model.mask_token, device=device)
    expected = [(batch, p, p) for p in model.scales]
    if [tuple(level.shape) for level in fixed] != expected:
        raise ValueError(f"fixed tokens of shapes {[tuple(x.shape) for x in fixed]} got, expected {expected}")
    tokens = join_levels(fixed).long().to(device)
    if tokens.min() < MASKED or tokens.max() >= model.codebook_size:
        raise ValueError(
            f"fixed tokens in [{tokens.min().item()}, {tokens.max().item()}] got, expected -1 (to be drawn) to "
            f"{model.codebook_size - 1}: do they come from another tokenizer?"
        )
    return tokens.masked_fill(tokens == MASKED, model.mask_token)


def _generators(generator: torch.Generator | Sequence[torch.Generator] | None, batch: int) -> list[torch.Generator]:
    if generator is None or isinstance(generator, torch.Generator):
        seeds = torch.randint(2**62, (batch,), generator=generator, device=getattr(generator, "device", "cpu"))
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators got, expected one for each of {batch} samples")
    return list(generator)
