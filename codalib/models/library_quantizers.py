"""Other quantizers of a frozen VAE's latents, from vector-quantize-pytorch, in the form of ours.

They are what CODA is compared with: residual VQ (arXiv:2107.03312), VQ with the rotation trick (arXiv:2410.06424), FSQ
(arXiv:2309.15505), LFQ (arXiv:2310.05737) and SimVQ (arXiv:2411.02038). Each level quantizes what the levels before
have left over, on the whole latent grid; with one level they are the plain methods. Losses, their weights and the
gradients are the library's own; codebooks are learned by gradients, so that one optimiser trains all that is trained.
The rotation trick acts on gradients alone, where the encoder learns: behind a frozen encoder it is residual VQ.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codalib.models.checks import check_indices, check_latents, whole_scales
from codalib.models.quantizer import QuantizerOutput
from codalib.models.tokens import Tokens

# Kind -> what its method is called.
LIBRARY_KINDS = {"rvq": "Residual VQ", "rotation": "Rotation-trick VQ", "fsq": "FSQ", "lfq": "LFQ", "simvq": "SimVQ"}


# Levels of each number for about so many codes, as the FSQ paper has them (its Table 1).
FSQ_LEVELS = {
    256: [8, 6, 5],
    1024: [8, 5, 5, 5],
    4096: [7, 5, 5, 5, 5],
    16384: [8, 8, 8, 6, 5],
    65536: [8, 8, 8, 5, 5, 5],
}


class LibraryQuantizer(nn.Module):
    """A quantizer of vector-quantize-pytorch with the interface of `models.quantizer.ResidualQuantizer`.

    Args:
        kind: one of `LIBRARY_KINDS`.
        latent_channels: C.
        codebook_size: K; of FSQ the number nearest to which it is to come, of `FSQ_LEVELS`. The attribute of this name
            is the true number of codes.
        scales: the side of the latent grid, once a level.
    Raises:
        ValueError: scales of different sides, or a number of codes that the method cannot have.
    """

    def __init__(
        self, kind: str, latent_channels: int, codebook_size: int, scales: Sequence[int], backend: str = "auto"
    ):
        super().__init__()
        import vector_quantize_pytorch as library  # slow to import, and only the baselines need it

        scales = whole_scales(scales)
        if len(set(scales)) != 1:
            raise ValueError(
                f"expected scales of one side for {LIBRARY_KINDS[kind]}, whose levels have one grid, got {scales}"
            )
        if kind == "fsq" and codebook_size not in FSQ_LEVELS:
            raise ValueError(
                f"expected a codebook_size of {', '.join(map(str, FSQ_LEVELS))} for FSQ, got {codebook_size}"
            )
        if kind == "lfq" and codebook_size != 2 ** int(math.log2(codebook_size)):
            raise ValueError(f"expected a codebook_size that is a power of two for LFQ, got {codebook_size}")
        self.kind, self.latent_channels, self.scales, self.asked_size = kind, latent_channels, scales, codebook_size
        size = {"dim": latent_channels, "num_quantizers": len(scales)}
        learned = {"learnable_codebook": True, "ema_update": False}
        if kind in ("rvq", "rotation"):
            inner = library.ResidualVQ(
                **size, codebook_size=codebook_size, rotation_trick=kind == "rotation", **learned
            )
        elif kind == "fsq":
            inner = library.ResidualFSQ(**size, levels=FSQ_LEVELS[codebook_size])
            codebook_size = math.prod(FSQ_LEVELS[codebook_size])
        elif kind == "lfq":
            inner = library.ResidualLFQ(**size, codebook_size=codebook_size)
        else:
            inner = library.ResidualSimVQ(**size, codebook_size=codebook_size)
        self.inner, self.codebook_size = inner, codebook_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: the sum of p^2 over the levels."""
        return sum(p * p for p in self.scales)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, C, H, W).

        `quantization_loss` is the library's loss (FSQ has none), the mean over the levels, and the mean squared error
        of the quantized latents: without images it is all that FSQ and LFQ learn their projections from.
        """
        features = self._checked(latents)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, indices, *losses = self.inner(features)
            loss = F.mse_loss(quantized, features)
            if losses:
                loss = loss + losses[0].float().mean()
        quantized = quantized.movedim(-1, 1).reshape(latents.shape)  # (B, H W, C) -> (B, C, H, W)
        return QuantizerOutput(quantized, self._split(indices), loss, features.new_zeros(()))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tokens:
        """Latents (B, C, H, W) -> indices, one (B, p, p) int64 a level. In evaluation mode, whatever the module's."""
        training = self.training
        self.eval()
        with torch.autocast(latents.device.type, enabled=False):
            indices = self.inner(self._checked(latents, finite=True))[1]
        self.train(training)
        return self._split(indices)

    def decode(self, indices: Sequence[Tensor], levels: int | None = None, partial: bool = False) -> Tensor:
        """Indices, one (B, p, p) a level -> latents (B, C, H, W); `levels=k` sums the first k levels alone.

        Raises ValueError on indices that do not fit, and with `partial`: a token that is not known has no meaning here.
        """
        if partial:
            raise ValueError(f"expected whole indices for {LIBRARY_KINDS[self.kind]}, got partial ones")
        check_indices(indices, self.scales, self.codebook_size, levels, lowest=0)
        side = self.scales[-1]
        flat = torch.stack([level.flatten(1) for level in indices], dim=-1)  # (B, p p, levels)
        codes = self.inner.get_codes_from_indices(flat)[:levels].sum(dim=0)  # (B, p p, d)
        project = getattr(self.inner, "project_out", nn.Identity())
        return project(codes).movedim(-1, 1).unflatten(2, (side, side))

    def config(self) -> dict:
        """The settings that rebuild this quantizer through `models.quantizer_kinds.quantizer_from_config`."""
        return {
            "kind": self.kind,
            "latent_channels": self.latent_channels,
            "codebook_size": self.asked_size,
            "scales": list(self.scales),
        }

    def _checked(self, latents: Tensor, finite: bool = False) -> Tensor:
        check_latents(latents, self.latent_channels, self.scales[-1], finite)
        return latents.float().flatten(2).movedim(1, -1)  # (B, C, H, W) -> (B, H W, C)

    def _split(self, indices: Tensor) -> Tokens:
        maps = (level.unflatten(1, (self.scales[-1],) * 2).long() for level in indices.unbind(dim=-1))
        return Tokens(maps, self.codebook_size)
