import math

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from codalib.evaluation.latents import approximation, code_spread, features_of, sharpness, token_stability
from codalib.models.ranking import confidence
from codalib.training.settings import QuantizerSettings

SETTINGS = QuantizerSettings(steps=1, batch_size=8, codebook_size=16, scales=(4,))


@pytest.fixture
def latents():
    return torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def quantizer_of(kind, **settings):
    torch.manual_seed(1)
    return QuantizerSettings(**vars(SETTINGS) | {"kind": kind} | settings).build_quantizer(4).requires_grad_(False)


def test_features_are_positions(latents):
    features = features_of(latents)
    assert features.shape == (640, 4)
    assert torch.equal(features[17], latents[1, :, 0, 1])
    drawn = features_of(latents, 600)
    assert len(drawn.unique(dim=0)) == 600
    with pytest.raises(ValueError, match="at most 640"):
        features_of(latents, 641)


def test_an_approximation_of_few_values_covers_little(latents):
    same = approximation(latents, latents, 200)
    assert same["quantization_error"] == 0
    assert same["latent_distance"] == pytest.approx(0, abs=1e-5)
    assert same["distinct"] == 1
    assert same["coverage"] == pytest.approx(1 - 2**-3, abs=0.06)
    rounded = approximation(latents, latents.sign() / 2, 200)
    assert rounded["distinct"] == 16 / 640
    assert rounded["coverage"] < 0.5
    assert rounded["latent_distance"] > 0.1


def test_sharpness_is_that_of_shares_written_out(latents):
    quantizer = quantizer_of("attention")
    features, attn = features_of(latents), quantizer.attn
    logits = attn.queries(features) @ attn.keys(quantizer.codebooks.weight).T * 32**-0.5
    expected = logits.softmax(1)
    found = sharpness(quantizer, latents)
    assert found["top_1_probability"] == pytest.approx(expected.max(1).values.mean().item(), rel=1e-5)
    assert found["assignment_entropy"] == pytest.approx(torch.special.entr(expected).sum(1).mean().item(), rel=1e-5)

    quantizer = quantizer_of("nearest")
    squared = torch.cdist(features, quantizer.codebooks.weight).square()
    variance = squared.min(1).values.mean() / 4
    expected = (-squared / (2 * variance)).softmax(1)
    found = sharpness(quantizer, latents)
    assert found["top_1_probability"] == pytest.approx(expected.max(1).values.mean().item(), rel=1e-4)
    assert 0 < found["assignment_entropy"] < math.log(16)


def test_codes_that_are_latents_cover_them(latents):
    quantizer = quantizer_of("nearest")
    with torch.no_grad():
        quantizer.codebooks.weight.copy_(features_of(latents, 16, seed=9))
    close = code_spread(quantizer, latents)
    with torch.no_grad():
        quantizer.codebooks.weight.copy_(torch.ones(16, 4))
    clump = code_spread(quantizer, latents)
    assert close["coverage"] > clump["coverage"]
    assert close["latent_distance"] < clump["latent_distance"]
    assert clump["utilization"] == 1 / 16


def test_sharpness_of_several_levels_is_the_mean_over_their_tokens(latents):
    quantizer = quantizer_of("attention", scales=(1, 4))
    scores = [level.flatten(0, 2) for level in confidence(quantizer, latents, top=16)]
    expected = torch.cat(scores)[:, 0].mean().item()
    assert sharpness(quantizer, latents, batch_size=7)["top_1_probability"] == pytest.approx(expected, rel=1e-5)


class Stripes(nn.Module):
    """A tokenizer whose token is 1 where it is bright, and not beyond white; it decodes to +FACTOR and -FACTOR."""

    num_tokens = 17

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def encode(self, images, sample):
        assert not sample
        means = [adaptive_avg_pool2d(images[:, 0], side) for side in (1, 4)]
        return [((mean > 0) & (mean < 1.1)).long() for mean in means]

    def decode(self, tokens):
        images = (2 * self.factor * tokens[1] - self.factor)[:, None].expand(-1, 3, -1, -1)
        return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_tokens_that_another_view_changes(monkeypatch):
    images = torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1]).expand(3, 3, 8, 8)  # the middle as a whole: token 0
    batches = [{"image": images[:2]}, {"image": images[2:]}]
    monkeypatch.setattr("codalib.evaluation.latents.evaluation_batches", lambda *_: batches)
    # Shifted: + + + - - + + -, so that the whole is above the middle, and the third of four patches no longer is.
    assert token_stability(Stripes(0.5), None) == {"shift_change": 5 / 17, "reencoding_change": 0}
    assert token_stability(Stripes(1.5), None)["reencoding_change"] == 0  # clamped
    assert token_stability(Stripes(-0.5), None)["reencoding_change"] == 16 / 17
