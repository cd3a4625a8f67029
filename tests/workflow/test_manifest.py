import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch

from codalib.base import hardware
from codalib.base.files import atomic_write, read_json, write_json
from codalib.workflow import manifest as runs
from codalib.workflow.manifest import Run
from codalib.workflow.parameters import check_parameters, settings_from, validate

PARAMETERS_CELL = """
steps: int = 3  # training steps
rate: float = 1e-3  # learning rate
norm: str | None = "rms"
scales: tuple[int, ...] = (1, 2)
rates: list[float] = [0.1]
adapt: bool = True
"""


def namespace(injected="", cell=PARAMETERS_CELL):
    names = {"__name__": "__main__", "In": [], "Out": {}, "_": 5}
    exec(cell, names)
    exec(injected, names)
    return names


def test_declared_values_come_back_in_their_types():
    names = namespace("scales = [1, 3]\nrate = 1\nrates = [1, 2.5]\nnorm = None")
    values = check_parameters(names)
    assert values == {"steps": 3, "rate": 1.0, "norm": None, "scales": (1, 3), "rates": [1.0, 2.5], "adapt": True}
    assert type(values["rate"]) is float
    assert names["scales"] == (1, 3)


def test_an_unknown_name_raises_with_the_closest_one():
    with pytest.raises(ValueError, match=r"no parameter `step`; the closest is `steps`"):
        check_parameters(namespace("step = 4"))


@pytest.mark.parametrize(
    ("injected", "words"),
    [
        ("steps = True", "`steps` must be int, got True"),
        ("steps = 2.0", "`steps` must be int, got 2.0"),
        ('rate = "1e-4"', r"write 0\.0001"),
        ('rate = "1e-5"', r"write 1\.0e-05"),
        ('adapt = "false"', "write True or False"),
        ("norm = False", "put it in quotes"),
        ("scales = [1, 2.5]", "`scales` must be tuple"),
        ('rates = "0.1"', "`rates` must be list"),
        ("adapt = 1", "`adapt` must be bool"),
        ("steps = None", "`steps` must be int, got None"),
    ],
)
def test_another_type_raises_one_sentence(injected, words):
    with pytest.raises(ValueError, match=words):
        check_parameters(namespace(injected))


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"`rate`.*`colour`"):
        check_parameters(namespace('rate = "fast"\ncolour = 1'))


def test_imports_functions_and_later_variables_are_no_parameters():
    names = namespace()
    cell = "import os\nfrom math import pi, sqrt\ndef area(r): return pi * r\nclass Thing: pass"
    names["In"] = ["%matplotlib inline", cell]
    exec(cell, names)
    check_parameters(names)
    names["losses"] = [1.0]  # the notebook goes on, then its reader runs the cell again
    assert check_parameters(names)["steps"] == 3


def test_a_kernel_without_a_history_knows_the_imports_of_its_running_cell(tmp_path):
    # nbval runs cells with store_history=False; string.digits would else be taken for a parameter
    names = namespace()
    cell = tmp_path / "cell.py"
    cell.write_text(
        "from string import digits\n"
        "from codalib.workflow.parameters import check_parameters\ncheck_parameters(globals())\n"
    )
    exec(compile(cell.read_text(), str(cell), "exec"), names)
    assert names["digits"] == "0123456789"


def test_a_second_run_still_checks_types():
    names = namespace()
    check_parameters(names)
    names["steps"] = "many"
    with pytest.raises(ValueError, match="`steps` must be int"):
        check_parameters(names)


def test_a_cell_without_declarations_is_an_error():
    with pytest.raises(ValueError, match="declares nothing"):
        check_parameters(namespace(cell="steps = 3"))


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int | float, 2, 2),
        (float | None, 2, 2.0),
        (Literal["rms", "layer"], "rms", "rms"),
        (tuple[int, float], [1, 2], (1, 2.0)),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (list, [1, "a"], [1, "a"]),
        (Any, {1}, {1}),
        ("int", 3, 3),
    ],
)
def test_conversions(hint, value, expected):
    result = validate({"name": hint}, {"name": value})["name"]
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [(Literal[1], True), (tuple[int, int], [1]), (dict[str, int], {"a": 0.5}), (list[int], (1,)), (None, 0)],
)
def test_refusals(hint, value):
    with pytest.raises(ValueError, match="must be"):
        validate({"name": hint}, {"name": value})


@dataclass(frozen=True)
class Settings:
    steps: int
    rate: float = 0.1
    betas: tuple[float, float] = field(default_factory=lambda: (0.5, 0.9))


def test_settings_take_parameters_of_their_names_then_derived_values():
    assert settings_from(Settings, {"steps": 2, "dataset": "emoji"}, rate=0.5) == Settings(steps=2, rate=0.5)


def test_settings_with_a_gap_or_a_stranger_raise():
    with pytest.raises(ValueError, match="needs steps"):
        settings_from(Settings, {"rate": 1.0})
    with pytest.raises(ValueError, match="no field speed"):
        settings_from(Settings, {"steps": 1}, speed=2)


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
    run = Run("smoke/stage", "00_stage", {"steps": 3, "scales": (1, 2)}, seed=7)
    assert run.folder == tmp_path / "smoke" / "stage"
    manifest = read_json(run.folder / "manifest.json")
    assert manifest["state"] == "running"
    assert manifest["parameters"] == {"steps": 3, "scales": [1, 2]}
    assert manifest["seed"] == 7
    assert manifest["machine"]["cores"] >= 1
    assert {"python", "torch", "numpy"} <= manifest["versions"].keys()
    (run.folder / "table.csv").write_text("a\n1\n")
    run.finish({"tables": [{"file": "table.csv", "title": "A", "caption": "B"}], "metrics": {"psnr": np.float64(30)}})
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["seconds"] >= 0
    assert manifest["peak_memory_bytes"] > 10_000_000
    assert manifest["results"]["metrics"]["psnr"] == 30


def test_results_with_a_missing_file_or_an_unknown_kind_raise(tmp_path):
    run = Run(tmp_path / "stage", "00_stage", {}, seed=0)
    with pytest.raises(ValueError, match=r"files that are not in .*: table\.csv"):
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
