"""What holds for every notebook as it is committed; nbval runs them (`make test`)."""

import ast
import importlib
import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest

from codalib.workflow.parameters import declared_parameters, validate

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]
LONGEST_FUNCTION = 10  # lines: what is longer belongs into codalib
CHECKED = "nbval-check-output"


@pytest.fixture(params=NOTEBOOKS, ids=IDS)
def notebook(request):
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def tags(cell):
    return cell.metadata.get("tags", [])


def code_after_parameters(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "parameters" in tags(cells[0])
    return "\n".join(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE) for cell in cells[1:])


def settings_classes(tree):
    """The dataclasses that a notebook fills by `settings_from(Class, parameters, **derived)`, and the derived names."""
    modules = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "settings_from":
            name = node.args[0].id
            yield getattr(importlib.import_module(modules[name]), name), {word.arg for word in node.keywords}


def test_it_opens_with_a_title_and_a_sentence_then_the_parameters(notebook):
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n\n\S", first.source)
    assert tags(second) == ["parameters"]


def test_its_parameters_are_commented_literals_of_their_types(notebook):
    declared = declared_parameters(notebook)
    assert declared
    validate(
        {name: hint for name, (hint, _) in declared.items()}, {name: value for name, (_, value) in declared.items()}
    )
    lines = notebook.cells[1].source.splitlines()
    assert len(lines) == len(declared)
    for line in lines:
        assert re.match(r"\w+: .+ = .+  # \S", line), line


def test_it_checks_its_parameters_before_any_work(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "check_parameters(globals())" in cells[1].source


def test_every_parameter_is_read(notebook):
    tree = ast.parse(code_after_parameters(notebook))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    read |= {field.name for settings, _ in settings_classes(tree) for field in fields(settings)}
    assert declared_parameters(notebook).keys() <= read


def test_its_parameters_agree_with_the_fields_of_its_settings(notebook):
    declared = declared_parameters(notebook)
    for settings, derived in settings_classes(ast.parse(code_after_parameters(notebook))):
        types = {field.name: field.type for field in fields(settings)}
        assert derived <= types.keys()
        for name in (types.keys() & declared.keys()) - derived:
            hint = types[name] if isinstance(types[name], str) else getattr(types[name], "__name__", str(types[name]))
            assert declared[name][0] == (hint if "[" not in str(types[name]) else str(types[name])), name


def test_it_is_thin(notebook):
    for node in ast.walk(ast.parse(code_after_parameters(notebook))):
        assert not isinstance(node, ast.ClassDef)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION


def test_it_keeps_outputs_in_checked_cells_only(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code" and CHECKED not in tags(cell):
            assert not cell.outputs
            assert cell.execution_count is None
        elif cell.cell_type == "code":
            assert cell.outputs
            assert cell.execution_count is not None
