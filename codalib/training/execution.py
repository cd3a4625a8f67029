"""How a stage's networks compute on their device: layout, compiled code, recomputed activations, the fused optimiser.

None of it decides a result, but for the rounding of sums.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch._functorch.config
from diffusers import AutoencoderKL
from torch import Tensor

from codalib.models.maskgit import MaskGIT
from codalib.training.settings import LoopSettings


def prepare_vae(autoencoder: AutoencoderKL, settings: LoopSettings, device: torch.device) -> None:
    """Have a VAE compute as the settings say, and with channels last on CUDA, as its convolutions want them there."""
    if settings.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    else:
        autoencoder.disable_gradient_checkpointing()  # a copy of one that was trained with it
    autoencoder.to(memory_format=layout(device))
    if settings.compile:
        _compile(autoencoder.encoder, autoencoder.decoder)


def prepare_transformer(model: MaskGIT, settings: LoopSettings) -> None:
    """Have a MaskGIT's blocks compute as the settings say; compiled once for all of them."""
    for block in model.blocks:
        block.checkpointed = settings.gradient_checkpointing
    if settings.compile:
        _compile(*model.blocks)


def layout(device: torch.device) -> torch.memory_format:
    """How the weights of convolutions lie in memory; what is saved is contiguous whatever it is.

    On a processor channels last saved 4 % of the emoji VAE's step (batch 8, one thread), not worth other last bits.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _compile(*modules: torch.nn.Module) -> None:
    # The tokenizer's step goes back through the decoder several times: no buffer of the first may be given away.
    torch._functorch.config.donated_buffer = False
    for module in modules:
        module.compile()  # in place: names of weights stay, and copies are not compiled


def build_adamw(
    parameters: Iterable[Tensor] | list[dict[str, Any]], settings: LoopSettings, **options: Any
) -> torch.optim.AdamW:
    """AdamW with the settings' rate and betas, in one kernel (fused) where all parameters are on CUDA."""
    parameters = list(parameters)
    tensors = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
    fused = True if all(p.is_cuda for p in tensors) else None  # None: torch's own choice
    return torch.optim.AdamW(parameters, settings.learning_rate, settings.betas, fused=fused, **options)
