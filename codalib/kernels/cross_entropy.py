"""Cross-entropy of a linear head over many codes, without the tokens x codes matrix of logits (Eq. 12's loss)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codalib.kernels.assignment import EXP_FLOOR, _check_rows, _tiles

LINEAR_LEAST_TOKENS = 256  # the same for a head: each tile also passes over the whole weight and its gradient


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy (in nats) of `hidden @ weight.T + bias` against targets, without the (N, K) logits.

    For MaskGIT's head over a large codebook (Eq. 12 of arXiv:2503.17760): pass the masked positions' rows alone. The
    gradients are computed tile by tile within the forward pass, three matrix products instead of four. Under autocast
    the products run in its dtype; the statistics and the sums over tiles are float32.

    Shapes: hidden (N, D), weight (K, D), targets (N,) int64 in [0, K), bias (K,). Raises ValueError where they do not
    fit, where N is 0, and on a target outside [0, K).
    """
    _check_rows(hidden, weight)
    if targets.shape != (len(hidden),):
        raise ValueError(f"expected targets of shape ({len(hidden)},), one a row of hidden, got {tuple(targets.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing from 0 to 1, got {label_smoothing}")
    if targets.device.type == "cpu":  # elsewhere the host would wait; there `gather` stops at a wrong one
        low, high = targets.min().item(), targets.max().item()
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"expected targets in [0, {len(weight) - 1}], got [{low}, {high}]: is a mask token among them?"
            )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        return _TiledCrossEntropy.apply(hidden, weight.to(hidden.dtype), targets, bias, label_smoothing)


class _TiledCrossEntropy(torch.autograd.Function):
    """Saved for backward are the gradients themselves, of the shapes of hidden, weight and bias."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, label_smoothing):
        tokens, codes = len(hidden), len(weight)
        needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        full = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=full)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=full) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=full) if needs_bias else None
        for rows, logits in _tiles(hidden.to(full), codes, buffers=1, least=LINEAR_LEAST_TOKENS):
            if hidden.dtype == full:
                torch.mm(hidden[rows], weight.T, out=logits)
            else:
                logits.copy_(hidden[rows] @ weight.T)
            if bias is not None:
                logits += bias
            wanted = logits.gather(1, targets[rows, None])[:, 0]
            largest = logits.amax(dim=1)
            aim = (1 - label_smoothing) * wanted + label_smoothing * logits.mean(dim=1)
            sums = logits.sub_(largest[:, None]).clamp_(min=EXP_FLOOR).exp_().sum(dim=1)
            loss += (largest + sums.log() - aim).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad = logits.mul_((1 / (sums * tokens))[:, None]).sub_(label_smoothing / (codes * tokens))
            grad.scatter_add_(1, targets[rows, None], torch.full_like(wanted[:, None], (label_smoothing - 1) / tokens))
            if needs_bias:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            if needs_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if needs_weight:
                if grad.dtype == full:
                    grad_weight.addmm_(grad.T, hidden[rows])
                else:
                    grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, grad_bias = (None if x is None else x * grad_loss for x in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, grad_bias, None
