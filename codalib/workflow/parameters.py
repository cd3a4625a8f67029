"""A notebook's parameters: declared in one cell, checked by name and type before any work.

The parameters cell holds what people change and what the notebook alone reads. Every other field of the dataclasses
that the notebook fills (the settings of a training stage) is given by its name, in the parameter `settings` or like a
parameter of its own: `-y "{settings: {rank: 8}}"` and `-p rank 8` say the same. What is given is merged, field by
field, over the small values that the notebook's own `settings` holds.
"""

import ast
import difflib
import functools
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

import codalib.reporting.tables  # noqa: F401  its options of pandas: settings are shown whole
from codalib.base.files import PLAIN
from codalib.workflow.profiles import StageError
from codalib.workflow.types import advice, convert, parse, spell

SETTINGS = "settings"  # the parameter that takes fields of dataclasses by name
IPYTHON_NAMES = {"In", "Out"}
INJECTED = "__codalib_injected__"  # in a kernel's globals: what was given without being declared, at the first check
Settings = typing.TypeVar("Settings")


# --- a notebook file, read without running it -------------------------------------------------------------------------
def declared_parameters(notebook: nbformat.NotebookNode) -> dict[str, tuple[str, Any]]:
    """{name: (type as written, default)} of the parameters cell.

    Read by Python's own parser: papermill's inspection, which `--help-notebook` shows, loses a parameter whose default
    holds an equals sign or whose type holds more than names and brackets (hence "Optional[int]" in notebooks).
    """
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise StageError(f"expected exactly one cell tagged `parameters`, got {len(cells)}")
    return _declarations(cells[0])


def declared_types(notebook: nbformat.NotebookNode) -> tuple[dict[str, str], dict[str, str]]:
    """{name: type as written} of the parameters, and of the fields that the notebook's `settings` takes.

    The fields are those of the dataclasses that the notebook gives to `check_parameters`, read from their source, since
    to import them takes seconds.
    """
    hints = {name: hint for name, (hint, _) in declared_parameters(notebook).items()}
    nodes = [node for cell in notebook.cells if cell.cell_type == "code" for node in ast.walk(_parse(cell.source))]
    modules = {name.name: node.module for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
    calls = [
        node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_parameters"
    ]
    classes = [_source_fields(modules[settings.id], settings.id) for call in calls for settings in call.args[1:]]
    without = {name for call in calls for keyword in call.keywords for name in ast.literal_eval(keyword.value)}
    return _types(hints, classes, without)


def notebook_values(notebook: nbformat.NotebookNode, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """What papermill is to put into a notebook: LAYERS of values by name, each over those before.

    Fields go into `settings`, together with the notebook's own. Wrong names and types raise ValueError.
    """
    hints, loose = declared_types(notebook)
    values = {SETTINGS: declared_parameters(notebook)[SETTINGS][1]} if SETTINGS in hints else {}
    for layer in layers:
        values |= _merged(layer, loose, values.get(SETTINGS, {}))
    validate(hints, values, loose)
    return values


def parsed(notebook: nbformat.NotebookNode, texts: Mapping[str, str]) -> dict[str, Any]:
    """Values typed on the command line as the types that the notebook declares; what cannot be one stays a text."""
    hints, loose = declared_types(notebook)
    types_of = loose | hints
    return {name: parse(text, _evaluated(types_of.get(name, str))) for name, text in texts.items()}


def resolved_values(notebook: nbformat.NotebookNode, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} in its type of every parameter of a notebook, and of the fields that it or LAYERS give."""
    defaults = {name: default for name, (_, default) in declared_parameters(notebook).items()}
    hints, loose = declared_types(notebook)
    values = validate(hints, defaults | notebook_values(notebook, *layers), loose)
    return {name: value for name, value in values.items() if name != SETTINGS} | values.get(SETTINGS, {})


def filled_settings(notebook: nbformat.NotebookNode, values: Mapping[str, Any]) -> list[Any]:
    """The dataclasses of settings that a notebook would make of its VALUES, by its own lines and nothing else.

    They say whether values go together, as types alone do not; ValueError where these do not. Lines that need more than
    the values, such as a data set, are left out.
    """
    setup = next((cell.source for cell in notebook.cells if "= check_parameters(" in cell.source), "")
    space = {**values, "parameters": dict(values)}
    for node in _parse(setup).body:
        called = getattr(getattr(getattr(node, "value", None), "func", None), "id", "")
        checks = called in ("settings_from", "check_sweep") or called.endswith("Settings")
        plain = isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if isinstance(node, ast.ImportFrom) or plain or checks:
            exec(compile(ast.Module([node], []), "<notebook>", "exec"), space)
    return [value for value in space.values() if is_dataclass(value) and not isinstance(value, type)]


def _types(
    declared: Mapping[str, Any], classes: Iterable[Mapping[str, Any]], without: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a notebook's parameters, that of a field's own name the field's, and of its other fields."""
    found: dict[str, Any] = {}
    for fields_of_one in classes if SETTINGS in declared else ():
        found = {name: hint for name, hint in fields_of_one.items() if name not in without} | found
    hints = {name: found.get(name, hint) for name, hint in declared.items()}
    return hints, {name: hint for name, hint in found.items() if name not in declared}


def _merged(given: Mapping[str, Any], loose: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """GIVEN, its fields (LOOSE names, and those in its `settings`) together over SETTINGS."""
    inside = given.get(SETTINGS, {})
    if not isinstance(inside, dict):
        return dict(given)  # no mapping: the check of types says so
    by_name = {name: value for name, value in given.items() if name in loose}
    flat = {name: value for name, value in given.items() if name not in by_name and name != SETTINGS}
    merged = {**settings, **inside, **by_name}
    return flat | ({SETTINGS: merged} if merged or SETTINGS in given else {})


def _declarations(cell: str) -> dict[str, tuple[str, Any]]:
    return {
        statement.target.id: (_written(statement.annotation), ast.literal_eval(statement.value))
        for statement in _parse(cell).body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
    }


def _written(annotation: ast.expr) -> str:
    """A type as written, in quotes or not."""
    return annotation.value if isinstance(annotation, ast.Constant) and annotation.value else ast.unparse(annotation)


def _parse(cell: str) -> ast.Module:
    """The syntax tree of a cell, lines of IPython magic left out."""
    return ast.parse("\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in cell.splitlines()))


@functools.cache  # a profile asks for the same ones with each of its stages
def _source_fields(module: str, name: str) -> dict[str, str]:
    """{field: type as written} of a dataclass, its bases' in the same module first."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for base in classes[name].bases:
        found |= _source_fields(module, base.id)
    return found | {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in classes[name].body
        if isinstance(statement, ast.AnnAssign)
    }


# --- in the notebook --------------------------------------------------------------------------------------------------
def check_parameters(namespace: dict[str, Any], *settings: type, without: Iterable[str] = ()) -> dict[str, Any]:
    """Check a notebook's parameters before any work: call it with `globals()` in the cell after the parameters cell.

    The parameters cell declares `name: type = value`; papermill then assigns plain names. A name that is neither
    declared nor a field of the dataclasses SETTINGS, and a value of another type, raise one ValueError that names each.
    An int is taken for a float and a list for a tuple, and stands converted in NAMESPACE afterwards; a bool is never a
    number. In a kernel that has passed once, the names that a notebook has bound since are left alone.

    Args:
        without: fields that the notebook sets itself, which are not taken.
    Returns {name: value} of the declared parameters and of the fields that are given.
    """
    declared = {name: hint for name, hint in namespace.get("__annotations__", {}).items() if not name.startswith("_")}
    if not declared:
        raise ValueError("expected a parameters cell with `name: type = value` for each parameter, got none")
    hints, loose = _types(declared, map(typing.get_type_hints, settings), set(without))
    given = {name: namespace[name] for name in declared if name in namespace}
    history = [cell for cell in namespace.get("In", []) if isinstance(cell, str)]
    injected = namespace.get(INJECTED)
    if injected is None:
        cells = [*history, _source(sys._getframe(1))]  # a kernel without a history has no In
        known = declared.keys() | IPYTHON_NAMES | _imported_names(cells)
        injected = {
            name: value
            for name, value in namespace.items()
            if name not in known and not name.startswith("_") and isinstance(value, PLAIN)
        }
    values = validate(hints, _merged(given | injected, loose, _declared_settings(history)), loose)
    namespace |= values
    namespace[INJECTED] = injected
    return {name: value for name, value in values.items() if name != SETTINGS} | values.get(SETTINGS, {})


def validate(
    declared: Mapping[str, Any], given: Mapping[str, Any], loose: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Values of GIVEN converted to their DECLARED types, those of `settings` to those of LOOSE.

    Unknown names and other types raise one ValueError.
    """
    values, problems = {}, []
    loose = {} if loose is None else loose

    def check(items: Mapping[str, Any], hints: Mapping[str, Any], into: dict[str, Any], what: str) -> None:
        for name, value in items.items():
            if name not in hints:
                problems.append(_unknown(name, declared, loose, what))
                continue
            hint = _evaluated(hints[name])
            try:
                into[name] = convert(value, hint)
            except TypeError:
                problems.append(f"expected {spell(hint)} for `{name}`, got {value!r}{advice(value, hint)}")

    check(given, declared, values, "a parameter")
    if isinstance(values.get(SETTINGS), dict):
        own = values[SETTINGS] = dict(values[SETTINGS])
        check(given[SETTINGS], loose, own, "a field in `settings`")
    if problems:
        raise ValueError("; ".join(problems))
    return values


def _evaluated(hint: Any) -> Any:
    """A type, from its written form where it is one."""
    return eval(hint, dict(vars(typing))) if isinstance(hint, str) else hint


def _unknown(name: str, declared: Iterable[str], loose: Iterable[str], what: str) -> str:
    if what != "a parameter" and name in declared:
        return f"expected `{name}` as a parameter of its own, got it in `settings`"
    closest = difflib.get_close_matches(name, [*declared, *loose], n=1, cutoff=0)[0]
    return f"expected {what} of this notebook, got `{name}`: the closest is `{closest}`"


def settings_from(settings: type[Settings], parameters: Mapping[str, Any], **derived: Any) -> Settings:
    """The dataclass SETTINGS filled from PARAMETERS of the same names, then from DERIVED; a gap raises ValueError."""
    names = {field.name for field in fields(settings) if field.init}
    if unknown := derived.keys() - names:
        raise ValueError(f"expected fields of {settings.__name__}, got {', '.join(sorted(unknown))}")
    values = {name: value for name, value in parameters.items() if name in names} | derived
    required = [f.name for f in fields(settings) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"expected {', '.join(missing)} of {settings.__name__} in the parameters cell, got none")
    return settings(**values)


def settings_table(*settings: Any) -> pd.DataFrame:
    """The resolved settings of a run, one row a field: its value, and its default where that is another."""
    rows = []
    for one in settings:
        for field in fields(one):
            value = getattr(one, field.name)
            default = "" if field.default is MISSING or value == field.default else repr(field.default)
            rows.append({"Of": type(one).__name__, "Setting": field.name, "Value": repr(value), "Default": default})
    return pd.DataFrame(rows).set_index(["Of", "Setting"])


def _declared_settings(cells: Iterable[str]) -> dict[str, Any]:
    """The `settings` of the parameters cell, from the last of CELLS that declares it: papermill replaces it."""
    found: dict[str, Any] = {}
    for cell in cells:
        try:
            found = _declarations(cell).get(SETTINGS, ("", found))[1]
        except (SyntaxError, ValueError):  # another language's cell, or values that are no literals: no parameters cell
            continue
    return found


def _source(frame: types.FrameType) -> str:
    """The code that FRAME runs, a notebook's cell; "" where Python does not have it."""
    try:
        return inspect.getsource(frame)
    except OSError:
        return ""


def _imported_names(cells: Iterable[str]) -> set[str]:
    """Names that the import statements of the cells run so far have bound (an imported constant is no parameter)."""
    names: set[str] = set()
    for cell in cells:
        try:
            tree = _parse(cell)
        except SyntaxError:  # another language's cell
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names
