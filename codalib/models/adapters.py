"""LoRA adapters on a VAE's convolutions (section 5.1 of arXiv:2503.17760): all of the VAE that is trained."""

from collections.abc import Iterable

from diffusers import AutoencoderKL
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from codalib.models.checks import check_list, check_whole
from codalib.models.vae import ContinuousVAE

ADAPTED_PARTS = {"both": ("encoder", "decoder"), "encoder": ("encoder",), "decoder": ("decoder",), "none": ()}
# Parts of a convolution's name. The release adapts these of MAR's VAE, and conv1 and conv2 alone of FLUX's.
ADAPTED_LAYERS = ("conv1", "conv2", "upsample", "downsample")


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
    rank x 1 x 1, zero at the start. It is adapted where its name contains one of `layers`; `where` is "both",
    "encoder", "decoder" or "none". Raises ValueError where there is nothing to adapt, or adapters are there already.
    """
    if where not in ADAPTED_PARTS:
        raise ValueError(f"expected adapters on one of {', '.join(ADAPTED_PARTS)}, got {where!r}")
    check_whole(1, rank=rank)
    check_list(layers=layers)  # of a text each letter would name layers
    if vae.adapter_settings is not None:
        raise ValueError("expected a VAE without adapters, got one with them: load it anew, or merge them first")
    vae.requires_grad_(False)
    if where == "none":
        return vae
    targets = list(adapted_convolutions(vae.autoencoder, where, layers))
    if not targets:
        raise ValueError(f"expected convolutions of the VAE's {where} named after {' or '.join(layers)}, got none")
    # alpha = rank gives scale 1; "gaussian" gives std 1/rank and a zero second factor
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    inject_adapter_in_model(config, vae.autoencoder)
    vae.adapter_settings = {"where": where, "rank": rank, "layers": list(layers)}
    return vae
