"""Extras of MaskGIT for models that are trained for minutes: the tokenizer's code values, and their sum as context.

Neither is in the paper. The parameters stand beside MaskGIT's own, under the names that saved models have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codalib.models.tokens import split_levels


class CodeValues(nn.Module):
    """The embeddings and the head of MaskGIT, with the code values where the model is given them.

    code_values: (K, C) the tokenizer's values of the codes; projected, they join the learned embedding of each code, so
    that codes of like values start alike.

    latent_context: at each place the sum of the visible tokens' code values, which is the latent as far as it is known,
    and the levels that it is known at, join the embeddings; the head's weights get a part that is projected from the
    code values in turn. So a model need not find out what the levels mean to each other.
    """

    code_channels: int | None  # C, None without code values
    latent_context: bool

    def add_codes(self, code_values: Tensor | None, codes: int, width: int, latent_context: bool) -> None:
        """Check both settings, and add the learned embeddings and what else `code_embeddings` needs."""
        if code_values is not None and len(code_values) != codes:
            raise ValueError(f"expected {codes} code values, one a code, got {len(code_values)}")
        if latent_context and code_values is None:
            raise ValueError("expected code_values with latent_context, which sums them, got none")
        self.code_channels = None if code_values is None else code_values.shape[1]
        self.latent_context = latent_context
        self.codes = nn.Embedding(codes + 1, width)  # the last is the mask
        if code_values is not None:
            self.register_buffer("code_values", code_values.detach().clone().float())
            self.code_projection = nn.Linear(self.code_channels, width, bias=False)

    def add_context(self, width: int) -> None:
        """Add what `known_latents` and `head_weight` need, where the model has `latent_context`."""
        if self.latent_context:
            self.context = nn.Linear(self.code_channels + len(self.scales), width, bias=False)
            self.head_projection = nn.Linear(self.code_channels, width, bias=False)

    def code_embeddings(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) in [0, K], K the mask -> (B, L, D)."""
        if self.code_channels is None:
            return self.codes(tokens)
        values = F.pad(self.code_projection(self.code_values), (0, 0, 0, 1))  # (K + 1, D), nothing for the mask
        return F.embedding(tokens, self.codes.weight + values)

    def head_weight(self) -> Tensor:
        """The weights of the logits, (K, D)."""
        return self.head.weight + self.head_projection(self.code_values) if self.latent_context else self.head.weight

    @torch.no_grad()
    def known_latents(self, tokens: Tensor) -> Tensor:
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
