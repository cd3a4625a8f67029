"""The loss terms: values, gradients, weights, and the sentences of their errors."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from codalib.models import checks, loss_weights, losses
from codalib.models.loss_weights import LossWeights
from codalib.pretrained import perceptual, registry


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


@pytest.fixture(scope="module")
def effnet_distance():
    return perceptual.build_perceptual("perceptual_effnet")


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, 2, 3, 48, 48, generator=generator) * 2 - 1).unbind()


def test_released_weights():
    expected = {"l1": 0.2, "l2": 1, "perceptual": 1, "quantization": 1, "entropy": 0.05, "adversarial": 1, "kl": 1e-6}
    assert dataclasses.asdict(LossWeights()) == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossWeights().l1 = 1.0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1e-4"])
def test_bad_weights_are_refused(value):
    with pytest.raises(ValueError, match="entropy"):
        LossWeights(entropy=value)


def test_weighted_sum_is_equation_9():
    terms = {
        "l1": scalar(1.0),
        "l2": scalar(2.0),
        "perceptual_effnet": scalar(3.0),
        "quantization": scalar(4.0),
        "entropy": scalar(5.0),
        "adversarial": scalar(6.0),
    }
    weights = LossWeights(perceptual=0.5, adversarial=0.1)
    total = losses.weighted_sum(terms, weights, {"adversarial": 20.0})
    assert total.item() == pytest.approx(0.2 * 1 + 2 + 0.5 * 3 + 4 + 0.05 * 5 + 0.1 * 20 * 6)


def test_weighted_sum_leaves_out_weight_zero_and_refuses_the_unknown():
    terms = {"l2": scalar(2.0), "entropy": scalar(math.nan)}
    assert losses.weighted_sum(terms, LossWeights(entropy=0)).item() == 2
    with pytest.raises(KeyError, match="mystery"):
        losses.weighted_sum({"mystery": scalar(1.0)}, LossWeights())
    with pytest.raises(KeyError, match="adversarial"):
        losses.weighted_sum({"l2": scalar(1.0)}, LossWeights(), {"adversarial": 1.0})
    with pytest.raises(ValueError, match="a weight above 0"):
        losses.weighted_sum({"l2": scalar(1.0)}, LossWeights(l2=0))


def test_reconstruction_terms(effnet_distance):
    images = torch.zeros(2, 3, 40, 40)
    assert {k: v.item() for k, v in losses.reconstruction_terms(images, images + 0.5).items()} == {
        "l1": 0.5,
        "l2": 0.25,
    }
    assert set(losses.reconstruction_terms(images, images, effnet_distance)) == {"l1", "l2", "perceptual_effnet"}


def test_kl_against_torch():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 3
    torch.testing.assert_close(losses.kl_divergence(mean, logvar), expected)
    assert losses.kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


def test_effnet_distance_properties(effnet_distance, pair):
    one, other = pair
    distance = effnet_distance(one, other)
    assert distance.shape == (2,)
    assert ((distance > 0) & (distance <= 4)).all()
    torch.testing.assert_close(distance, effnet_distance(other, one))
    assert effnet_distance(one, one).abs().max() == 0
    nearer = effnet_distance(one, one + 0.1 * (other - one))
    assert (nearer < distance).all()


def test_effnet_distance_moves_the_image_and_nothing_else(effnet_distance, pair):
    one, other = pair
    moving = other.clone().requires_grad_()
    effnet_distance(one, moving).mean().backward()
    assert torch.isfinite(moving.grad).all()
    assert moving.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in effnet_distance.parameters())
    flat = torch.zeros_like(one).requires_grad_()  # equal images: the gradient is 0, not NaN
    effnet_distance(torch.zeros_like(one), flat).mean().backward()
    assert flat.grad.abs().sum() == 0


def test_weight_zero_loads_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(perceptual, "EfficientNetLite0", refuse)
    monkeypatch.setattr(perceptual.PerceptualVGG, "__init__", refuse)
    assert perceptual.build_perceptual("perceptual_vgg", weight=0) is None
    assert perceptual.build_perceptual("auto", weight=0) is None
    assert perceptual.build_perceptual(None) is None


def test_perceptual_names(monkeypatch, tmp_path):
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert perceptual.build_perceptual("auto").name == "perceptual_effnet"
    with pytest.raises(registry.MissingWeights):
        perceptual.build_perceptual("perceptual_vgg")
    with pytest.raises(ValueError, match="expected the perceptual network perceptual_vgg"):
        perceptual.build_perceptual("alex")
    (tmp_path / "vgg16-397923af.pth").touch()
    monkeypatch.setattr(perceptual.PerceptualVGG, "__init__", torch.nn.Module.__init__)  # without the weights
    assert perceptual.build_perceptual("auto").name == "perceptual_vgg"


def test_hinge():
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-2.0, 1.0]])
    assert losses.discriminator_hinge(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert losses.generator_hinge(fake).item() == pytest.approx(0.5)
    assert losses.discriminator_hinge(torch.full((1, 2), 1.0), torch.full((1, 2), -1.0)).item() == 0


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction = 0.5 * parameter.square().sum()  # gradient (3, 4), norm 5
    adversarial = 2 * parameter[0]  # norm 2
    weight = loss_weights.adaptive_weight(reconstruction, adversarial, parameter)
    assert weight.item() == pytest.approx(5 / (2 + 1e-6), rel=1e-7)
    assert not weight.requires_grad
    assert parameter.grad is None
    smaller = loss_weights.adaptive_weight(0.1 * reconstruction, adversarial, parameter)  # below 1 too
    assert smaller.item() == pytest.approx(0.5 / (2 + 1e-6), rel=1e-6)
    (reconstruction + weight * adversarial).backward()  # the graphs are still there
    assert loss_weights.adaptive_weight(parameter.sum() * 1e9, parameter.sum(), parameter).item() == 1e4
    with pytest.raises(ValueError, match="that the adversarial loss does not depend on"):
        loss_weights.adaptive_weight(parameter.sum(), torch.zeros((), requires_grad=True) * 1, parameter)


def test_ramp():
    assert [loss_weights.ramp(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    with pytest.raises(ValueError, match="step -1"):
        loss_weights.ramp(-1, 4)
    with pytest.raises(ValueError, match="of 0"):
        loss_weights.ramp(0, 0)


def test_check_finite_names_term_step_and_checkpoint():
    checks.check_finite({"l1": scalar(1.0)}, 3, None)
    terms = {"l1": scalar(1.0), "entropy": scalar(math.nan)}
    with pytest.raises(checks.NonFiniteLoss, match=r"step 7 .*entropy = nan.* step_00005") as caught:
        checks.check_finite(terms, 7, "step_00005")
    assert "l1" not in str(caught.value)
    with pytest.raises(checks.NonFiniteLoss, match="no checkpoint"):
        checks.check_finite({"l2": scalar(math.inf)}, 7, None)
