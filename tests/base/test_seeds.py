import torch

from codalib.base.seeds import sample_generators, step_seed


def test_no_two_samples_of_any_seeds_share_their_noise():
    drawn = [torch.rand(4, generator=own) for seed in range(4) for own in sample_generators(seed, range(50))]
    assert len({tuple(noise.tolist()) for noise in drawn}) == 200
    (alone,) = sample_generators(2, [7])
    assert torch.equal(torch.rand(4, generator=alone), drawn[2 * 50 + 7])


def test_no_two_steps_of_any_seeds_and_processes_share_their_seed():
    seeds = {step_seed(seed, step, process) for seed in range(5) for step in range(50) for process in range(3)}
    assert len(seeds) == 750
    assert step_seed(2**32 - 1, 10**9, 1000) < 2**64
    assert step_seed(3, 7) == step_seed(3, 7, 0) == 9565533078676835473  # the same on every machine
