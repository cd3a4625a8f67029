"""Parallel decoding of MaskGIT (section 4 of arXiv:2503.17760, arXiv:2202.04200): schedules and `generate`.

From a sequence that is masked but for what is fixed, each step draws a token for every masked position, keeps the most
confident of them and masks the rest again; how many are kept is the schedule's. A sample's noise comes from a generator
of its own, so that it depends on its seed and its condition, and not on its batch (but for the rounding of sums).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codalib.base.hardware import to_device
from codalib.models.checks import check_sampling
from codalib.models.maskgit import Condition, MaskGIT
from codalib.models.sampling_inputs import MASKED, draw_noise, first_tokens, masked_places, one_rng_a_sample, twice
from codalib.models.tokens import Tokens, split_levels

SCHEDULES: dict[str, Callable[[float], float]] = {  # fraction of steps done, in (0, 1] -> fraction of tokens masked
    "cosine": lambda done: math.cos(done * math.pi / 2),
    "linear": lambda done: 1 - done,
    "square": lambda done: 1 - done * done,
}
GUIDANCE_SCHEDULES = ("constant", "linear")
ORDERS = ("confidence", "coarse-to-fine")
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
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"expected a schedule of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not 1 <= steps <= tokens:
        raise ValueError(f"expected 1 to {tokens} steps for {tokens} masked tokens, one each at least, got {steps}")
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
        raise ValueError(f"expected a guidance_schedule of {', '.join(GUIDANCE_SCHEDULES)}, got {schedule!r}")
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
    """Draw images' tokens, which `CodaTokenizer.decode` takes, with a model in evaluation mode.

    condition, batch: labels (B,) or a `TextCondition`; without one, and without `fixed`, `batch` is B.
    steps, schedule: 1 to the number of masked tokens; "cosine", "linear" or "square", see `unmask_counts`.
    temperature: divides the logits that tokens are drawn from; near 0 the likeliest is taken.
    choice_temperature: weight of the confidence's Gumbel noise at the start (MaskGIT's 4.5), 0 at the end.
    guidance, guidance_schedule: w of (1 + w) * conditional - w * unconditional logits, see `guidance_at`.
    order: "confidence" over all levels (the paper's), or "coarse-to-fine": no token is unmasked before those of coarser
        levels, confidence decides within a level. Both unmask the schedule's number at each step.
    generator: a CPU one for each sample; or one, or None for torch's own, to draw their seeds from.
    fixed: one (B, p, p) a level of tokens that stay as they are, -1 where they are to be drawn (inpainting; with
        another label, class editing). They may differ in number from sample to sample.
    """
    guidance_at(0, steps, guidance, guidance_schedule)
    check_sampling(model.training, model.is_conditional, temperature, choice_temperature, guidance, order, ORDERS)
    tokens = first_tokens(model, condition, batch, fixed)  # (B, L) on the model's device
    generators = one_rng_a_sample(generator, len(tokens))
    left = (tokens == model.mask_token).sum(1).tolist()  # (B,)
    plans = torch.tensor([unmask_counts(n, steps, schedule) if n else [0] * steps for n in left])  # (B, steps)
    for step in range(steps):
        weight = guidance_at(step, steps, guidance, guidance_schedule)
        noise = draw_noise(generators, model.num_tokens, tokens.device)  # (2, B, L)
        masked = tokens == model.mask_token
        places = masked_places(masked, int(plans[:, step:].sum()))
        drawn, confidence = _draw(model, tokens, condition, weight, temperature, noise[0], places)
        gumbel = -torch.log(-torch.log(noise[1].double().clamp(1e-12, 1 - 1e-12)))
        confidence = confidence + choice_temperature * (1 - (step + 1) / steps) * gumbel
        if order == "coarse-to-fine":
            confidence = confidence - LEVEL_GAP * model.token_levels
        rank = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True).argsort(dim=1)
        tokens = torch.where(masked & (rank < to_device(plans[:, step, None], tokens.device)), drawn, tokens)
        if on_step is not None:
            seen = tokens.masked_fill(tokens == model.mask_token, MASKED)
            on_step(Step(step, split_levels(seen, model.scales), split_levels(drawn, model.scales)))
    return Tokens(split_levels(tokens, model.scales), model.codebook_size)


def _draw(
    model: MaskGIT,
    tokens: Tensor,
    condition: Condition,
    guidance: float,
    temperature: float,
    uniform: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each of PLACES (M,): tokens (B, L) with them filled in, and their log-probabilities (B, L).

    Of the logits before the temperature: at a low temperature all draws would otherwise be equally confident.
    """
    if guidance:
        absent = torch.arange(2 * len(tokens), device=tokens.device) >= len(tokens)
        both = model.features(torch.cat([tokens, tokens]), twice(condition), absent)
        states = [state.flatten(0, 1)[places] for state in both.chunk(2)]  # conditional, unconditional: (M, D)
    else:
        states = [model.features(tokens, condition).flatten(0, 1)[places]]
    numbers, rows = uniform.flatten()[places], max(1, TILE_LOGITS // model.codebook_size)
    parts = []
    for some, *inputs in zip(numbers.split(rows), *(state.split(rows) for state in states), strict=True):
        logits = [model.logits(state).float() for state in inputs]  # (rows, K)
        guided = (1 + guidance) * logits[0] - guidance * logits[1] if guidance else logits[0]
        parts.append(draw_tokens(guided, temperature, some))
    drawn = tokens.flatten().clone()
    confidence = torch.zeros_like(drawn, dtype=torch.float64)
    drawn[places], confidence[places] = (torch.cat(column) for column in zip(*parts, strict=True))
    return drawn.view_as(tokens), confidence.view_as(tokens)


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and uniform numbers (N,) -> tokens (N,) and their log-probabilities (N,) in float64.

    A token is the first whose cumulative probability exceeds its uniform number.
    """
    cumulative = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    aim = uniform[:, None] * cumulative[:, -1:]  # the last is 1 but for rounding
    token = torch.searchsorted(cumulative, aim, right=True).clamp_(max=logits.shape[1] - 1)  # (N, 1)
    return token[:, 0], logits.log_softmax(dim=1).gather(1, token)[:, 0].double()
