"""CodaTokenizer: a continuous VAE, its adapters and a quantizer as one module between images and indices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from codalib.models.checks import check_images
from codalib.models.hub import OnHub
from codalib.models.library_quantizers import LibraryQuantizer
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.tokens import Tokens
from codalib.models.vae import ContinuousVAE


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer makes of images (B, 3, h, w)."""

    reconstruction: Tensor  # (B, 3, h, w), about [-1, 1], not clamped
    latents: Tensor  # (B, C, H, W) normalised, before quantization
    quantized: Tensor  # (B, C, H, W)
    indices: Tokens  # one (B, p, p) int64 a level
    quantization_loss: Tensor  # ()
    entropy_loss: Tensor  # ()


class CodaTokenizer(OnHub, nn.Module):
    """Images <-> multi-scale indices (Figure 2 of arXiv:2503.17760).

    Encoder, quantizer and decoder are one module with one forward, so that under several processes the gradients of
    the adapters are averaged too (the release takes the VAE out of its wrapper and loses them). Raises ValueError where
    the VAE and the quantizer have not the same latent channels.
    """

    def __init__(self, vae: ContinuousVAE, quantizer: ResidualQuantizer | LibraryQuantizer):
        super().__init__()
        if vae.latent_channels != quantizer.latent_channels:
            found = f"{vae.latent_channels} and {quantizer.latent_channels}"
            raise ValueError(f"expected a VAE and a quantizer of the same latent channels, got {found}")
        self.vae, self.quantizer = vae, quantizer
        self.base: str | None = None  # what `load_vae` takes for the VAE without adapters, where that is known

    @property
    def resolution(self) -> int:
        """Side of the images in pixels: the last scale is the latent grid."""
        return self.quantizer.scales[-1] * self.vae.downsampling

    @property
    def num_tokens(self) -> int:
        return self.quantizer.num_tokens

    def forward(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> TokenizerOutput:
        """Encode, quantize and decode images (B, 3, h, w) in [-1, 1]; `sample`: see `ContinuousVAE.encode`."""
        latents = self.vae.encode(self._checked(images), sample, generator)
        out = self.quantizer(latents)
        losses = out.quantization_loss, out.entropy_loss
        return TokenizerOutput(self.vae.decode(out.quantized), latents, out.quantized, out.indices, *losses)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tokens:
        """Images (B, 3, h, w) in [-1, 1] -> one (B, p, p) int64 tensor of indices a level, coarse to fine."""
        return self.quantizer.encode(self.vae.encode(self._checked(images), sample, generator))

    @torch.no_grad()
    def decode(self, indices: list[Tensor], levels: int | None = None, partial: bool = False) -> Tensor:
        """Indices -> images (B, 3, h, w) in about [-1, 1]; `levels`, `partial`: see `ResidualQuantizer.decode`."""
        return self.vae.decode(self.quantizer.decode(indices, levels, partial))

    def _checked(self, images: Tensor) -> Tensor:
        check_images(images, 3, self.resolution)
        return images

    def save_pretrained(self, folder: str | Path, base: str | Path | None = None) -> None:
        """Replace the folder; `base` is the name of the base VAE for `load_vae`, None writes the VAE itself."""
        from codalib.models.checkpoints.ours import save_tokenizer  # which imports this module

        save_tokenizer(self, folder, base)

    @classmethod
    def from_pretrained(cls, folder: str | Path, vae: str | Path | None = None, backend: str = "auto") -> Self:
        """Load a saved folder, OWNER/NAME of the Hub, "emoji" or "emoji-small", frozen; `vae`: where its VAE is."""
        from codalib.models.checkpoints.ours import load_saved_tokenizer  # which imports this module

        return load_saved_tokenizer(folder, vae, backend)
