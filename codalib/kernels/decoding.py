"""MaskGIT's blocks as compiled code while tokens are drawn, on CUDA replayed as a graph."""

import torch
from torch import Tensor, nn


def compile_decoding(model: nn.Module) -> None:
    """Have a MaskGIT's blocks run as compiled code, on CUDA as a graph that each decoding step replays.

    Pays over many batches of one size: compiling takes up to minutes. The rounding of sums differs. On CUDA what
    `features` gave is overwritten by its next call, which `generate` allows for.
    """
    compiled = torch.compile(model.blocks.forward, mode="reduce-overhead")

    def replay(x: Tensor, attended: Tensor | None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, attended)

    model.blocks.forward = replay
