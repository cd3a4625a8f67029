"""Continuous VAEs: diffusers' AutoencoderKL with its latent shift and scale, and LoRA adapters on its convolutions.

Nothing outside this module knows the shift and the scale: latents are normalised on the way out of the encoder and
restored on the way into the decoder.
"""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codalib.base.files import write_json
from codalib.base.paths import DATA, embedded
from codalib.pretrained.registry import MissingWeights, find_weights
from codalib.pretrained.vae_layouts import CONFIGS, build_autoencoder, read_state

EMOJI_VAE = DATA / "vae-emoji"
PUBLISHED_VAES = ("kl16", "flux")  # the paper's two, by their names in `pretrained.registry.NETWORKS`
PUBLISHED_WIDTHS = tuple(config["block_out_channels"] for config in CONFIGS.values())
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt")  # files in latent diffusion's layout
ADAPTED_PARTS = {"both": ("encoder", "decoder"), "encoder": ("encoder",), "decoder": ("decoder",), "none": ()}


# Parts of a convolution's name. The release adapts these of MAR's VAE, and conv1 and conv2 alone of FLUX's.
ADAPTED_LAYERS = ("conv1", "conv2", "upsample", "downsample")
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapters.safetensors", "adapters.json"
NO_NOISE = -40.0  # a logarithmic variance below diffusers' clamp at -30, where it gets no gradient and stays


class ContinuousVAE(nn.Module):
    """A continuous VAE between images (B, 3, h, w) in [-1, 1] and normalised latents (B, C, H, W).

    latents = (z - shift) * scale with z from the autoencoder's posterior; shift and scale come from its config
    (`shift_factor`, `scaling_factor`).
    """

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder
        self.adapter_settings: dict | None = None

    @property
    def scale(self) -> float:
        return self.autoencoder.config.scaling_factor

    @property
    def shift(self) -> float:
        return self.autoencoder.config.shift_factor or 0.0

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Image pixels a side of one latent position."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def latent_side(self, resolution: int) -> int:
        """Side of the latent grid of square images; raises ValueError where the resolution does not divide."""
        if resolution % self.downsampling:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {self.downsampling} for this VAE")
        return resolution // self.downsampling

    def posterior(self, images: Tensor):
        """The autoencoder's own Gaussian (`mean`, `logvar`, `sample`), not normalised."""
        if images.ndim != 4 or images.shape[1] != self.autoencoder.config.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, {self.autoencoder.config.in_channels}, h, w)"
            )
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
        """Encode and decode."""
        return self.decode(self.encode(images, sample, generator))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the autoencoder as diffusers does; adapters are saved apart (`save_adapters`)."""
        if self.adapter_settings is not None:
            raise ValueError("this VAE holds adapters: save them with save_adapters, or save merged(vae)")
        self.autoencoder.save_pretrained(folder)


def load_vae(name: str | Path, subfolder: str | None = None) -> ContinuousVAE:
    """Load a continuous VAE, frozen and in evaluation mode.

    Args:
        name: "emoji" (embedded); "kl16" or "flux" (the paper's two, from the weights folder); a folder written by
            diffusers' `save_pretrained`; a file in latent diffusion's layout (MAR's kl16.safetensors); or a Hub name
            such as "stabilityai/sd-vae-ft-mse", a gated one with the token from the environment (HF_TOKEN). What
            follows the Hub name's two parts is the subfolder: "black-forest-labs/FLUX.1-dev/vae".
        subfolder: where the VAE lies below the folder or Hub name, e.g. "vae".
    Raises:
        ValueError: nothing loadable under that name; the message says what was looked for.
    """
    source = embedded(EMOJI_VAE) if name == "emoji" else name
    if name in PUBLISHED_VAES:
        try:
            source = find_weights(str(name))
        except MissingWeights as error:
            raise ValueError(str(error)) from error
    if Path(source).suffix in CHECKPOINTS and Path(source).expanduser().is_file():
        return _load_checkpoint(Path(source).expanduser())
    folder = Path(source).expanduser() / (subfolder or "")
    is_local = Path(source).expanduser().exists()
    if is_local and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no config.json: expected a folder written by diffusers' AutoencoderKL.save_pretrained"
        )
    if not is_local and subfolder is None and len(parts := str(source).split("/")) > 2:
        source, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        autoencoder = AutoencoderKL.from_pretrained(
            folder if is_local else str(source), subfolder=None if is_local else subfolder
        )
    except (OSError, ValueError) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no VAE could be loaded from {source!s} ({reason}): give 'emoji', a diffusers folder or a Hub name"
        ) from error
    return ContinuousVAE(autoencoder.float()).eval().requires_grad_(False)


def _load_checkpoint(path: Path) -> ContinuousVAE:
    state = read_state(path)
    if any(".lora_layer." in name for name in state):
        raise ValueError(
            f"{path} holds adapters beside its VAE: open its folder with codalib.models.checkpoints.load_tokenizer"
        )
    autoencoder = build_autoencoder(state)
    if autoencoder.config.block_out_channels not in PUBLISHED_WIDTHS:
        raise ValueError(
            f"{path} holds a VAE of widths {autoencoder.config.block_out_channels}, whose latent scale is not known: "
            "give it as a diffusers folder, whose config.json states the scale"
        )
    return ContinuousVAE(autoencoder).eval().requires_grad_(False)


def adapted_convolutions(autoencoder: AutoencoderKL, where: str, layers: Iterable[str]) -> dict[str, nn.Conv2d]:
    """The convolutions that `add_adapters` adapts, by name, in the network's order."""
    return {
        name: module
        for name, module in autoencoder.named_modules()
        if isinstance(module, nn.Conv2d)
        and name.split(".")[0] in ADAPTED_PARTS[where]
        and any(part in name for part in layers)
    }


def add_adapters(
    vae: ContinuousVAE, where: str = "both", rank: int = 32, layers: tuple[str, ...] = ADAPTED_LAYERS
) -> ContinuousVAE:
    """Add LoRA adapters to the VAE's convolutions, in place; only they are trainable afterwards.

    An adapted convolution computes base(x) + up(down(x)), down: rank x in x k x k, normal with std 1/rank, up: out x
    rank x 1 x 1, zero at the start (paper section 5.1: rank 32, on the convolutions of encoder and decoder).

    Args:
        where: "both", "encoder", "decoder" or "none".
        layers: a convolution is adapted when its name contains one of these.
    Raises:
        ValueError: unknown `where`, a rank below 1, adapters already there, or no convolution with such a name.
    """
    if where not in ADAPTED_PARTS:
        raise ValueError(f"adapters are wanted on {where!r}, expected one of {', '.join(ADAPTED_PARTS)}")
    if rank < 1:
        raise ValueError(f"the adapters' rank is {rank}, expected at least 1")
    if vae.adapter_settings is not None:
        raise ValueError("this VAE holds adapters already: load it anew, or merge them first")
    vae.requires_grad_(False)
    if where == "none":
        return vae
    targets = list(adapted_convolutions(vae.autoencoder, where, layers))
    if not targets:
        raise ValueError(f"no convolution of the VAE's {where} has a name with {' or '.join(layers)} in it")
    # alpha = rank gives scale 1; "gaussian" gives std 1/rank and a zero second factor
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    inject_adapter_in_model(config, vae.autoencoder)
    vae.adapter_settings = {"where": where, "rank": rank, "layers": list(layers)}
    return vae


def fresh_copy(vae: ContinuousVAE) -> ContinuousVAE:
    """A VAE of the same architecture with new random weights, all trainable: the start of a tokenizer from scratch.

    Its posterior has no noise and its latents no scale: what a discrete tokenizer in VQGAN's way (arXiv:2012.09841)
    rounds is the encoder's output itself.
    """
    fresh = ContinuousVAE(copy.deepcopy(vae.autoencoder))
    for module in fresh.autoencoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh.autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None)
    last = fresh.autoencoder.quant_conv or fresh.autoencoder.encoder.conv_out
    with torch.no_grad():  # the half that gives the posterior's logarithmic variance
        last.weight[vae.latent_channels :] = 0
        last.bias[vae.latent_channels :] = NO_NOISE
    return fresh.train().requires_grad_(True)


def adapter_parameters(vae: ContinuousVAE) -> list[nn.Parameter]:
    return [p for name, p in vae.named_parameters() if "lora_" in name]


def last_decoder_adapter(vae: ContinuousVAE) -> nn.Parameter | None:
    """The second factor of the decoder's last adapter, where the adversarial weight is measured; None without one.

    The last to be run: diffusers registers the middle of the decoder behind its upsampling half, but runs it before.
    """
    decoder = vae.autoencoder.decoder
    for part in (decoder.conv_out, decoder.up_blocks, decoder.mid_block, decoder.conv_in):
        found = [p for name, p in part.named_parameters() if "lora_B" in name]
        if found:
            return found[-1]
    return None


def save_adapters(vae: ContinuousVAE, folder: str | Path) -> None:
    """Write the adapters alone: their weights (safetensors) and settings (JSON)."""
    if vae.adapter_settings is None:
        raise ValueError("this VAE holds no adapters to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(vae.autoencoder).items()
    }
    partial = folder / (ADAPTER_WEIGHTS + ".part")
    save_file(state, partial)
    partial.replace(folder / ADAPTER_WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, vae.adapter_settings)


def load_adapters(vae: ContinuousVAE, folder: str | Path) -> ContinuousVAE:
    """Add the adapters of a folder written by `save_adapters` to their base VAE, in place."""
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} holds no {ADAPTER_CONFIG}: expected a folder written by save_adapters")
    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    add_adapters(vae, settings["where"], settings["rank"], tuple(settings["layers"]))
    state, expected = load_file(folder / ADAPTER_WEIGHTS), get_peft_model_state_dict(vae.autoencoder)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != {name: tuple(value.shape) for name, value in expected.items()}:
        odd = sorted(
            name
            for name in state.keys() | expected.keys()
            if shapes.get(name) != tuple(expected.get(name, torch.empty(0)).shape)
        )
        raise ValueError(f"the adapters in {folder} do not fit this VAE: {len(odd)} tensors differ, first {odd[0]}")
    set_peft_model_state_dict(vae.autoencoder, state)
    return vae


def merged(vae: ContinuousVAE) -> ContinuousVAE:
    """A copy of the VAE with its adapters added into the base convolutions: the same function, no peft layers."""
    return _with_plain_layers(vae, merge=True)


def without_adapters(vae: ContinuousVAE) -> ContinuousVAE:
    """A copy of the VAE as it was before its adapters were added."""
    return _with_plain_layers(vae, merge=False)


def _with_plain_layers(vae: ContinuousVAE, merge: bool) -> ContinuousVAE:
    vae = copy.deepcopy(vae)
    for name, layer in [(n, m) for n, m in vae.autoencoder.named_modules() if isinstance(m, LoraLayer)]:
        if merge:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(vae.autoencoder.get_submodule(parent), child, layer.get_base_layer())
    vae.adapter_settings = None
    return vae
