"""The named terms of the tokenizer's loss (Eq. 9-11 of arXiv:2503.17760), and the one line that adds them.

Every function returns terms by name; `weighted_sum` is the only place where weights enter. A term computed with
another network than the paper's carries another name: `perceptual_vgg` is the paper's LPIPS, `perceptual_effnet` is
the same idea on EfficientNet-Lite0, whose weights need no download.
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


class NonFiniteLoss(RuntimeError):
    """A term of the loss is not a number, or infinite."""


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"got the loss weight {field.name} = {value!r}, expected a finite number >= 0")

    def of(self, term: str) -> float:
        """The weight of a named term; both perceptual terms share one. Raises KeyError for an unknown term."""
        name = "perceptual" if term.startswith("perceptual_") else term
        if name not in {field.name for field in dataclasses.fields(self)}:
            known = ", ".join(field.name for field in dataclasses.fields(self))
            raise KeyError(f"got a loss term named {term!r}, expected one of {known} (perceptual_NETWORK)")
        return getattr(self, name)


def weighted_sum(
    terms: Mapping[str, Tensor], weights: LossWeights, factors: Mapping[str, float | Tensor] | None = None
) -> Tensor:
    """The loss of Eq. 9: the sum of weight x factor x term; terms of weight 0 are left out.

    Args:
        terms: scalar tensors by name.
        weights: their weights.
        factors: further multipliers by name, as {"adversarial": adaptive weight x ramp}.
    """
    factors = factors or {}
    if unknown := set(factors) - set(terms):
        raise KeyError(f"got a factor for {', '.join(sorted(unknown))}, expected only for terms: {', '.join(terms)}")
    weighted = [weights.of(name) * factors.get(name, 1.0) * term for name, term in terms.items() if weights.of(name)]
    if not weighted:
        raise ValueError(f"every loss term has weight 0 ({', '.join(terms) or 'there are none'}): give one a weight")
    return torch.stack([torch.as_tensor(value) for value in weighted]).sum()


def reconstruction_terms(
    images: Tensor, reconstruction: Tensor, perceptual: "PerceptualDistance | None" = None
) -> dict[str, Tensor]:
    """`l1` and `l2` (means over pixels, images in [-1, 1], (B, 3, h, w)) and, with a network, its perceptual term."""
    images, reconstruction = images.float(), reconstruction.float()
    terms = {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}
    if perceptual is not None:
        terms[perceptual.name] = perceptual(images, reconstruction).mean()
    return terms


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of the posterior N(mean, exp(logvar)) to N(0, 1) in nats: summed over an image's latents, mean over images.

    The term `kl` of a continuous VAE's pretraining; mean and logvar are (B, C, H, W).
    """
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
    zero (`up`, peft's lora_B), since the other's gradient starts at zero. Where processes share a batch their
    gradients are averaged before the norms (the release lets each process take its own weight), so that every process
    has the weight that a single one with the whole batch would have.

    Args:
        reconstruction_loss: the weighted l1, l2 and perceptual terms, a scalar.
        adversarial_loss: the adversarial term, a scalar.
        parameter: the parameter, on which both losses depend; where the decoder has no trained one, its input.

    Returns:
        A detached scalar. Both losses' graphs are kept.
    """
    norms = []
    for name, loss in (("reconstruction", reconstruction_loss), ("adversarial", adversarial_loss)):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"the {name} loss does not depend on the parameter of shape {tuple(parameter.shape)} given for the "
                "adaptive weight: give one of the decoder's last trained layer"
            )
        norms.append(_norm_over_processes(gradient.float(), shared=parameter.is_leaf))
    ratio = norms[0] / (norms[1] + ADAPTIVE_WEIGHT_EPS)
    return ratio.clamp(0, ADAPTIVE_WEIGHT_MAXIMUM).detach()


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
        raise ValueError(f"got step {step} of {total_steps}, expected 0 <= step and at least one step")
    return min(1.0, step / total_steps)


def check_finite(terms: Mapping[str, Tensor], step: int, last_checkpoint: object | None) -> None:
    """Raise `NonFiniteLoss`, naming the term, the step and the last good checkpoint, if a term is not finite."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    if bool(torch.isfinite(values).all()):  # one transfer for all terms
        return
    bad = [
        f"{name} = {value:g}" for name, value in zip(terms, values.tolist(), strict=True) if not math.isfinite(value)
    ]
    where = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was written yet"
    raise NonFiniteLoss(
        f"at step {step} the loss is not finite ({', '.join(bad)}); {where}: "
        "resume from it with a lower learning rate or a smaller weight of that term"
    )
