"""Triton kernels of the softmax assignment: `kernels.assignment`'s "triton" backend, for CUDA.

Each kernel takes a block of tokens (or of codes) through all codes (or tokens) in tiles that stay on the chip, so that
nothing of size tokens x codes is ever written. Few tokens would keep few of the GPU's processors busy: a pass over the
codes is then split, and the parts' results are joined. No atomic additions: two runs agree bit for bit, but for the
gradient of the values, which torch's own index_add_ sums.

Inputs may be float32, bfloat16 or float16; sums and statistics are float32. Products of float32 inputs keep float32's
precision ("tf32x3" where the tensor cores have TF32, plain float32 otherwise): at a temperature of 0.01, TF32's
ten bits would be as coarse as the differences between logits. float64 inputs are computed in float32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTROPY_EPS = 1e-5  # as in codalib.kernels.assignment, which imports this file only when it is asked for
TOKEN_BLOCK = 64
CODE_BLOCK = 64
WIDE = 32  # of queries or values wider than this, blocks and pipeline are smaller, to fit the registers and the chip
PROGRAMS = 512  # kernels of fewer blocks are split; a few for each of an A100's or H100's 108 to 132 processors
LEAST_SPLIT = 1024  # codes
LOW = tl.constexpr(-1.0e30)  # stands for minus infinity, with which 0 * x would not be 0


@triton.jit
def _load_rows(pointer, rows, count, columns, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    mask = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    tile = tl.load(pointer + rows[:, None].to(tl.int64) * WIDTH + columns[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _statistics_kernel(
    queries_ptr, keys_ptr, indices_ptr, statistics_ptr, tokens, codes, split, scale, sharpness,
    D: tl.constexpr, D_PAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ARGMAX_ONLY: tl.constexpr,
):  # fmt: skip
    """Of a token block and a split of the codes: argmax, maximum, sum exp, sum of sharp exp, sum of it x its log."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    width = tl.arange(0, D_PAD)
    queries = _load_rows(queries_ptr, rows, tokens, width, D, WIDEN)
    largest = tl.full([BT], LOW, tl.float32)
    best = tl.zeros([BT], tl.int32)
    soft = tl.zeros([BT], tl.float32)
    sharp = tl.zeros([BT], tl.float32)
    weighted = tl.zeros([BT], tl.float32)
    end = tl.minimum(codes, (part + 1) * split)
    for start in range(part * split, end, BK):
        columns = start + tl.arange(0, BK)
        keys = _load_rows(keys_ptr, columns, codes, width, D, WIDEN)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        logits = tl.where(columns[None, :] < codes, logits, LOW)
        top, where = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(top > largest, start + where.to(tl.int32), best)
        new = tl.maximum(largest, top)
        if not ARGMAX_ONLY:
            shift = (largest - new) * sharpness
            distance = logits - new[:, None]
            soft = soft * tl.exp(largest - new) + tl.sum(tl.exp(distance), axis=1)
            log_sharp = distance * sharpness
            exponentials = tl.exp(log_sharp)
            weighted = (weighted + sharp * shift) * tl.exp(shift) + tl.sum(exponentials * log_sharp, axis=1)
            sharp = sharp * tl.exp(shift) + tl.sum(exponentials, axis=1)
        largest = new
    mask = rows < tokens
    place = part.to(tl.int64) * tokens + rows
    tl.store(indices_ptr + place, best, mask=mask)
    stride = tl.num_programs(1).to(tl.int64) * tokens
    tl.store(statistics_ptr + place, largest, mask=mask)
    if not ARGMAX_ONLY:
        tl.store(statistics_ptr + stride + place, soft, mask=mask)
        tl.store(statistics_ptr + 2 * stride + place, sharp, mask=mask)
        tl.store(statistics_ptr + 3 * stride + place, weighted, mask=mask)


@triton.jit
def _mean_kernel(
    queries_ptr, keys_ptr, largest_ptr, log_sharp_sum_ptr, mean_ptr, tokens, codes, scale, sharpness,
    D: tl.constexpr, D_PAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The mean sharp distribution at one code block."""
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    width = tl.arange(0, D_PAD)
    keys = tl.trans(_load_rows(keys_ptr, columns, codes, width, D, WIDEN))
    total = tl.zeros([BK], tl.float32)
    for start in range(0, tokens, BT):
        rows = start + tl.arange(0, BT)
        logits = tl.dot(_load_rows(queries_ptr, rows, tokens, width, D, WIDEN), keys, input_precision=PRECISION) * scale
        largest = tl.load(largest_ptr + rows, mask=rows < tokens, other=0.0)
        # A row past the end has a normaliser of e^(1e30), so that its probability is 0.
        log_sum = tl.load(log_sharp_sum_ptr + rows, mask=rows < tokens, other=-LOW)
        total += tl.sum(tl.exp((logits - largest[:, None]) * sharpness - log_sum[:, None]), axis=0)
    tl.store(mean_ptr + columns, total / tokens, mask=columns < codes)


@triton.jit
def _distributions(queries, keys, largest, log_soft_sum, log_sharp_sum, scale, sharpness, PRECISION: tl.constexpr):
    """Of a tile: the soft distribution, the sharp one, and the latter's logarithm but for the row's normaliser."""
    distance = tl.dot(queries, keys, input_precision=PRECISION) * scale - largest[:, None]
    log_sharp = distance * sharpness
    soft = tl.exp(distance - log_soft_sum[:, None])
    return soft, tl.exp(log_sharp - log_sharp_sum[:, None]), log_sharp


@triton.jit
def _pulls_kernel(
    queries_ptr, keys_ptr, values_ptr, grad_value_ptr, rows_ptr, slope_ptr, pulls_ptr,
    tokens, codes, split, scale, sharpness,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Row sums of the gradient: P * G and S * (slope - log S), for one token block and one split of the codes."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    mask = rows < tokens
    width, channels = tl.arange(0, D_PAD), tl.arange(0, C_PAD)
    queries = _load_rows(queries_ptr, rows, tokens, width, D, WIDEN)
    grad_value = _load_rows(grad_value_ptr, rows, tokens, channels, C, WIDEN)
    largest = tl.load(rows_ptr + rows, mask=mask, other=0.0)
    log_soft_sum = tl.load(rows_ptr + tokens + rows, mask=mask, other=0.0)
    log_sharp_sum = tl.load(rows_ptr + 2 * tokens + rows, mask=mask, other=0.0)
    soft_pull = tl.zeros([BT], tl.float32)
    sharp_pull = tl.zeros([BT], tl.float32)
    end = tl.minimum(codes, (part + 1) * split)
    for start in range(part * split, end, BK):
        columns = start + tl.arange(0, BK)
        inside = columns < codes
        keys = tl.trans(_load_rows(keys_ptr, columns, codes, width, D, WIDEN))
        values = tl.trans(_load_rows(values_ptr, columns, codes, channels, C, WIDEN))
        slope = tl.load(slope_ptr + columns, mask=inside, other=0.0)
        soft, sharp, log_sharp = _distributions(
            queries, keys, largest, log_soft_sum, log_sharp_sum, scale, sharpness, PRECISION
        )
        grad_soft = tl.dot(grad_value, values, input_precision=PRECISION)
        soft_pull += tl.sum(tl.where(inside[None, :], soft * grad_soft, 0.0), axis=1)
        sharp_pull += tl.sum(tl.where(inside[None, :], sharp * (slope[None, :] - log_sharp), 0.0), axis=1)
    place = part.to(tl.int64) * tokens + rows
    tl.store(pulls_ptr + place, soft_pull, mask=mask)
    tl.store(pulls_ptr + tl.num_programs(1).to(tl.int64) * tokens + place, sharp_pull, mask=mask)


@triton.jit
def _grad_queries_kernel(
    queries_ptr, keys_ptr, values_ptr, grad_value_ptr, rows_ptr, slope_ptr, weight_ptr, grad_ptr,
    tokens, codes, split, scale, sharpness,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The queries' gradient from one split of the codes."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    mask = rows < tokens
    width, channels = tl.arange(0, D_PAD), tl.arange(0, C_PAD)
    queries = _load_rows(queries_ptr, rows, tokens, width, D, WIDEN)
    grad_value = _load_rows(grad_value_ptr, rows, tokens, channels, C, WIDEN)
    largest = tl.load(rows_ptr + rows, mask=mask, other=0.0)
    log_soft_sum = tl.load(rows_ptr + tokens + rows, mask=mask, other=0.0)
    log_sharp_sum = tl.load(rows_ptr + 2 * tokens + rows, mask=mask, other=0.0)
    soft_pull = tl.load(rows_ptr + 3 * tokens + rows, mask=mask, other=0.0)
    sharp_pull = tl.load(rows_ptr + 4 * tokens + rows, mask=mask, other=0.0)
    weight = tl.load(weight_ptr)
    total = tl.zeros([BT, D_PAD], tl.float32)
    end = tl.minimum(codes, (part + 1) * split)
    for start in range(part * split, end, BK):
        columns = start + tl.arange(0, BK)
        inside = columns < codes
        keys = _load_rows(keys_ptr, columns, codes, width, D, WIDEN)
        values = tl.trans(_load_rows(values_ptr, columns, codes, channels, C, WIDEN))
        slope = tl.load(slope_ptr + columns, mask=inside, other=0.0)
        soft, sharp, log_sharp = _distributions(
            queries, tl.trans(keys), largest, log_soft_sum, log_sharp_sum, scale, sharpness, PRECISION
        )
        grad_soft = tl.dot(grad_value, values, input_precision=PRECISION)
        grad = soft * (grad_soft - soft_pull[:, None])
        grad += weight * sharp * (slope[None, :] - log_sharp - sharp_pull[:, None])
        grad = tl.where(inside[None, :], grad, 0.0)
        total += tl.dot(grad.to(keys.dtype), keys, input_precision=PRECISION)
    place = (part.to(tl.int64) * tokens + rows)[:, None] * D + width[None, :]
    tl.store(grad_ptr + place, total * scale, mask=mask[:, None] & (width[None, :] < D))


@triton.jit
def _grad_keys_kernel(
    queries_ptr, keys_ptr, values_ptr, grad_value_ptr, rows_ptr, slope_ptr, weight_ptr, grad_ptr,
    tokens, codes, scale, sharpness,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of one code block's keys."""
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = columns < codes
    width, channels = tl.arange(0, D_PAD), tl.arange(0, C_PAD)
    keys = tl.trans(_load_rows(keys_ptr, columns, codes, width, D, WIDEN))
    values = tl.trans(_load_rows(values_ptr, columns, codes, channels, C, WIDEN))
    slope = tl.load(slope_ptr + columns, mask=inside, other=0.0)
    weight = tl.load(weight_ptr)
    total = tl.zeros([BK, D_PAD], tl.float32)
    for start in range(0, tokens, BT):
        rows = start + tl.arange(0, BT)
        mask = rows < tokens
        queries = _load_rows(queries_ptr, rows, tokens, width, D, WIDEN)
        grad_value = _load_rows(grad_value_ptr, rows, tokens, channels, C, WIDEN)
        largest = tl.load(rows_ptr + rows, mask=mask, other=0.0)
        log_soft_sum = tl.load(rows_ptr + tokens + rows, mask=mask, other=0.0)
        log_sharp_sum = tl.load(rows_ptr + 2 * tokens + rows, mask=mask, other=0.0)
        soft_pull = tl.load(rows_ptr + 3 * tokens + rows, mask=mask, other=0.0)
        sharp_pull = tl.load(rows_ptr + 4 * tokens + rows, mask=mask, other=0.0)
        soft, sharp, log_sharp = _distributions(
            queries, keys, largest, log_soft_sum, log_sharp_sum, scale, sharpness, PRECISION
        )
        grad_soft = tl.dot(grad_value, values, input_precision=PRECISION)
        grad = soft * (grad_soft - soft_pull[:, None])
        grad += weight * sharp * (slope[None, :] - log_sharp - sharp_pull[:, None])
        grad = tl.where(mask[:, None], grad, 0.0)
        total += tl.dot(tl.trans(grad).to(queries.dtype), queries, input_precision=PRECISION)
    place = columns[:, None].to(tl.int64) * D + width[None, :]
    tl.store(grad_ptr + place, total * scale, mask=inside[:, None] & (width[None, :] < D))


class TritonAssign(torch.autograd.Function):
    """(queries (N, D), keys (K, D), values (K, C), scale, temperature) -> value (N, C), indices (N,), entropy ().

    Saved for backward are the inputs, four numbers a token and one a code.
    """

    @staticmethod
    def forward(ctx, queries, keys, values, scale, entropy_temperature):
        queries, keys, values = _kernel_ready(queries, keys, values)
        sharpness = 1 / entropy_temperature
        indices, (largest, soft_sum, sharp_sum, weighted_sum) = _statistics(queries, keys, scale, sharpness)
        rows = torch.stack([largest, soft_sum.log(), sharp_sum.log()])  # (3, N)
        mean = rows.new_empty(len(keys))
        blocks = _blocks(queries)
        with _on_device(queries):
            _mean_kernel[(triton.cdiv(len(keys), blocks["BK"]),)](
                *(queries, keys, rows[0], rows[2], mean, len(queries), len(keys), scale, sharpness), **blocks
            )
        token_entropy = (rows[2] - weighted_sum / sharp_sum).mean()
        entropy = token_entropy + (mean * (mean + ENTROPY_EPS).log()).sum()
        ctx.save_for_backward(queries, keys, values, indices, rows, mean)
        ctx.scale, ctx.sharpness = scale, sharpness
        ctx.mark_non_differentiable(indices)
        return values[indices].float(), indices, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value, _, grad_entropy):
        """The gradient of the logits is that of `kernels.assignment`; here are its three passes over the products."""
        queries, keys, values, indices, rows, mean = ctx.saved_tensors
        tokens, codes, width = len(queries), len(keys), queries.shape[1]
        grad_values = torch.zeros_like(values, dtype=torch.float32).index_add_(0, indices, grad_value.float())
        grad_value = grad_value.to(values.dtype).contiguous()
        slope = (mean + ENTROPY_EPS).log() + mean / (mean + ENTROPY_EPS)
        weight = (grad_entropy * ctx.sharpness / tokens).float().reshape(1)
        channels = values.shape[1]
        blocks = _blocks(queries, channels) | {"C": channels, "C_PAD": _padded(channels)}
        split, grid = _grid(tokens, codes, blocks)
        numbers = (tokens, codes, split, ctx.scale, ctx.sharpness)
        with _on_device(queries):
            pulls = rows.new_empty(2, grid[1], tokens)
            _pulls_kernel[grid](queries, keys, values, grad_value, rows, slope, pulls, *numbers, **blocks)
            rows = torch.cat([rows, pulls.sum(dim=1)])  # (5, N)
            inputs = (queries, keys, values, grad_value, rows, slope, weight)
            grad_queries = rows.new_empty(grid[1], tokens, width)
            _grad_queries_kernel[grid](*inputs, grad_queries, *numbers, **blocks)
            grad_keys = rows.new_empty(codes, width)
            _grad_keys_kernel[(triton.cdiv(codes, blocks["BK"]),)](
                *inputs, grad_keys, tokens, codes, ctx.scale, ctx.sharpness, **blocks
            )
        return grad_queries.sum(dim=0), grad_keys, grad_values, None, None


def triton_argmax(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Indices (N,) of the largest `scale * queries @ keys.T`, by the kernel that `TritonAssign` takes them from."""
    return _statistics(*_kernel_ready(queries, keys), scale, None)[0]


def _statistics(queries: Tensor, keys: Tensor, scale: float, sharpness: float | None) -> tuple[Tensor, Tensor]:
    """Indices (N,) and, unless `sharpness` is None, the largest logit and the three sums of each row (4, N)."""
    tokens, codes = len(queries), len(keys)
    argmax_only = sharpness is None
    blocks = _blocks(queries)
    split, grid = _grid(tokens, codes, blocks)
    indices = torch.empty(grid[1], tokens, dtype=torch.int32, device=queries.device)
    parts = torch.empty(1 if argmax_only else 4, grid[1], tokens, device=queries.device)
    with _on_device(queries):
        _statistics_kernel[grid](
            *(queries, keys, indices, parts, tokens, codes, split, scale, sharpness or 0.0),
            **blocks,
            ARGMAX_ONLY=argmax_only,
        )
    # Join the parts; of tied parts the first, whose indices are lower.
    best = parts[0].argmax(dim=0, keepdim=True)  # (1, N)
    indices = indices.gather(0, best)[0].long()
    if argmax_only:
        return indices, parts[0, 0]
    largest = parts[0].gather(0, best)[0]
    shift = parts[0] - largest
    sharp_shift = shift * sharpness
    soft_sum = (parts[1] * shift.exp()).sum(dim=0)
    sharp_sum = (parts[2] * sharp_shift.exp()).sum(dim=0)
    weighted_sum = ((parts[3] + parts[2] * sharp_shift) * sharp_shift.exp()).sum(dim=0)
    return indices, torch.stack([largest, soft_sum, sharp_sum, weighted_sum])


def _kernel_ready(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, without a graph, and of one data type: what a product takes. float64 becomes float32."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    return [x.detach().to(dtype).contiguous() for x in tensors]


def _blocks(queries: Tensor, channels: int = 1) -> dict:
    """The constants of a kernel; the dot products' precision follows from the device."""
    width = queries.shape[1]
    wide = max(width, channels) > WIDE
    # Older GPUs, and Triton's interpreter, cannot multiply bfloat16: there it is made float32 as it is loaded.
    tensor_cores = queries.is_cuda and torch.cuda.get_device_capability(queries.device) >= (8, 0)
    return {
        "D": width,
        "D_PAD": _padded(width),
        "BT": TOKEN_BLOCK // 2 if wide else TOKEN_BLOCK,
        "BK": CODE_BLOCK // 2 if wide else CODE_BLOCK,
        "PRECISION": "tf32x3" if tensor_cores and torch.version.hip is None else "ieee",
        "WIDEN": queries.dtype == torch.bfloat16 and not tensor_cores,
        "num_stages": 1 if wide else 2,
    }


def _grid(tokens: int, codes: int, blocks: dict) -> tuple[int, tuple[int, int]]:
    """Codes of one split, a multiple of the code block, and the grid (token blocks, splits)."""
    token_blocks = triton.cdiv(tokens, blocks["BT"])
    splits = max(1, min(PROGRAMS // token_blocks, codes // LEAST_SPLIT))
    split = triton.cdiv(triton.cdiv(codes, splits), blocks["BK"]) * blocks["BK"]
    return split, (token_blocks, triton.cdiv(codes, split))


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # what a dot product of Triton takes


def _on_device(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device if x.is_cuda else -1)  # -1: no change, for the interpreter
