"""Assignment of features to codes: value, index and entropy of a softmax over all codes, without tokens x codes.

A softmax assignment of N tokens to K codes is an (N, K) matrix of logits, and its plain formula keeps several such
matrices alive until the backward pass. Here a tile of tokens at a time goes through the whole formula, and the backward
pass computes the tile again: what lives between the two is O(N + K). It is exact: no token and no code is sampled,
nothing is approximated. Statistics are float32 (float64 for float64 inputs), whatever the inputs.

The plain formula is `models.quantizer.softmax_assignment`; backends, with its values and gradients each:

    tiled       tiles in eager torch; everywhere
    compiled    tiles whose element-wise parts torch.compile fuses; about 10 s of compiling at first use, and with no
                compiler at hand one warning and `tiled` instead
    triton      CUDA kernels (`kernels.triton_assignment`), forward and backward
    auto        on CUDA `triton` where it is installed and runs, else one warning and `tiled`; on other devices
                `compiled` where a training step has 2^25 logits or more, so that the compiling pays after some ten
                steps; otherwise `tiled`

Ties: the lowest index of the largest logits is chosen, as `torch.argmax` does.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("auto", "tiled", "compiled", "triton")
TRITON_WIDTH = 128  # of the rows: wider ones need more shared memory than a card of 100 KB a block has
ENTROPY_EPS = 1e-5  # added to the mean distribution inside its logarithm; the value of the release
AUTO_COMPILE_LOGITS = 2**25  # MAR scales: 4 images at K = 16,384; a step of `tiled` then takes about 0.5 s
TILE_ELEMENTS = {"cpu": 2**20}  # logits in one tile: 4 MiB in float32, a few of which fit a processor's last cache
TILE_ELEMENTS_ELSEWHERE = 2**25  # a GPU wants longer kernels: 128 MiB
TILE_LEAST_TOKENS = 16  # tokens in one tile at least, however many the codes: matrix products of fewer rows are slow
ARGMAX_BLOCK = 64  # codes


# Where a tile that spans all codes has fewer tokens than this, the argmax goes over tiles of codes too: their products
# are faster by a half (2,048 tokens x 512 codes on a processor).
ARGMAX_LEAST_TOKENS = 64
ARGMAX_TILE_BLOCKS = 8  # blocks of codes in a tile of the argmax


# exp(-80) = 2e-35: a row's largest exponential is 1, so no sum over any number of codes that fits a memory can tell it
# from 0, while processors take exp of anything near float32's least number (exp(-87)) 12 to 40 times more slowly.
EXP_FLOOR = -80.0


class Assignment(NamedTuple):
    """N tokens assigned to K codes of C channels."""

    value: Tensor  # (N, C): values[indices]; its gradient reaches the logits as that of softmax(logits) @ values
    hard: Tensor  # (N, C): values[indices]; its gradient reaches the values alone
    indices: Tensor  # (N,) int64
    entropy: Tensor  # (): mean entropy of a token minus entropy of the mean distribution, in nats


def resolve_backend(backend: str, device: torch.device, tokens: int, codes: int, width: int = 1) -> str:
    """The backend to use for `tokens` x `codes` logits on `device`: decides "auto", checks that the others can run.

    `width` is that of the rows, the larger of D and C.

    Raises ValueError on an unknown name, or on "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend of {', '.join(BACKENDS)}, got {backend!r}")
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        if device.type == "cuda":
            return "triton" if has_triton and width <= TRITON_WIDTH and _triton_runs(device) else "tiled"
        # Not in evaluation: argmax is never compiled, and a forward pass alone gains little.
        return "compiled" if torch.is_grad_enabled() and tokens * codes >= AUTO_COMPILE_LOGITS else "tiled"
    if backend == "triton":
        if not has_triton:
            raise ValueError('backend "triton" got, but Triton is not installed; install it or choose "tiled"')
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f'backend "triton" got for tensors on {device}; move them to CUDA or choose "tiled"')
    return backend


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether the kernels work, tried once; without a C compiler or Python's headers, one warning."""
    from codalib.kernels import triton_assignment

    try:
        rows = torch.ones(16, 16, device=device)
        triton_assignment.triton_argmax(rows, rows, 1.0)
    except Exception as error:  # Triton's own, of which it has many, and those of the compiler that it calls
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(f'Triton does not work here, "tiled" is used instead: {reason}', stacklevel=4)
        return False
    return True


def softmax_assign(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, entropy_temperature: float, backend: str = "auto"
) -> Assignment:
    """Assign each query to the code of its largest logit, with index backpropagation (Eq. 7-8 of arXiv:2503.17760).

    The logits are `scale * queries @ keys.T`. `value` is the chosen row of `values`, its gradient that of the soft
    mixture: with one-hot O and softmax P it is `(O + P - stop_gradient(P)) @ values`. The entropy is that of
    softmax(logits / entropy_temperature).

    Shapes: queries (N, D), keys (K, D), values (K, C); N and K at least 1. Raises ValueError on shapes that do not fit.
    """
    _check_rows(queries, keys)
    if values.ndim != 2 or len(values) != len(keys):
        raise ValueError(f"expected values of shape (K, C) for {len(keys)} keys, got {tuple(values.shape)}")
    width = max(queries.shape[1], values.shape[1])
    backend = resolve_backend(backend, queries.device, len(queries), len(keys), width)
    with torch.autocast(queries.device.type, enabled=False):
        if backend == "triton":
            from codalib.kernels.triton_assignment import TritonAssign

            value, indices, entropy = TritonAssign.apply(queries, keys, values, scale, entropy_temperature)
            return Assignment(value, _at_least_float32(F.embedding(indices, values)), indices, entropy)
        queries, keys, values = (_at_least_float32(x) for x in (queries, keys, values))
        math = _compiled_math(queries.device.type) if backend == "compiled" else _EAGER
        value, indices, entropy = _TiledAssign.apply(queries * scale, keys, values, entropy_temperature, math)
        return Assignment(value, F.embedding(indices, values), indices, entropy)


@torch.no_grad()
def argmax_assign(queries: Tensor, keys: Tensor, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Index of the largest `scale * queries @ keys.T` of each row, with no softmax: (N, D), (K, D) -> (N,) int64.

    The same indices as `softmax_assign` with the same arguments, to the last bit: both take the same products.
    """
    _check_rows(queries, keys)
    backend = resolve_backend(backend, queries.device, len(queries), len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        if backend == "triton":
            from codalib.kernels.triton_assignment import triton_argmax

            return triton_argmax(queries, keys, scale)
        queries, keys = _at_least_float32(queries) * scale, _at_least_float32(keys)
        if _codes_need_tiles(queries, keys):
            return _argmax_over_code_tiles(queries, keys)
        indices = queries.new_empty(len(queries), dtype=torch.long)
        for rows, logits in _tiles(queries, len(keys), buffers=1):
            indices[rows] = _row_argmax(torch.mm(queries[rows], keys.T, out=logits))
        return indices


@torch.no_grad()
def nearest_assign(features: Tensor, codes: Tensor, backend: str = "auto") -> Tensor:
    """Index of the code at the least Euclidean distance (Eq. 1 of arXiv:2503.17760): (N, C), (K, C) -> (N,) int64."""
    return argmax_assign(*_distance_as_product(features, codes), backend=backend)


@torch.no_grad()
def top_assign(queries: Tensor, keys: Tensor, count: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest logits of each row, falling, their indices (both (N, count)), and its log-sum-exp."""
    _check_rows(queries, keys)
    if not 1 <= count <= len(keys):
        raise ValueError(f"expected a count from 1 to {len(keys)}, the number of codes, got {count}")
    queries, keys = _at_least_float32(queries) * scale, _at_least_float32(keys)
    top = queries.new_empty(len(queries), count)
    indices, log_sums = torch.empty_like(top, dtype=torch.long), queries.new_empty(len(queries))
    for rows, logits in _tiles(queries, len(keys), buffers=1):
        torch.mm(queries[rows], keys.T, out=logits)
        top[rows], indices[rows] = logits.topk(count, dim=1)
        log_sums[rows] = logits.sub_(top[rows, :1]).clamp_(min=EXP_FLOOR).exp_().sum(dim=1).log_() + top[rows, 0]
    return top, indices, log_sums


@torch.no_grad()
def top_nearest(features: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` least Euclidean distances of each feature to codes, rising, with their indices: both (N, count)."""
    products, indices, _ = top_assign(*_distance_as_product(features, codes), count)
    squares = _at_least_float32(features).square().sum(dim=1, keepdim=True) - 2 * products
    return squares.clamp(min=0).sqrt(), indices


def _distance_as_product(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose product is f.c - |c|^2 / 2, largest where |f - c|^2 is least: a column of ones joins the features."""
    _check_rows(features, codes)
    features, codes = _at_least_float32(features), _at_least_float32(codes)
    ones, half_norms = features.new_ones(len(features), 1), codes.square().sum(dim=1, keepdim=True) / 2
    return torch.cat([features, ones], dim=1), torch.cat([codes, -half_norms], dim=1)


class _TiledAssign(torch.autograd.Function):
    """The assignment in tiles; saved for backward are the inputs, two numbers a token and one a code."""

    @staticmethod
    def forward(ctx, queries, keys, values, entropy_temperature, math):
        tokens, codes = len(queries), len(keys)
        sharpness = queries.new_full((), 1 / entropy_temperature)  # no copy, which would wait
        # One more product where the codes need tiles, so that the indices are those of `argmax_assign`.
        apart = _codes_need_tiles(queries, keys)
        indices = _argmax_over_code_tiles(queries, keys) if apart else queries.new_empty(tokens, dtype=torch.long)
        largest = queries.new_empty(tokens)
        mean, token_entropy = queries.new_zeros(codes), queries.new_zeros(())
        for rows, logits, scratch in _tiles(queries, codes, buffers=2):
            torch.mm(queries[rows], keys.T, out=logits)
            if not apart:
                indices[rows] = _row_argmax(logits)
            largest[rows] = logits.gather(1, indices[rows, None])[:, 0]
            column_sums, entropies = math.forward(logits, scratch, largest[rows], sharpness)
            mean += column_sums
            token_entropy += entropies.sum()
        mean /= tokens
        entropy = token_entropy / tokens + (mean * (mean + ENTROPY_EPS).log()).sum()
        ctx.save_for_backward(queries, keys, values, indices, largest, mean)
        ctx.sharpness, ctx.math = sharpness, math
        ctx.mark_non_differentiable(indices)
        return values[indices], indices, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value, _, grad_entropy):
        """With G = grad_value @ values.T, soft distribution P and sharp one S, the gradient of the logits is

            P * (G - rowsum(P * G)) + weight * S * (U - rowsum(S * U)),  U = slope - log S,

        where slope is the derivative of the mean distribution's negative entropy. A row's constant in U cancels, so
        that log S stands for itself without its log-sum-exp.
        """
        queries, keys, values, indices, largest, mean = ctx.saved_tensors
        slope = (mean + ENTROPY_EPS).log() + mean / (mean + ENTROPY_EPS)
        weight = grad_entropy * ctx.sharpness / len(queries)
        grad_queries, grad_keys = torch.empty_like(queries), queries.new_zeros(keys.T.shape)
        for rows, logits, grad, scratch in _tiles(queries, len(keys), buffers=3):
            torch.mm(queries[rows], keys.T, out=logits)
            torch.mm(grad_value[rows], values.T, out=grad)
            ctx.math.backward(logits, grad, scratch, largest[rows], ctx.sharpness, slope, weight)
            torch.mm(grad, keys, out=grad_queries[rows])
            grad_keys.addmm_(queries[rows].T, grad)  # (D, K): a faster product than (K, D)
        grad_values = torch.zeros_like(values).index_add_(0, indices, grad_value)
        return grad_queries, grad_keys.T, grad_values, None, None


class _TileMath(NamedTuple):
    """The element-wise work on a tile. Tiles are (T, K), may be overwritten; `largest` is each row's logit (T,).

    forward(logits, scratch, largest, sharpness) -> the sharp distribution's column sums (K,) and entropies (T,)
    backward(logits, grad, scratch, largest, sharpness, slope, weight): `grad`, holding G, becomes the gradient

    Logits are cut off at `largest`, which came of products in another order where the codes need tiles: a logit that
    rounding puts above it would be raised to a high power by a large sharpness.
    """

    forward: Callable
    backward: Callable


def _eager_forward(logits, scratch, largest, sharpness):
    log_sharp = logits.sub_(largest[:, None]).mul_(sharpness).clamp_(EXP_FLOOR, 0)
    sharp = torch.exp(log_sharp, out=scratch)
    sums = sharp.sum(dim=1)
    column_sums = sums.reciprocal() @ sharp
    return column_sums, sums.log() - sharp.mul_(log_sharp).sum(dim=1) / sums


def _eager_backward(logits, grad, scratch, largest, sharpness, slope, weight):
    logits.sub_(largest[:, None])
    soft = torch.clamp(logits, EXP_FLOOR, 0, out=scratch).exp_()
    soft.mul_(soft.sum(dim=1, keepdim=True).reciprocal_())
    grad.mul_(soft).addcmul_(soft, grad.sum(dim=1, keepdim=True), value=-1)
    log_sharp = logits.mul_(sharpness).clamp_(EXP_FLOOR, 0)
    sharp = torch.exp(log_sharp, out=scratch)
    sharp.mul_(sharp.sum(dim=1, keepdim=True).reciprocal_())
    pull = torch.sub(slope, log_sharp, out=logits).mul_(sharp)
    pull.addcmul_(sharp, pull.sum(dim=1, keepdim=True), value=-1)
    grad.addcmul_(pull, weight)


def _sharp_sums(logits, sharp, largest, sharpness):
    """To be compiled: one pass over a tile, which leaves the unnormalised distribution in `sharp`."""
    log_sharp = ((logits - largest[:, None]) * sharpness).clamp(EXP_FLOOR, 0)
    exponentials = log_sharp.exp()
    sharp.copy_(exponentials)
    return exponentials.sum(dim=1), (exponentials * log_sharp).sum(dim=1)


def _whole_backward(logits, grad, largest, sharpness, slope, weight):
    """To be compiled: one loop over the rows, whose exponentials stay in a buffer of one row."""
    distance = logits - largest[:, None]
    log_sharp = (distance * sharpness).clamp(EXP_FLOOR, 0)
    soft, sharp = distance.clamp(EXP_FLOOR, 0).exp(), log_sharp.exp()
    pull = slope - log_sharp
    soft_sum, sharp_sum = soft.sum(dim=1, keepdim=True), sharp.sum(dim=1, keepdim=True)
    soft_pull = (soft * grad).sum(dim=1, keepdim=True) / soft_sum
    sharp_pull = (sharp * pull).sum(dim=1, keepdim=True) / sharp_sum
    grad.copy_(soft / soft_sum * (grad - soft_pull) + sharp * (weight / sharp_sum) * (pull - sharp_pull))


_EAGER = _TileMath(_eager_forward, _eager_backward)


@cache
def _compiled_math(device: str) -> _TileMath:
    """The work through torch.compile, tried once; without a working compiler one warning and the eager work."""
    tiles = [torch.zeros(3, 130, device=device) for _ in range(3)]
    rows, columns, one = torch.ones(3, device=device), torch.zeros(130, device=device), torch.ones((), device=device)
    try:
        math = _in_two_passes(
            *(torch.compile(part, dynamic=True, fullgraph=True) for part in (_sharp_sums, _whole_backward))
        )
        with torch.no_grad():
            math.forward(*tiles[:2], rows, one)
            math.backward(*tiles, rows, one, columns, one)
    except (RuntimeError, ImportError, OSError) as error:  # what torch.compile raises where a toolchain is missing
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(f'torch.compile does not work here, "tiled" is used instead: {reason}', stacklevel=3)
        return _EAGER
    return math


def _in_two_passes(sharp_sums: Callable, whole_backward: Callable) -> _TileMath:
    # Sizes of 1 are constants to torch.compile, each worth a compilation of its own: such tiles stay eager.
    def forward(logits, scratch, largest, sharpness):
        if 1 in logits.shape:
            return _eager_forward(logits, scratch, largest, sharpness)
        sums, weighted_sums = sharp_sums(logits, scratch, largest, sharpness)
        return sums.reciprocal() @ scratch, sums.log() - weighted_sums / sums

    def backward(logits, grad, scratch, *rest):
        if 1 in logits.shape:
            _eager_backward(logits, grad, scratch, *rest)
        else:
            whole_backward(logits, grad, *rest)

    return _TileMath(forward, backward)


def _row_argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(dim=1)` in two steps, blocks first: torch vectorises a maximum, but not its index."""
    codes = logits.shape[1]
    blocks = codes // ARGMAX_BLOCK
    if blocks < 2:
        return logits.argmax(dim=1)
    whole = logits[:, : blocks * ARGMAX_BLOCK].unflatten(1, (blocks, ARGMAX_BLOCK))  # (T, blocks, block)
    block = whole.amax(dim=2).argmax(dim=1, keepdim=True)  # (T, 1)
    inside = whole.gather(1, block[:, :, None].expand(-1, 1, ARGMAX_BLOCK)).argmax(dim=2)  # (T, 1)
    indices = block * ARGMAX_BLOCK + inside
    if codes % ARGMAX_BLOCK:
        rest, in_rest = logits[:, blocks * ARGMAX_BLOCK :].max(dim=1, keepdim=True)
        indices = torch.where(rest > logits.gather(1, indices), in_rest + blocks * ARGMAX_BLOCK, indices)
    return indices[:, 0]


def _codes_need_tiles(queries: Tensor, keys: Tensor) -> bool:
    elements = TILE_ELEMENTS.get(queries.device.type, TILE_ELEMENTS_ELSEWHERE)
    return elements // len(keys) < min(ARGMAX_LEAST_TOKENS, len(queries))


def _argmax_over_code_tiles(queries: Tensor, keys: Tensor) -> Tensor:
    """Indices (N,) of the largest products: the best block of codes from all tiles' maxima, then the best code in it.

    All tiles have one width, and the best block's products are taken again one by one: equal codes have products that
    are equal to the last bit, whatever order a matrix product adds in, and the first of them wins.
    """
    indices = queries.new_empty(len(queries), dtype=torch.long)
    inside = torch.arange(ARGMAX_BLOCK, device=keys.device)
    width = ARGMAX_TILE_BLOCKS * ARGMAX_BLOCK
    tiles = list(keys.split(width))
    tiles[-1] = torch.cat([tiles[-1], keys[-1:].expand(width - len(tiles[-1]), -1)])  # filled up with the last code
    for rows, products in _tiles(queries, width, buffers=1):
        maxima = queries.new_empty(len(products), len(tiles), ARGMAX_TILE_BLOCKS)
        for number, tile in enumerate(tiles):
            torch.mm(queries[rows], tile.T, out=products)
            torch.amax(products.view(-1, ARGMAX_TILE_BLOCKS, ARGMAX_BLOCK), dim=2, out=maxima[:, number])
        block = maxima.flatten(1).argmax(dim=1, keepdim=True)  # (T, 1)
        candidates = (block * ARGMAX_BLOCK + inside).clamp_(
            max=len(keys) - 1
        )  # (T, block); past the end, the last again
        best = keys[candidates].mul_(queries[rows, None]).sum(dim=2).argmax(dim=1, keepdim=True)  # (T, 1)
        indices[rows] = candidates.gather(1, best)[:, 0]
    return indices


def _tiles(
    queries: Tensor, codes: int, buffers: int, least: int | None = None
) -> Iterator[tuple[slice, *tuple[Tensor, ...]]]:
    """The rows of each tile of at least `least` tokens, with uninitialised (T, K) buffers that all tiles share."""
    elements = TILE_ELEMENTS.get(queries.device.type, TILE_ELEMENTS_ELSEWHERE)
    step = min(max(least or TILE_LEAST_TOKENS, elements // codes), len(queries))
    # One allocation: the C library keeps a freed one for the next level, but gives several back to the system.
    tiles = queries.new_empty(buffers, step, codes).unbind()
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, *(tile[: rows.stop - start] for tile in tiles)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_rows(queries: Tensor, keys: Tensor) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1] or 0 in (len(queries), len(keys)):
        raise ValueError(
            f"expected rows (N, D) and codes (K, D) with N and K at least 1, got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}"
        )
