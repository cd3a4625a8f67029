"""Which codes suit a feature, and with what confidence a quantizer takes one (Fig. 5 of arXiv:2503.17760)."""

from typing import NamedTuple

import torch
from torch import Tensor

from codalib.kernels.assignment import top_assign, top_nearest
from codalib.models.quantizer import ResidualAttentionQuantizer, ResidualQuantizer


class Ranking(NamedTuple):
    """The codes that suit the features of a level best, the top-1 code first."""

    scores: Tensor  # (B, p, p, top): softmax scores in [0, 1], falling; or Euclidean distances of latents, rising
    codes: Tensor  # (B, p, p, top) int64


@torch.no_grad()
def rank_codes(quantizer: ResidualQuantizer, latents: Tensor, top: int = 50) -> list[Ranking]:
    """The `top` codes of each feature of latents (B, C, H, W), one `Ranking` a level.

    Attention ranks by its softmax scores, the nearest neighbour by its distances. A level's features are what the
    levels before it leave; the first code is the one that `encode` takes.
    """
    residual, ranked = quantizer.checked(latents), []
    tokens = quantizer.encode(latents)
    with torch.autocast(latents.device.type, enabled=False):
        keys, values = quantizer.project_codes()
        for level, p in zip(tokens, quantizer.scales, strict=True):
            features = quantizer.pool(residual, p)
            if isinstance(quantizer, ResidualAttentionQuantizer):
                queries, scale = quantizer.attn.queries(features), quantizer.attention_dim**-0.5
                logits, codes, log_sums = top_assign(queries, keys, top, scale)
                scores = (logits - log_sums[:, None]).exp()
            else:
                scores, codes = top_nearest(features, keys, top)
            ranked.append(Ranking(scores.view(-1, p, p, top), codes.view(-1, p, p, top)))
            residual = residual - quantizer.upsample(values[level.flatten()], p)
    return ranked


def confidence(quantizer: ResidualQuantizer, latents: Tensor, top: int = 50) -> list[Tensor]:
    """The scores of `rank_codes`, one (B, p, p, top) a level."""
    return [level.scores for level in rank_codes(quantizer, latents, top)]
