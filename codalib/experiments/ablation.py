"""The quantizers on a frozen VAE that Table 1 and Figures 3 to 6 compare: cells of the factorial, with their codes.

They are the middle steps of Table 1's ablation. A fourth, attention with one level, is not in the paper's table: it
shows what attention does without residual levels, and its codes lie in the space of the latents themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from codalib.base.files import atomic_folder, read_json, write_json
from codalib.base.paths import DATA, embedded
from codalib.experiments.paper import TABLE_1
from codalib.experiments.sweeps import BEST, PAPER
from codalib.models.quantizer import ResidualQuantizer
from codalib.pretrained.registry import load_checked, read_weights
from codalib.training.settings import QuantizerSettings

CONTINUOUS, VQ, RESIDUAL, ATTENTION, ADAPTED = (row.method for row in TABLE_1)
ONE_LEVEL_ATTENTION = "Attention quantization, one level"
METHODS = {  # method -> kind of quantizer, and whether it has the residual levels
    VQ: ("nearest", False),
    ONE_LEVEL_ATTENTION: ("attention", False),
    RESIDUAL: ("nearest", True),
    ATTENTION: ("attention", True),
}
EMBEDDED_QUANTIZERS = {"emoji": DATA / "quantizers-emoji"}  # name -> folder
INDEX = "quantizers.json"


@dataclass(frozen=True)
class Fitted:
    """A fitted quantizer of a method of `METHODS`, at `BEST` or `PAPER`, with one seed."""

    method: str
    setting: str
    settings: QuantizerSettings
    quantizer: ResidualQuantizer
    snapshots: tuple[tuple[int, ResidualQuantizer], ...] = ()  # (step, the quantizer after so many steps), rising


def ablation_rows(
    rows: Sequence[Mapping[str, Any]], one_level: str, levels: str
) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Of the rows of `Factorial.run` those that stand for a method of `METHODS`: (method, setting, row), seed by seed.

    At the best, of a kind's two starts the one with the lower error on the choosing images stands. At the paper's
    setting codes start at random, as the paper's do; where no such trial is, as those at the best.

    Args:
        one_level, levels: names of the grids of the methods with one level and with residual levels.
    Raises:
        ValueError: a method has no finished trial.
    """
    found = []
    for method, (kind, residual) in METHODS.items():
        grid = levels if residual else one_level
        own = [row for row in rows if row["grid"] == grid and row["settings"]["kind"] == kind and "test" in row]
        for name, setting in (("best", BEST), ("paper", PAPER)):
            cell = [row for row in own if row["setting"] == name]
            if not cell:
                raise ValueError(f"expected a finished trial of {kind} codes on {grid!r}, {name} setting, got none")
            if name == "best":
                first = [row for row in cell if row["settings"]["seed"] == cell[0]["settings"]["seed"]]  # as the claims
                start = min(first, key=lambda row: row["choose"]["relative_error"])["settings"]["start"]
            elif any(row["settings"]["start"] == "random" for row in cell):
                start = "random"
            found += [(method, setting, row) for row in cell if row["settings"]["start"] == start]
    return found


def chosen(quantizers: Sequence[Fitted], method: str, setting: str) -> list[Fitted]:
    """The quantizers of a METHOD at `BEST` or at `PAPER`, one a seed; ValueError where there are none."""
    own = [fitted for fitted in quantizers if (fitted.method, fitted.setting) == (method, setting)]
    if not own:
        there = sorted({f"{fitted.method}, {fitted.setting}" for fitted in quantizers})
        raise ValueError(f"expected one of {'; '.join(there)}, got {method!r}, {setting!r}")
    return own


# --- files ------------------------------------------------------------------------------------------------------------
def save_quantizers(quantizers: Sequence[Fitted], folder: str | Path, vae: str) -> None:
    """Write the quantizers, and the name of the VAE whose latents they quantize, as FOLDER, replacing what it was."""
    rows = []
    with atomic_folder(folder) as new:
        for number, fitted in enumerate(quantizers):
            states = {"": fitted.quantizer} | {f"-step-{step}": state for step, state in fitted.snapshots}
            for mark, quantizer in states.items():
                tensors = {name: value.detach().cpu().contiguous() for name, value in quantizer.state_dict().items()}
                save_file(tensors, new / f"{number:03d}{mark}.safetensors")
            steps = [step for step, _ in fitted.snapshots]
            own = {"method": fitted.method, "setting": fitted.setting, "settings": asdict(fitted.settings)}
            rows.append(own | {"snapshots": steps})
        channels = quantizers[0].quantizer.latent_channels
        write_json(new / INDEX, {"vae": vae, "latent_channels": channels, "quantizers": rows})


def load_quantizers(folder: str | Path) -> tuple[list[Fitted], str]:
    """The quantizers that `save_quantizers` wrote, in the same order, frozen, and their VAE.

    FOLDER may be an embedded name, "emoji". Raises ValueError where there are none.
    """
    known = EMBEDDED_QUANTIZERS.get(str(folder))
    folder = embedded(known) if known else Path(folder)
    if not (folder / INDEX).exists():
        notebook = "01_quantizer_factorial"
        raise ValueError(f"expected a folder that the notebook {notebook} wrote, got {folder}, which holds no {INDEX}")
    contents, quantizers = read_json(folder / INDEX), []
    for number, row in enumerate(contents["quantizers"]):
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in row["settings"].items()}
        settings = QuantizerSettings(**values)
        state = [
            with_weights(settings, contents["latent_channels"], folder / f"{number:03d}{mark}.safetensors")
            for mark in ("", *(f"-step-{step}" for step in row["snapshots"]))
        ]
        snapshots = tuple(zip(row["snapshots"], state[1:], strict=True))
        quantizers.append(Fitted(row["method"], row["setting"], settings, state[0], snapshots))
    return quantizers, contents["vae"]


def with_weights(settings: QuantizerSettings, channels: int, file: Path) -> ResidualQuantizer:
    """A quantizer of these settings for latents of so many CHANNELS with the weights of FILE, frozen."""
    with torch.random.fork_rng(devices=[]):  # fresh weights that are overwritten: the caller's randomness stays
        quantizer = settings.build_quantizer(channels)
    load_checked(quantizer, read_weights(str(file)), str(file))
    return quantizer.eval().requires_grad_(False)
