"""CodaTokenizer: a continuous VAE, its adapters and a quantizer as one module between images and indices."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codalib.base.files import write_json
from codalib.base.paths import DATA, embedded
from codalib.models.library_quantizers import LibraryQuantizer
from codalib.models.quantizer import ResidualQuantizer, quantizer_from_config
from codalib.models.tokens import Tokens
from codalib.models.vae import ADAPTER_CONFIG, ContinuousVAE, load_adapters, load_vae, save_adapters

EMBEDDED_TOKENIZERS = {  # name -> folder
    "emoji": DATA / "tokenizer-emoji",  # 332 tokens an image
    "emoji-small": DATA / "tokenizer-emoji-small",  # 149 tokens, for generators that are trained on a processor
}
CONFIG, QUANTIZER_WEIGHTS = "config.json", "quantizer.safetensors"


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer makes of images (B, 3, h, w)."""

    reconstruction: Tensor  # (B, 3, h, w), about [-1, 1], not clamped
    latents: Tensor  # (B, C, H, W) normalised, before quantization
    quantized: Tensor  # (B, C, H, W)
    indices: Tokens  # one (B, p, p) int64 a level
    quantization_loss: Tensor  # ()
    entropy_loss: Tensor  # ()


class CodaTokenizer(nn.Module):
    """Images <-> multi-scale indices (Figure 2 of arXiv:2503.17760).

    Encoder, quantizer and decoder are one module with one forward, so that under several processes the gradients of
    the adapters are averaged too (the release takes the VAE out of its wrapper and loses them).

    Args:
        vae: with or without adapters.
        quantizer: of the VAE's latent channels.
    Raises:
        ValueError: the two do not fit.
    """

    def __init__(self, vae: ContinuousVAE, quantizer: ResidualQuantizer | LibraryQuantizer):
        super().__init__()
        if vae.latent_channels != quantizer.latent_channels:
            raise ValueError(
                f"the VAE has {vae.latent_channels} latent channels and the quantizer {quantizer.latent_channels}, "
                "expected the same"
            )
        self.vae, self.quantizer = vae, quantizer
        self.base: str | None = None  # what `load_vae` takes for the VAE without adapters, where that is known

    @property
    def resolution(self) -> int:
        """Side of the images in pixels: the last scale is the latent grid."""
        return self.quantizer.scales[-1] * self.vae.downsampling

    @property
    def num_tokens(self) -> int:
        """Indices an image."""
        return self.quantizer.num_tokens

    def forward(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> TokenizerOutput:
        """Encode, quantize and decode images (B, 3, h, w) in [-1, 1].

        The posterior is sampled, in evaluation too, as the release does; `sample=False` takes its mean.
        """
        latents = self.vae.encode(self._checked(images), sample, generator)
        out = self.quantizer(latents)
        return TokenizerOutput(
            self.vae.decode(out.quantized), latents, out.quantized, out.indices, out.quantization_loss, out.entropy_loss
        )

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tokens:
        """Images (B, 3, h, w) in [-1, 1] -> one (B, p, p) int64 tensor of indices a level, coarse to fine."""
        return self.quantizer.encode(self.vae.encode(self._checked(images), sample, generator))

    @torch.no_grad()
    def decode(self, indices: list[Tensor], levels: int | None = None, partial: bool = False) -> Tensor:
        """Indices -> images (B, 3, h, w) in about [-1, 1].

        `levels=k` decodes the first k levels alone; with `partial` a token of -1 is not known and adds nothing.
        """
        return self.vae.decode(self.quantizer.decode(indices, levels, partial))

    def _checked(self, images: Tensor) -> Tensor:
        expected = (3, self.resolution, self.resolution)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, {expected[1]}, {expected[2]})")
        return images

    def save_pretrained(self, folder: str | Path, base: str | Path | None = None) -> None:
        """Write the tokenizer: the quantizer, the adapters, and the base VAE or its name.

        Args:
            folder: a new folder appears whole; one that is there is replaced once the new one is written.
            base: what `load_vae` takes to find the base VAE again; None writes the VAE itself into the folder (only for
                one without adapters).
        """
        folder, partial = Path(folder), Path(f"{folder}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if base is None:
            self.vae.save_pretrained(partial / "vae")
        if self.vae.adapter_settings is not None:
            save_adapters(self.vae, partial)
        state = {name: value.detach().cpu().contiguous() for name, value in self.quantizer.state_dict().items()}
        save_file(state, partial / QUANTIZER_WEIGHTS)
        write_json(partial / CONFIG, {"vae": None if base is None else str(base), "quantizer": self.quantizer.config()})
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, vae: str | Path | None = None, backend: str = "auto"
    ) -> "CodaTokenizer":
        """Load a folder written by `save_pretrained`, frozen and in evaluation mode.

        Args:
            folder: the tokenizer's, or the name of an embedded one, "emoji" or "emoji-small".
            vae: another place of the base VAE than the one that was saved.
            backend: the quantizer's (see `kernels.assignment`).
        Raises:
            ValueError: no tokenizer there, or parts that do not fit; the message says which.
        """
        name = str(folder)
        folder = embedded(EMBEDDED_TOKENIZERS[name]) if name in EMBEDDED_TOKENIZERS else Path(folder)
        if not (folder / CONFIG).exists():
            raise ValueError(f"{folder} holds no {CONFIG}: expected a folder written by CodaTokenizer.save_pretrained")
        config = json.loads((folder / CONFIG).read_text())
        source = vae or config["vae"] or folder / "vae"
        base = load_vae(source)
        if (folder / ADAPTER_CONFIG).exists():
            load_adapters(base, folder)
        quantizer = quantizer_from_config(config["quantizer"], backend)
        state, expected = load_file(folder / QUANTIZER_WEIGHTS), quantizer.state_dict()
        odd = [
            n
            for n in state.keys() | expected.keys()
            if n not in state or n not in expected or state[n].shape != expected[n].shape
        ]
        if odd:
            raise ValueError(f"{folder / QUANTIZER_WEIGHTS} does not fit its {CONFIG}: {', '.join(sorted(odd))} differ")
        quantizer.load_state_dict(state)
        tokenizer = cls(base, quantizer).eval().requires_grad_(False)
        tokenizer.base = str(source)
        return tokenizer
