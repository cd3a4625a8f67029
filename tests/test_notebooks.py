"""What holds for every notebook as it is committed; nbval runs them (`make test`)."""

import ast
import importlib
import re
from dataclasses import fields
from pathlib import Path

import nbformat
import papermill
import pytest

from codalib.workflow.parameters import declared_parameters, resolved_values
from codalib.workflow.profiles import profile_parts

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]
PROFILES = sorted(path.stem for path in (Path(__file__).parents[1] / "profiles").glob("*.yaml"))
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


def settings_classes(notebook):
    """The dataclasses whose fields a notebook takes by name: those that it gives to `check_parameters`."""
    tree = ast.parse(code_after_parameters(notebook))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {name.name: node.module for node in imports for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_parameters":
            yield from (getattr(importlib.import_module(modules[name.id]), name.id) for name in node.args[1:])


def test_it_opens_with_a_title_and_a_sentence_then_the_parameters(notebook):
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n\n\S", first.source)
    assert tags(second) == ["parameters"]


def test_its_parameters_are_commented_literals_of_their_types(notebook):
    declared = declared_parameters(notebook)
    resolved_values(notebook)
    source = notebook.cells[1].source
    statements, lines = ast.parse(source).body, source.splitlines()
    assert [statement.target.id for statement in statements] == list(declared)
    for statement in statements:
        assert re.search(r"[\w}\])\"]  # \S", lines[statement.end_lineno - 1]), lines[statement.lineno - 1]


def test_papermill_sees_all_of_its_parameters(request, notebook):
    path = next(path for path in NOTEBOOKS if path.stem in request.node.name)
    assert papermill.inspect_notebook(path).keys() == declared_parameters(notebook).keys()


def test_it_checks_its_parameters_before_any_work_and_shows_its_settings(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "check_parameters(" in cells[1].source
    classes = list(settings_classes(notebook))
    assert ("settings" in declared_parameters(notebook)) == bool(classes)
    if classes:
        assert cells[2].source.startswith("settings_table(")
        assert cells[1].source.count("settings_from(") == len(classes)


def test_every_parameter_is_read(notebook):
    tree = ast.parse(code_after_parameters(notebook))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    read |= {field.name for settings in settings_classes(notebook) for field in fields(settings)} | {"settings"}
    assert declared_parameters(notebook).keys() <= read


def test_no_parameter_restates_a_default(notebook):
    """A value that is a field's default stands in the dataclass alone; `seed` is all of the notebook's."""
    defaults = {field.name: field.default for settings in settings_classes(notebook) for field in fields(settings)}
    values = resolved_values(notebook)
    assert not {name for name in values.keys() - {"seed"} if name in defaults and values[name] == defaults[name]}


@pytest.mark.parametrize("profile", PROFILES)
def test_no_profile_restates_a_default_or_what_it_extends(profile):
    """Each key of a section changes the value of at least one of the section's notebooks."""
    changed = {}
    for path in NOTEBOOKS:
        own = nbformat.read(path, as_version=4)
        values = {field.name: field.default for settings in settings_classes(own) for field in fields(settings)}
        values |= resolved_values(own)
        for writer, names, section in profile_parts(profile, path.stem):
            resolved = resolved_values(own, section)
            now = {name: resolved[name] for name in section}
            for name in section if writer == profile else ():
                changed.setdefault((names, name), set()).add(now[name] != values[name])
            values |= now
    assert [key for key, differs in changed.items() if differs == {False}] == []


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
