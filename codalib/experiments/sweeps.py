"""A sweep: a method at every setting with one seed, then its best and the paper's setting with the other seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from codalib.base.files import read_json, write_json
from codalib.base.paths import runs_folder
from codalib.experiments.bracketing import bracket

BEST, PAPER = "best of its sweep", "paper's setting"
VARIANTS = "variants.json"  # the rows of a notebook that trains several tokenizers
Setting = TypeVar("Setting")


def check_sweep(learning_rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Raise ValueError for what `sweep` cannot train with, before any work is done."""
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"expected one or more learning_rates, all above 0, got {list(learning_rates)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected one or more seeds, all different, got {list(seeds)}")


def sweep(
    train: Callable[[Setting, int], dict[str, Any]],
    settings: Sequence[Setting],
    seeds: Sequence[int],
    score: str,
    paper: Setting | None,
    bracketed: bool = False,
) -> list[dict[str, Any]]:
    """Train a method at every setting with the first seed; then at its best and the paper's with the other seeds.

    Args:
        train: trains at a setting, such as a learning rate, with a seed; returns a row with a number SCORE, of which
            the lowest is best.
        paper: the paper's setting, which may be among the others; None: only the best is trained again.
        bracketed: the settings are numbers, and more are tried until the best is inside, see `bracketing.bracket`.
    Returns the rows, each with "settings": which of `BEST` and `PAPER` it stands for, if any.
    """
    first: dict[Setting, dict[str, Any]] = {}

    def tried(setting: Setting) -> float:
        first[setting] = train(setting, seeds[0])
        return first[setting][score]

    if bracketed:
        bracket(tried, sorted(settings))
    else:
        for setting in settings:
            tried(setting)
    if bracketed and paper is not None and paper not in first:
        tried(paper)
    best = min(first, key=lambda setting: first[setting][score])
    names = {setting: [name for name, own in ((BEST, best), (PAPER, paper)) if own == setting] for setting in first}
    again = [(setting, seed) for setting in first for seed in seeds[1:] if names[setting]]
    rows = [*first.items(), *((setting, train(setting, seed)) for setting, seed in again)]
    return [row | {"settings": names[setting]} for setting, row in rows]


def write_rows(rows: Sequence[dict[str, Any]], folder: str | Path) -> None:
    """Write rows as `VARIANTS` of a folder, the paths of their tokenizers relative to it."""
    folder = Path(folder)
    own = [row | {"tokenizer": str((folder / row["tokenizer"]).relative_to(folder))} for row in rows]
    write_json(folder / VARIANTS, own)


def read_rows(folder: str) -> list[dict[str, Any]]:
    """What `write_rows` wrote below `runs_folder()`, with whole paths."""
    place = runs_folder(folder)
    if not (place / VARIANTS).exists():
        notebooks = "01_train_variants or 01_train_baselines"
        raise ValueError(f"expected the folder of {notebooks}, got {place}, which holds no {VARIANTS}")
    return [row | {"tokenizer": str(place / row["tokenizer"])} for row in read_json(place / VARIANTS)]
