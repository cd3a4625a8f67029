"""Assignment of features to codes: the value, the index and the entropy of a softmax over all codes, in tiles.

A softmax assignment of N tokens to K codes is an (N, K) matrix of logits, and its plain formula keeps several such
matrices alive until the backward pass. Here a tile of tokens is taken through the whole formula at a time, and the
backward pass computes the tile again; what is kept between the two is O(N + K) and exact: no token and no code is
sampled, nothing is approximated.

Ties: the lowest index of the largest logits is chosen, as `torch.argmax` does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("auto", "reference", "tiled")
ENTROPY_EPS = 1e-5  # added to the mean distribution inside its logarithm; the value of the release
TILE_ELEMENTS = 2**21  # logits in one tile: 8 MiB in float32, a few of which fit a processor's last cache
TILE_TOKENS = 128  # tokens in one tile at most; longer tiles make no matrix product faster


class Assignment(NamedTuple):
    """N tokens assigned to K codes of C channels."""

    value: Tensor  # (N, C): values[indices]; its gradient reaches the logits as that of softmax(logits) @ values
    hard: Tensor  # (N, C): values[indices]; its gradient reaches the values alone
    indices: Tensor  # (N,) int64
    entropy: Tensor  # (): mean entropy of a token minus entropy of the mean distribution, in nats


def resolve_backend(backend: str, device: torch.device, tokens: int, codes: int) -> str:
    """The backend that "auto" stands for on `device` with `tokens` x `codes` logits; any other name is returned."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    return "tiled" if backend == "auto" else backend


def softmax_assign(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, entropy_temperature: float, backend: str = "auto"
) -> Assignment:
    """Assign each query to the code of its largest logit, with index backpropagation (Eq. 7-8 of arXiv:2503.17760).

    The logits are `scale * queries @ keys.T`. `value` is the chosen row of `values`, its gradient that of the soft
    mixture: with one-hot O and softmax P it is `(O + P - stop_gradient(P)) @ values`. The entropy is that of
    softmax(logits / entropy_temperature).

    Shapes: queries (N, D), keys (K, D), values (K, C). Statistics are float32, or float64 for float64 inputs.
    """
    _check_same_width(queries, keys)
    if values.ndim != 2 or len(values) != len(keys):
        raise ValueError(
            f"values of shape {tuple(values.shape)} for {len(keys)} keys; expected ({len(keys)}, channels)"
        )
    backend = resolve_backend(backend, queries.device, len(queries), len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, values = (_at_least_float32(x) for x in (queries, keys, values))
        if backend == "reference":
            return _reference_assign(queries * scale, keys, values, entropy_temperature)
        value, indices, entropy = _TiledAssign.apply(queries * scale, keys, values, entropy_temperature)
        return Assignment(value, F.embedding(indices, values), indices, entropy)


@torch.no_grad()
def argmax_assign(queries: Tensor, keys: Tensor, backend: str = "auto") -> Tensor:
    """Index of the key with the largest product with each query, with no softmax: (N, D), (K, D) -> (N,) int64."""
    _check_same_width(queries, keys)
    backend = resolve_backend(backend, queries.device, len(queries), len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = _at_least_float32(queries), _at_least_float32(keys)
        if backend == "reference":
            return (queries @ keys.T).argmax(dim=-1)
        indices = [(tile @ keys.T).argmax(dim=-1) for tile in queries.split(_tile_tokens(len(keys)))]
        return torch.cat(indices) if indices else queries.new_zeros(0, dtype=torch.long)


def nearest_assign(features: Tensor, codes: Tensor, backend: str = "auto") -> Tensor:
    """Index of the code at the least Euclidean distance (Eq. 1 of arXiv:2503.17760): (N, C), (K, C) -> (N,) int64.

    |f - c|^2 is least where f.c - |c|^2 / 2 is largest: one matrix product with a column of ones added to the features.
    """
    _check_same_width(features, codes)
    features, codes = _at_least_float32(features), _at_least_float32(codes)
    ones = features.new_ones(len(features), 1)
    half_norms = codes.square().sum(dim=1, keepdim=True) / 2
    return argmax_assign(torch.cat([features, ones], dim=1), torch.cat([codes, -half_norms], dim=1), backend)


def _reference_assign(queries: Tensor, keys: Tensor, values: Tensor, entropy_temperature: float) -> Assignment:
    """The plain formula, for tests and for reading: it holds several (N, K) matrices."""
    logits = queries @ keys.T  # (N, K)
    indices = logits.argmax(dim=-1)
    soft = logits.softmax(dim=-1)
    one_hot = F.one_hot(indices, len(keys)).to(soft)
    log_sharp = (logits / entropy_temperature).log_softmax(dim=-1)
    sharp = log_sharp.exp()
    mean = sharp.mean(dim=0)  # (K,)
    entropy = (mean * (mean + ENTROPY_EPS).log()).sum() - (sharp * log_sharp).sum(dim=-1).mean()
    return Assignment((one_hot + (soft - soft.detach())) @ values, one_hot @ values, indices, entropy)


class _TiledAssign(torch.autograd.Function):
    """`_reference_assign` in tiles; saved for backward are the inputs, five numbers a token and one a code."""

    @staticmethod
    def forward(ctx, queries, keys, values, entropy_temperature):
        tokens, codes = len(queries), len(keys)
        indices = queries.new_empty(tokens, dtype=torch.long)
        statistics = queries.new_empty(4, tokens)  # the row's maximum; sum of exp; the same two sums at the temperature
        mean = queries.new_zeros(codes)
        for rows in _tiles(tokens, codes):
            logits = queries[rows] @ keys.T
            indices[rows], statistics[:, rows], column_sums = _forward_tile(logits, 1 / entropy_temperature)
            mean += column_sums
        mean /= tokens
        _, _, sharp_sum, weighted_sum = statistics
        token_entropy = (sharp_sum.log() - weighted_sum / sharp_sum).mean()
        entropy = token_entropy + (mean * (mean + ENTROPY_EPS).log()).sum()
        ctx.save_for_backward(queries, keys, values, indices, statistics, mean)
        ctx.entropy_temperature = entropy_temperature
        ctx.mark_non_differentiable(indices)
        return values[indices], indices, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value, _, grad_entropy):
        queries, keys, values, indices, statistics, mean = ctx.saved_tensors
        tokens, codes = len(queries), len(keys)
        # The derivative of the mean distribution's negative entropy with respect to its element k.
        slope = (mean + ENTROPY_EPS).log() + mean / (mean + ENTROPY_EPS)
        weight = grad_entropy / (tokens * ctx.entropy_temperature)
        grad_queries, grad_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for rows in _tiles(tokens, codes):
            logits = queries[rows] @ keys.T
            grad_soft = grad_value[rows] @ values.T
            grad_logits = _backward_tile(
                logits, grad_soft, statistics[:, rows], slope, weight, 1 / ctx.entropy_temperature
            )
            torch.mm(grad_logits, keys, out=grad_queries[rows])
            grad_keys.addmm_(grad_logits.T, queries[rows])
        grad_values = torch.zeros_like(values).index_add_(0, indices, grad_value) if ctx.needs_input_grad[2] else None
        return grad_queries, grad_keys, grad_values, None


def _forward_tile(logits: Tensor, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (T,), statistics (4, T) and summed sharp distribution (K,) of a tile of logits, which it overwrites."""
    largest, indices = logits.max(dim=1)
    logits -= largest[:, None]
    exponentials = logits.exp()
    soft_sum = exponentials.sum(dim=1)
    logits *= sharpness
    torch.exp(logits, out=exponentials)
    sharp_sum = exponentials.sum(dim=1)
    weighted_sum = torch.linalg.vecdot(exponentials, logits)
    column_sums = sharp_sum.reciprocal() @ exponentials
    return indices, torch.stack([largest, soft_sum, sharp_sum, weighted_sum]), column_sums


def _backward_tile(
    logits: Tensor, grad_soft: Tensor, statistics: Tensor, slope: Tensor, weight: Tensor, sharpness: float
) -> Tensor:
    """The gradient of a tile's logits (T, K); both tiles are overwritten.

    With soft distribution P, sharp distribution S and G = grad_value @ values.T, it is
    P * (G - rowsum(P * G)) + weight * S * (U - rowsum(S * U)), where U = slope - log S.
    """
    largest, soft_sum, sharp_sum, _ = statistics[:, :, None]
    logits -= largest
    soft = logits.exp().div_(soft_sum)
    row_sums = torch.linalg.vecdot(soft, grad_soft)
    grad_logits = grad_soft.sub_(row_sums[:, None]).mul_(soft)
    logits.mul_(sharpness).sub_(sharp_sum.log())  # now log S
    sharp = torch.exp(logits, out=soft)
    pull = torch.sub(slope, logits, out=logits)
    row_sums = torch.linalg.vecdot(sharp, pull)
    return grad_logits.add_(pull.sub_(row_sums[:, None]).mul_(sharp).mul_(weight))


def _tile_tokens(codes: int) -> int:
    return max(1, min(TILE_TOKENS, TILE_ELEMENTS // codes))


def _tiles(tokens: int, codes: int) -> list[slice]:
    step = _tile_tokens(codes)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_same_width(queries: Tensor, keys: Tensor) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} do not match; expected (N, D) and (K, D)"
        )
