"""What a model weighs: parameters by part, floating-point operations, and the memory that training keeps."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from codalib.models.tokenizer import CodaTokenizer


def count_parameters(
    tokenizer: CodaTokenizer, perceptual: nn.Module | None, discriminator: nn.Module | None
) -> list[dict]:
    """Rows {"part", "parameters", "trained"}; `trained` counts what the optimisers change."""

    def plain(module: nn.Module | None) -> int:
        named = () if module is None else module.named_parameters()
        return sum(p.numel() for name, p in named if "lora_" not in name)

    def adapters(module: nn.Module) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)

    vae = tokenizer.vae.autoencoder
    rows = [
        ("VAE, encoder", plain(vae.encoder) + plain(vae.quant_conv), False),
        ("VAE, decoder", plain(vae.decoder) + plain(vae.post_quant_conv), False),
        ("adapters of the encoder", adapters(vae.encoder), True),
        ("adapters of the decoder", adapters(vae.decoder), True),
        ("quantizer", plain(tokenizer.quantizer), True),
    ]
    if discriminator is not None:
        rows += [
            (f"{discriminator.name}, backbone", plain(discriminator.backbone), False),
            (f"{discriminator.name}, heads", plain(discriminator.heads), True),
        ]
    if perceptual is not None:
        rows.append((f"{perceptual.name}, network", plain(perceptual), False))
    return [{"part": part, "parameters": count, "trained": count if trained else 0} for part, count, trained in rows]


def count_operations() -> FlopCounterMode:
    """torch's counter of floating-point operations (a multiplication and an addition are two), `addmm_` counted too."""

    def addmm(_, one: Sequence[int], other: Sequence[int], out_shape: Any = None, **rest: Any) -> int:
        return 2 * one[0] * one[1] * other[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})


def training_operations(tokenizer: CodaTokenizer, images: Tensor) -> int:
    """Operations of one forward and backward pass over images (B, 3, h, w), an image.

    Of VAE, adapters and quantizer alone: the networks of perceptual and adversarial terms are left out, as they are the
    same for every tokenizer.
    """
    with count_operations() as counter:
        out = tokenizer(images)
        ((out.reconstruction - images).square().mean() + out.quantization_loss).backward()
    tokenizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() // len(images)


def assignment_operations(tokens: int, codes: int, width: int, channels: int) -> int:
    """Operations of the matrix products that assign tokens to codes, forward and backward.

    The logits twice (the backward pass computes them again), the values' part of their gradient, and the gradients of
    queries and keys: four products over the width, one over the channels.
    """
    return 2 * tokens * codes * (4 * width + channels)


class KeptForBackward:
    """The largest memory that autograd holds at once for the backward pass, in bytes; parameters are left out.

    It grows with the batch, unlike the rest, so that it tells which batch a GPU takes.
    """

    def __init__(self) -> None:
        self.bytes, self.most = 0, 0
        self._holders: Counter[int] = Counter()
        self._parameters: set[int] = set()
        self._contexts: tuple = ()

    def __enter__(self) -> "KeptForBackward":
        self._contexts = (
            register_module_forward_pre_hook(self._note_parameters),
            torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack),
        )
        self._contexts[1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts[1].__exit__(*error)
        self._contexts[0].remove()

    def _note_parameters(self, module: nn.Module, _: Any) -> None:
        self._parameters |= {p.untyped_storage().data_ptr() for p in module.parameters(recurse=False)}

    def _pack(self, tensor: Tensor) -> "Tensor | _Kept":
        address = tensor.untyped_storage().data_ptr()
        if isinstance(tensor, nn.Parameter) or address in self._parameters:
            return tensor
        return _Kept(tensor, self._holders, self._add)

    @staticmethod
    def _unpack(kept: "Tensor | _Kept") -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    def _add(self, count: int) -> None:
        self.bytes += count
        self.most = max(self.most, self.bytes)


class StepMemory(TorchDispatchMode):
    """The largest memory of tensors that live at once in a training step, `most` bytes above what lived before it.

    Unlike `KeptForBackward` it sees what is computed again in the backward pass. A step begins where a module of the
    class KIND is called with gradients, and the last step counts; what the tensors' operations need inside does not.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.kind, self.bytes, self.before, self.most = kind, 0, 0, 0
        self._living: set[int] = set()
        self._hook: Any = None

    def __enter__(self) -> "StepMemory":
        self._hook = register_module_forward_pre_hook(self._begin)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _begin(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, self.kind) and torch.is_grad_enabled():
            self.before, self.most = self.bytes, 0

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._living:
            self._living.add(key)
            self.bytes += size
            self.most = max(self.most, self.bytes - self.before)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._living.discard(key)
        self.bytes -= size


class _Kept:
    """One saved tensor; storages that several share count once."""

    def __init__(self, tensor: Tensor, holders: Counter[int], add: Callable[[int], None]):
        self.tensor, self._holders, self._add = tensor, holders, add
        storage = tensor.untyped_storage()
        self._address, self._bytes = storage.data_ptr(), storage.nbytes()
        holders[self._address] += 1
        if holders[self._address] == 1:
            add(self._bytes)

    def __del__(self) -> None:
        self._holders[self._address] -= 1
        if not self._holders[self._address]:
            self._add(-self._bytes)
