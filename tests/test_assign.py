"""The backends of the assignment against its plain formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codalib import assign
from codalib.assign import softmax_assign

CPU_BACKENDS = ["tiled"]


def problem(tokens: int, codes: int, width: int = 6, channels: int = 3, seed: int = 0, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (codes, width), (codes, channels)]
    queries, keys, values = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return queries * spread, keys, values


def run(inputs: tuple[Tensor, ...], backend: str, temperature: float, scale: float = 0.5):
    """Outputs of the assignment and the gradients of a fixed mixture of all of them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = softmax_assign(*inputs, scale, temperature, backend)
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(out.value.shape, generator=generator, dtype=out.value.dtype) for _ in range(2))
    ((out.value * first).sum() + (out.hard * second).sum() + 0.7 * out.entropy).backward()
    return out, [x.grad for x in inputs]


def assert_same(inputs, backend, temperature, rtol=1e-9, atol=1e-9):
    out, gradients = run(inputs, backend, temperature)
    expected, expected_gradients = run(inputs, "reference", temperature)
    assert torch.equal(out.indices, expected.indices)
    for x, y in zip(
        [out.value, out.hard, out.entropy, *gradients], [*expected[:2], expected[3], *expected_gradients], strict=True
    ):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of at least 3 tokens and about 60 logits, blocks of 8 codes: small problems cross many borders."""
    monkeypatch.setattr(assign, "TILE_LEAST_TOKENS", 3)
    monkeypatch.setattr(assign, "TILE_ELEMENTS", {"cpu": 60})
    monkeypatch.setattr(assign, "ARGMAX_BLOCK", 8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    codes=st.integers(1, 70),
    width=st.integers(1, 9),
    channels=st.integers(1, 5),
    temperature=st.sampled_from([0.01, 0.3, 1.0]),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_are_those_of_the_plain_formula(
    backend, tokens, codes, width, channels, temperature, spread, seed
):
    inputs = problem(tokens, codes, width, channels, seed, spread=spread)
    assert_same(inputs, backend, temperature, rtol=1e-7, atol=1e-7)
