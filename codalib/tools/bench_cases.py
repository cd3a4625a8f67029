"""What the benchmark measures: one function without arguments a case.

Tasks and their implementations:

    step      forward and backward of the whole attention quantizer: the backends of `kernels.assignment`, and
              `released`, the algorithm of the authors' release written anew, which keeps several (tokens x codes)
              matrices a level
    encode    latents to indices with our quantizers (`attention`, `nearest`), against `library`, one call of
              vector-quantize-pytorch's VectorQuantize with as many tokens, and `products`, the bare matrix products
    residual  the same residual quantization (three steps at full resolution, nearest code, one codebook) by our
              quantizer (`nearest`) and by vector-quantize-pytorch's ResidualVQ (`library`)
    rates     the rates of narrow matrix products and of exp on this machine, of which the floors are made
    compiling the time that the first use of the compiled backend takes
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codalib.base.hardware import machine
from codalib.kernels.assignment import ENTROPY_EPS
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.quantizer import FLUX_SCALES, MAR_SCALES, ResidualAttentionQuantizer

CHANNELS, WIDTH = 16, 32  # latent channels and attention width of the release
SCALES = {"MAR": MAR_SCALES, "FLUX": FLUX_SCALES, "equal": (16, 16, 16), "tiny": (1, 2, 3)}
ENTROPY_WEIGHT = 0.05
SEED = 0
PRODUCTS_A_LOGIT = {"step": 4 * WIDTH + CHANNELS, "encode": WIDTH, "residual": CHANNELS + 1}  # multiply-adds
EXPONENTIALS_A_LOGIT = {"step": 3, "encode": 0, "residual": 0}  # one forward, two backward

# (tokens x codes) matrices of 4 bytes that an implementation holds at its peak, as measured at 16,384 codes; a case
# that would need more than this fraction of the memory is not run.
MATRICES = {("step", "released"): 9, ("step", "reference"): 5, ("encode", "library"): 4, ("residual", "library"): 2}
MEMORY_FRACTION = 0.4

# One tile of the bare products: about the fastest shape on processors (the product stays in the second-level cache).
PRODUCT_TOKENS, PRODUCT_CODES = 64, 2048
GPU_TILE = 8192, 16384  # tokens and codes of a rate on a GPU
RATE_SECONDS = 1.0  # for how long each rate is measured


@dataclass(frozen=True)
class Case:
    """One measurement; `scales` names an entry of SCALES."""

    task: str
    implementation: str
    codes: int
    batch: int
    scales: str = "MAR"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch, over all levels."""
        return self.batch * sum(p * p for p in SCALES[self.scales])

    def floor_seconds(self, rates: Mapping[str, float]) -> float:
        """The least time that the case's products and exponentials take at the RATES of its device."""
        logits = self.tokens * self.codes
        products = 2 * PRODUCTS_A_LOGIT[self.task] * logits / rates["products"]
        return products + EXPONENTIALS_A_LOGIT[self.task] * logits / rates["exponentials"]

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values()).replace(" ", "_")

    @property
    def too_large(self) -> str:
        """Why the case cannot be run on this machine, or ""."""
        needed = MATRICES.get((self.task, self.implementation), 0) * 4 * self.tokens * self.codes
        if self.device == "cuda":
            available = torch.cuda.get_device_properties(0).total_memory
        else:
            available = MEMORY_FRACTION * machine()["memory_bytes"]
        return f"not run: it would take about {needed / 1e9:.0f} GB" if needed > available else ""


def workload(case: Case) -> Callable[[], Any]:
    """A function without arguments that does the case's work once."""
    torch.manual_seed(SEED)
    device, side = torch.device(case.device), SCALES[case.scales][-1]
    latents = torch.randn(case.batch, CHANNELS, side, side).to(device)
    if case.task == "step":
        return _step(case, latents.requires_grad_())
    if case.implementation == "products":
        queries, keys = torch.randn(case.tokens, WIDTH).to(device), torch.randn(case.codes, WIDTH).to(device)
        return lambda: bare_products(queries, keys)
    if case.implementation == "library":
        return _library(case, device)
    quantizer = _quantizer(case, "auto").to(device)
    return lambda: quantizer.encode(latents)


def _quantizer(case: Case, backend: str) -> ResidualAttentionQuantizer | ResidualNearestQuantizer:
    if case.implementation == "nearest":
        return ResidualNearestQuantizer(CHANNELS, case.codes, SCALES[case.scales], backend=backend)
    return ResidualAttentionQuantizer(CHANNELS, case.codes, SCALES[case.scales], WIDTH, backend=backend)


def _step(case: Case, latents: Tensor) -> Callable[[], None]:
    released = case.implementation == "released"
    quantizer = _quantizer(case, "reference" if released else case.implementation).to(latents.device)

    def step() -> None:
        quantizer.zero_grad()
        latents.grad = None
        if released:
            quantized, quantization_loss, entropy_loss = released_forward(quantizer, latents)
        else:
            out = quantizer(latents)
            quantized, quantization_loss, entropy_loss = out.quantized, out.quantization_loss, out.entropy_loss
        (F.mse_loss(quantized, latents) + quantization_loss + ENTROPY_WEIGHT * entropy_loss).backward()

    return step


def released_forward(quantizer: ResidualAttentionQuantizer, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The release's way through the quantizer, written from its description: the same values by whole matrices.

    Each level projects all codes again, and holds logits, their softmax, the one-hot choice, the straight-through sum
    of both, and the softmax and its logarithm at the entropy's temperature, each (tokens, codes).
    Returns the quantized latents (B, C, H, W), the quantization loss and the entropy loss.
    """
    attn, side = quantizer.attn, quantizer.scales[-1]
    residual, quantized = latents, torch.zeros_like(latents)
    losses, entropies = [], []
    for p in quantizer.scales:
        pooled = F.interpolate(residual, size=(p, p), mode="area")
        features = pooled.permute(0, 2, 3, 1).reshape(-1, pooled.shape[1])  # (N, C)
        codes = quantizer.codebooks.weight
        keys, values = attn.keys(codes), attn.to_v(codes)
        logits = attn.queries(features) @ keys.T * quantizer.attention_dim**-0.5  # (N, K)
        soft = logits.softmax(dim=1)
        one_hot = torch.zeros_like(soft).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
        value = (one_hot - soft.detach() + soft) @ values
        hard = one_hot @ values
        sharp, log_sharp = (f(logits / quantizer.entropy_temperature, dim=1) for f in (F.softmax, F.log_softmax))
        mean = sharp.mean(dim=0)
        entropies.append((mean * (mean + ENTROPY_EPS).log()).sum() - (sharp * log_sharp).sum(dim=1).mean())
        committed = F.mse_loss(value, features) + F.mse_loss(hard.detach(), features)
        losses.append(committed + quantizer.beta * F.mse_loss(hard, features.detach()))
        grid = value.view(-1, p, p, pooled.shape[1]).permute(0, 3, 1, 2)
        upsampled = F.interpolate(grid, size=(side, side), mode="bicubic")
        quantized, residual = quantized + upsampled, residual - upsampled
    return quantized, torch.stack(losses).mean(), torch.stack(entropies).mean()


def _library(case: Case, device: torch.device) -> Callable[[], Any]:
    from vector_quantize_pytorch import ResidualVQ, VectorQuantize

    if case.task == "residual":
        steps = len(SCALES[case.scales])
        quantizer = ResidualVQ(dim=CHANNELS, num_quantizers=steps, codebook_size=case.codes, shared_codebook=True)
        features = torch.randn(1, case.tokens // steps, CHANNELS)
    else:
        quantizer = VectorQuantize(dim=CHANNELS, codebook_size=case.codes)
        features = torch.randn(1, case.tokens, CHANNELS)
    quantizer, features = quantizer.eval().to(device), features.to(device)
    return torch.no_grad()(lambda: quantizer(features))


def bare_products(queries: Tensor, keys: Tensor) -> None:
    """The products of all queries (N, D) with all keys (K, D), a tile at a time into one buffer."""
    buffer = queries.new_empty(PRODUCT_TOKENS * PRODUCT_CODES)
    for some in keys.split(PRODUCT_CODES):
        for rows in queries.split(PRODUCT_TOKENS):
            torch.mm(rows, some.T, out=buffer[: len(rows) * len(some)].view(len(rows), len(some)))


def rates(device: torch.device) -> dict[str, float]:
    """Additions and multiplications a second of products of inner width D, and exponentials a second, in tiles.

    A processor's tile is the one that the kernels work on; a GPU's is larger, so that no launch counts.
    """
    tokens, codes = (PRODUCT_TOKENS, PRODUCT_CODES) if device.type == "cpu" else GPU_TILE
    queries, keys = torch.randn(tokens, WIDTH).to(device), torch.randn(codes, WIDTH).to(device)
    tile = -10 * torch.rand(tokens, codes).to(device)
    out = torch.empty_like(tile)
    square = torch.randn(1024, 1024).to(device)
    square_out = torch.empty_like(square)
    return {
        "products": 2 * tile.numel() * WIDTH / _least_seconds(lambda: torch.mm(queries, keys.T, out=out), device),
        "square_products": 2 * 1024**3 / _least_seconds(lambda: torch.mm(square, square, out=square_out), device),
        "exponentials": tile.numel() / _least_seconds(lambda: torch.exp(tile, out=out), device),
    }


def _least_seconds(work: Callable[[], Any], device: torch.device, calls: int = 20) -> float:
    """Of one call: the best mean over some calls, so that the clock's own time does not count."""
    best, end = float("inf"), time.perf_counter() + RATE_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait_for(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
