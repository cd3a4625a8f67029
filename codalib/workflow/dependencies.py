"""What shapes a notebook's numbers: files of the library, by its imports, and data and models outside the checkout."""

import ast
import contextlib
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import nbformat

import codalib
from codalib.base.paths import runs_folder
from codalib.datasets.images import KINDS
from codalib.pretrained.registry import weights_folder
from codalib.workflow.profiles import texts_in

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


def outside(values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What the data and models that VALUES name outside the checkout and its runs hold: {"outside": {name: digest}}.

    The names, sizes and dates of the files count, which a look at the folders gives: the bytes are compared by the
    stage itself, once it runs. Empty where there are none, as with what is embedded.
    """
    found = {}
    for text in texts_in(values):
        kind, colon, path = text.partition(":")
        place = Path(os.path.expandvars(path if colon and kind in KINDS else text)).expanduser()
        place = next((one for one in (place, *place.parents) if "{" not in str(one)), place)  # tars by braces
        if not place.is_absolute() and not (colon and kind in KINDS):
            place = weights_folder() / place
            if place == weights_folder():
                continue
        if place.exists() and not place.resolve().is_relative_to(runs_folder().resolve()):
            found[text] = _listing(place)
    return {"outside": dict(sorted(found.items()))} if found else {}


@cache
def _listing(place: Path) -> str:
    files = [place] if place.is_file() else (Path(top, name) for top, _, names in os.walk(place) for name in names)
    rows = []
    for file in files:
        with contextlib.suppress(OSError):  # a link that leads nowhere, or a file that has just gone
            state = file.stat()
            rows.append((str(file), state.st_size, state.st_mtime_ns))
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()[:16]


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
