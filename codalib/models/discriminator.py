"""The discriminator on frozen features (the StyleGAN-T design): small trained heads over a pretrained network.

The backbone is DINO ViT-S/16, the paper's, or EfficientNet-Lite0, whose weights need no download; the discriminator's
`name` tells which. Only the heads are trained, and only they are in its state dict.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from codalib.base.processes import synchronised
from codalib.pretrained.networks import DinoViTS16, EfficientNetLite0, to_side

KERNEL = 9  # tokens seen by a head's residual block
SLOPE = 0.2  # of LeakyReLU


def _block(channels: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution), nn.BatchNorm1d(channels), nn.LeakyReLU(SLOPE))


class Head(nn.Module):
    """Tokens (B, channels, N) -> one logit a token (B, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project, self.mix = _block(channels, 1), _block(channels, KERNEL)
        self.logit = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.project(tokens)
        x = (x + self.mix(x)) / math.sqrt(2)  # keeps the variance
        return self.logit(x).squeeze(1)


class FrozenFeatureDiscriminator(nn.Module):
    """Images in [-1, 1] (B, 3, h, w) -> logits (B, N), one for each token of each readout of the backbone.

    DINO: five readouts, the CLS token added to each patch token, of images brought to 224 pixels: N = 5 x 196.
    EfficientNet: five feature maps at the images' own size, each read row by row as a sequence of tokens.
    Batch statistics are shared by all processes where a process group is there before it is built.
    """

    def __init__(self, backbone: DinoViTS16 | EfficientNetLite0) -> None:
        super().__init__()
        if isinstance(backbone, DinoViTS16):
            self.name, channels = "discriminator_dino", [backbone.num_features] * (1 + len(backbone.readouts))
        elif isinstance(backbone, EfficientNetLite0):
            self.name, channels = "discriminator_effnet", backbone.channels
        else:
            raise TypeError(f"expected a backbone DinoViTS16 or EfficientNetLite0, got {type(backbone).__name__}")
        self.backbone = backbone
        self.heads = synchronised(nn.ModuleList(Head(c) for c in channels))

    def forward(self, images: Tensor, generator: torch.Generator | None = None, maps: list | None = None) -> Tensor:
        """Images -> logits (B, N); a CPU `generator` seeds DINO's crop; `maps`: EfficientNet's maps, where known."""
        readouts = self.readouts(images, generator, maps)
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, readouts, strict=True)], dim=1)

    def readouts(self, images: Tensor, generator: torch.Generator | None, maps: list | None = None) -> list[Tensor]:
        """The frozen features as sequences: one (B, channels, tokens) for each head."""
        if isinstance(self.backbone, DinoViTS16):
            images = to_side(images, self.backbone.resolution, crop=self.training, generator=generator)
            return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in self.backbone.tokens(images)]  # (B, 384, 196)
        sequences = [x.flatten(2) for x in maps or self.backbone.feature_maps(images)]
        if sequences[-1].shape[-1] < KERNEL // 2:  # circular padding cannot go round more than once
            raise ValueError(
                f"expected sides of at least 33 pixels for EfficientNet's heads, got {tuple(images.shape[-2:])}: use "
                "larger images, or the adversarial weight 0"
            )
        return sequences
