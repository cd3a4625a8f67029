"""Write the API reference, from the docstrings: `python docs/build_api.py [FOLDER]`, docs/api without one.

A page for each module; a warning of pdoc's is an error.
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import codalib
import codalib.models.checkpoints

HERE = Path(__file__).parent


def build(folder: Path) -> None:
    """Write the pages of `codalib` and of all its modules into FOLDER, index.html first."""
    # pdoc shows what a package's `__all__` names and finds in it: ours loads names when they are used.
    for name in codalib.__all__:
        setattr(codalib, name, getattr(codalib, name))
    for package in (codalib, codalib.models.checkpoints):
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"__main__"}
        package.__all__ += sorted(modules)
    warnings.filterwarnings("error", module="pdoc")
    # What a class inherits from a library is read too.
    warnings.filterwarnings("ignore", r"Error parsing type annotation .* for (?!codalib\.)", module="pdoc")
    pdoc.render.configure(docformat="google", footer_text=f"codalib {codalib.__version__}")
    pdoc.pdoc("codalib", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if sys.argv[1:] else HERE / "api")
