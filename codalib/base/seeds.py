"""Seeds: one stride between the seeds of runs, processes and views, and one generator a sample."""

from collections.abc import Sequence

import torch

SEED_STRIDE = 1_000_003  # between two seeds' families: more than a run has samples, a data set images, a step processes


def sample_generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample, from a run's seed and the sample's number in it; on the CPU, for every device."""
    return [torch.Generator().manual_seed(seed * SEED_STRIDE + number) for number in numbers]
