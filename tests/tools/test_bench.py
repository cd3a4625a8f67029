"""The benchmark: what it compares computes the same, its memory is right, it resumes, its page names its run."""

import re
import subprocess
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from codalib.base.files import read_json, write_json
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.quantizer import ResidualAttentionQuantizer
from codalib.reporting import bench as shown
from codalib.reporting.bench import STEP_EXPONENTIALS, STEP_PRODUCTS, rates_in_words, read_bench, sweeps, which_run
from codalib.tools import bench, bench_cases
from codalib.tools.bench import BACKENDS, CODES, plan, run, write_rows
from codalib.tools.bench_cases import (
    EXPONENTIALS_A_LOGIT,
    PRODUCTS_A_LOGIT,
    Case,
    bare_products,
    released_forward,
    workload,
)


def test_the_released_algorithm_computes_the_same_values_and_gradients():
    torch.manual_seed(0)
    quantizer = ResidualAttentionQuantizer(4, 40, (1, 2, 5), 8, backend="tiled").double()
    latents = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    out = quantizer(latents)
    results = [(out.quantized, out.quantization_loss, out.entropy_loss), released_forward(quantizer, latents)]
    inputs = [latents, *quantizer.parameters()]
    gradients = [torch.autograd.grad(a.square().sum() + b + 0.05 * c, inputs) for a, b, c in results]
    for pair in (*zip(*results, strict=True), *zip(*gradients, strict=True)):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_the_librarys_residual_quantization_chooses_the_same_codes():
    vqp = pytest.importorskip("vector_quantize_pytorch")
    theirs = vqp.ResidualVQ(dim=4, num_quantizers=3, codebook_size=30, shared_codebook=True).eval()
    ours = ResidualNearestQuantizer(4, 30, (5, 5, 5))
    torch.manual_seed(0)
    theirs.layers[0]._codebook.embed.normal_()
    ours.load_state_dict({"codebooks.weight": theirs.layers[0]._codebook.embed[0]})
    latents = torch.randn(2, 4, 5, 5)
    indices = theirs(latents.flatten(2).transpose(1, 2))[1]  # (B, 25, 3)
    for step, level in enumerate(ours.encode(latents)):
        assert torch.equal(level.flatten(1), indices[:, :, step])


def test_bare_products_take_sizes_that_are_no_multiple_of_a_tile(monkeypatch):
    monkeypatch.setattr(bench_cases, "PRODUCT_TOKENS", 4)
    monkeypatch.setattr(bench_cases, "PRODUCT_CODES", 8)
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.append(out.numel()) or mm(a, b, out=out))
    bare_products(torch.randn(5, 3), torch.randn(19, 3))
    assert sum(sizes) == 5 * 19


def test_peak_memory_counts_what_was_held_and_given_back():
    device = torch.device("cpu")
    idle = bench._start_of_memory(device)
    torch.ones(64 * 2**20 // 4)
    grown = bench._peak_memory(device) - idle
    assert 60 * 2**20 < grown < 80 * 2**20


def test_the_plan_covers_the_codes_the_tokens_and_the_gpu():
    cases = plan(("cpu", "cuda"))
    assert len(set(cases)) == len({case.name for case in cases}) == len(cases)
    for device in ("cpu", "cuda"):
        steps = {(x.implementation, x.codes, x.batch) for x in cases if x.task == "step" and x.device == device}
        assert {(x, codes, 4) for x in ("released", *BACKENDS) for codes in CODES} <= steps
        assert {("tiled", 65536, batch) for batch in (1, 2, 4, 8, 16)} <= steps
    assert Case("step", "triton", 65536, 12, "FLUX", "cuda") in cases
    assert not any(case.implementation == "triton" for case in plan())


def test_what_would_not_fit_the_memory_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_cases, "machine", lambda: {"memory_bytes": 10**9, "cores": 1})
    monkeypatch.setattr(bench, "_measure_apart", lambda *_: {"state": "measured"})
    rows = run([Case("step", x, 65536, 4) for x in ("reference", "tiled")], tmp_path)
    assert [row["state"] for row in rows] == ["not run: it would take about 4 GB", "measured"]


@pytest.mark.parametrize(("status", "state"), [(-9, "killed by the system"), (1, None)])
def test_a_case_that_fails_is_told(monkeypatch, status, state):
    ended = subprocess.CompletedProcess([], status, stdout="", stderr="ValueError: no such thing")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    if state:
        assert bench._measure_apart(Case("step", "tiled", 8, 1, "tiny"), 1)["state"].startswith(state)
    else:
        with pytest.raises(RuntimeError, match=r"step-tiled-8-1-tiny-cpu ended with status 1:\nValueError: no such"):
            bench._measure_apart(Case("step", "tiled", 8, 1, "tiny"), 1)


def test_a_case_that_the_gpu_has_no_memory_for_says_so_and_the_next_goes_on(monkeypatch, tmp_path):
    def measure(case, repeats):
        if case.codes == 96:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"state": "measured", "seconds": 1.0}

    def here(command, **_):  # in place of a process of its own
        return subprocess.CompletedProcess(command, bench.main(command[4:]), stderr="")

    monkeypatch.setattr(bench, "measure", measure)
    own = SimpleNamespace(run=here, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(bench, "subprocess", own)
    rates = {"task": "rates", "device": "cpu", "rates": {"products": 1e9, "exponentials": 1e9}}
    cases = [Case("compiling", "compiled", 96, 1, "tiny"), *(Case("step", "tiled", n, 1, "tiny") for n in (96, 48))]
    rows = run(cases, tmp_path)
    assert [row["state"] for row in rows] == ["out of memory", "out of memory", "measured"]
    write_rows([asdict(Case("rates", "rates", 96, 1, "tiny")) | rates, *rows], tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["state"].tolist() == ["out of memory", "measured"]


def test_a_machine_without_a_compiler_has_no_compiled_numbers(monkeypatch):
    def tiled_instead(case):
        if case.implementation == "compiled":
            return lambda: warnings.warn("torch.compile does not work here, and why", stacklevel=1)
        return lambda: None

    monkeypatch.setattr(bench, "workload", tiled_instead)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored after the test")
    state = bench.measure(Case("step", "compiled", 8, 1, "tiny"), repeats=1)["state"]
    assert state == "not run: torch.compile does not work here, and why"
    assert bench._seconds_of_compiling(Case("compiling", "compiled", 8, 1, "tiny")) is None


def test_quick_measures_in_processes_of_their_own_and_resumes(monkeypatch, tmp_path):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    page, some = tmp_path / "bench-quick" / "page", "tiled-.*-2-|encode"  # each takes a process and its imports
    arguments = ["--quick", "--repeats=1", f"--only={some}"]
    bench.main(arguments)
    table = pd.read_csv(page / "results.csv")
    assert list(table["task"]) == ["step", "encode"]  # the rates have a file of their own
    assert (table["state"] == "measured").all()
    assert (table[["seconds", "floor_seconds"]] > 0).all(axis=None)
    assert (table["peak_bytes"] < 200e6).all()
    manifest = read_json(page / "manifest.json")
    assert manifest["state"] == "finished"
    assert manifest["machine"]["cores"] >= 1
    text = (page / "index.html").read_text()
    assert "Measured on " in text
    assert not re.search(r'(src|href)="(?!data:|#|\.\./index)', text)

    def again(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench, "_measure_apart", again)
    bench.main(arguments)
    assert pd.read_csv(page / "results.csv").equals(table)
    with pytest.raises(AssertionError, match="measured again"):
        bench.main([*arguments, "--repeats=2"])


def measured(case):
    """A made-up row: the materialising versions hold ten matrices, the others grow with the tokens alone."""
    row = {**vars(case), "tokens": case.tokens}
    if case.task == "rates":
        speed = {"products": 1e11, "square_products": 1.2e11, "exponentials": 2e9}
        return row | {"rates": speed}
    if case.task == "compiling":
        return row | {"seconds": 9.0}
    if case.codes == max(CODES) and case.implementation == "released":
        return row | {"state": "not run: it would take about 34 GB"}
    whole = case.implementation in ("released", "reference", "library")
    logits = case.tokens * case.codes
    memory = 40 * logits if whole else 2048 * case.tokens + 10**8
    seconds = logits / (2e7 if whole else 1e8)
    return row | {"state": "measured", "seconds": seconds, "slowest_seconds": seconds, "peak_bytes": memory, "load": 1}


def write_run(folder, cases, gpu=None):
    results = write_rows([measured(case) for case in cases], folder)
    machine = {"processor": "a processor", "cores": 2, "memory_bytes": 2**33, "gpu": gpu}
    state = {"started": "2026-01-02T03:04", "commit": "abc", "dirty": False, "parameters": {"repeats": 3}}
    write_json(folder / "manifest.json", state | {"machine": machine, "versions": {"python": "3", "torch": "2"}})
    assert all((folder / row["file"]).is_file() for row in results["tables"])
    return read_bench(folder)


def test_what_is_written_is_read_with_its_floors(tmp_path):
    frame, rates, manifest = write_run(tmp_path, plan())
    row = frame[(frame["implementation"] == "tiled") & (frame["codes"] == 16384) & (frame["batch"] == 4)].iloc[0]
    logits = 2720 * 16384
    assert row["floor_seconds"] == pytest.approx(2 * (4 * 32 + 16) * logits / 1e11 + 3 * logits / 2e9, rel=1e-4)
    assert (PRODUCTS_A_LOGIT["step"], EXPONENTIALS_A_LOGIT["step"]) == (STEP_PRODUCTS, STEP_EXPONENTIALS)
    assert "Compiling took 9 s" in rates_in_words(rates.loc["cpu"])
    sentence = which_run(manifest)
    assert all(part in sentence for part in ("2026-01-02", "a processor", "no GPU number exists", "commit abc;"))


def test_the_tables_hold_the_ratios_and_say_what_is_missing(tmp_path):
    frame, _, _ = write_run(tmp_path, plan())
    found = {(title, x): rows for title, x, rows in sweeps(frame)}
    over_codes = found["Forward and backward, MAR scales, over codes, 4 images", "codes"]
    table = shown.ratios(over_codes).set_index(["codes", "implementation"])
    assert table.loc[("262,144", "released algorithm"), "seconds"] == "not run: it would take about 34 GB"
    assert table.loc[("16,384", "tiled"), "plain: time x"] == "5.00"
    over_tokens = found["Forward and backward, MAR scales, over tokens, 65,536 codes", "tokens"]
    slopes = shown.memory_a_token(over_tokens).set_index("implementation")["KiB a token"]
    assert (slopes["tiled"], slopes["one row of 65,536 logits"]) == ("2.0", "256")


def test_a_gpu_has_its_implementation_and_its_single_size(tmp_path):
    cases = [case for case in plan(("cuda",)) if case.scales == "FLUX" or case.task in ("rates", "compiling")]
    frame, _, manifest = write_run(tmp_path, cases, gpu="a GPU")
    assert "GPU: a GPU" in which_run(manifest)
    ((title, x, rows),) = sweeps(frame)
    assert (title, x, len(rows)) == ("Forward and backward, FLUX scales", "", 5)
    assert "triton" in set(shown.ratios(rows)["implementation"])


def test_the_step_and_the_encoding_run_through_every_implementation():
    for implementation in ("released", "reference", "tiled"):
        workload(Case("step", implementation, 20, 1, "tiny"))()
    for implementation in ("products", "attention", "nearest"):
        workload(Case("encode", implementation, 20, 1, "tiny"))()
