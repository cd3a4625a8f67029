"""The backends of the assignment against its plain formula, and what must hold of the formula itself."""

import math
import subprocess
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codalib.kernels import assignment as assign
from codalib.kernels import cross_entropy
from codalib.kernels.assignment import argmax_assign, nearest_assign, resolve_backend, softmax_assign, top_assign
from codalib.kernels.cross_entropy import linear_cross_entropy
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.quantizer import ResidualAttentionQuantizer, softmax_assignment

TILED = ["tiled", "compiled"]  # the Triton backend has its own file
TEMPERATURES = [0.01, 0.3, 1.0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of at least 3 tokens and about 60 logits, blocks of 8 codes: small problems cross many borders."""
    monkeypatch.setattr(assign, "TILE_LEAST_TOKENS", 3)
    monkeypatch.setattr(cross_entropy, "LINEAR_LEAST_TOKENS", 3)
    monkeypatch.setattr(assign, "TILE_ELEMENTS", {"cpu": 60})
    monkeypatch.setattr(assign, "ARGMAX_BLOCK", 8)
    monkeypatch.setattr(assign, "ARGMAX_LEAST_TOKENS", 2)  # tiles of codes from 31 codes on
    monkeypatch.setattr(assign, "ARGMAX_TILE_BLOCKS", 2)


def problem(tokens, codes, width=6, channels=3, seed=0, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (codes, width), (codes, channels)]
    queries, keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(queries * spread).to(dtype), keys.to(dtype), values.to(dtype)]


def assigned(queries, keys, values, scale, temperature, backend):
    """By a backend, or by the quantizer's plain formula, "reference"."""
    formula = backend == "reference"
    arguments = (queries, keys, values, scale, temperature)
    return softmax_assignment(*arguments) if formula else softmax_assign(*arguments, backend)


def run(inputs: list[Tensor], backend: str, temperature: float = 0.3, scale: float = 0.5):
    """Outputs of the assignment and the gradients of a fixed mixture of all of them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = assigned(*inputs, scale, temperature, backend)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *out.value.shape, generator=generator, dtype=torch.float64).to(out.value.dtype)
    ((out.value * weights[0]).sum() + (out.hard * weights[1]).sum() + 0.7 * out.entropy).backward()
    return out, [x.grad for x in inputs]


def assert_same_as_reference(inputs, backend, temperature, rtol, atol):
    out, gradients = run(inputs, backend, temperature)
    expected, expected_gradients = run(inputs, "reference", temperature)
    assert torch.equal(out.indices, expected.indices)
    pairs = zip(
        [out.value, out.hard, out.entropy, *gradients],
        [expected.value, expected.hard, expected.entropy, *expected_gradients],
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * (1 + theirs.abs().max().item()))


sizes = {
    "tokens": st.integers(1, 40),
    "codes": st.integers(1, 70),
    "width": st.integers(1, 9),
    "channels": st.integers(1, 5),
    "temperature": st.sampled_from(TEMPERATURES),
    "spread": st.sampled_from([0.1, 1.0, 30.0]),
    "seed": st.integers(0, 10**6),
}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(**sizes)
def test_tiled_is_the_plain_formula(tokens, codes, width, channels, temperature, spread, seed):
    inputs = problem(tokens, codes, width, channels, seed, spread=spread)
    assert_same_as_reference(inputs, "tiled", temperature, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(**sizes)
def test_compiled_is_the_plain_formula(tokens, codes, width, channels, temperature, spread, seed):
    inputs = problem(tokens, codes, width, channels, seed, dtype=torch.float32, spread=min(spread, 3.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.compile does not work here")
        # float32: at a temperature of 0.01 a rounding of the logits weighs a hundred times as much.
        assert_same_as_reference(inputs, "compiled", temperature, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_those_of_the_soft_mixture_and_the_true_entropy(temperature):
    """The value is hard, so its index backpropagation is compared with the soft mixture whose gradient it must have."""
    inputs = [x.requires_grad_() for x in problem(9, 21)]
    weight = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = softmax_assign(*inputs, 0.5, temperature, "tiled")
    ours = torch.autograd.grad((out.value * weight).sum(), inputs[:2])
    soft = (inputs[0] @ inputs[1].T * 0.5).softmax(dim=-1) @ inputs[2]
    theirs = torch.autograd.grad((soft * weight).sum(), inputs[:2])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def entropy(queries, keys):
        return softmax_assign(queries, keys, inputs[2].detach(), 0.5, temperature, "tiled").entropy

    def chosen(values):
        return softmax_assign(inputs[0].detach(), inputs[1].detach(), values, 0.5, temperature, "tiled")[:2]

    assert torch.autograd.gradcheck(entropy, inputs[:2])
    assert torch.autograd.gradcheck(chosen, inputs[2:])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_entropy_at_its_extremes(backend):
    codes, values = 16, torch.zeros(16, 1)
    # Every token equally near to all codes: both entropies are log K, their difference is 0.
    indifferent = assigned(torch.zeros(32, 4), torch.randn(codes, 4), values, 1.0, 0.01, backend)
    assert indifferent.entropy.item() == pytest.approx(0, abs=1e-3)  # the release's 1e-5 inside the logarithm
    # Each code chosen surely and equally often: 0 - log K. All tokens on one code: 0 - 0.
    sure = 50 * torch.eye(codes)
    assert assigned(sure, sure, values, 1.0, 0.01, backend).entropy.item() == pytest.approx(-math.log(16), abs=1e-3)
    assert assigned(sure[:1].expand(16, -1), sure, values, 1.0, 0.01, backend).entropy.item() == pytest.approx(
        0, abs=1e-3
    )


@pytest.mark.parametrize("backend", TILED)
def test_of_tied_codes_the_lowest_index_wins(backend):
    keys = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [-1.0, 0.0]]).repeat(9, 1)  # ties 4, 8, ... apart too
    queries = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    expected = torch.tensor([1, 3, 0, 1])
    assert torch.equal(argmax_assign(queries, keys, backend=backend), expected)
    assert torch.equal(softmax_assign(queries, keys, keys, 1.0, 0.01, backend).indices, expected)
    assert torch.equal(nearest_assign(keys[[1, 3, 0]], keys, backend), expected[:3])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(tokens=st.integers(1, 6), codes=st.integers(1, 70), levels=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_argmax_in_blocks_and_over_tiles_of_codes_is_the_first_largest(tokens, codes, levels, seed):
    logits = torch.randint(levels, (tokens, codes), generator=torch.Generator().manual_seed(seed)).float()
    first = [row.index(max(row)) for row in logits.tolist()]
    assert assign._row_argmax(logits).tolist() == first
    assert assign._argmax_over_code_tiles(torch.eye(tokens), logits.T.contiguous()).tolist() == first


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize(("tokens", "codes"), [(1, 1), (1, 33), (13, 1)])
def test_one_token_or_one_code(tokens, codes, backend):
    assert_same_as_reference(problem(tokens, codes), backend, 0.01, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", *TILED])
def test_large_logits_stay_finite(backend):
    out, gradients = run(problem(9, 40, dtype=torch.float32, spread=1e4), backend, 0.01)
    assert all(x.isfinite().all() for x in (*out, *gradients))


def test_nothing_of_tokens_times_codes_is_saved_for_backward():
    tokens, codes = 50, 70
    inputs = [x.requires_grad_() for x in problem(tokens, codes)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        softmax_assign(*inputs, 0.5, 0.01, "tiled")
    assert max(saved) <= max(x.numel() for x in inputs) < tokens * codes
    assert sum(saved) < 3 * sum(x.numel() for x in inputs)


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor had which any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_no_tensor_of_tokens_times_codes_is_ever_made():
    tokens, codes = 50, 300
    inputs = problem(tokens, codes)
    with Largest() as formula:
        run(inputs, "reference")
    with Largest() as softmax:
        run(inputs, "tiled")
    with Largest() as argmax:
        argmax_assign(*inputs[:2], backend="tiled")
        nearest_assign(*inputs[:2], backend="tiled")
    with Largest() as head:
        linear_cross_entropy(*(x.requires_grad_() for x in inputs[:2]), torch.arange(tokens)).backward()
    most = [softmax.elements, argmax.elements, head.elements]
    assert max(most) < tokens * codes / 5 < formula.elements == tokens * codes


def test_a_quantizer_projects_its_codes_once_a_pass():
    quantizer = ResidualAttentionQuantizer(3, 40, (1, 2, 4), 6, backend="tiled")
    counts = Counter()
    for name in ("to_q", "to_k", "to_v"):
        layer = getattr(quantizer.attn, name)
        layer.register_forward_hook(lambda *_, name=name: counts.update([name]))
    quantizer(torch.randn(2, 3, 4, 4))
    assert counts == {"to_q": 3, "to_k": 1, "to_v": 1}
    quantizer.encode(torch.randn(2, 3, 4, 4))
    assert counts == {"to_q": 6, "to_k": 2, "to_v": 2}


def test_argmax_takes_the_indices_of_the_softmax():
    for seed in range(5):
        queries, keys, values = problem(50, 70, seed=seed, dtype=torch.float32)
        indices = argmax_assign(queries, keys, 0.37, "tiled")
        assert torch.equal(indices, softmax_assign(queries, keys, values, 0.37, 0.01, "tiled").indices)


@pytest.mark.parametrize("kind", [ResidualAttentionQuantizer, ResidualNearestQuantizer])
def test_a_reference_quantizer_encodes_what_it_and_the_backends_assign(kind):
    torch.manual_seed(0)
    quantizer = kind(3, 40, (1, 2, 4), backend="reference").double()
    latents = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    tokens = {"forward": quantizer(latents).indices}
    for quantizer.backend in ("reference", "tiled", "compiled"):
        tokens[quantizer.backend] = quantizer.encode(latents)
    for levels in zip(*tokens.values(), strict=True):
        assert all(torch.equal(level, levels[0]) for level in levels)


def test_nearest_is_the_least_distance():
    features, codes, _ = problem(60, 45)
    expected = (features[:, None] - codes).norm(dim=2).argmin(dim=1)
    assert torch.equal(nearest_assign(features, codes, "tiled"), expected)


def test_top_assign_gives_the_sorted_largest_logits_and_the_normaliser():
    queries, keys, _ = problem(20, 45)
    logits = 0.5 * queries @ keys.T
    top, indices, log_sums = top_assign(queries, keys, 5, scale=0.5)
    torch.testing.assert_close(top, logits.sort(dim=1, descending=True).values[:, :5])
    torch.testing.assert_close(logits.gather(1, indices), top)
    torch.testing.assert_close(log_sums, logits.logsumexp(dim=1))
    with pytest.raises(ValueError, match="expected a count from 1 to 45"):
        top_assign(queries, keys, 46)


def test_half_precision_inputs_have_float32_statistics_also_under_autocast():
    inputs = problem(20, 30, dtype=torch.bfloat16)
    plain = softmax_assign(*(x.float() for x in inputs), 0.5, 0.01, "tiled")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = softmax_assign(*inputs, 0.5, 0.01, "tiled")
    assert out.value.dtype == out.entropy.dtype == torch.float32
    assert torch.equal(out.value, plain.value)
    assert torch.equal(out.entropy, plain.entropy)


def test_what_is_to_be_compiled_compiles_where_anything_does():
    """Else the tests of the backend would hold the tiled work, which takes its place with a warning."""
    try:
        torch.compile(torch.add, fullgraph=True)(torch.ones(2), torch.ones(2))
    except Exception as error:  # of any kind, where a toolchain is missing
        pytest.skip(f"torch.compile does not work here: {error}")
    assert assign._compiled_math("cpu") is not assign._EAGER


def test_without_a_compiler_one_warning_and_the_tiled_values(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    assign._compiled_math.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r'"tiled" is used instead: no compiler found$'):
            out, gradients = run(problem(9, 20), "compiled")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(problem(9, 20), "compiled")
    finally:
        assign._compiled_math.cache_clear()
    expected, expected_gradients = run(problem(9, 20), "tiled")
    assert torch.equal(out.value, expected.value)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def test_auto_compiles_only_large_training_steps_on_a_processor():
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu, 680, 1024) == "tiled"
    assert resolve_backend("auto", cpu, 2720, 16384) == "compiled"
    with torch.no_grad():
        assert resolve_backend("auto", cpu, 2720, 16384) == "tiled"
    assert resolve_backend("tiled", cpu, 10**6, 10**6) == "tiled"


def test_what_cannot_run_raises_one_clear_sentence(monkeypatch):
    queries, keys, values = problem(4, 5)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"Triton is not installed|move them to CUDA"):
        softmax_assign(queries, keys, values, 1.0, 1.0, "triton")
    with pytest.raises(ValueError, match=r"expected a backend of auto, .*got 'magic'"):
        argmax_assign(queries, keys, backend="magic")
    with pytest.raises(ValueError, match=r"expected rows \(N, D\) and codes \(K, D\)"):
        softmax_assign(queries[:, :2], keys, values, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        nearest_assign(queries[:0], keys)
    with pytest.raises(ValueError, match="for 5 keys"):
        softmax_assign(queries, keys, values[:4], 1.0, 1.0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_linear_cross_entropy_is_torchs_own(label_smoothing, with_bias):
    def problem_of(tokens, codes, width):
        hidden, weight, _ = problem(tokens, codes, width)
        bias = torch.randn(codes, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        targets = torch.randint(codes, (tokens,), generator=torch.Generator().manual_seed(2))
        return targets, [x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]

    def ours(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, targets, bias, label_smoothing)

    def theirs(hidden, weight, bias=None):
        return F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=label_smoothing)

    targets, inputs = problem_of(25, 37, 8)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    gradients = zip(*(torch.autograd.grad(3 * f(*inputs), inputs) for f in (ours, theirs)), strict=True)
    for a, b in gradients:
        torch.testing.assert_close(a, b)
    targets, inputs = problem_of(7, 9, 2)
    assert torch.autograd.gradcheck(ours, inputs)


def test_linear_cross_entropy_leaves_unasked_gradients_out_and_obeys_autocast():
    hidden, weight, _ = problem(25, 37, width=8, dtype=torch.float32)
    targets = torch.arange(25)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    exact = weight.detach().requires_grad_()
    plain = F.cross_entropy(hidden @ exact.T, targets)
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad, exact.grad, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.tensor([0, 5, 1, 1])}, r"expected targets in \[0, 4\], got \[0, 5\]: is a mask token"),
        ({"targets": torch.tensor([0, 1])}, r"expected targets of shape \(4,\)"),
        ({"label_smoothing": 1.5}, "expected label_smoothing from 0 to 1"),
        ({"hidden": torch.zeros(0, 6), "targets": torch.zeros(0, dtype=torch.long)}, "at least 1"),
    ],
)
def test_linear_cross_entropy_names_what_is_wrong(arguments, message):
    good = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(5, 6), "targets": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | arguments))


class _OfTriton(Exception):
    """As Triton's own errors are, of no other kind."""


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find C compiler."), subprocess.CalledProcessError(1, "gcc"), _OfTriton("ptxas"), None],
)
def test_auto_on_a_gpu_falls_back_once_where_triton_finds_no_compiler(monkeypatch, error):
    pytest.importorskip("triton")
    from codalib.kernels import assignment, triton_assignment

    asked = []

    def argmax(*_):
        asked.append(1)
        if error:
            raise error

    monkeypatch.setattr(triton_assignment, "triton_argmax", argmax)
    monkeypatch.setattr(assignment.torch, "ones", lambda *_, **__: torch.zeros(16, 16))
    assignment._triton_runs.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [resolve_backend("auto", torch.device("cuda"), 680, 1024) for _ in range(3)]
    assignment._triton_runs.cache_clear()
    assert found == ["tiled" if error else "triton"] * 3
    assert len(asked) == 1
    assert resolve_backend("auto", torch.device("cuda"), 680, 1024, width=129) == "tiled"
    assert len(caught) == bool(error)
