"""MaskGIT on multi-scale tokens: a bidirectional transformer and its masked loss (Eq. 12 of arXiv:2503.17760).

All levels share one vocabulary, and the sequence is their tokens one level after the other, coarse to fine, each map
row by row. The condition stands in front of it: a class token, or the token embeddings of a caption. The authors have
not released this stage; what the paper leaves open follows MaskGIT (arXiv:2202.04200), and is said where it is decided.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codalib.base.files import write_json
from codalib.base.paths import DATA, embedded
from codalib.kernels.cross_entropy import linear_cross_entropy

# width, depth, heads. L is the paper's: 195M with 16,384 codes. The paper gives no size for S: this is the width and
# the heads of U-ViT-S, beside which it stands in Table 5. XS is for the embedded emoji on a processor.
PRESETS = {"L": (768, 24, 16), "S": (512, 12, 8), "XS": (256, 6, 4)}
INITIAL_STD = 0.02
MLP_RATIO = 4
MASK_RATIOS = ("cosine", "beta")
BETA = (12, 3)  # the "beta" mask ratio's parameters, of the same authors' later work; integers, see `sample_mask`
STORED_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDED_GENERATORS = {  # name -> folder; of the tokenizer "emoji-small"
    "emoji-class": DATA / "maskgit-emoji-class",
    "emoji-text": DATA / "maskgit-emoji-text",
}


class TextCondition(NamedTuple):
    """The token embeddings of B captions, as `codalib.datasets.text.TextEncoder.tokens` gives them."""

    embeddings: Tensor  # (B, T, text width)
    mask: Tensor  # (B, T) bool, true where there is a token


Condition = Tensor | TextCondition | None  # labels (B,) int64, captions, or nothing


# --- sequences and masks ----------------------------------------------------------------------------------------------
def join_levels(indices: Sequence[Tensor]) -> Tensor:
    """One (B, p, p) a level -> the sequence (B, L), coarse to fine, each map row by row."""
    return torch.cat([level.flatten(1) for level in indices], dim=1)


def split_levels(tokens: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """The sequence (B, L) -> one (B, p, p) a level; raises ValueError where L is not the sum of p^2."""
    sizes = [p * p for p in scales]
    if tokens.shape[1] != sum(sizes):
        raise ValueError(f"sequences of {tokens.shape[1]} tokens got, expected {sum(sizes)} for scales {tuple(scales)}")
    return [part.unflatten(1, (p, p)) for part, p in zip(tokens.split(sizes, dim=1), scales, strict=True)]


def token_levels(scales: Sequence[int]) -> Tensor:
    """The level of each position of the sequence, (L,) int64 counted from 0."""
    return torch.tensor([level for level, p in enumerate(scales) for _ in range(p * p)])


def sample_mask(
    batch: int,
    scales: Sequence[int],
    ratio: str = "cosine",
    coarse_first: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which tokens are hidden in training: (B, L) bool, at least one a sample, on the CPU.

    Args:
        ratio: how the share of masked tokens is drawn: "cosine", cos(u pi / 2) with u uniform (MaskGIT's), or "beta",
            a Beta(12, 3).
        coarse_first: share of the samples in which the visible tokens fill the levels coarse to fine, as decoding in
            that order meets them, instead of lying anywhere (the paper's, 0).
    """
    if ratio not in MASK_RATIOS:
        raise ValueError(f"mask ratio {ratio!r} got, expected one of {', '.join(MASK_RATIOS)}")
    if ratio == "cosine":
        share = torch.cos(math.pi / 2 * torch.rand(batch, generator=generator))
    else:  # the a-th smallest of a + b - 1 uniform numbers is a Beta(a, b)
        a, b = BETA
        share = torch.rand(batch, a + b - 1, generator=generator).kthvalue(a, dim=1).values
    levels = token_levels(scales)
    hidden = (share * len(levels)).ceil().long().clamp(1, len(levels))  # (B,)
    order = torch.rand(batch, len(levels), generator=generator)
    in_levels = torch.rand(batch, 1, generator=generator) < coarse_first
    order = torch.where(in_levels, order + levels, order)  # below 1, so that it orders tokens within a level alone
    rank = order.argsort(dim=1).argsort(dim=1)  # (B, L), 0 is unmasked first
    return rank >= len(levels) - hidden[:, None]


# --- the transformer --------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm self-attention and MLP.

    Dropout falls on what the two add to the sequence. Unlike MaskGIT none falls on the attention's weights, which would
    keep torch from its fused attention on a processor.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """x (B, L, D); `attended` (B, 1, 1, L) bool, false for positions that nobody looks at, None: all are."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)  # (B, heads, L, D / heads)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))


class MaskGIT(nn.Module):
    """Predicts masked tokens from visible ones and a condition (section 4.3 of arXiv:2503.17760).

    Args:
        codebook_size: K; the token K is the mask.
        scales: the side of each level's map, as the quantizer has them.
        width, depth, heads: of the transformer.
        num_classes: labels 0 to num_classes - 1 as the condition; None: no classes.
        text_dim: width of a text encoder's token embeddings as the condition; None: no text.
        dropout: on the embeddings and in the blocks.
        level_positions: position embeddings of each level's own (the paper's); False: one set, that of the finest map,
            averaged over the cells of coarser ones (the ablation). Both have an embedding for each level.
        code_values: (K, C) the tokenizer's values of the codes; projected, they join the learned embedding of each
            code, so that codes of like values start alike.
        latent_context: what the visible tokens amount to joins the embeddings: at each place the sum of their code
            values, which is the latent as far as it is known, and the levels that it is known at. The head's weights
            get a part that is projected from the code values in turn. Neither is in the paper; a model that is trained
            for minutes need not find out what the levels mean to each other. Needs `code_values`.
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
        if width % heads:
            raise ValueError(f"width {width} and {heads} heads got, expected a width that the heads divide")
        if num_classes is not None and text_dim is not None:
            raise ValueError("num_classes and text_dim got, expected one of them: the condition is a class or a text")
        if code_values is not None and len(code_values) != codebook_size:
            raise ValueError(f"{len(code_values)} code values got, expected {codebook_size}, one a code")
        if latent_context and code_values is None:
            raise ValueError("latent_context got without code_values, expected both: it sums the codes' values")
        self.codebook_size, self.scales = codebook_size, tuple(int(p) for p in scales)
        self.width, self.depth, self.heads = width, depth, heads
        self.num_classes, self.text_dim = num_classes, text_dim
        self.dropout_rate, self.level_positions = dropout, level_positions
        self.code_channels = None if code_values is None else code_values.shape[1]
        self.latent_context = latent_context
        self.info: dict[str, Any] = {}  # what else is saved beside the weights, such as the tokenizer's hash

        self.codes = nn.Embedding(codebook_size + 1, width)  # the last is the mask
        if code_values is not None:
            self.register_buffer("code_values", code_values.detach().clone().float())
            self.code_projection = nn.Linear(self.code_channels, width, bias=False)
        self.levels = nn.Embedding(len(self.scales), width)
        self.positions = nn.Parameter(torch.empty(self.num_tokens if level_positions else max(self.scales) ** 2, width))
        self.register_buffer("token_levels", token_levels(self.scales), persistent=False)
        if num_classes is not None:
            self.classes = nn.Embedding(num_classes + 1, width)  # the last is no class
        if text_dim is not None:
            self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
            self.no_text = nn.Parameter(torch.empty(width))
        self.input_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size)
        if latent_context:
            self.context = nn.Linear(self.code_channels + len(self.scales), width, bias=False)
            self.head_projection = nn.Linear(self.code_channels, width, bias=False)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.positions, std=INITIAL_STD)
        if text_dim is not None:
            nn.init.trunc_normal_(self.no_text, std=INITIAL_STD)

    @classmethod
    def preset(cls, name: str, codebook_size: int, scales: Sequence[int], **settings) -> "MaskGIT":
        """A model of a named size: "L" (the paper's 195M with 16,384 codes), "S" or "XS"."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} got, expected one of {', '.join(PRESETS)}")
        width, depth, heads = PRESETS[name]
        return cls(codebook_size, scales, **{"width": width, "depth": depth, "heads": heads} | settings)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return sum(p * p for p in self.scales)

    @property
    def mask_token(self) -> int:
        return self.codebook_size

    @property
    def is_conditional(self) -> bool:
        return self.num_classes is not None or self.text_dim is not None

    def features(self, tokens: Tensor, condition: Condition = None, dropped: Tensor | None = None) -> Tensor:
        """Tokens (B, L) in [0, K], K where hidden -> what the head reads, (B, L, D).

        Args:
            condition: labels (B,) or a `TextCondition`, whichever the model was built for.
            dropped: (B,) bool, true for samples that are not to see their condition.
        Raises:
            ValueError: another length, a condition of another kind, or a label out of range.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} got, expected (B, {self.num_tokens})")
        self.check_condition(condition, len(tokens))
        if dropped is None:
            dropped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        x = self._code_embeddings(tokens) + self.levels(self.token_levels) + self._position_embeddings()  # (B, L, D)
        if self.latent_context:
            x = x + self.context(self._known_latents(tokens))
        attended = None
        if isinstance(condition, TextCondition):
            prefix, visible = self._text_prefix(condition, dropped)
            x = torch.cat([prefix, x], dim=1)
            if not visible.all():
                visible = torch.cat([visible, visible.new_ones(tokens.shape)], dim=1)
                attended = visible[:, None, None]  # (B, 1, 1, T + L)
        elif condition is not None:
            x = torch.cat([self.classes(condition.masked_fill(dropped, self.num_classes))[:, None], x], dim=1)
        x = self.dropout(self.input_norm(x))
        for block in self.blocks:
            x = block(x, attended)
        return self.output_norm(x[:, -self.num_tokens :])

    def logits(self, features: Tensor) -> Tensor:
        """What `features` gave, at any positions (..., D) -> logits of the codes (..., K)."""
        return F.linear(features, self._head_weight(), self.head.bias)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        condition: Condition = None,
        dropped: Tensor | None = None,
        label_smoothing: float = 0.1,
    ) -> Tensor:
        """The loss of Eq. 12: mean cross-entropy in nats at the masked tokens, without their (tokens x K) logits.

        Args:
            tokens: (B, L) the image's tokens.
            mask: (B, L) bool, true where hidden.
            condition, dropped: see `hidden`.
            label_smoothing: share of the target that is spread evenly over all codes.
        """
        hidden = self.features(tokens.masked_fill(mask, self.mask_token), condition, dropped)
        return linear_cross_entropy(hidden[mask], self._head_weight(), tokens[mask], self.head.bias, label_smoothing)

    def check_condition(self, condition: Condition, batch: int) -> None:
        """Raise ValueError unless the condition is of the model's kind, for BATCH samples, and in range."""
        wanted = "labels" if self.num_classes is not None else "text" if self.text_dim is not None else "no condition"
        got = "no condition" if condition is None else "text" if isinstance(condition, TextCondition) else "labels"
        if got != wanted:
            raise ValueError(f"{got} got as the condition, expected {wanted}: the model was built for it")
        if condition is None:
            return
        count = len(condition.embeddings) if got == "text" else len(condition)
        if count != batch:
            raise ValueError(f"the condition of {count} samples got, expected one for each of {batch}")
        if got == "text" and condition.embeddings.shape[-1] != self.text_dim:
            raise ValueError(
                f"text embeddings of width {condition.embeddings.shape[-1]} got, expected {self.text_dim}: "
                "use the text encoder that the model was trained with"
            )
        if got == "labels" and count:
            low, high = condition.min().item(), condition.max().item()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"label {low if low < 0 else high} got, expected 0 to {self.num_classes - 1}: "
                    f"the model knows {self.num_classes} classes"
                )

    def _code_embeddings(self, tokens: Tensor) -> Tensor:
        if self.code_channels is None:
            return self.codes(tokens)
        values = F.pad(self.code_projection(self.code_values), (0, 0, 0, 1))  # (K + 1, D), nothing for the mask
        return F.embedding(tokens, self.codes.weight + values)

    def _head_weight(self) -> Tensor:
        if not self.latent_context:
            return self.head.weight
        return self.head.weight + self.head_projection(self.code_values)  # (K, D)

    @torch.no_grad()
    def _known_latents(self, tokens: Tensor) -> Tensor:
        """At each place the values of the visible tokens of all levels, and which levels are visible: (B, L, C + l).

        Levels are brought to the finest map as the quantizer does, and the sum to each level's map by its mean.
        """
        values = F.pad(self.code_values, (0, 0, 0, 1))  # (K + 1, C), nothing for the mask
        visible = (tokens != self.mask_token).float()[..., None] * F.one_hot(self.token_levels, len(self.scales))
        known, side = torch.cat([F.embedding(tokens, values), visible], dim=2), max(self.scales)  # (B, L, C + l)
        maps = [level.movedim(-1, 1) for level in split_levels(known, self.scales)]  # (B, C + l, p, p)
        whole = sum(m if m.shape[-1] == side else F.interpolate(m, size=(side, side), mode="bicubic") for m in maps)
        pooled = [whole if p == side else F.adaptive_avg_pool2d(whole, p) for p in self.scales]
        return torch.cat([level.flatten(2) for level in pooled], dim=2).transpose(1, 2)

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
        """The settings that rebuild this model, as plain values."""
        return {
            "codebook_size": self.codebook_size,
            "scales": list(self.scales),
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "num_classes": self.num_classes,
            "text_dim": self.text_dim,
            "dropout": self.dropout_rate,
            "level_positions": self.level_positions,
            "latent_context": self.latent_context,
        }

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write weights, settings and `info`, replacing the folder; `dtype` is how weights are stored."""
        if dtype not in STORED_TYPES:
            raise ValueError(f"dtype {dtype!r} got, expected one of {', '.join(STORED_TYPES)}")
        folder, partial = Path(folder), Path(f"{folder}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = {name: v.detach().cpu().to(STORED_TYPES[dtype]).contiguous() for name, v in self.state_dict().items()}
        save_file(state, partial / WEIGHTS)
        write_json(partial / CONFIG, {"model": self.config(), "info": self.info})
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MaskGIT":
        """Load a folder written by `save_pretrained`, or one of `EMBEDDED_GENERATORS` by its name.

        In float32, frozen, in evaluation mode. `datasets.token_cache.check_generator` makes sure that it fits a
        tokenizer.

        Raises ValueError where there is no model, or weights that do not fit its settings.
        """
        known = EMBEDDED_GENERATORS.get(str(folder))
        path = embedded(known) if known else Path(folder).expanduser()
        if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
            raise ValueError(f"{path} holds no {CONFIG} and {WEIGHTS}: expected a folder of MaskGIT.save_pretrained")
        config, state = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
        try:
            model = cls(**config["model"], code_values=state.get("code_values"))
            model.load_state_dict(state)
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: {WEIGHTS} does not fit {CONFIG} ({str(error).splitlines()[0]})") from error
        model.info = config["info"]
        return model.eval().requires_grad_(False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
