"""A pretend accelerator for tests on a processor: it computes as the CPU, raises where CUDA would, counts host waits.

    with pretending() as waits:          # a Counter: (what waits, place in codalib) -> how often
        model.to(DEVICE)(images)         # RuntimeError: images are still on the CPU

It raises on operands of two devices (but for scalars, which kernels take from the host), on a generator of another
device, and on `.numpy()`. It cannot show what kernels, streams or the numbers of a GPU do.
"""

import os
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

if os.environ.get("CODALIB_TEST_GPU") == "1":
    pytest.skip("torch would take the pretend device for its accelerator, and pin no memory", allow_module_level=True)
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("the pretend device needs torch 2.10 or newer", allow_module_level=True)

aten = torch.ops.aten
NAME = "pretend"
# What a host must wait for, since a shape or a branch of its own depends on values on the device.
READ = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_waits: Counter = Counter()


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class OnDevice(torch.Tensor):
    """A tensor of the device, whose numbers lie in `host`."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        own = torch.Tensor._make_wrapper_subclass(cls, host.shape, **layout, device=DEVICE)
        own.host = host
        return own

    def __tensor_flatten__(self):
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnDevice(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:  # by which safetensors tells what shares memory
        return self.host.untyped_storage()

    def __repr__(self) -> str:
        return f"OnDevice({self.host})"

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else repr(self)

    def tolist(self) -> list:
        return self.cpu().tolist()


class _Generator(torch.Generator):
    """One of the CPU that says to be of another device; torch hands it on as its C part alone."""

    def __new__(cls, device="cpu"):
        own = super().__new__(cls)
        own.place = torch.device(device)
        _generators[own._cdata] = own
        return own

    device = property(lambda self: self.place)


_generators: WeakValueDictionary = WeakValueDictionary()


class OneProcess:
    """What the library asks of an accelerator."""

    device, num_processes, process_index, is_main_process = DEVICE, 1, 0, True

    def prepare(self, module):
        return module

    def backward(self, loss):
        loss.backward()

    def reduce(self, tensor, how):
        return tensor

    def wait_for_everyone(self):
        pass


class _Mode(TorchDispatchMode):
    """Sees what has no operand on the device, such as `torch.zeros(3, device=DEVICE)`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[Counter]:
    """The device is there; yields the count of the host's waits."""
    _waits.clear()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` builds on the CPU, then copies
    try:
        with _Mode(), mock.patch("torch.Generator", _Generator):
            yield _waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _run(func, args, kwargs):
    name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    ours = [one for one in tensors if isinstance(one, OnDevice)]
    asked = kwargs.get("device")
    onto = torch.device(asked).type if asked is not None else NAME if ours else "cpu"
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator):
            place = _generators.get(leaf._cdata, leaf).device.type
            if place != onto:
                raise RuntimeError(f"expected a generator on {onto} for {name}, got one on {place}")
    if not ours and onto != NAME:
        return func(*args, **kwargs)
    if name not in ("_to_copy", "copy_"):
        _check_devices(name, args, tensors)
    if wait := _wait(name, args, kwargs, tensors, onto):
        _waits[wait, _place()] += 1
    own = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    out = func(*tree_map(_host, args), **tree_map(_host, own))
    if name == "copy_":
        return args[0]
    if onto != NAME or name == "_local_scalar_dense":
        return out
    out = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def _host(x):
    return x.host if isinstance(x, OnDevice) else x


def _check_devices(name, args, tensors) -> None:
    """Kernels take scalars from the host; indexing takes indices from there, into a tensor of the device alone."""
    inner = args[1] if name in INDEXING else ()
    allowed = [id(one) for one in inner if isinstance(args[0], OnDevice)]
    odd = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0 and id(x) not in allowed]
    if odd and len(odd) < len(tensors):
        raise RuntimeError(
            f"expected all operands of {name} on {NAME}, got shapes {[tuple(x.shape) for x in odd]} on cpu"
        )


def _wait(name, args, kwargs, tensors, onto) -> str:
    """What the host waits for in this operation, or ""."""
    if name in READ:
        return name
    if name in INDEXING:
        indices = [one for one in args[1] if isinstance(one, torch.Tensor)]
        masks = any(one.dtype in (torch.bool, torch.uint8) for one in indices)
        return (
            "mask as index" if masks else "index from the host" if any(type(x) is torch.Tensor for x in indices) else ""
        )
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name not in ("_to_copy", "copy_") or kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]):
        return ""
    ends = (onto, _type(args[0])) if name == "_to_copy" else (_type(args[0]), _type(args[1]))
    return "" if ends[0] == ends[1] else "copy to the device" if ends[0] == NAME else "copy to the host"


def _type(x) -> str:
    return NAME if isinstance(x, OnDevice) else "cpu"


def _place() -> str:
    frames = (f for f in reversed(traceback.extract_stack()) if "/codalib/" in f.filename)
    frame = next((f for f in frames if "site-packages" not in f.filename), None)
    return f"{frame.filename.rpartition('/codalib/')[2]}:{frame.lineno}" if frame else "elsewhere"
