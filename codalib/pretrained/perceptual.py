"""Perceptual distances on frozen networks; each carries the name of its network."""

import warnings

import lpips
import torch
from torch import Tensor, nn

from codalib.pretrained.networks import EfficientNetLite0, FrozenNetwork, check_images
from codalib.pretrained.registry import find_weights, has_weights, load_checked, read_weights


class PerceptualDistance(nn.Module):
    """Base of the perceptual distances: `name` is the term's, forward gives (B,) for two batches in [-1, 1]."""

    name: str

    def forward(self, reference: Tensor, reconstruction: Tensor) -> Tensor:
        raise NotImplementedError


class PerceptualVGG(FrozenNetwork, PerceptualDistance):
    """LPIPS with VGG16, the paper's perceptual loss: torchvision's weights, the package `lpips`'s linear layers.

    Raises:
        codalib.pretrained.registry.MissingWeights: VGG16's weights are not on this machine.
    """

    name = "perceptual_vgg"

    def __init__(self) -> None:
        super().__init__()
        path = find_weights("vgg16_lpips")
        state = read_weights(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses torchvision's old `pretrained` argument
            self.model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # lpips cuts VGG's `features` into slices and keeps the layers' numbers: slice2.5.weight is features.5.weight.
        ours = {name: f"features.{name.split('.', 1)[1]}" for name in self.model.net.state_dict()}
        load_checked(self.model.net, {name: state[vgg] for name, vgg in ours.items() if vgg in state}, str(path))
        self.freeze()

    def forward(self, reference: Tensor, reconstruction: Tensor) -> Tensor:
        """Two batches in [-1, 1] (B, 3, h, w) -> LPIPS (B,), in [0, inf)."""
        check_images(reference)
        check_images(reconstruction)
        return self.model(reference, reconstruction).flatten()


class PerceptualEffNet(PerceptualDistance):
    """LPIPS's idea on EfficientNet-Lite0, without learned linear layers: for five stages, the squared distance of
    channel-unit-normalised features, averaged over space; then the mean of the stages, in [0, 4].

    Not comparable with LPIPS's values, hence its own name.
    """

    name = "perceptual_effnet"
    eps = 1e-8  # inside the root, so that features of norm 0 have a finite gradient

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0()

    def forward(self, reference: Tensor, reconstruction: Tensor) -> Tensor:
        """Two batches in [-1, 1] (B, 3, h, w) -> distance (B,)."""
        return self.between(self.feature_maps(reference), self.feature_maps(reconstruction))

    def between(self, reference: list[Tensor], reconstruction: list[Tensor]) -> Tensor:
        """The distance (B,) of images whose `feature_maps` are known."""
        stages = zip(map(self._unit, reference), map(self._unit, reconstruction), strict=True)
        distances = [(one - other).square().sum(dim=1).mean(dim=(1, 2)) for one, other in stages]
        return torch.stack(distances).mean(dim=0)  # (B,)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The network's five maps of images in [-1, 1] (B, 3, h, w)."""
        return self.network.feature_maps(images)

    def _unit(self, features: Tensor) -> Tensor:
        features = features.float()
        return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + self.eps)


def build_perceptual(name: str | None, weight: float = 1.0) -> PerceptualDistance | None:
    """The perceptual distance of a name; None, and no network loaded, for no name or a weight of 0.

    Args:
        name: "perceptual_vgg", "perceptual_effnet", None, or "auto": VGG where its weights are, else EfficientNet (the
            returned module's `name` tells which).
        weight: the weight that the term will have.
    """
    if name == "auto":
        name = PerceptualVGG.name if has_weights("vgg16_lpips") else PerceptualEffNet.name
    if name not in (None, PerceptualVGG.name, PerceptualEffNet.name):
        raise ValueError(
            f"expected the perceptual network {PerceptualVGG.name}, {PerceptualEffNet.name}, auto or None, got {name!r}"
        )
    if name is None or weight == 0:
        return None
    return PerceptualVGG() if name == PerceptualVGG.name else PerceptualEffNet()
