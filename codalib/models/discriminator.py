"""The discriminator on frozen features (the StyleGAN-T design): small trained heads over a pretrained network.

The backbone is DINO ViT-S/16, the paper's, or EfficientNet-Lite0, whose weights need no download; the discriminator's
`name` tells which. Only the heads are trained, and only they are in its state dict.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from codalib.pretrained.networks import DinoViTS16, EfficientNetLite0, to_side
from codalib.pretrained.registry import has_weights

KERNEL = 9  # tokens seen by a head's residual block
SLOPE = 0.2  # of LeakyReLU

logger = logging.getLogger(__name__)


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
        self.heads = _synchronised(nn.ModuleList(Head(c) for c in channels))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images in [-1, 1] (B, 3, h, w) -> logits (B, N); a CPU `generator` seeds DINO's crop of large images."""
        readouts = self.readouts(images, generator)
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, readouts, strict=True)], dim=1)

    def readouts(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """The frozen features as sequences: one (B, channels, tokens) for each head."""
        if isinstance(self.backbone, DinoViTS16):
            images = to_side(images, self.backbone.resolution, crop=self.training, generator=generator)
            return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in self.backbone.tokens(images)]  # (B, 384, 196)
        sequences = [x.flatten(2) for x in self.backbone.feature_maps(images)]
        if sequences[-1].shape[-1] < KERNEL // 2:  # circular padding cannot go round more than once
            raise ValueError(
                f"expected sides of at least 33 pixels for EfficientNet's heads, got {tuple(images.shape[-2:])}: use "
                "larger images, or the adversarial weight 0"
            )
        return sequences


def _synchronised(module: nn.Module) -> nn.Module:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return module
    if not torch.cuda.is_available():
        logger.warning("SyncBatchNorm needs GPUs: the discriminator's batch statistics are each process's own")
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def real_and_fake(
    discriminator: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The logits (B, N) of real and fake images (B, 3, h, w) for the discriminator's step, judged as *one* batch.

    In two passes the batch norm would bring each kind to the same mean and variance, and hide what tells them apart:
    on blurred against slightly noisy images, 60 steps brought the hinge loss from 1.04 to 0.98 in two passes and from
    1.03 to 0.33 in one. No gradient reaches `fake`.
    """
    real_logits, fake_logits = discriminator(torch.cat([real, fake.detach()]), generator).split([len(real), len(fake)])
    return real_logits, fake_logits


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the bare module, out of DistributedDataParallel, for the generator's step: build the graph inside.

    Gradients flow through it to its input, but none is left on its parameters (the release leaves them there). Its
    layers are in eval mode: fake images, alone in their batch, are normalised by the running statistics of real and
    fake ones together, for the reason given in `real_and_fake`. Its own `training` flag stays, for the crops.
    """
    bare = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    trained = [parameter for parameter in bare.parameters() if parameter.requires_grad]
    training = [layer for layer in bare.modules() if layer is not bare and layer.training]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for layer in training:
            layer.training = False
        yield bare
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for layer in training:
            layer.training = True


def build_discriminator(name: str | None, weight: float = 1.0) -> FrozenFeatureDiscriminator | None:
    """The discriminator "dino", "effnet" or "auto" (DINO where its weights are); None for no name or a weight of 0.

    Raises `codalib.pretrained.registry.MissingWeights` where the backbone's weights are not on this machine.
    """
    if name == "auto":
        name = "dino" if has_weights("dino_vits16") else "effnet"
    if name not in (None, "dino", "effnet"):
        raise ValueError(f"expected the discriminator dino, effnet, auto or None, got {name!r}")
    if name is None or weight == 0:
        return None
    return FrozenFeatureDiscriminator(DinoViTS16() if name == "dino" else EfficientNetLite0())
