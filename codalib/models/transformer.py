"""MaskGIT's transformer blocks, and how their layers start."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INITIAL_STD = 0.02
MLP_RATIO = 4


class Block(nn.Module):
    """Pre-norm self-attention and MLP.

    Dropout falls on what the two add to the sequence. Unlike MaskGIT none falls on the attention's weights, which would
    keep torch from its fused attention on a processor. Where `checkpointed`, the backward pass computes the block
    again from its input, the same dropout included, instead of keeping what it computed.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.checkpointed = heads, False
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """x (B, L, D); `attended` (B, 1, 1, L) bool, false for positions that nobody looks at, None: all are."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._mixed, x, attended, use_reentrant=False)
        return self._mixed(x, attended)

    def _mixed(self, x: Tensor, attended: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)  # (B, heads, L, D / heads)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))


class Blocks(nn.ModuleList):
    """Blocks one after the other; called as each of them is."""

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        for block in self:
            x = block(x, attended)
        return x


def initialise(module: nn.Module) -> None:
    """Truncated normal weights and zero biases, for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
