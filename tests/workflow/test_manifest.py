import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from codalib.base import hardware
from codalib.base.files import atomic_write, read_json, write_json
from codalib.workflow import manifest as runs
from codalib.workflow.manifest import Run


@dataclass(frozen=True)
class Settings:
    rank: int = 32
    norm: str | None = "rms"


def test_the_memory_of_launched_processes_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    hardware.note_peaks(0, {"peak_memory_bytes": 2**60, "peak_gpu_memory_bytes": 2**60})  # of an earlier run
    run = Run("smoke/ranks", "00_stage", {}, 0)
    for rank, gpu in ((1, 5 * 2**30), (0, 6 * 2**30)):
        hardware.note_peaks(rank, {"peak_memory_bytes": 2**20, "peak_gpu_memory_bytes": gpu})
    manifest = run.finish()
    hardware.RANK_PEAKS.clear()
    assert [own["peak_gpu_memory_bytes"] // 2**30 for own in manifest["ranks"]] == [6, 5]
    assert manifest["peak_gpu_memory_bytes"] == 6 * 2**30
    assert 2**20 < manifest["peak_memory_bytes"] < 2**50


def test_how_a_gpu_computes_is_set_and_recorded_once_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    monkeypatch.setattr(hardware, "_gpu", lambda query: "a GPU" if query == "get_device_name" else 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as another library may leave it
    try:
        run = Run("smoke/gpu", "00_stage", {}, 0)
        assert run.manifest["machine"]["tf32"] == {"matrix products": True, "convolutions": True}
        assert hardware.compute_device() == "cuda"
        assert torch.backends.cudnn.benchmark
        assert run.finish()["machine"]["tf32"] == {"matrix products": False, "convolutions": True}
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines(["half of the new", None])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with atomic_write(path, "wb") as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o600 == 0o600


def test_json_holds_plain_numbers_only(tmp_path):
    write_json(tmp_path / "a.json", {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": tmp_path})
    assert read_json(tmp_path / "a.json") == {"a": 0.5, "b": [0, 1], "c": None, "d": str(tmp_path)}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not a JSON file"):
        read_json(tmp_path / "b.json")


def test_a_run_is_recorded_from_its_start_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    run = Run("smoke/stage", "00_stage", {"steps": 3, "scales": (1, 2)}, 7, Settings(rank=8))
    assert run.folder == tmp_path / "smoke" / "stage"
    manifest = read_json(run.folder / "manifest.json")
    assert manifest["state"] == "running"
    assert manifest["parameters"] == {"steps": 3, "scales": [1, 2]}
    assert manifest["settings"] == {"Settings": {"rank": 8, "norm": "rms"}}
    assert manifest["seed"] == 7
    assert manifest["machine"]["cores"] >= 1
    assert {"python", "torch", "numpy"} <= manifest["versions"].keys()
    (run.folder / "table.csv").write_text("a\n1\n")
    run.finish({"tables": [{"file": "table.csv", "title": "A", "caption": "B"}], "metrics": {"psnr": np.float64(30)}})
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["seconds"] >= 0
    assert manifest["peak_memory_bytes"] > 10_000_000
    assert manifest["ranks"] == []
    assert manifest["results"]["metrics"]["psnr"] == 30


def test_results_with_a_missing_file_or_an_unknown_kind_raise(tmp_path):
    run = Run(tmp_path / "stage", "00_stage", {}, seed=0)
    with pytest.raises(ValueError, match=r"expected the files of the results in .*, got none of table\.csv"):
        run.finish({"tables": [{"file": "table.csv"}]})
    with pytest.raises(ValueError, match="got plots"):
        run.finish({"plots": []})


def test_the_version_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "project_folder", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.source_version() == {"commit": None, "dirty": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the GPU")
def test_a_processor_says_whether_it_multiplies_bfloat16(monkeypatch):
    for flags, expected in (("flags : avx2 avx512f", False), ("flags : avx512f avx512_bf16", True), ("", False)):
        monkeypatch.setattr(hardware, "_cpuinfo", lambda flags=flags: f"model name : Some\n{flags}\n")
        assert hardware.machine()["bfloat16"] is expected
        assert hardware.machine()["processor"] == "Some"


def test_the_lock_is_named_only_where_its_versions_are_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "project_folder", lambda: tmp_path)
    assert runs.lock_digest() is None
    versions = {name: version for name, version in runs.library_versions().items() if name != "python"}
    lines = [f"{name}=={version.partition('+')[0]} ; python_version < '3.99'" for name, version in versions.items()]
    (tmp_path / "requirements.lock").write_text("\n".join(["# a comment", "numpy==0.1", *lines]))
    found = runs.lock_digest()
    assert len(found) == 16
    (tmp_path / "requirements.lock").write_text("\n".join([*lines, "extra==1"]))
    assert runs.lock_digest() not in (found, None)
    for other in ("torch==0.0.1\n", "pillow==0.0.1\n"):  # any library, whether or not it is named in the manifest
        (tmp_path / "requirements.lock").write_text(other)
        assert runs.lock_digest() is None
