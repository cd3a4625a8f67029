"""Rehearse a profile's tokenizer training before a GPU is paid for: `codalib rehearse --profile PROFILE`.

The notebook's own settings and the training code itself run on the real architectures, with seeded random weights where
the real ones are not on this machine: a step, a checkpoint, an interruption, a resume, a second step, an evaluation, a
save and a load. What is counted on the way (parameters, memory, floating-point operations) is what the real run will
have, and what it implies for a GPU is printed.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nbformat
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from codalib.base.files import atomic_write, read_json, write_json
from codalib.base.paths import project_folder
from codalib.base.processes import launch
from codalib.datasets.images import DataError, ImageDataset
from codalib.kernels.assignment import resolve_backend
from codalib.models.adversary import build_discriminator
from codalib.models.checkpoints import PUBLISHED_VAES, find_model, load_vae
from codalib.models.checks import NonFiniteLoss
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained.perceptual import build_perceptual
from codalib.pretrained.registry import MissingWeights, has_weights
from codalib.pretrained.vae_layouts import CONFIGS
from codalib.tools.fetch import needed
from codalib.tools.operations import (
    KeptForBackward,
    StepMemory,
    assignment_operations,
    count_operations,
    count_parameters,
)
from codalib.tools.rehearsal_page import page
from codalib.training.settings import FitSettings, TokenizerSettings
from codalib.training.tokenizer import train_and_save
from codalib.training.trainer import read_log
from codalib.workflow.manifest import Run
from codalib.workflow.parameters import resolved_values, settings_from
from codalib.workflow.profiles import StageError, profile_section, profile_stages

log = logging.getLogger(__name__)


NOTEBOOK = "01_train_tokenizer"
LAYOUTS = {"kl16": "ldm", "flux": "diffusers"}  # whose architecture is built where the weights are missing
STEPS = 2  # one before the interruption, one after the resume
IMAGES = 64  # in the random data set; more than the steps take
ITERATIONS = 50_000  # of the paper's Table 2, which counts them at a batch of 256
TFLOPS = (312.0, 989.0)  # of an A100 and an H100 (SXM) in dense bfloat16, by their data sheets
UTILISATION = 0.25  # of them in use: an assumption, ordinary for convolutions of 128 to 512 channels


# What autocast to bfloat16 keeps for the backward pass over what float32 keeps, in the layers of both published VAEs:
# on GPUs it computes group norms in float32, so that their inputs are kept in both precisions.
AUTOCAST_FACTOR = 1.1


class Interruption(Exception):
    """Raised by the data in the middle of the rehearsal, as if the process had been killed."""


class RandomImages(ImageDataset):
    """Seeded noise in place of photographs; counts the images that it hands out, and stops after some."""

    def __init__(self, resolution: int, seed: int, name: str, count: int = IMAGES):
        super().__init__([], ["noise"], resolution, False, name)
        self.seed, self.count = seed, count
        self.handed_out, self.interrupt_after = 0, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index = key[0] if isinstance(key, tuple) else key
        if self.handed_out == self.interrupt_after:
            raise Interruption
        self.handed_out += 1
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.rand(3, self.resolution, self.resolution, generator=generator) * 2 - 1
        return {"image": image, "label": 0, "caption": "", "index": index}


def training_parameters(profile: str) -> dict[str, Any]:
    """All parameters and settings of the notebook that trains the tokenizer, as PROFILE sets them.

    Raises StageError for wrong ones.
    """
    path = project_folder() / "notebooks" / f"{NOTEBOOK}.ipynb"
    if NOTEBOOK not in profile_stages(profile, sorted(file.stem for file in path.parent.glob("*.ipynb"))):
        raise StageError(f"expected a profile that runs {NOTEBOOK}, such as imagenet-mar-65536, got {profile}")
    try:
        values = resolved_values(nbformat.read(path, as_version=4), profile_section(profile, NOTEBOOK))
    except ValueError as error:
        raise StageError(f"profile {profile}: {error}") from error
    return asdict(settings_from(TokenizerSettings, values)) | asdict(settings_from(FitSettings, values)) | values


def base_vae(name: str, folder: Path, seed: int) -> tuple[str, bool]:
    """What `load_vae` takes for the profile's VAE, and whether its weights are random.

    Random ones, of the published architecture, are written into FOLDER; only for the paper's two VAEs. Any other that
    cannot be loaded raises ValueError.
    """
    if name not in PUBLISHED_VAES or has_weights(name):
        return find_model(name), False
    torch.manual_seed(seed)
    ContinuousVAE(AutoencoderKL(**CONFIGS[LAYOUTS[name]])).save_pretrained(folder)
    return str(folder), True


def rehearsal_settings(parameters: Mapping[str, Any], batch: int) -> TokenizerSettings:
    """The profile's settings, but few steps, a small batch, and what this machine has."""
    here = torch.cuda.is_available()
    perceptual, discriminator = parameters["perceptual_network"], parameters["discriminator_network"]
    return replace(
        settings_from(TokenizerSettings, parameters),
        steps=STEPS,
        batch_size=batch,
        accumulation=1,
        workers=0,
        ema_start=0,
        evaluate_every=0,
        checkpoint_every=1,
        log_every=1,
        precision=parameters["precision"] if here else "float32",
        backend="auto" if here else "tiled",  # compiled code would hide its operations from the count
        compile=False,  # as above
        perceptual_network="auto" if perceptual == "perceptual_vgg" and not has_weights("vgg16_lpips") else perceptual,
        discriminator_network="auto" if discriminator == "dino" and not has_weights("dino_vits16") else discriminator,
    )


def rehearse(
    profile: str,
    batch: int = 1,
    tflops: Sequence[float] = TFLOPS,
    utilisation: float = UTILISATION,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Rehearse PROFILE and return what was found, also written to runs/PROFILE/rehearsal/ (rehearsal.json, and .md).

    Args:
        profile: a name in profiles/.
        batch: images a step.
        tflops: of the GPUs to reckon with, 10^12 operations a second.
        utilisation: the fraction of that in use, in (0, 1].
        parameters: in place of the profile's.
    Raises:
        StageError, ValueError: unknown profile, wrong parameters, or a VAE that is not here and not one of the paper's.
        NonFiniteLoss: a term is not finite.
    """
    if batch < 1 or not 0 < utilisation <= 1 or not tflops or min(tflops) <= 0:
        raise ValueError(
            f"batch {batch}, TFLOP/s {tflops}, utilisation {utilisation}: expected at least 1, above 0, above 0 to 1"
        )
    parameters = dict(training_parameters(profile) if parameters is None else parameters)
    settings = rehearsal_settings(parameters, batch)
    own = parameters | {"batch_of_the_rehearsal": batch}
    run = Run(f"{profile}/rehearsal", "rehearse", own, parameters["seed"])
    work = run.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        found = _rehearsed(parameters, settings, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found |= {
        "profile": profile,
        "vae": parameters["vae"],
        "changes": _changes(parameters, settings),
        "missing": _missing(profile, parameters),
        "batch": batch,
        "precision": settings.precision,
    }
    found["forecast"] = forecast(parameters, found, tflops, utilisation)
    metrics = {"seconds_a_step": found["seconds_a_step"], "operations_an_image": found["operations"]["an image"]}
    manifest = run.finish({"metrics": metrics})
    found |= {name: manifest[name] for name in ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "machine")}
    write_json(run.folder / "rehearsal.json", found)
    with atomic_write(run.folder / "rehearsal.md") as file:
        file.write(page(found) + "\n")
    return found


def _rehearsed(parameters: Mapping[str, Any], settings: TokenizerSettings, work: Path) -> dict[str, Any]:
    """What the two steps counted and checked, and the sizes of what they built."""
    seed, resolution = parameters["seed"], parameters["resolution"]
    base, is_random = base_vae(parameters["vae"], work / "vae", seed)
    vae = load_vae(base)
    side, channels = vae.latent_side(resolution), vae.latent_channels
    del vae
    settings.check_grid(side)
    train = RandomImages(resolution, seed, "random images")
    val = RandomImages(resolution, seed + IMAGES, "random images", count=settings.batch_size)
    found = _two_steps(settings, base, channels, train, val, work)
    tokenizer = CodaTokenizer.from_pretrained(work / "tokenizer", backend=settings.backend)
    found["checks"]["loads again and encodes"] = _encodes(tokenizer, val)
    perceptual = build_perceptual(settings.perceptual_network, settings.perceptual_weight)
    discriminator = build_discriminator(settings.discriminator_network, settings.adversarial_weight)
    return found | {
        "parameters": count_parameters(tokenizer, perceptual, discriminator),
        "latents": [channels, side, side],
        "tokens": tokenizer.num_tokens,
        "random_weights": [parameters["vae"]] if is_random else [],
        "stand_ins": _stand_ins(parameters, perceptual, discriminator),
    }


def _two_steps(
    settings: TokenizerSettings, base: str, channels: int, train: RandomImages, val: RandomImages, work: Path
) -> dict[str, Any]:
    """Train one step, break off, resume, train the second, evaluate, save; returns what was counted and checked.

    The second step computes activations again instead of keeping them: both ways of a step are seen.
    """
    train.interrupt_after = settings.batch_size
    plain, again = (replace(settings, gradient_checkpointing=checkpointed) for checkpointed in (False, True))
    with count_operations() as operations, KeptForBackward() as kept, StepMemory(CodaTokenizer) as memory:
        try:
            launch(train_and_save, 1, plain, base, train, val, work)
        except Interruption:
            log.info("the first step is done and saved; the rehearsal is interrupted here and starts again")
    first, (checkpoint,) = read_log(work), sorted(work.glob("checkpoints/*/step-*"))
    train.interrupt_after = None
    with StepMemory(CodaTokenizer) as memory_again:
        launch(train_and_save, 1, again, base, train, val, work)
    rows, state = read_log(work), read_json(checkpoint / "state.json")
    terms = [{name: value for name, value in row.items() if name not in ("step", "seconds", "rate")} for row in rows]
    images = settings.batch_size
    return {
        "terms": terms,
        "seconds_a_step": rows[0]["seconds"],
        "seconds_a_step_checkpointed": rows[1]["seconds"] - rows[0]["seconds"],
        "operations": _operations(operations, settings, channels),
        "kept_for_backward": kept.most // images,
        "saved_by_checkpointing": max(0, memory.most - memory_again.most) // images,
        "checks": {
            "a checkpoint was written at step 1": state["step"] == 1,
            "the second start resumed at step 1": train.handed_out == STEPS * images and rows[0] == first[0],
            "the second step is logged": [row["step"] for row in rows] == [1, STEPS],
            "an evaluation batch was measured": "val_psnr" in rows[-1],
            "the tokenizer was saved": (work / "tokenizer").is_dir(),
        },
    }


def _operations(counter: FlopCounterMode, settings: TokenizerSettings, channels: int) -> dict[str, int]:
    """Operations of a step by kind, an image: those that were counted, and those that the counter cannot see."""
    by_kind = counter.get_flop_counts()["Global"]
    counts = {
        "convolutions": sum(n for kind, n in by_kind.items() if "convolution" in str(kind)),
        "matrix products": sum(n for kind, n in by_kind.items() if "convolution" not in str(kind)),
    }
    images = settings.batch_size
    size_of = (images * sum(p * p for p in settings.scales), settings.codebook_size, settings.attention_dim, channels)
    assignment = assignment_operations(*size_of) if settings.kind == "attention" else 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = settings.backend != "reference" and resolve_backend(settings.backend, device, *size_of[:2])
    if assignment and kernels == "triton":
        counts["matrix products"] += assignment  # the counter does not see into its kernels
    each = {name: count // images for name, count in counts.items()}
    return each | {"an image": sum(counts.values()) // images, "of which the assignment": assignment // images}


@torch.no_grad()
def _encodes(tokenizer: CodaTokenizer, images: ImageDataset) -> bool:
    batch = images[0]["image"][None]
    decoded = tokenizer.decode(tokenizer.encode(batch, sample=False))
    return decoded.shape == batch.shape and bool(decoded.isfinite().all())


def _stand_ins(
    parameters: Mapping[str, Any], perceptual: nn.Module | None, discriminator: nn.Module | None
) -> dict[str, str]:
    """Network of the profile -> network that stood in for it."""
    rows = {}
    if perceptual is not None and parameters["perceptual_network"] not in ("auto", perceptual.name):
        rows[parameters["perceptual_network"]] = perceptual.name
    if discriminator is not None and parameters["discriminator_network"] not in (
        "auto",
        discriminator.name.split("_")[1],
    ):
        rows[f"discriminator_{parameters['discriminator_network']}"] = discriminator.name
    return rows


def _changes(parameters: Mapping[str, Any], settings: TokenizerSettings) -> dict[str, list]:
    """Parameter -> [the profile's value, the rehearsal's], where they differ."""
    names = ("steps", "batch_size", "accumulation", "workers", "ema_start", "precision", "compile")
    pairs = {name: [parameters[name], getattr(settings, name)] for name in names}
    pairs |= {"processes": [parameters["processes"], 1], "fit_steps": [parameters["fit_steps"], 0]}
    pairs |= {"dataset": [parameters["dataset"], "random images"], "backend": ["auto", settings.backend]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _missing(profile: str, parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the real run still needs on this machine: networks by name, and folders of images."""
    kind, _, path = parameters["dataset"].partition(":")
    filled = os.path.expandvars(path)
    if kind != "imagefolder":
        folders = []
    elif "$" in filled:
        folders = [f"{path} (the variable is not set)"]
    else:
        both = (Path(filled).expanduser() / split for split in ("train", "val"))
        folders = [str(folder) for folder in both if not folder.is_dir()]
    return {"networks": [name for name in needed(profile) if not has_weights(name)], "folders": folders}


def forecast(
    parameters: Mapping[str, Any], found: Mapping[str, Any], tflops: Sequence[float], utilisation: float
) -> dict[str, Any]:
    """The real run's arithmetic: images a step, GPU memory, hours on each kind of GPU."""
    images = parameters["batch_size"] * parameters["accumulation"] * parameters["processes"]
    operations = found["operations"]["an image"] * images
    rows = [
        {"steps": steps, "tflops": rate, "gpu_hours": operations * steps / (rate * 1e12 * utilisation) / 3600}
        for steps in dict.fromkeys((parameters["steps"], ITERATIONS))
        for rate in tflops
    ]
    in_bfloat16 = parameters["precision"] != "float32" and found["precision"] == "float32"
    factor = AUTOCAST_FACTOR if in_bfloat16 else 1
    kept, saved = (factor * found[name] for name in ("kept_for_backward", "saved_by_checkpointing"))
    # In float32: all weights; and of the trained ones the gradient, AdamW's two moments and the average.
    weights = 4 * sum(row["parameters"] + 4 * row["trained"] for row in found["parameters"])
    return {
        "images_a_step": images,
        "batch_size": parameters["batch_size"],
        "processes": parameters["processes"],
        "operations_a_step": operations,
        "utilisation": utilisation,
        "gpu_memory_bytes": round(weights + kept * parameters["batch_size"]),
        "gpu_memory_bytes_an_image": round(kept),
        "gpu_memory_bytes_checkpointed": round(weights + (kept - saved) * parameters["batch_size"]),
        "gpu_memory_bytes_checkpointed_an_image": round(kept - saved),
        "rows": rows,
    }


# --- the command line -------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="codalib rehearse", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", required=True, help="a name in profiles/")
    parser.add_argument("--batch", type=int, default=1, help="images a step (1)")
    parser.add_argument("--tflops", type=float, nargs="+", default=TFLOPS, help="of the GPUs to reckon with (312 989)")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="fraction of that in use (0.25)")
    options = parser.parse_args(arguments)
    try:
        found = rehearse(options.profile, options.batch, options.tflops, options.utilisation)
    except (StageError, DataError, MissingWeights, NonFiniteLoss, ValueError) as error:
        log.error("%s", error)
        return 1
    sys.stdout.write(page(found) + "\n")
    return 0 if all(found["checks"].values()) else 1
