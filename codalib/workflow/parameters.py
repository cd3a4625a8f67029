"""A notebook's parameters: declared in one cell, checked by name and type before any work."""

import ast
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import nbformat

from codalib.base.files import PLAIN
from codalib.workflow.profiles import StageError


def declared_parameters(notebook: nbformat.NotebookNode) -> dict[str, tuple[str, Any]]:
    """{name: (type as written, default)} of the parameters cell.

    Read by Python's own parser: papermill's inspection loses a parameter whose default holds an equals sign.
    """
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise StageError(f"The notebook must have exactly one cell tagged `parameters`, it has {len(cells)}.")
    return {
        statement.target.id: (ast.unparse(statement.annotation), ast.literal_eval(statement.value))
        for statement in ast.parse(cells[0]).body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
    }


IPYTHON_NAMES = {"In", "Out"}
CHECKED = "__codalib_checked__"  # left in a kernel's globals once its injected parameters have been looked at
Settings = typing.TypeVar("Settings")


# --- parameters -------------------------------------------------------------------------------------------------------
def check_parameters(namespace: dict[str, Any]) -> dict[str, Any]:
    """Check a notebook's parameters before any work: call it with `globals()` in the cell after the parameters cell.

    The parameters cell declares `name: type = value`; papermill then assigns plain names. A name that was assigned but
    not declared, and a value of another type than declared, raise one ValueError that names each of them. An int is
    taken for a float and a list for a tuple, and stands converted in NAMESPACE afterwards; a bool is never a number.
    In a kernel that has passed once, only types are looked at, so that cells can be run again.

    Returns {name: value} of the declared parameters.
    """
    declared = {name: hint for name, hint in namespace.get("__annotations__", {}).items() if not name.startswith("_")}
    if not declared:
        raise ValueError("The parameters cell declares nothing: write each parameter as `name: type = value`.")
    given = {name: namespace[name] for name in declared if name in namespace}
    if not namespace.get(CHECKED):
        cells = [*namespace.get("In", []), _source(sys._getframe(1))]  # a kernel without a history has no In
        known = declared.keys() | IPYTHON_NAMES | _imported_names(cells)
        given |= {
            name: value
            for name, value in namespace.items()
            if name not in known and not name.startswith("_") and isinstance(value, PLAIN)
        }
    values = validate(declared, given)
    namespace |= values
    namespace[CHECKED] = True
    return values


def validate(declared: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of GIVEN converted to their DECLARED types; unknown names and other types raise one ValueError."""
    values, problems = {}, []
    for name, value in given.items():
        if name not in declared:
            closest = difflib.get_close_matches(name, declared, n=1, cutoff=0)[0]
            problems.append(f"There is no parameter `{name}`; the closest is `{closest}`.")
            continue
        hint = declared[name]
        hint = eval(hint, dict(vars(typing))) if isinstance(hint, str) else hint
        try:
            values[name] = _convert(value, hint)
        except TypeError:
            problems.append(f"Parameter `{name}` must be {_spell(hint)}, got {value!r}{_advice(value, hint)}.")
    if problems:
        raise ValueError(" ".join(problems))
    return values


def _convert(value: Any, hint: Any) -> Any:
    """VALUE as HINT: the value itself, an int as float, a list as tuple; TypeError where it is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        exact = [option for option in arguments if type(value) is (typing.get_origin(option) or option)]
        for option in (*exact, *arguments):
            try:
                return _convert(value, option)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is list or origin is list:
        if isinstance(value, list):
            return [_convert(item, arguments[0]) for item in value] if arguments else value
    elif hint is tuple or origin is tuple:
        if isinstance(value, list | tuple):
            if not arguments:
                return tuple(value)
            hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
            if len(hints) == len(value):
                return tuple(_convert(item, item_hint) for item, item_hint in zip(value, hints, strict=True))
    elif hint is dict or origin is dict:
        if isinstance(value, dict):
            key, item = arguments or (Any, Any)
            return {_convert(k, key): _convert(v, item) for k, v in value.items()}
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise TypeError


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _advice(value: Any, hint: Any) -> str:
    """What to write instead, for the values that YAML and the command line are known to misread."""
    wanted = set(typing.get_args(hint)) | {hint}
    if isinstance(value, str) and wanted & {int, float}:
        try:
            number = float(value)
        except ValueError:
            return ""
        return f" (a string: YAML reads a number without a point as text, so write {_yaml_number(number)})"
    if isinstance(value, str) and bool in wanted and value.lower() in ("true", "false", "yes", "no"):
        return " (a string: write True or False, in YAML true or false without quotes)"
    if isinstance(value, bool | int | float) and str in wanted:
        return " (put it in quotes in YAML; on papermill's command line give it with -r instead of -p)"
    return ""


def _yaml_number(number: float) -> str:
    mantissa, mark, exponent = repr(number).partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if mark else repr(number)


def _source(frame: types.FrameType) -> str:
    """The code that FRAME runs, a notebook's cell; "" where Python does not have it."""
    try:
        return inspect.getsource(frame)
    except OSError:
        return ""


def _imported_names(cells: list[str]) -> set[str]:
    """Names that the import statements of the cells run so far have bound (an imported constant is no parameter)."""
    names: set[str] = set()
    for cell in cells:
        try:
            tree = ast.parse(cell)
        except SyntaxError:  # a cell with an IPython magic
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def settings_from(settings: type[Settings], parameters: Mapping[str, Any], **derived: Any) -> Settings:
    """The dataclass SETTINGS filled from PARAMETERS of the same names, then from DERIVED; a gap raises ValueError."""
    names = {field.name for field in fields(settings) if field.init}
    unknown = derived.keys() - names
    if unknown:
        raise ValueError(f"{settings.__name__} has no field {', '.join(sorted(unknown))}; it has {sorted(names)}.")
    values = {name: value for name, value in parameters.items() if name in names} | derived
    required = [f.name for f in fields(settings) if f.init and f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{settings.__name__} needs {', '.join(missing)}: declare them in the parameters cell.")
    return settings(**values)
