"""The files of the library that shape a notebook's numbers, from the graph of its imports."""

import ast
import os
from functools import cache
from pathlib import Path

import grimp
import nbformat

import codalib

PACKAGE = Path(codalib.__file__).parent
DRAWN = ("codalib.reporting", "codalib.workflow")  # rooms that only draw, write and record


def library_files(path: str | Path) -> list[str]:
    """The modules of codalib that a notebook imports, and those that these import, as paths from the working directory.

    A notebook that trains (its name starts with a digit) does not depend on the rooms that only draw, write and record,
    so that a new colour does not train anything again.

    Raises ValueError where the notebook imports something from codalib that is not there.
    """
    path = Path(path)
    cells = nbformat.read(path, as_version=4).cells
    named = _imported("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    if missing := sorted(named - _graph().modules):
        raise ValueError(f"{path} imports {', '.join(missing)}, expected modules of codalib")
    skipped = DRAWN if path.stem[0].isdigit() else ()
    pending, found = set(named), set()
    while pending:
        module = pending.pop()
        if module not in found and not module.startswith(skipped):
            found.add(module)
            pending |= _graph().find_modules_directly_imported_by(module)
    return sorted(os.path.relpath(_file(module)) for module in found)


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph("codalib", cache_dir=None)


def _file(module: str) -> Path:
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _imported(source: str) -> set[str]:
    """The modules of codalib that SOURCE imports; lines of IPython magic are passed over."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    found = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "codalib"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "codalib":
            found |= {_module(node.module, name.name) for name in node.names}
    return found


def _module(package: str, name: str) -> str:
    """The module behind `from PACKAGE import NAME`: a module itself, a name of the front door, or PACKAGE."""
    if package == "codalib" and name in codalib.FRONT_DOOR:
        return f"codalib.{codalib.FRONT_DOOR[name]}"
    whole = f"{package}.{name}"
    return whole if whole in _graph().modules else package
