"""MaskGIT on multi-scale tokens: a bidirectional transformer and its masked loss (Eq. 12 of arXiv:2503.17760).

All levels share one vocabulary, and the sequence is their tokens one level after the other, coarse to fine, each map
row by row. The condition stands in front of it: a class token, or the token embeddings of a caption. The authors have
not released this stage; what the paper leaves open follows MaskGIT (arXiv:2202.04200), and is said where it is decided.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codalib.kernels.cross_entropy import linear_cross_entropy
from codalib.models.checks import check_condition, check_tokens, check_width, whole_scales
from codalib.models.hub import OnHub
from codalib.models.latent_context import CodeValues
from codalib.models.tokens import token_levels
from codalib.models.transformer import INITIAL_STD, Block, Blocks, initialise

# width, depth, heads. L is the paper's: 195M with 16,384 codes. The paper gives no size for S: this is the width and
# the heads of U-ViT-S, beside which it stands in Table 5. XS is for the embedded emoji on a processor.
PRESETS = {"L": (768, 24, 16), "S": (512, 12, 8), "XS": (256, 6, 4)}


class TextCondition(NamedTuple):
    """The token embeddings of B captions, as `codalib.datasets.text.TextEncoder.tokens` gives them."""

    embeddings: Tensor  # (B, T, text width)
    mask: Tensor  # (B, T) bool, true where there is a token


Condition = Tensor | TextCondition | None  # labels (B,) int64, captions, or nothing


class MaskGIT(OnHub, CodeValues):
    """Predicts masked tokens from visible ones and a condition (section 4 of arXiv:2503.17760).

    Args:
        codebook_size, scales: K, where the token K is the mask, and the side of each level's map.
        width, depth, heads: of the transformer.
        num_classes, text_dim: the condition, of one kind or none: labels 0 to num_classes - 1, or a text encoder's
            token embeddings of width text_dim. dropout: on the embeddings and in the blocks.
        level_positions: position embeddings of each level's own (the paper's); False: one set, that of the finest map,
            averaged over the cells of coarser ones (the ablation). Both have an embedding for each level.
        code_values, latent_context: extras that are not in the paper, see `models.latent_context`.
    """

    def __init__(
        self,
        codebook_size: int,
        scales: Sequence[int],
        width: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        text_dim: int | None = None,
        dropout: float = 0.1,
        level_positions: bool = True,
        code_values: Tensor | None = None,
        latent_context: bool = False,
    ):
        super().__init__()
        check_width(width, heads, num_classes, text_dim)
        self.codebook_size, self.scales = codebook_size, whole_scales(scales)
        self.width, self.depth, self.heads = width, depth, heads
        self.num_classes, self.text_dim = num_classes, text_dim
        self.dropout_rate, self.level_positions = dropout, level_positions
        self.info: dict[str, Any] = {}  # what else is saved beside the weights, such as the tokenizer's hash
        self._build_embeddings(code_values, latent_context)
        self.input_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = Blocks(Block(width, heads, dropout) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size)
        self.add_context(width)
        self.apply(initialise)
        for parameter in [self.positions] if text_dim is None else [self.positions, self.no_text]:
            nn.init.trunc_normal_(parameter, std=INITIAL_STD)

    def _build_embeddings(self, code_values: Tensor | None, latent_context: bool) -> None:
        """What the sequence starts as: codes, levels, positions and the condition."""
        width, scales = self.width, self.scales
        self.add_codes(code_values, self.codebook_size, width, latent_context)
        self.levels = nn.Embedding(len(scales), width)
        self.positions = nn.Parameter(torch.empty(self.num_tokens if self.level_positions else max(scales) ** 2, width))
        self.register_buffer("token_levels", token_levels(scales), persistent=False)
        if self.num_classes is not None:
            self.classes = nn.Embedding(self.num_classes + 1, width)  # the last is no class
        if self.text_dim is not None:
            self.text = nn.Sequential(nn.LayerNorm(self.text_dim), nn.Linear(self.text_dim, width))
            self.no_text = nn.Parameter(torch.empty(width))

    @classmethod
    def preset(cls, name: str, codebook_size: int, scales: Sequence[int], **settings) -> "MaskGIT":
        """A model of a named size: "L" (the paper's 195M with 16,384 codes), "S" or "XS"."""
        if name not in PRESETS:
            raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {name!r}")
        width, depth, heads = PRESETS[name]
        return cls(codebook_size, scales, **{"width": width, "depth": depth, "heads": heads} | settings)

    @property
    def num_tokens(self) -> int:
        return sum(p * p for p in self.scales)

    @property
    def mask_token(self) -> int:
        return self.codebook_size

    @property
    def is_conditional(self) -> bool:
        return self.num_classes is not None or self.text_dim is not None

    def features(self, tokens: Tensor, condition: Condition = None, dropped: Tensor | None = None) -> Tensor:
        """Tokens (B, L) in [0, K], K where masked -> what the head reads, (B, L, D).

        `condition` is of the model's kind; `dropped` (B,) bool is true for samples that are not to see theirs.
        Raises ValueError on another length, a condition of another kind, or a label out of range.
        """
        check_tokens(tokens, self.num_tokens)
        check_condition(condition, len(tokens), self.num_classes, self.text_dim)
        if dropped is None:
            dropped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        x = self.code_embeddings(tokens) + self.levels(self.token_levels) + self._position_embeddings()  # (B, L, D)
        if self.latent_context:
            x = x + self.context(self.known_latents(tokens))
        attended = None
        if isinstance(condition, TextCondition):
            prefix, visible = self._text_prefix(condition, dropped)
            x = torch.cat([prefix, x], dim=1)
            if visible.device.type != "cpu" or not visible.all():  # a GPU is not waited for
                attended = torch.cat([visible, visible.new_ones(tokens.shape)], dim=1)[:, None, None]  # (B, 1, 1, T+L)
        elif condition is not None:
            x = torch.cat([self.classes(condition.masked_fill(dropped, self.num_classes))[:, None], x], dim=1)
        x = self.blocks(self.dropout(self.input_norm(x)), attended)
        return self.output_norm(x[:, -self.num_tokens :])

    def logits(self, features: Tensor) -> Tensor:
        """What `features` gave, at any positions, (..., D) -> logits of the codes (..., K)."""
        return F.linear(features, self.head_weight(), self.head.bias)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        condition: Condition = None,
        dropped: Tensor | None = None,
        label_smoothing: float = 0.1,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The loss of Eq. 12: the mean of -log p(z_i | visible tokens) over the masked tokens i, in nats.

        `tokens` (B, L), `mask` (B, L) bool, true where masked; `condition`, `dropped` as in `features`; `rows` (M,):
        the masked places, flattened, if known; `label_smoothing`: the part of the target spread over all codes.
        """
        x = self.features(tokens.masked_fill(mask, self.mask_token), condition, dropped)
        rows = mask.flatten().nonzero()[:, 0] if rows is None else rows
        # Eq. 12 as F.cross_entropy(self.logits(x[mask]), tokens[mask]), without a masked tokens x codes matrix.
        x, targets = x.flatten(0, 1)[rows], tokens.flatten()[rows]  # (M, D), (M,)
        return linear_cross_entropy(x, self.head_weight(), targets, self.head.bias, label_smoothing)

    def _position_embeddings(self) -> Tensor:
        if self.level_positions:
            return self.positions  # (L, D)
        side = max(self.scales)
        finest = self.positions.T.unflatten(1, (side, side))  # (D, side, side)
        return torch.cat([F.adaptive_avg_pool2d(finest, p).flatten(1) for p in self.scales], dim=1).T  # (L, D)

    def _text_prefix(self, text: TextCondition, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """The projected captions (B, T, D) and which positions hold something; a dropped one is the one `no_text`."""
        first = torch.arange(text.mask.shape[1], device=text.mask.device) == 0  # (T,)
        prefix = self.text(text.embeddings.to(self.no_text.dtype))
        prefix = torch.where(dropped[:, None, None], self.no_text.to(prefix.dtype), prefix)
        return prefix, torch.where(dropped[:, None], first, text.mask)

    def config(self) -> dict[str, Any]:
        names = ("codebook_size", "scales", "width", "depth", "heads", "num_classes", "text_dim", "dropout")
        values = {name: getattr(self, name) for name in (*names, "level_positions", "latent_context")}
        return values | {"scales": list(self.scales), "dropout": self.dropout_rate}

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write weights (stored as `dtype`), settings and `info`, replacing the folder."""
        from codalib.models.checkpoints.ours import save_maskgit  # which imports this module

        save_maskgit(self, folder, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MaskGIT":
        """Load a saved folder, OWNER/NAME of the Hub, "emoji-class" or "emoji-text": float32, frozen, to evaluate."""
        from codalib.models.checkpoints.ours import load_maskgit  # which imports this module

        return load_maskgit(folder)
