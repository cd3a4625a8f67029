"""Seeds: one stride between the seeds of runs and views, one generator a sample, one seed a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_STRIDE = 1_000_003  # between two seeds' families: more than a run has samples
SEEDS = 2**32  # seeds are below it: NumPy's bound


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that is no whole number from 0 to 2**32 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise ValueError(f"expected a whole number from 0 to {SEEDS - 1} as seed, got {seed!r}: take one of these")


def sample_generators(seed: int, numbers: Sequence[int]) -> "list[torch.Generator]":
    """One generator a sample, from a run's seed and the sample's number in it; on the CPU, for every device."""
    import torch  # here alone: what checks a seed needs no torch

    return [torch.Generator().manual_seed((seed * SEED_STRIDE + number) % 2**64) for number in numbers]


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """A seed of 64 bits for one step of one process, by NumPy's SeedSequence: no two share their noise.

    A sum would: seed 1 at a step would draw what seed 0 draws at the next.
    """
    import numpy as np  # here alone, as above

    return int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0])
