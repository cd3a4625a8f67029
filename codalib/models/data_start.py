"""A start from data: codes that are features of some latents, for both kinds of quantizer alike.

k-means-like starts are the usual remedy for dead codes of nearest-neighbour quantizers (for example in
vector-quantize-pytorch); attention gets one too, so that neither side of a comparison has a head start.
"""

import torch
from torch import Tensor, nn

from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.quantizer import ResidualAttentionQuantizer, ResidualQuantizer

START_LATENTS = 1024  # images whose features are drawn from


@torch.no_grad()
def start_from_data(quantizer: ResidualQuantizer, latents: Tensor, seed: int = 0) -> None:
    """Replace the codes by features of LATENTS (N, C, H, W), a run of codes for each level.

    Each level gets a part of the codebook in proportion to its side p (a level of more tokens gets more codes, but the
    coarse ones are not starved), draws it from the features of its residual, with repetition only where there are fewer
    features than codes, and quantizes with the codes drawn so far before the next level draws. With attention the
    values are the codes themselves, and queries and keys one isometry of features and codes (for width D >= C), so
    that a feature starts with the code of the most similar direction.

    Raises ValueError for a quantizer that has no codebook of ours.
    """
    if not isinstance(quantizer, ResidualAttentionQuantizer | ResidualNearestQuantizer):
        raise ValueError(f"expected a nearest or attention quantizer for a start from data, got {quantizer.kind!r}")
    generator = torch.Generator().manual_seed(seed)
    codes = quantizer.codebooks.weight
    if isinstance(quantizer, ResidualAttentionQuantizer):
        _as_isometry(quantizer, generator)
    drawn = torch.randperm(len(latents), generator=generator)[:START_LATENTS]
    residual = latents[drawn].to(codes)
    parts = torch.tensor(quantizer.scales, dtype=torch.float64).cumsum(0)
    ends = (parts / parts[-1] * quantizer.codebook_size).round().long().tolist()
    start = 0
    for p, end in zip(quantizer.scales, ends, strict=True):
        features = quantizer.pool(residual, p)
        repeats = -(-(end - start) // len(features))
        order = torch.cat([torch.randperm(len(features), generator=generator) for _ in range(max(repeats, 1))])
        codes[start:end] = features[order[: end - start].to(features.device)]
        if end:
            keys, values = (part[:end] for part in quantizer.project_codes())
            chosen = quantizer.choose(features, keys, "tiled")
            residual = residual - quantizer.upsample(values[chosen], p)
        start = end


def _as_isometry(quantizer: ResidualAttentionQuantizer, generator: torch.Generator) -> None:
    attention, channels = quantizer.attn, quantizer.latent_channels
    isometry = torch.linalg.qr(torch.randn(quantizer.attention_dim, quantizer.attention_dim, generator=generator))[0]
    if channels <= quantizer.attention_dim:
        attention.to_q.weight.copy_(isometry[:, :channels])
    attention.to_k.weight.copy_(attention.to_q.weight)
    attention.to_v.weight.copy_(torch.eye(channels))
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        nn.init.zeros_(layer.bias)
