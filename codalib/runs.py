"""One run of a notebook: its checked parameters, its folder, and the manifest that says how its numbers came about."""

import ast
import difflib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

MANIFEST = "manifest.json"
RESULTS = ("tables", "figures", "metrics", "claims")  # what a stage may hand to the report
FILES = ("file", "png", "svg", "gif")  # keys of a result that name files
LIBRARIES = ("codalib", "torch", "torchvision", "diffusers", "peft", "accelerate", "timm", "torchmetrics", "numpy")
PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, type(None))  # what papermill can inject
IPYTHON_NAMES = {"In", "Out"}
CHECKED = "__codalib_checked__"  # left in a kernel's globals once its injected parameters have been looked at
Settings = typing.TypeVar("Settings")


# --- folders and files ------------------------------------------------------------------------------------------------


def project_folder() -> Path:
    """The checkout that holds this package, or the working directory where the package is installed apart from one."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "Snakefile").exists() else Path.cwd()


def runs_folder(name: str | Path = "") -> Path:
    """The folder NAME of checkpoints and results, below `$CODALIB_RUNS` or `runs/`; an absolute NAME is kept."""
    return Path(os.environ.get("CODALIB_RUNS") or project_folder() / "runs") / name


def reports_folder(name: str | Path = "") -> Path:
    """The folder NAME of pages and tables, below `$CODALIB_REPORTS` or `reports/`; an absolute NAME is kept."""
    return Path(os.environ.get("CODALIB_REPORTS") or project_folder() / "reports") / name


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open PATH for writing ("w" or "wb") so that readers see the old file or the whole new one, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes private files; give this one the mode of any other
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; a broken one raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file ({error}): remove it and run its stage again.") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write VALUE atomically; numpy and torch scalars become numbers, a float that is not finite becomes null."""
    with atomic_write(path) as file:
        json.dump(_plain(value), file, indent=2, allow_nan=False)
        file.write("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, PLAIN) and hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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


# --- the manifest -----------------------------------------------------------------------------------------------------


class Run:
    """One run of a notebook in its own folder, recorded in `manifest.json` from its first second on.

    Args:
        output: the run's folder, below `runs_folder()` unless absolute; it is made.
        notebook: the notebook's name without its ending, such as "01_train_tokenizer".
        parameters: what `check_parameters` returned.
        seed: the seed of everything random in the run.
    """

    def __init__(self, output: str | Path, notebook: str, parameters: Mapping[str, Any], seed: int) -> None:
        self.folder = runs_folder(output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clock = time.monotonic()
        self.manifest = {
            "notebook": notebook,
            "state": "running",
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seed": seed,
            "parameters": dict(parameters),
            **source_version(),
            "versions": library_versions(),
            "machine": machine(),
        }
        write_json(self.folder / MANIFEST, self.manifest)

    def finish(self, results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Record the end of the run and its RESULTS, and return the manifest.

        RESULTS may hold "tables" [{"file", "title", "caption"}], "figures" [{"png", "svg", "caption", "alt"} and for an
        animation "gif"], "metrics" {name: number} and "claims" [{"id", "verdict", "effect", "detail"}]; files are named
        relative to the folder and must exist. Anything else raises ValueError.
        """
        results = dict(results or {})
        unknown = results.keys() - set(RESULTS)
        if unknown:
            raise ValueError(f"A run's results hold {', '.join(RESULTS)}, got {', '.join(sorted(unknown))}.")
        rows = (*results.get("tables", ()), *results.get("figures", ()))
        missing = [row[key] for row in rows for key in FILES if key in row and not self._has(row[key])]
        if missing:
            raise ValueError(f"The results name files that are not in {self.folder}: {', '.join(missing)}.")
        self.manifest |= {
            "state": "finished",
            "seconds": round(time.monotonic() - self._clock, 1),
            "peak_memory_bytes": peak_memory(),
            "peak_gpu_memory_bytes": _gpu("max_memory_allocated"),
            "results": _plain(results),
        }
        write_json(self.folder / MANIFEST, self.manifest)
        return self.manifest

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()


def source_version() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout, its reports left out; both None where git or a checkout is missing."""

    def git(*command: str) -> str:
        root = str(project_folder())
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)reports")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape the numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """The processor's name, usable cores, memory in bytes and, where torch is loaded, the GPU's name (None: there is
    none) and whether the machine multiplies bfloat16, which the precision "auto" of the training stages then takes."""
    lines = _cpuinfo().splitlines()
    processor = platform.processor() or platform.machine()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {"processor": processor, "cores": cores, "memory_bytes": memory, "gpu": _gpu("get_device_name")}
    return found | {"bfloat16": has_bfloat16() if "torch" in sys.modules else None}


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def compute_device() -> str:
    """Where a notebook computes: "cuda" where torch sees a GPU, else "cpu"."""
    import torch  # here alone: what reads results needs no torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware; emulated, it is ten times slower than float32."""
    import torch  # here alone, as above

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


def _gpu(query: str) -> Any:
    torch = sys.modules.get("torch")  # a run that never loaded torch used no GPU
    return getattr(torch.cuda, query)() if torch is not None and torch.cuda.is_available() else None


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
