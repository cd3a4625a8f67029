"""The one training loop: seeded steps, schedule, clipping, averages, log, checkpoints, resume.

A `Stage` computes named loss terms and takes the optimiser steps; the `Trainer` does the rest. All
randomness of step s is a function of (seed, s), so a resumed run equals an uninterrupted one bit for bit.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from codalib.base.files import read_json, write_json
from codalib.base.hardware import has_bfloat16
from codalib.base.processes import make_accelerator
from codalib.base.seeds import SEED_STRIDE
from codalib.models.checks import check_finite
from codalib.training.settings import LoopSettings

log = logging.getLogger(__name__)


KEPT_CHECKPOINTS = 2


def learning_rate_factor(step: int, settings: LoopSettings) -> float:
    """Cosine from 1 to `final_learning_rate` after a linear warm-up (the release has none)."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.final_learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Stage:
    """What a training stage gives the trainer: its batches, its step, its validation."""

    def __init__(self, settings: LoopSettings):
        torch.manual_seed(settings.seed)
        self.settings, self.accelerator = settings, make_accelerator()
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes

    def batches(self, first: int) -> Iterator:
        """Endless micro-batches, from that of number `first` on."""
        raise NotImplementedError

    def train_step(self, micro_batches: list, step: int) -> dict[str, Tensor]:
        """Take the optimiser steps through `Trainer.update`; returns named terms."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Named metrics, logged every `evaluate_every` steps and at the end."""
        return {}

    def autocast(self) -> torch.autocast:
        """The context of the stage's forward passes; `precision` as in `LoopSettings`."""
        precision = self.settings.precision
        wanted = has_bfloat16() if precision == "auto" else precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)


class Trainer:
    """Runs a stage's steps and keeps its state.

    Args:
        settings: the stage's settings.
        folder: receives log.jsonl, tensorboard/ and checkpoints/<fingerprint>/step-N.
        module: what is trained (its trainable parameters are saved and averaged).
        optimizers: name -> optimiser; each parameter belongs to `module` or to `companions`.
        companions: further modules whose state belongs to a checkpoint (the discriminator), name -> module.
        inputs: what else decides the result (names and hashes of data and weights), for the fingerprint.
    """

    def __init__(
        self,
        settings: LoopSettings,
        folder: str | Path,
        accelerator: Accelerator,
        module: nn.Module,
        optimizers: dict[str, torch.optim.Optimizer],
        companions: dict[str, nn.Module] | None = None,
        ema_ramp: int = 1,
        **inputs,
    ):
        self.settings, self.folder, self.accelerator = settings, Path(folder), accelerator
        self.module, self.optimizers, self.companions = module, optimizers, companions or {}
        inputs["processes"] = accelerator.num_processes  # the batch is shared by all of them
        self.checkpoints = self.folder / "checkpoints" / settings.fingerprint(**inputs)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob("*.part"):
            shutil.rmtree(leftover)
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.ema = (
            RampedEMA(self.trainable.values(), ema_ramp, decay=settings.ema, update_after_step=settings.ema_start)
            if settings.ema
            else None
        )
        if self.ema:
            self.ema.to(accelerator.device)
        self.base_rates = {n: [g["lr"] for g in o.param_groups] for n, o in optimizers.items()}
        self.step, self.seconds = 0, 0.0

    # --- one run ------------------------------------------------------------------------------------------------------

    def run(self, stage: Stage, description: str) -> None:
        """Train until `settings.steps`, from the newest checkpoint on; the module ends with its averaged weights.

        Raises NonFiniteLoss where a term is not finite; names the term, the step and the last good checkpoint.
        """
        self.resume()
        if self.step < self.settings.steps:
            self._train(stage, description)
        if self.ema:
            self.ema.copy_to(self.trainable.values())

    def _train(self, stage: Stage, description: str) -> None:
        main, started, before = self.accelerator.is_main_process, time.monotonic(), self.seconds
        writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step) if main else None
        stream = stage.batches(self.step * self.settings.accumulation)
        bar = tqdm(total=self.settings.steps, initial=self.step, desc=description, disable=not main, mininterval=2.0)
        while self.step < self.settings.steps:
            micro_batches = [next(stream) for _ in range(self.settings.accumulation)]
            # After the batches: a loader that starts takes a number from the global generator, in a resumed run too.
            torch.manual_seed(self.settings.seed + self.step + SEED_STRIDE * self.accelerator.process_index)
            rate = learning_rate_factor(self.step, self.settings)
            for name, optimizer in self.optimizers.items():
                for group, base in zip(optimizer.param_groups, self.base_rates[name], strict=True):
                    group["lr"] = base * rate
            terms = stage.train_step(micro_batches, self.step)
            if self.ema:
                self.ema.step(self.trainable.values())
            self.step += 1
            self.seconds = before + time.monotonic() - started
            row = {}
            if self.step % self.settings.log_every == 0 or self.step in (1, self.settings.steps):
                row = {name: value.item() for name, value in terms.items()}
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
            if self._due(self.settings.evaluate_every):
                with self.averaged():
                    row |= stage.evaluate()
            if row and main:
                self._log(row | {"rate": rate}, writer)
            if self._due(self.settings.checkpoint_every):
                self.save()
            bar.update()
        bar.close()
        if writer:
            writer.close()

    def _due(self, every: int) -> bool:
        return self.step == self.settings.steps or bool(every and self.step % every == 0)

    def update(
        self, loss: Tensor, terms: dict[str, Tensor], name: str, parameters: list[nn.Parameter], last: bool
    ) -> None:
        """Back-propagate one micro-batch's loss; on the last one clip the gradients' norm and take the step."""
        check_finite(terms, self.step, self.newest())
        self.accelerator.backward(loss / self.settings.accumulation)
        if last:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
            check_finite({f"gradient norm of the {name}": norm}, self.step, self.newest())
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the module carries the averaged weights (EMA); without EMA its own."""
        if not self.ema:
            yield
            return
        parameters = list(self.trainable.values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def _log(self, row: dict[str, float], writer: SummaryWriter) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 2), **row}) + "\n")
        for name, value in row.items():
            writer.add_scalar(name, value, self.step)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*[0-9]"))
        return found[-1] if found else None

    def save(self) -> None:
        """Write a checkpoint under another name, then rename it: a killed process leaves the older ones whole."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        final = self.checkpoints / f"step-{self.step:08d}"
        partial = final.with_suffix(".part")
        partial.mkdir()
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self.trainable.items()}, partial / "trainable.safetensors"
        )
        for name, module in self.companions.items():
            save_file(
                {n: v.detach().cpu().contiguous() for n, v in module.state_dict().items()},
                partial / f"{name}.safetensors",
            )
        for name, optimizer in self.optimizers.items():
            save_file(_optimizer_tensors(optimizer), partial / f"optimizer_{name}.safetensors")
        if self.ema:
            shadow = {n: v.cpu().contiguous() for n, v in zip(self.trainable, self.ema.shadow_params, strict=True)}
            save_file(shadow, partial / "averaged.safetensors")
        settings = dataclasses.asdict(self.settings)
        write_json(partial / "state.json", {"step": self.step, "seconds": self.seconds, "settings": settings})
        for path in partial.iterdir():
            _flush(path)
        os.replace(partial, final)
        for old in sorted(self.checkpoints.glob("step-*[0-9]"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def resume(self) -> None:
        """Take up the newest checkpoint of the same settings, if there is one, and cut the log behind it."""
        newest = self.newest()
        if newest is not None:
            state = read_json(newest / "state.json")
            self.step, self.seconds = state["step"], state["seconds"]
            _copy(load_file(newest / "trainable.safetensors"), self.trainable, newest)
            for name, module in self.companions.items():
                module.load_state_dict(load_file(newest / f"{name}.safetensors"))
            for name, optimizer in self.optimizers.items():
                _load_optimizer(optimizer, load_file(newest / f"optimizer_{name}.safetensors"))
            if self.ema:
                shadow = dict(zip(self.trainable, self.ema.shadow_params, strict=True))
                _copy(load_file(newest / "averaged.safetensors"), shadow, newest)
                self.ema.optimization_step = self.step
            log.info("resumed from %s", newest)
        if self.accelerator.is_main_process:
            _cut_log(self.folder / "log.jsonl", self.step)


class TrainingLog(list[dict[str, float]]):
    """The rows of a stage's log: step, seconds, and the named terms and measures of that step."""


def read_log(folder: str | Path) -> TrainingLog:
    """The log.jsonl of a stage's folder; empty where there is none yet."""
    path = Path(folder) / "log.jsonl"
    return TrainingLog(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else TrainingLog()


class RampedEMA(EMAModel):
    """An average whose ramp (1 + n) / (10 + n) counts n, the steps since its begin, once every RAMP steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], ramp: int, **kwargs):
        super().__init__(parameters, **kwargs)
        self.ramp = ramp

    def get_decay(self, optimization_step: int) -> float:
        since = optimization_step - self.update_after_step - 1
        return super().get_decay(self.update_after_step + 1 + since // self.ramp) if since > 0 else 0.0


def _cut_log(path: Path, step: int) -> None:
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows if step))


def _copy(source: dict[str, Tensor], target: dict[str, Tensor], where: Path) -> None:
    if source.keys() != target.keys():
        raise ValueError(
            f"{where} holds {len(source)} tensors, expected {len(target)}: it belongs to another model; remove it"
        )
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value).cpu().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def checksum(*tensors: Tensor) -> str:
    """Changes when the tensors do: their shapes and two sums, enough to tell runs apart."""
    parts = [(tuple(t.shape), t.double().sum().item(), t.double().abs().sum().item()) for t in tensors]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
