"""On a GPU, with `make test-gpu`: golden values, a training and sampling, beside the tests marked `gpu` elsewhere.

The first test shows that all others see none.
"""

import contextlib
import os
import runpy
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codalib.base.hardware import compute_device
from codalib.datasets.images import load_dataset
from codalib.kernels.decoding import compile_decoding
from codalib.models.checkpoints import load_quantizer, load_vae
from codalib.models.maskgit import MaskGIT
from codalib.models.sampling import generate
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.settings import TokenizerSettings
from codalib.training.tokenizer import train_tokenizer
from codalib.training.trainer import read_log

ROOT = Path(__file__).parents[1]
MAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, ""),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ""),
        ({"CODALIB_TEST_GPU": "1"}, "0"),
        ({"CODALIB_TEST_GPU": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, "2"),
    ],
)
def test_tests_see_no_gpu_or_the_one_that_they_are_asked_to_take(variables, seen):
    names = ("CODALIB_TEST_GPU", "CUDA_VISIBLE_DEVICES")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    code = "import conftest, os, sys; assert 'torch' not in sys.modules; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, cwd=ROOT, env=rest | variables, capture_output=True, text=True).stdout == f"{seen}\n"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "tiled", "triton", "auto"])
def test_golden_values(backend):
    golden = {name: value.cuda() for name, value in load_file(ROOT / "tests/golden/quantizer_mar.safetensors").items()}
    state = {name.removeprefix("param."): value for name, value in golden.items() if name.startswith("param.")}
    quantizer = load_quantizer(state, scales=MAR_SCALES, norm="rms", backend=backend).cuda()
    out = quantizer(golden["input"])
    assert all((level == golden[f"indices.{i}"]).float().mean() > 0.999 for i, level in enumerate(out.indices))
    torch.testing.assert_close(out.quantization_loss, golden["vq_loss"], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_tokenizer_trains_and_its_tokens_decode(tmp_path):
    settings = TokenizerSettings(steps=3, batch_size=2, accumulation=2, codebook_size=64, scales=(1, 2, 4, 8), rank=2)
    data = load_dataset("emoji", "train", 64, limit=8), load_dataset("emoji", "val", 64, limit=4)
    tokenizer = train_tokenizer(settings, load_vae("emoji"), *data, tmp_path)
    assert next(tokenizer.parameters()).is_cuda
    assert 5 < read_log(tmp_path)[-1]["val_psnr"] < 60


@pytest.mark.gpu
def test_the_embedded_models_sample_as_on_the_processor():
    tokenizer, model = CodaTokenizer.from_pretrained("emoji-small"), MaskGIT.from_pretrained("emoji-class")
    drawn = []
    for device in ("cpu", compute_device()):
        tokens = generate(
            model.to(device), torch.tensor([2, 7], device=device), generator=torch.Generator().manual_seed(0)
        )
        drawn.append([level.cpu() for level in tokens])
        assert tokenizer.to(device).decode(tokens).isfinite().all()
    assert (torch.cat([(a == b).flatten() for a, b in zip(*drawn, strict=True)]).float().mean()) > 0.5


@pytest.mark.gpu
def test_decoding_from_a_graph_draws_as_without_one():
    """In more than one batch, so that a replay's result must have been read before the next overwrites it."""
    drawn = []
    for compiled in (False, True):
        model = MaskGIT.from_pretrained("emoji-class").to(compute_device())
        if compiled:
            compile_decoding(model)
        for seed in range(3):
            rng, labels = torch.Generator().manual_seed(seed), torch.tensor([2, 7], device=compute_device())
            tokens = generate(model, labels, guidance=2.0, generator=rng)
            drawn.append(torch.cat([level.flatten().cpu() for level in tokens]))
    for eager, graph in zip(drawn[:3], drawn[3:], strict=True):
        assert (eager == graph).float().mean() > 0.5  # sums round otherwise, and one draw changes those after it


def test_half_an_hour_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The script for a lent GPU: what its time does not reach goes on, what has ended is not done again."""
    script = runpy.run_path(str(ROOT / "tests/gpu/half_hour.py"))
    own, calls = script["main"].__globals__, []

    def run_part(name, command, out, seconds, tiny):
        calls.append(name)
        (out / f"{name.replace(' ', '-').replace(',', '')}.log").write_text('x\n{"images_a_second": 2.5}\n')
        return None if name == "sampling" and calls.count(name) == 1 else int(name == "tests")

    monkeypatch.setitem(own, "run_part", run_part)
    back = tmp_path / "back"
    monkeypatch.setattr(sys, "argv", ["half_hour.py", "--out", str(tmp_path / "out"), "--back", str(back), "--tiny"])
    assert own["main"]() == 3
    assert own["main"]() == 0
    assert sorted(file.name for file in back.iterdir()) == ["parts.json", "results.tar.gz", "summary.md"]
    with tarfile.open(back / "results.tar.gz") as tar:
        assert {"sampling.log", "reports/emoji-long/results"} <= set(tar.getnames())
    names = list(script["parts"](tmp_path / "out", True))
    assert calls == [*names, "sampling"]
    assert {"sampling", "sampling, CUDA graph"} < set(names)
    summary = (back / "summary.md").read_text()
    assert "| tests | ended with status 1 |" in summary
    assert "| sampling | ended | 0 | 2.5 |" in summary
    assert all(hasattr(TokenizerSettings, name) for changes in own["VARIANTS"].values() for name in changes)


def alive(words: bytes) -> bool:
    """Whether, after five seconds, a process still has these words in its command."""
    for _ in range(50):
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(words in file.read_bytes())
        if not any(found):
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at Linux's /proc")
def test_a_part_whose_time_is_over_is_ended(tmp_path):
    run_part = runpy.run_path(str(ROOT / "tests/gpu/half_hour.py"))["run_part"]
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
    assert run_part("x", [sys.executable, "-c", code], tmp_path, 3, True) is None
    assert "up" in (tmp_path / "x.log").read_text()
    assert not alive(b"signal.SIG_IGN); print('up'")  # what the part had started is gone too
    assert run_part("x", [sys.executable, "-c", "raise SystemExit(4)"], tmp_path, 60, True) == 4
