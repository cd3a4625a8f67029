"""Parameters and fields of settings: names and types are checked before any work, in the notebook and outside it."""

import ast
import typing
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import nbformat
import papermill
import pytest
from nbformat import v4

from codalib.training.settings import TokenizerSettings
from codalib.workflow.parameters import (
    check_parameters,
    declared_types,
    notebook_values,
    resolved_values,
    settings_from,
    settings_table,
    validate,
)
from codalib.workflow.types import parse

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
    with pytest.raises(ValueError, match=r"got `step`: the closest is `steps`"):
        check_parameters(namespace("step = 4"))


@pytest.mark.parametrize(
    ("injected", "words"),
    [
        ("steps = True", "expected int for `steps`, got True"),
        ("steps = 2.0", "expected int for `steps`, got 2.0"),
        ('rate = "1e-4"', r"write 0\.0001"),
        ('rate = "1e-5"', r"write 1\.0e-05"),
        ('adapt = "false"', "write True or False"),
        ("norm = False", "put it in quotes"),
        ("scales = [1, 2.5]", "expected tuple.* for `scales`"),
        ('rates = "0.1"', "expected list.* for `rates`"),
        ("adapt = 1", "expected bool for `adapt`"),
        ("steps = None", "expected int for `steps`, got None"),
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
    with pytest.raises(ValueError, match="expected int for `steps`"):
        check_parameters(names)


def test_a_cell_without_declarations_is_an_error():
    with pytest.raises(ValueError, match="expected a parameters cell"):
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
    with pytest.raises(ValueError, match=r"expected .* for `name`"):
        validate({"name": hint}, {"name": value})


# --- fields of dataclasses, through the parameter `settings` ----------------------------------------------------------
SMALL_CELL = """
steps: int = 2  # optimiser steps
scales: tuple = (1, 2)  # its whole type is the field's
seeds: "list[Optional[int]]" = [0]  # quoted, as papermill reads it
settings: dict = {"rate": 0.5, "betas": [0.1, 0.2]}  # any other field of Settings, by name
"""


@dataclass(frozen=True)
class Base:
    steps: int
    rate: float = 0.1


@dataclass(frozen=True)
class Settings(Base):
    betas: tuple[float, float] = field(default_factory=lambda: (0.5, 0.9))
    scales: tuple[int, ...] = (1,)
    norm: str | None = "rms"
    seed: int = 0


def small(injected="", history=True):
    """What `check_parameters` makes of the small cell and of papermill's values."""
    names = namespace(injected, SMALL_CELL)
    names["In"] = ["", SMALL_CELL, injected] if history else []
    return check_parameters(names, Settings, without=("seed",)), names


def test_fields_that_are_given_go_over_the_notebooks_own():
    assert small()[0] == {"steps": 2, "scales": (1, 2), "seeds": [0], "rate": 0.5, "betas": (0.1, 0.2)}
    values, names = small("settings = {'rate': 1, 'norm': None}\nscales = [1, 3]")
    assert values == {"steps": 2, "scales": (1, 3), "seeds": [0], "rate": 1.0, "betas": (0.1, 0.2), "norm": None}
    assert names["settings"] == {"rate": 1.0, "betas": (0.1, 0.2), "norm": None}
    assert check_parameters(names, Settings, without=("seed",)) == values  # its reader runs the cell again
    assert settings_from(Settings, values, seed=3) == Settings(2, 1.0, (0.1, 0.2), (1, 3), None, 3)


def test_a_field_may_be_given_like_a_parameter():
    values, names = small("norm = 'layer'\nsettings = {'norm': 'rms'}")
    assert values["norm"] == "layer"
    names["norm"] = object()  # the notebook binds the name, then its reader runs the cell again
    names["settings"] = {"rate": 0.5}
    assert check_parameters(names, Settings, without=("seed",))["norm"] == "layer"


def test_without_a_history_the_settings_stand_as_they_are():
    assert small(history=False)[0]["rate"] == 0.5


@pytest.mark.parametrize(
    ("injected", "words"),
    [
        ("settings = {'nrom': 'rms'}", "expected a field in `settings` of this notebook, got `nrom`: .* `norm`"),
        ("settings = {'rate': '1e-4'}", r"expected float for `rate`, got '1e-4' .*write 0\.0001"),
        ("rate = 'fast'", "expected float for `rate`, got 'fast'"),
        ("settings = {'steps': 3}", "expected `steps` as a parameter of its own, got it in `settings`"),
        ("settings = {'seed': 3}", "expected a field in `settings` of this notebook, got `seed`"),
        ("seed = 3", "expected a parameter of this notebook, got `seed`: the closest is `seeds`"),
        ("settings = 3", "expected dict for `settings`, got 3"),
        ("scales = [1.5]", r"expected tuple\[int, \.\.\.\] for `scales`"),
    ],
)
def test_wrong_fields_raise_before_any_work(injected, words):
    with pytest.raises(ValueError, match=words):
        small(injected)


def test_a_notebook_file_is_read_as_its_kernel_would():
    check = "from codalib.training.settings import TokenizerSettings\n"
    check += "check_parameters(globals(), TokenizerSettings, without=('seed', 'kind'))"
    cell = "scales: tuple = (1, 2)  # a\nsettings: dict = {'rank': 4}  # b"
    cells = [v4.new_code_cell(cell, metadata={"tags": ["parameters"]}), v4.new_code_cell(check)]
    notebook = v4.new_notebook(cells=cells)
    hints, loose = declared_types(notebook)
    assert hints == {"scales": "tuple[int, ...]", "settings": "dict"}
    written = {name: eval(hint) for name, hint in loose.items()}
    fields_of = typing.get_type_hints(TokenizerSettings)
    assert written == {name: fields_of[name] for name in fields_of.keys() - {"seed", "kind", "scales"}}
    assert notebook_values(notebook) == {"settings": {"rank": 4}}
    layers = {"beta": 0.1, "scales": [1]}, {"settings": {"beta": 0.2}, "steps": 5}
    assert notebook_values(notebook, *layers) == {"scales": [1], "settings": {"rank": 4, "beta": 0.2, "steps": 5}}
    assert resolved_values(notebook, {"norm": None}) == {"scales": (1, 2), "rank": 4, "norm": None}
    with pytest.raises(ValueError, match="got `kind`"):
        notebook_values(notebook, {"kind": "nearest"})


def test_the_table_says_which_defaults_are_changed():
    table = settings_table(Settings(2, betas=(0.5, 0.9), norm=None))
    assert table.loc[("Settings", "norm")].tolist() == ["None", "'rms'"]
    assert table.loc[("Settings", "rate")].tolist() == ["0.1", ""]
    assert len(table) == 6


def test_the_table_is_shown_whole():
    many = make_dataclass("Many", [(f"field_{i}", str, "x" * 99) for i in range(200)])
    shown = settings_table(many())._repr_html_()
    assert all(f"field_{i}<" in shown for i in range(200))
    assert shown.count("x" * 99) == 200


def test_papermill_takes_fields_by_name(tmp_path):
    """The real thing: its injected cell, its history, its YAML."""
    check = "from codalib.workflow.parameters import check_parameters\n"
    check += "from codalib.training.settings import FitSettings\nprint(check_parameters(globals(), FitSettings))"
    cell = 'label: str = "x"  # a\nsettings: dict = {"fit_steps": 3, "fit_batch_size": 2}  # fields of FitSettings'
    cells = [v4.new_code_cell(cell, metadata={"tags": ["parameters"]}), v4.new_code_cell(check)]
    path, out = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    given = {"fit_learning_rate": 0.1, "settings": {"fit_steps": 5}}
    executed = papermill.execute_notebook(
        path, out, given, kernel_name="python3", language="python", progress_bar=False
    )
    printed = executed.cells[-1].outputs[0]["text"]
    expected = {"label": "x", "fit_steps": 5, "fit_batch_size": 2, "fit_learning_rate": 0.1}
    assert ast.literal_eval(printed) == expected


def test_settings_take_parameters_of_their_names_then_derived_values():
    assert settings_from(Settings, {"steps": 2, "dataset": "emoji"}, rate=0.5) == Settings(steps=2, rate=0.5)


def test_settings_with_a_gap_or_a_stranger_raise():
    with pytest.raises(ValueError, match="expected steps of Settings"):
        settings_from(Settings, {"rate": 1.0})
    with pytest.raises(ValueError, match="expected fields of Settings, got speed"):
        settings_from(Settings, {"steps": 1}, speed=2)


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("1e3", int, 1000),
        ("-3", int, -3),
        ("9007199254740993", int, 9007199254740993),
        ("1e-4", float, 1e-4),
        ("None", int | None, None),
        ("null", str | None, None),
        ("2026-11-26", str, "2026-11-26"),
        ("null", str, "null"),
        ("1e3", str, "1e3"),
        ("/a: b #c {d}", str, "/a: b #c {d}"),
        ("3", str | None, "3"),
        ("true", bool, True),
        ("No", bool, False),
        ("rms", Literal["rms", "layer"], "rms"),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("[1e-4, 2]", list[float], [1e-4, 2.0]),
        ("{a: 2026-11-26}", dict[str, str], {"a": "2026-11-26"}),
        ("{a: 12:00, b: 010, c: 1_000, d: -.5}", dict, {"a": "12:00", "b": "010", "c": 1000, "d": -0.5}),
        ("{rate: 1e-4, name: 2026-11-26}", dict, {"rate": "1e-4", "name": "2026-11-26"}),
    ],
)
def test_a_text_of_the_command_line_is_read_as_the_declared_type(text, hint, expected):
    value = parse(text, hint)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "hint"), [("1.5", int), ("None", int), ("1", bool), ("{", dict), ("nan", int), ("inf", int), ("x", float)]
)
def test_a_text_of_another_type_is_refused_in_one_sentence(text, hint):
    with pytest.raises(ValueError, match=r"expected .* for `name`, got"):
        validate({"name": hint}, {"name": parse(text, hint)})
