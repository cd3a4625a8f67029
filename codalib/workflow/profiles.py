"""Profiles: which notebooks run, and which of their values differ from the defaults.

A profile is a YAML file. `extends` names a profile whose values it takes over, `stages` the notebooks that it runs,
`resources` what each of them takes on a cluster (`profile_resources`). Any other key names a notebook, or several with
commas between, and holds their parameters and fields of settings by name; a later section goes over an earlier one, and
all of a profile's own over those that it extends. A text that begins with PROFILE/ names a folder of the run's own
profile.
"""

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from codalib.base.paths import MissingPart, project_folder
from codalib.workflow.types import PlainLoader, convert, spell

EXTENDS, STAGES, RESOURCES = "extends", "stages", "resources"  # keys of a profile that name no notebook
ALL = "all"  # below `resources`: of every stage
OWN = "PROFILE/"  # in a value: the profile that runs


class StageError(Exception):
    """A notebook that could not be run to its end; its message says why in one sentence."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Resources:
    """What a stage takes on a cluster, on one machine; what is None is the cluster's default."""

    gpus: int = 0
    cores: int = 2
    memory: float = 8.0  # GB
    hours: float = 24.0  # after which the cluster ends it; the same command goes on from its last checkpoint
    partition: str | None = None  # of the cluster's machines
    account: str | None = None  # that the cluster charges

    def for_snakemake(self) -> dict[str, Any]:
        """Under the names that Snakemake and its plugin for Slurm know, None where there is nothing to ask for."""
        return {
            "gpu": self.gpus or None,
            "mem_mb": round(self.memory * 1000),
            "runtime": max(1, round(self.hours * 60)),  # minutes
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "nodes": 1,
        }


def profile_resources(profile: str, stage: str) -> Resources:
    """What STAGE takes on a cluster, by `resources` of PROFILE and of what it extends: {notebooks: {name: value}}.

    The key `all` is for every stage; a later line goes over an earlier one, value by value. StageError for a notebook,
    a name or a value that is none.
    """
    found, hints = Resources(), {field.name: field.type for field in fields(Resources)}
    for one in _line(profile):
        path, section = profile_path(one), _read(one).get(RESOURCES) or {}
        if not isinstance(section, dict) or not all(isinstance(values, dict) for values in section.values()):
            raise StageError(f"{path}: expected notebooks with names and values in {RESOURCES}, got {section!r}")
        for key, values in section.items():
            names = _notebooks(key, path, ALL)
            if unknown := [name for name in values if name not in hints]:
                raise StageError(f"{path}: expected {RESOURCES} of {', '.join(hints)}, got {', '.join(unknown)}")
            if ALL in names or stage in names:
                found = replace(found, **{name: _resource(path, name, values[name], hints[name]) for name in values})
    return found


def _resource(path: Path, name: str, value: Any, hint: Any) -> Any:
    try:
        converted = convert(value, hint)
    except TypeError:
        converted = math.nan  # neither a number nor a text: refused below
    if isinstance(converted, int | float) and not (converted > 0 or (name == "gpus" and converted == 0)):
        above = "" if name in ("partition", "account") else " above 0"
        raise StageError(f"{path}: expected {spell(hint)}{above} for {name} in {RESOURCES}, got {value!r}")
    return converted


def profile_path(profile: str) -> Path:
    """The YAML file of a profile; an unknown profile raises StageError with the known ones."""
    folder = project_folder() / "profiles"
    path = folder / f"{profile}.yaml"
    if not folder.exists():
        raise StageError(str(MissingPart(folder)))
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise StageError(f"expected a profile of {known}, got {profile!r}")
    return path


def profile_section(profile: str, notebook: str) -> dict[str, Any]:
    """The values that PROFILE, with what it extends, gives to NOTEBOOK: {name: value}, empty where it has none."""
    values = {name: value for _, _, part in profile_parts(profile, notebook) for name, value in part.items()}
    return {name: _filled(value, profile) for name, value in values.items()}


def profile_parts(profile: str, notebook: str) -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """The sections that `profile_section` puts together, the later over the earlier.

    Of each the profile, the notebooks that it is for, and its values as written.
    """
    sections = [(one, names, section) for one in _line(profile) for names, section in _sections(one).items()]
    return [(one, names, dict(section)) for one, names, section in sections if notebook in names]


def profile_stages(profile: str, order: Sequence[str]) -> dict[str, list[str]]:
    """The notebooks that PROFILE runs, its `stages` or all, in ORDER: notebook -> those whose results it reads.

    A notebook reads the results of another where one of its values names that one's folder, "PROFILE/NOTEBOOK".
    Raises StageError for a name that is not in ORDER, and for a notebook that reads one which the profile does not run.
    """
    named = [contents[STAGES] for contents in map(_read, _line(profile)) if STAGES in contents]
    chosen = named[-1] if named else order
    if unknown := [str(name) for name in chosen if name not in order]:
        raise StageError(f"{profile_path(profile)}: expected {STAGES} of {', '.join(order)}, got {', '.join(unknown)}")
    needs = {}
    for name in (name for name in order if name in chosen):
        texts = list(texts_in(profile_section(profile, name)))
        needs[name] = [other for other in order if any(f"{text}/".startswith(f"{profile}/{other}/") for text in texts)]
        if missing := [other for other in needs[name] if other not in chosen]:
            raise StageError(f"{profile_path(profile)}: {name} needs {', '.join(missing)}: add it to {STAGES}")
    return needs


def _line(profile: str) -> list[str]:
    """PROFILE and what it extends, the last first; StageError for one that is not there, and for a circle."""
    line = [profile]
    while base := _read(line[0]).get(EXTENDS):
        if base in line:
            raise StageError(f"expected profiles that extend one another in a line, got {' -> '.join([base, *line])}")
        line.insert(0, base)
    return line


def _sections(profile: str) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """A profile's own sections: the notebooks that each is for -> its values."""
    path, found = profile_path(profile), {}
    for key, section in _read(profile).items():
        if key in (EXTENDS, STAGES, RESOURCES):
            continue
        names = _notebooks(key, path)
        if not isinstance(section or {}, dict):
            raise StageError(f"{path}: expected names and values in the section {key!r}, got {section!r}")
        if "settings" in (section or {}):
            raise StageError(f"{path}: expected the fields themselves as keys of the section {key!r}, got `settings`")
        found[names] = section or {}
    return found


def _notebooks(key: Any, path: Path, *others: str) -> tuple[str, ...]:
    """The notebooks that a KEY of the profile PATH names, or OTHERS; StageError for one that is not there."""
    notebooks, names = project_folder() / "notebooks", tuple(name.strip() for name in str(key).split(","))
    if unknown := [name for name in names if name not in others and not (notebooks / f"{name}.ipynb").exists()]:
        raise StageError(f"{path}: expected sections of notebooks, got {', '.join(unknown)}")
    return names


@functools.cache  # a profile is read for each of its stages
def _parsed(text: str) -> Any:
    return yaml.load(text, PlainLoader)


def _read(profile: str) -> dict[str, Any]:
    path = profile_path(profile)
    try:
        contents = copy.deepcopy(_parsed(path.read_text(encoding="utf-8"))) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"{path}: expected YAML, got {' '.join(str(error).split())}: put texts in quotes") from error
    if not isinstance(contents, dict):
        raise StageError(f"{path}: expected notebooks with their values, got {contents!r}")
    return contents


def _filled(value: Any, profile: str) -> Any:
    """VALUE, however deep, with PROFILE/ filled in."""
    if isinstance(value, dict):
        return {name: _filled(part, profile) for name, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, profile) for part in value]
    return f"{profile}/{value.removeprefix(OWN)}" if isinstance(value, str) and value.startswith(OWN) else value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of a profile, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)
