"""The named terms of the tokenizer's loss, and the one line that adds them (Eq. 9 of arXiv:2503.17760).

`quantization` (Eq. 10-11) and `entropy` come from the quantizer. A term computed with another network than the paper's
carries another name: `perceptual_vgg` is the paper's LPIPS, `perceptual_effnet` the same idea on EfficientNet-Lite0.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from codalib.pretrained.perceptual import PerceptualDistance

ADAPTIVE_WEIGHT_MAXIMUM = 1e4  # VQGAN's clamp
ADAPTIVE_WEIGHT_EPS = 1e-4  # VQGAN's, added to the adversarial gradient's norm


@dataclass(frozen=True)
class LossWeights:
    """The weights of Eq. 9; the defaults are the released configuration's.

    `perceptual` weighs whichever perceptual term is there. `adversarial` is multiplied by the adaptive weight and the
    ramp. `kl` belongs to the pretraining of a continuous VAE (latent diffusion's 1e-6); the tokenizer has no such term.
    """

    l1: float = 0.2
    l2: float = 1.0
    perceptual: float = 1.0
    quantization: float = 1.0
    entropy: float = 0.05
    adversarial: float = 1.0
    kl: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"expected the loss weight {name} to be a finite number >= 0, got {value!r}")

    def of(self, term: str) -> float:
        """The weight of a named term; both perceptual terms share one. Raises KeyError for an unknown term."""
        known = dataclasses.asdict(self)
        name = "perceptual" if term.startswith("perceptual_") else term
        if name not in known:
            raise KeyError(f"expected a loss term of {', '.join(known)} (perceptual_NETWORK), got {term!r}")
        return known[name]


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


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, parameter: Tensor) -> Tensor:
    """VQGAN's weight of the adversarial term: |grad reconstruction| / (|grad adversarial| + 1e-4), at most 1e4.

    The gradients are taken at one parameter: the decoder's last adapter, and of its two factors the one that starts at
    zero (`up`, peft's lora_B), since the other's gradient starts at zero; where the decoder has no trained one, at its
    input. Where processes share a batch their gradients are averaged before the norms (the release lets each process
    take its own weight). The losses are scalars, the weighted sum of l1, l2 and perceptual terms and the adversarial
    term; their graphs are kept. Returns a detached scalar.
    """
    norms = []
    for name, loss in (("reconstruction", reconstruction_loss), ("adversarial", adversarial_loss)):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"expected a parameter of the decoder's last trained layer for the adaptive weight, got one of shape "
                f"{tuple(parameter.shape)} that the {name} loss does not depend on"
            )
        norms.append(_norm_over_processes(gradient.float(), shared=parameter.is_leaf))
    return (norms[0] / (norms[1] + ADAPTIVE_WEIGHT_EPS)).clamp(0, ADAPTIVE_WEIGHT_MAXIMUM).detach()


def _norm_over_processes(gradient: Tensor, shared: bool) -> Tensor:
    """The norm of a shared parameter's mean gradient, or that of an activation's gradients side by side."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return gradient.norm()
    summed = gradient.clone() if shared else gradient.square().sum()
    torch.distributed.all_reduce(summed)
    processes = torch.distributed.get_world_size()  # each process's loss is the mean over its own images
    return (summed / processes).norm() if shared else summed.sqrt() / processes


def ramp(step: int, total_steps: int) -> float:
    """The adversarial term's ramp: step / total_steps, from 0 to 1 over the whole training."""
    if total_steps < 1 or step < 0:
        raise ValueError(f"expected 0 <= step and at least one step in all, got step {step} of {total_steps}")
    return min(1.0, step / total_steps)
