"""The weights of the loss's named terms (Eq. 9 of arXiv:2503.17760): fixed ones, the adaptive one and its ramp."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codalib.models.vae import ContinuousVAE

ADAPTIVE_WEIGHT_MAXIMUM = 1e4  # VQGAN's clamp
ADAPTIVE_WEIGHT_EPS = 1e-6  # the release's, added to the adversarial gradient's norm; VQGAN's is 1e-4
ADAPTIVE_LAYERS = ("first_upsample", "last")


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


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, parameter: Tensor) -> Tensor:
    """VQGAN's weight of the adversarial term: |grad reconstruction| / (|grad adversarial| + 1e-6), at most 1e4.

    The gradients are taken at one parameter, see `adaptive_weight_layer`; where the decoder has no trained adapter, at
    its input. Where processes share a batch their gradients are averaged before the norms (the release lets each
    process take its own weight). The losses are scalars, the weighted sum of l1, l2 and perceptual terms and the
    adversarial term; their graphs are kept. Returns a detached scalar.
    """
    norms = []
    for name, loss in (("reconstruction", reconstruction_loss), ("adversarial", adversarial_loss)):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"expected a parameter of the decoder's layer for the adaptive weight, got one of shape "
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


def adaptive_weight_layer(vae: ContinuousVAE, which: str = "first_upsample") -> nn.Parameter | None:
    """The adapter of the decoder where the adaptive weight is taken; None where the decoder has none.

    Of its two factors the one that starts at zero (`up`, peft's lora_B), since the other's gradient starts at zero.

    Args:
        which: "first_upsample", the first upsampling that runs (16 -> 32 at MAR's 256 pixels): the release takes its
            `decoder.up[-1].upsample.conv` and calls it the last layer, but the LDM layout runs that one first. Where it
            is not adapted (FLUX), and with "last", the last adapter that runs, which is VQGAN's idea.
    """
    if which not in ADAPTIVE_LAYERS:
        raise ValueError(f"expected an adaptive layer of {' or '.join(ADAPTIVE_LAYERS)}, got {which!r}")
    decoder = vae.autoencoder.decoder
    if which == "first_upsample":
        for name, parameter in decoder.up_blocks[0].named_parameters():
            if "upsamplers" in name and "lora_B" in name:
                return parameter
    # diffusers registers the middle of the decoder behind its upsampling half, but runs it before
    for part in (decoder.conv_out, decoder.up_blocks, decoder.mid_block, decoder.conv_in):
        if found := [p for name, p in part.named_parameters() if "lora_B" in name]:
            return found[-1]
    return None


def ramp(step: int, total_steps: int) -> float:
    """The adversarial term's ramp: step / total_steps, from 0 to 1 over the whole training."""
    if total_steps < 1 or step < 0:
        raise ValueError(f"expected 0 <= step and at least one step in all, got step {step} of {total_steps}")
    return min(1.0, step / total_steps)
