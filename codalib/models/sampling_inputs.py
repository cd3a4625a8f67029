"""What `models.sampling.generate` is given, as it computes with it: first tokens, conditions and random generators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codalib.base.hardware import to_device
from codalib.models.checks import check_condition, check_fixed
from codalib.models.maskgit import Condition, MaskGIT, TextCondition
from codalib.models.tokens import join_levels

MASKED = -1  # in indices that are handed in or out: a token that is not known


def first_tokens(model: MaskGIT, condition: Condition, batch: int | None, fixed: Sequence[Tensor] | None) -> Tensor:
    """The sequences at the start: the mask token but where tokens are fixed."""
    asked = batch
    if isinstance(condition, TextCondition):
        batch = len(condition.mask)
    elif condition is not None:
        batch = len(condition)
    elif fixed is not None:
        batch = len(fixed[0])
    if asked not in (None, batch):
        raise ValueError(f"expected a condition or fixed tokens for each of {asked} samples, the batch, got {batch}")
    if not batch:
        raise ValueError(
            "expected labels, captions, fixed tokens or batch, got none: the number of samples is not known"
        )
    check_condition(condition, batch, model.num_classes, model.text_dim, wait=True)
    device = model.positions.device
    if fixed is None:
        return torch.full((batch, model.num_tokens), model.mask_token, device=device)
    check_fixed(fixed, batch, model.scales, model.codebook_size)
    tokens = join_levels(fixed).long().to(device)
    return tokens.masked_fill(tokens == MASKED, model.mask_token)


def masked_places(mask: Tensor, count: int) -> Tensor:
    """Where MASK (B, L) is true, as places of its flattened order, (count,) int64, rising: `mask.flatten().nonzero()`.

    How many it is, COUNT, is known, so that the host need not wait for the device.
    """
    return mask.flatten().byte().argsort(stable=True, descending=True)[:count]


def one_rng_a_sample(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[torch.Generator]:
    if generator is None or isinstance(generator, torch.Generator):
        seeds = torch.randint(2**62, (batch,), generator=generator, device=getattr(generator, "device", "cpu"))
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != batch:
        raise ValueError(f"expected a generator for each of {batch} samples, got {len(generator)}")
    return list(generator)


def draw_noise(generators: Sequence[torch.Generator], length: int, device: torch.device) -> Tensor:
    """Uniform numbers (2, B, L), drawn on the CPU: one draws a token, one makes the noise of its choice."""
    return to_device(torch.stack([torch.rand(2, length, generator=own) for own in generators], dim=1), device)


def twice(condition: Condition) -> Condition:
    if isinstance(condition, TextCondition):
        return TextCondition(*(torch.cat([part, part]) for part in condition))
    return torch.cat([condition, condition])
