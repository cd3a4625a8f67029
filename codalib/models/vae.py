"""Continuous VAEs: diffusers' AutoencoderKL with its latent shift and scale.

Nothing outside this module knows the shift and the scale: latents are normalised on the way out of the encoder and
restored on the way into the decoder.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from codalib.models.checks import check_images


class ContinuousVAE(nn.Module):
    """A continuous VAE between images (B, 3, h, w) in [-1, 1] and normalised latents (B, C, H, W).

    latents = (z - shift) * scale with z from the autoencoder's posterior; shift and scale come from its config.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder
        self.adapter_settings: dict | None = None  # of `models.adapters.add_adapters`

    scale = property(lambda self: self.autoencoder.config.scaling_factor)
    shift = property(lambda self: self.autoencoder.config.shift_factor or 0.0)
    latent_channels = property(lambda self: self.autoencoder.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Image pixels a side of one latent position."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def latent_side(self, resolution: int) -> int:
        """Side of the latent grid of square images; raises ValueError where the resolution does not divide."""
        if resolution % self.downsampling:
            raise ValueError(f"expected a resolution that is a multiple of {self.downsampling}, got {resolution}")
        return resolution // self.downsampling

    def posterior(self, images: Tensor):
        """The autoencoder's own Gaussian (`mean`, `logvar`, `sample`), not normalised."""
        check_images(images, self.autoencoder.config.in_channels)
        return self.autoencoder.encode(images).latent_dist

    def encode(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, h, w) in [-1, 1] -> normalised latents (B, C, H, W).

        The posterior is sampled, as the release does in training and in evaluation; `sample=False` takes its mean.
        A list of generators, one an image, makes an image's noise independent of its batch.
        """
        posterior = self.posterior(images)
        z = posterior.sample(generator) if sample else posterior.mean
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, H, W) -> images (B, 3, h, w), about [-1, 1] and not clamped."""
        return self.autoencoder.decode(latents / self.scale + self.shift).sample

    def forward(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        return self.decode(self.encode(images, sample, generator))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the autoencoder as diffusers does; adapters are saved apart (`models.checkpoints.save_adapters`)."""
        if self.adapter_settings is not None:
            raise ValueError("expected a VAE without adapters, got one with them: save_adapters saves those")
        self.autoencoder.save_pretrained(folder)
