"""What CODA is compared with: residual VQ by distance (Eq. 1-2 of arXiv:2503.17760), and a VQGAN from scratch."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from codalib.kernels.assignment import nearest_assign
from codalib.models.quantizer import MAR_SCALES, Level, ResidualQuantizer
from codalib.models.vae import ContinuousVAE

NO_NOISE = -40.0  # a logarithmic variance below diffusers' clamp at -30, where it gets no gradient and stays


class ResidualNearestQuantizer(ResidualQuantizer):
    """The VQ baseline: the nearest code, straight-through on the features (Eq. 1-2).

    Its loss is that of VQ-VAE: mse(code, sg[feature]) + beta * mse(sg[code], feature). Over several scales the
    straight-through gradients of the levels add up to exactly the identity, so `quantized` has the gradient of Eq. 2.
    """

    kind = "nearest"

    def __init__(
        self,
        latent_channels: int = 16,
        codebook_size: int = 65536,
        scales: Sequence[int] = MAR_SCALES,
        beta: float = 0.25,
        backend: str = "auto",
    ):
        super().__init__(latent_channels, codebook_size, scales, beta, backend)

    def project_codes(self) -> tuple[Tensor, Tensor]:
        return self.codebooks.weight, self.codebooks.weight

    def choose(self, features: Tensor, keys: Tensor, backend: str) -> Tensor:
        if backend == "reference":  # Eq. 1: argmin |f - c|^2 = argmax f.c - |c|^2 / 2
            return (features @ keys.T - keys.square().sum(dim=1) / 2).argmax(dim=-1)
        return nearest_assign(features, keys, backend)

    def assign(self, features: Tensor, keys: Tensor, values: Tensor, backend: str) -> Level:
        indices = self.choose(features.detach(), keys.detach(), backend)
        codes = F.embedding(indices, values)
        loss = F.mse_loss(codes, features.detach()) + self.beta * F.mse_loss(codes.detach(), features)
        # Eq. 2 in an order whose value is the code without rounding.
        return Level(codes.detach() + (features - features.detach()), indices, loss, loss.new_zeros(()))


def fresh_copy(vae: ContinuousVAE) -> ContinuousVAE:
    """A VAE of the same architecture with new random weights, all trainable: the start of a tokenizer from scratch.

    Its posterior has no noise and its latents no scale: what a discrete tokenizer in VQGAN's way (arXiv:2012.09841)
    rounds is the encoder's output itself.
    """
    fresh = ContinuousVAE(copy.deepcopy(vae.autoencoder))
    for module in fresh.autoencoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh.autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None)
    last = fresh.autoencoder.quant_conv or fresh.autoencoder.encoder.conv_out
    with torch.no_grad():  # the half that gives the posterior's logarithmic variance
        last.weight[vae.latent_channels :] = 0
        last.bias[vae.latent_channels :] = NO_NOISE
    return fresh.train().requires_grad_(True)
