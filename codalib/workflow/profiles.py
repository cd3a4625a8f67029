"""Profiles: which notebooks run, and which of their parameters differ from the defaults."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from codalib.base.paths import MissingPart, project_folder

STAGES = "stages"  # a profile's list of the notebooks that it runs


class StageError(Exception):
    """A notebook that could not be run to its end; its message says why in one sentence."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def profile_path(profile: str) -> Path:
    """The YAML file of a profile; an unknown profile raises StageError with the known ones."""
    folder = project_folder() / "profiles"
    path = folder / f"{profile}.yaml"
    if not folder.exists():
        raise StageError(str(MissingPart(folder)))
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise StageError(f"There is no profile {profile!r}; profiles/ has {known}.")
    return path


def profile_section(profile: str, notebook: str) -> dict[str, Any]:
    """What PROFILE changes in the parameters of NOTEBOOK: {name: value}, empty where it has no section for it."""
    path, contents = profile_path(profile), _read_profile(profile)
    section = contents.get(notebook) or {}
    if not isinstance(section, dict):
        raise StageError(f"{path}: the section {notebook!r} must map names to values, got {section!r}.")
    return section


def profile_stages(profile: str, order: Sequence[str]) -> dict[str, list[str]]:
    """The notebooks that PROFILE runs, its `stages` or all, in ORDER: notebook -> those whose results it reads.

    A notebook reads the results of another where one of its values names that one's folder, "PROFILE/NOTEBOOK".
    Raises StageError for a name that is not in ORDER, and for a notebook that reads one which the profile does not run.
    """
    chosen = _read_profile(profile).get(STAGES, order)
    unknown = [str(name) for name in chosen if name not in order]
    if unknown:
        raise StageError(
            f"{profile_path(profile)}: {STAGES} names {', '.join(unknown)}, expected some of {', '.join(order)}."
        )
    needs = {}
    for name in (name for name in order if name in chosen):
        texts = list(_texts(profile_section(profile, name)))
        needs[name] = [other for other in order if any(f"{text}/".startswith(f"{profile}/{other}/") for text in texts)]
        missing = [other for other in needs[name] if other not in chosen]
        if missing:
            raise StageError(f"{profile_path(profile)}: {name} needs {', '.join(missing)}: add it to {STAGES}.")
    return needs


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of a profile, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _read_profile(profile: str) -> dict[str, Any]:
    path = profile_path(profile)
    contents = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    notebooks = project_folder() / "notebooks"
    unknown = [str(name) for name in contents if name != STAGES and not (notebooks / f"{name}.ipynb").exists()]
    if unknown:
        raise StageError(f"{path} has sections of no notebook: {', '.join(unknown)}.")
    return contents
