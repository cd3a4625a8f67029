import torch

from codalib.base.seeds import sample_generators


def test_no_two_samples_of_any_seeds_share_their_noise():
    drawn = [torch.rand(4, generator=own) for seed in range(4) for own in sample_generators(seed, range(50))]
    assert len({tuple(noise.tolist()) for noise in drawn}) == 200
    (alone,) = sample_generators(2, [7])
    assert torch.equal(torch.rand(4, generator=alone), drawn[2 * 50 + 7])
