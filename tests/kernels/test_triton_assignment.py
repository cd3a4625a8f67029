"""The Triton kernels: on CUDA where there is a GPU, otherwise in Triton's interpreter and through its compiler."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu


@pytest.mark.skipif(INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter():
    """The interpreter is chosen when Triton is imported, hence a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CODALIB_TEST_GPU": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def problem(tokens, codes, width=6, channels=3, seed=0, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (codes, width), (codes, channels)]
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(DEVICE, dtype) for x in (queries * spread, keys, values)]


def run(inputs, backend, temperature):
    from codalib.kernels.assignment import softmax_assign
    from codalib.models.quantizer import softmax_assignment

    inputs = [x.clone().requires_grad_() for x in inputs]
    arguments = (*inputs, 0.5, temperature)
    # The plain formula's own promotion: in float32 whatever the inputs.
    formula = [x.float() if isinstance(x, torch.Tensor) else x for x in arguments]
    out = softmax_assignment(*formula) if backend == "reference" else softmax_assign(*arguments, backend)
    weights = torch.randn(2, *out.value.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ((out.value * weights[0]).sum() + (out.hard * weights[1]).sum() + 0.7 * out.entropy).backward()
    return out, [x.grad for x in inputs]


# The sizes cross the borders of the blocks (64, or 32 of wide vectors) and of the splits (1,024 codes, made 64 here).
SIZES = [(1, 1, 6, 3), (1, 70, 3, 1), (70, 1, 4, 2), (65, 130, 32, 16), (33, 35, 40, 5)]


@needs_kernels
@pytest.mark.parametrize(("size", "temperature"), list(zip(SIZES, [1.0, 0.01, 0.3, 0.01, 0.3], strict=True)), ids=str)
def test_values_and_gradients_are_those_of_the_plain_formula(size, temperature, monkeypatch):
    from codalib.kernels import triton_assignment as assign_triton

    monkeypatch.setattr(assign_triton, "LEAST_SPLIT", 64)
    assert_same_as_reference(problem(*size), temperature)


def assert_same_as_reference(inputs, temperature):
    out, gradients = run(inputs, "triton", temperature)
    expected, expected_gradients = run(inputs, "reference", temperature)
    assert torch.equal(out.indices, expected.indices)
    pairs = zip(
        [*out[:2], out.entropy, *gradients], [*expected[:2], expected.entropy, *expected_gradients], strict=True
    )
    for ours, theirs in pairs:
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * (1 + scale), check_dtype=False)


@needs_kernels
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    tokens=st.integers(1, 80),
    codes=st.integers(1, 150),
    width=st.integers(1, 40),
    channels=st.integers(1, 20),
    temperature=st.sampled_from([0.01, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_size_gives_the_plain_formula(tokens, codes, width, channels, temperature, seed):
    assert_same_as_reference(problem(tokens, codes, width, channels, seed), temperature)


@needs_kernels
def test_argmax_and_nearest_take_the_same_codes(monkeypatch):
    from codalib.kernels import triton_assignment as assign_triton
    from codalib.kernels.assignment import argmax_assign, nearest_assign, softmax_assign

    monkeypatch.setattr(assign_triton, "LEAST_SPLIT", 64)
    queries, keys, values = problem(20, 150)
    indices = argmax_assign(queries, keys, 0.37, "triton")
    assert torch.equal(indices, softmax_assign(queries, keys, values, 0.37, 0.01, "triton").indices)
    assert torch.equal(indices, (queries @ keys.T).argmax(dim=1))
    assert torch.equal(nearest_assign(queries, keys, "triton"), torch.cdist(queries, keys).argmin(dim=1))


@needs_kernels
def test_of_tied_codes_the_lowest_index_wins(monkeypatch):
    from codalib.kernels import triton_assignment as assign_triton
    from codalib.kernels.assignment import argmax_assign, softmax_assign

    monkeypatch.setattr(assign_triton, "LEAST_SPLIT", 64)
    keys = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [-1.0, 0.0]], device=DEVICE).repeat(40, 1)
    queries = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], device=DEVICE)
    assert argmax_assign(queries, keys, backend="triton").tolist() == [1, 3, 0]
    assert softmax_assign(queries, keys, keys, 1.0, 0.01, "triton").indices.tolist() == [1, 3, 0]


@needs_kernels
def test_large_logits_stay_finite():
    out, gradients = run(problem(9, 70, spread=1e4), "triton", 0.01)
    assert all(x.isfinite().all() for x in (*out, *gradients))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_statistics_and_sums(dtype):
    half = problem(70, 150, dtype=dtype)
    out, gradients = run(half, "triton", 1.0)
    expected, expected_gradients = run(half, "tiled", 1.0)  # of the same rounded inputs, in float32
    assert torch.equal(out.indices, expected.indices)
    assert out.value.dtype == out.hard.dtype == out.entropy.dtype == torch.float32
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * theirs.abs().max().item())


@needs_kernels
def test_inputs_of_different_precision_meet_in_the_higher():
    queries, keys, values = problem(9, 40, dtype=torch.bfloat16)
    mixed = run([queries, keys.float(), values], "triton", 1.0)[0]
    plain = run([x.float() for x in (queries, keys, values)], "triton", 1.0)[0]
    assert torch.equal(mixed.value, plain.value)
    assert torch.equal(mixed.entropy, plain.entropy)


@needs_kernels
def test_the_quantizer_runs_on_the_kernels():
    from codalib.models.quantizer import ResidualAttentionQuantizer

    torch.manual_seed(0)
    q = ResidualAttentionQuantizer(4, 70, scales=(1, 3), attention_dim=8, backend="triton").to(DEVICE)
    latents = torch.randn(2, 4, 3, 3, device=DEVICE)
    losses = []
    for q.backend in ("triton", "reference"):
        out = q(latents)
        assert torch.equal(q.decode(q.encode(latents)), out.quantized)
        losses.append(out.quantization_loss + out.entropy_loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


KERNELS = ("_statistics_kernel", "_mean_kernel", "_pulls_kernel", "_grad_queries_kernel", "_grad_keys_kernel")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("dtype", "precision", "capability", "kilobytes", "names"),
    [
        ("fp32", "tf32x3", 86, 99, KERNELS),  # an RTX 3090 and the shared memory that one block may have there
        ("bf16", "tf32x3", 86, 99, KERNELS),
        ("fp32", "ieee", 75, 64, KERNELS[-1:]),  # a T4, without TF32; the largest kernel stands for all
    ],
)
def test_kernels_compile_for_a_gpu_that_need_not_be_here(dtype, precision, capability, kilobytes, names):
    """Machine code is made, and the shared memory of a block suffices."""
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    if "nvidia" not in backends:
        pytest.skip("this Triton has no NVIDIA compiler")
    from codalib.kernels import triton_assignment as kernels

    constants = {"D": 32, "D_PAD": 32, "C": 16, "C_PAD": 16, "BT": 64, "BK": 64, "PRECISION": precision}
    constants |= {"WIDEN": False, "ARGMAX_ONLY": False}
    inputs = ("queries_ptr", "keys_ptr", "values_ptr", "grad_value_ptr")
    for kernel in (getattr(kernels, name) for name in names):
        signature, values = {}, {}
        for position, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], values[(position,)] = "constexpr", constants[name]
            elif name.endswith("_ptr"):
                signature[name] = f"*{dtype}" if name in inputs else "*i32" if name == "indices_ptr" else "*fp32"
            else:
                signature[name] = "fp32" if name in ("scale", "sharpness") else "i32"
        compiled = compile_kernel(
            ASTSource(kernel, signature, constexprs=values),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "num_stages": 2},
        )
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= kilobytes * 1024, kernel.__name__
