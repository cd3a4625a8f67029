"""The named terms of the tokenizer's loss, and the one line that adds them (Eq. 9 of arXiv:2503.17760).

`quantization` (Eq. 10-11) and `entropy` come from the quantizer. A term computed with another network than the paper's
carries another name: `perceptual_vgg` is the paper's LPIPS, `perceptual_effnet` the same idea on EfficientNet-Lite0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from codalib.models.loss_weights import LossWeights
from codalib.pretrained.perceptual import PerceptualDistance


def weighted_sum(
    terms: Mapping[str, Tensor], weights: LossWeights, factors: Mapping[str, float | Tensor] | None = None
) -> Tensor:
    """The loss of Eq. 9, the sum of weight x factor x term; terms of weight 0 are left out.

    `terms` are scalars by name, `factors` further multipliers, as {"adversarial": adaptive weight x ramp}.
    """
    factors = factors or {}
    if unknown := set(factors) - set(terms):
        raise KeyError(f"expected factors only of the terms {', '.join(terms)}, got {', '.join(sorted(unknown))}")
    weighted = [weights.of(name) * factors.get(name, 1.0) * term for name, term in terms.items() if weights.of(name)]
    if not weighted:
        raise ValueError(f"expected a loss term of a weight above 0, got {', '.join(terms) or 'no term'}")
    return torch.stack([torch.as_tensor(value) for value in weighted]).sum()  # Eq. 9


def reconstruction_terms(
    images: Tensor, reconstruction: Tensor, perceptual: PerceptualDistance | None = None
) -> dict[str, Tensor]:
    """`l1` and `l2` (means over pixels, images in [-1, 1], (B, 3, h, w)) and, with a network, its perceptual term."""
    images, reconstruction = images.float(), reconstruction.float()
    terms = {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}
    if perceptual is not None:
        terms[perceptual.name] = perceptual(images, reconstruction).mean()
    return terms


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """The term `kl`: KL of N(mean, exp(logvar)) to N(0, 1) in nats, summed over (C, H, W), mean over images."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """The generator's adversarial term: minus the mean logit of its images. Logits are (B, N)."""
    return -fake_logits.float().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's hinge loss, mean of the real and the fake half (as VQGAN's). Logits are (B, N)."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())
