"""The one training loop: seeded steps, schedule, clipping, averages, log, checkpoints, resume.

A `Stage` computes named loss terms and takes the optimiser steps; the `Trainer` does the rest. All
randomness of step s is a function of (seed, s), so a resumed run equals an uninterrupted one bit for bit
on the same machine with the same number of threads; with another number sums round differently.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from codalib.base.files import atomic_write, read_json, sha256, write_json, writing
from codalib.base.hardware import ThreadWatch, chosen_precision
from codalib.base.processes import make_accelerator
from codalib.base.seeds import step_seed
from codalib.models.checks import check_finite
from codalib.training.settings import LoopSettings
from codalib.training.trackers import chosen_tracker, start_tracker

log = logging.getLogger(__name__)


KEPT_CHECKPOINTS = 2
LATE, LATE_AFTER = 1.2, 5  # a promise is broken from this multiple of it on, known after so many steps
LOG = "log.jsonl"
DIGESTS = "sha256sums.txt"  # in a checkpoint, of its other files; `sha256sum -c` reads it


def learning_rate_factor(step: int, settings: LoopSettings) -> float:
    """Cosine from 1 to `final_learning_rate` after a linear warm-up (the release has none)."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.final_learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclasses.dataclass
class TimeLimit:
    """Minutes promised for a training: it is said once when they cannot hold, and the training ends early or not."""

    minutes: float
    keep: str = "minutes"  # "minutes": end with the step that reaches them; "steps": go on to the last step
    _said: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.keep not in ("minutes", "steps") or not self.minutes > 0:
            raise ValueError(f"expected minutes above 0, and to keep 'minutes' or 'steps', got {self}")

    def ends(self, seconds: float, step: int, steps: int) -> bool:
        """Whether the training ends here, after so many seconds and STEP of STEPS steps."""
        limit = 60 * self.minutes
        late = step >= LATE_AFTER and seconds / step * steps > LATE * limit
        if step < steps and not self._said and (late or seconds > limit):
            self._said = True
            what = (
                f"it ends at about step {int(limit / seconds * step)} of {steps}, and a longer run goes on from there"
                if self.keep == "minutes"
                else "all steps are kept"
            )
            words = "%.1f minutes were promised for %d steps, which take about %.1f at this pace: %s"
            log.warning(words, self.minutes, steps, seconds / step * steps / 60, what)
        return self.keep == "minutes" and seconds > limit


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

    @contextmanager
    def gradients_apart(self, apart: bool, *modules: nn.Module | None) -> Iterator[None]:
        """A context in which each process keeps its gradients of MODULES to itself, where APART.

        So all but the last micro-batch of a step add up before the processes average: once a step, not once each.
        """
        with ExitStack() as stack:
            for module in modules:
                if apart and isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def autocast(self) -> torch.autocast:
        """The context of the stage's forward passes; `precision` as in `LoopSettings`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    @property
    def bfloat16(self) -> bool:
        return chosen_precision(self.settings.precision) == "bfloat16"


class Trainer:
    """Runs a stage's steps and keeps its state.

    Args:
        settings: the stage's settings.
        folder: receives log.jsonl, checkpoints/<fingerprint>/step-N and, by `training.trackers`, tensorboard/.
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
        chosen_tracker()  # raises before any work
        self.settings, self.folder, self.accelerator = settings, Path(folder), accelerator
        self.module, self.optimizers, self.companions = module, optimizers, companions or {}
        inputs["processes"] = accelerator.num_processes  # the batch is shared by all of them
        inputs["precision"] = chosen_precision(settings.precision)  # "auto" is another one on another machine
        self.checkpoints = self.folder / "checkpoints" / settings.fingerprint(**inputs)
        for name, what in (
            ("warmup_steps", "the learning rate is never reached"),
            ("ema_start", "nothing is averaged"),
        ):
            if (value := getattr(settings, name)) and value >= settings.steps:
                log.warning("%s %d of %d steps: %s", name, value, settings.steps, what)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.ema = (
            RampedEMA(
                self.trainable.values(),
                ema_ramp,
                decay=settings.ema,
                update_after_step=settings.ema_start,
                foreach=accelerator.device.type == "cuda",  # a few kernels for all; the last bits are others
            )
            if settings.ema
            else None
        )
        if self.ema:
            self.ema.to(accelerator.device)
        self.base_rates = {n: [g["lr"] for g in o.param_groups] for n, o in optimizers.items()}
        self.step, self.seconds, self.ends = 0, 0.0, False
        self._unchecked: list[tuple[int, dict[str, Tensor]]] = []  # terms whose finiteness nobody has asked for yet

    # --- one run ------------------------------------------------------------------------------------------------------

    def run(self, stage: Stage, description: str, limit: TimeLimit | None = None) -> None:
        """Train until `settings.steps`, from the newest checkpoint on; the module ends with its averaged weights.

        With a LIMIT it may end earlier, its schedule cut, with a checkpoint from which a longer run goes on.
        Raises NonFiniteLoss where a term is not finite; names the term, the step and the last good checkpoint.
        """
        if limit and self.accelerator.num_processes > 1:
            raise ValueError("expected one process with a limit of minutes, which each would reach at its own step")
        self.resume()
        over = limit is not None and self.step > 0 and limit.ends(self.seconds, self.step, self.settings.steps)
        if self.step < self.settings.steps and not over:
            self._train(stage, description, limit)
        if self.ema:
            self.ema.copy_to(self.trainable.values())

    def _train(self, stage: Stage, description: str, limit: TimeLimit | None) -> None:
        main, started, before = self.accelerator.is_main_process, time.monotonic(), self.seconds
        watch = ThreadWatch() if self.accelerator.num_processes == 1 else None
        tracker = self._tracker() if main else None
        stream = stage.batches(self.step * self.settings.accumulation)
        bar = tqdm(total=self.settings.steps, initial=self.step, desc=description, disable=not main, mininterval=2.0)
        while not self.ends:
            micro_batches = [next(stream) for _ in range(self.settings.accumulation)]
            # After the batches: a loader that starts takes a number from the global generator, in a resumed run too.
            torch.manual_seed(step_seed(self.settings.seed, self.step, self.accelerator.process_index))
            rate = self._set_rates()
            began = time.monotonic()
            terms = stage.train_step(micro_batches, self.step)
            if watch:
                watch.step(time.monotonic() - began)
            if self.ema:
                self.ema.step(self.trainable.values())
            self.step += 1
            self.seconds = before + time.monotonic() - started
            self.ends = self.step == self.settings.steps
            self.ends |= limit is not None and limit.ends(self.seconds, self.step, self.settings.steps)
            if self.step == 1 or any(self._due(every) for every in self._looks):
                self._check_terms()
            row = self._row(stage, terms, bar)
            if row and main:
                self._log(row | {"rate": rate}, tracker)
            if self._due(self.settings.checkpoint_every):
                self.save()
            bar.update()
        bar.close()
        if tracker:
            tracker.finish()

    def _tracker(self) -> GeneralTracker | None:
        with writing(self.folder):
            return start_tracker(self.folder, self.checkpoints.name, self.step, dataclasses.asdict(self.settings))

    def _set_rates(self) -> float:
        """Give every optimiser this step's learning rate; returns its fraction of the settings'."""
        rate = learning_rate_factor(self.step, self.settings)
        for name, optimizer in self.optimizers.items():
            for group, base in zip(optimizer.param_groups, self.base_rates[name], strict=True):
                group["lr"] = base * rate
        return rate

    def _row(self, stage: Stage, terms: dict[str, Tensor], bar: tqdm) -> dict[str, float]:
        """What this step's row of the log holds: its terms and its validation, where they are due."""
        row = {}
        if self.step == 1 or self._due(self.settings.log_every):
            row = {name: value.item() for name, value in terms.items()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
        if self._due(self.settings.evaluate_every):
            with self.averaged():
                row |= stage.evaluate()
        return row

    @property
    def _looks(self) -> tuple[int, ...]:
        """After how many steps something of the training is kept or shown."""
        return self.settings.log_every, self.settings.evaluate_every, self.settings.checkpoint_every

    def _due(self, every: int) -> bool:
        return self.ends or bool(every and self.step % every == 0)

    def update(
        self, loss: Tensor, terms: dict[str, Tensor], name: str, parameters: list[nn.Parameter], last: bool
    ) -> None:
        """Back-propagate one micro-batch's loss; on the last one clip the gradients' norm and take the step."""
        self._keep_terms(terms)
        self.accelerator.backward(loss / self.settings.accumulation)
        if last:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
            self._keep_terms({f"gradient norm of the {name}": norm})
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)

    def _keep_terms(self, terms: dict[str, Tensor]) -> None:
        """Have the terms checked: here at once, on a GPU where the host waits anyway, before anything is kept."""
        self._unchecked.append((self.step, {name: term.detach() for name, term in terms.items()}))
        if self.accelerator.device.type == "cpu":
            self._check_terms()

    def _check_terms(self) -> None:
        """Raise NonFiniteLoss for the first step that has a term which is not finite."""
        values = [term.float() for _, terms in self._unchecked for term in terms.values()]
        if values and not torch.stack(values).isfinite().all():  # one wait for all
            for step, terms in self._unchecked:
                check_finite(terms, step, self.newest())
        self._unchecked.clear()

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

    def _log(self, row: dict[str, float], tracker: GeneralTracker | None) -> None:
        with writing(self.folder):
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 2), **row}) + "\n")
            if tracker:
                tracker.log(row, self.step)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def found(self) -> list[Path]:
        """The checkpoints of these settings and inputs by their steps, whatever the clock said."""
        return sorted(self.checkpoints.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Path | None:
        return next(reversed(self.found()), None)

    def save(self) -> None:
        """Write a checkpoint under another name, then rename it: a killed process leaves the older ones whole.

        Raises OSError where it cannot be written, the older ones untouched.
        """
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        final = self.checkpoints / f"step-{self.step:08d}"
        partial = final.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write(partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {self.step} could not be written ({error}): make room in {self.folder} and "
                f"run again; it goes on from {self.newest() or 'its start'}"
            ) from error
        os.replace(partial, final)
        for old in self.found()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        files = {"trainable": self.trainable}
        files |= {name: module.state_dict() for name, module in self.companions.items()}
        files |= {f"optimizer_{name}": _optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()}
        if self.ema:
            files["averaged"] = dict(zip(self.trainable, self.ema.shadow_params, strict=True))
        for name, tensors in files.items():
            save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, folder / f"{name}.safetensors")
        settings = dataclasses.asdict(self.settings)
        write_json(folder / "state.json", {"step": self.step, "seconds": self.seconds, "settings": settings})
        digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        (folder / DIGESTS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        for path in folder.iterdir():
            _flush(path)

    def resume(self) -> None:
        """Take up the newest whole checkpoint of the same settings and inputs, if there is one, and the log up to it.

        A damaged checkpoint is put aside as step-N.damaged and the one before it taken; ValueError where all are
        damaged. The log of a run of other settings is put aside into that run's own folder of checkpoints.
        """
        place: list[Path | None] = [self._newest_whole() if self.accelerator.is_main_process else None]
        newest = broadcast_object_list(place)[0]
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
            self._take_log()

    def _newest_whole(self) -> Path | None:
        damaged = []
        for path in reversed(self.found()):
            damage = _damage(path)
            if damage is None:
                break
            damaged.append(path)
            log.warning("%s is damaged (%s): passed over", path, damage)
        else:
            if damaged:
                raise ValueError(
                    f"expected a whole checkpoint in {self.checkpoints}, got {len(damaged)} damaged: restore one, or "
                    "remove that folder to train from the start"
                )
            return None
        for one in damaged:
            aside = one.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            one.rename(aside)
        return path

    def _take_log(self) -> None:
        """Make the folder's log and curves this run's: another run's are moved to its checkpoints, ours brought back.

        Nothing is lost: rows behind the checkpoint are written again by the same steps, and where there is no
        checkpoint the old log stays under another name.
        """
        everyone, ours = self.checkpoints.parent, self.checkpoints.name
        marker, path = everyone / "log-of.txt", self.folder / LOG
        owner = marker.read_text().strip() if marker.exists() else ours if self.step else "unknown"
        if owner != ours:
            for name in (LOG, "tensorboard"):
                if (self.folder / name).exists():
                    log.warning("%s is of other settings or inputs: moved to %s", self.folder / name, everyone / owner)
                    _move(self.folder / name, everyone / owner / name)
                if (self.checkpoints / name).exists():
                    _move(self.checkpoints / name, self.folder / name)
        with atomic_write(marker) as file:
            file.write(ours)
        if not path.exists():
            return
        rows = read_log(self.folder)
        if self.step:
            with atomic_write(path) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= self.step)
        else:
            log.warning("no checkpoint of the run that wrote %s: it starts again, and its log is kept beside", path)
            _move(path, path.with_name("log-old.jsonl"))


class TrainingLog(list[dict[str, float]]):
    """The rows of a stage's log: step, seconds, and the named terms and metrics of that step."""


def read_log(folder: str | Path) -> TrainingLog:
    """The log.jsonl of a stage's folder; empty where there is none yet.

    A torn last line, which a killed process leaves, is passed over with a warning; ValueError for one elsewhere.
    """
    path, rows = Path(folder) / LOG, TrainingLog()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number == len(lines):
            log.warning("%s: the last line is torn and is passed over", path)
        elif line.strip():
            raise ValueError(f"{path}, line {number}: expected a row of a log, got {line[:60]!r}: remove the line")
    return rows


class RampedEMA(EMAModel):
    """An average whose ramp (1 + n) / (10 + n) counts n, the steps since its begin, once every RAMP steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], ramp: int, **kwargs):
        super().__init__(parameters, **kwargs)
        self.ramp = ramp

    def get_decay(self, optimization_step: int) -> float:
        since = optimization_step - self.update_after_step - 1
        return super().get_decay(self.update_after_step + 1 + since // self.ramp) if since > 0 else 0.0


def _move(source: Path, target: Path) -> None:
    """Rename SOURCE to TARGET, or to TARGET with the first free number where that is taken."""
    target.parent.mkdir(parents=True, exist_ok=True)
    numbered = (target.with_stem(f"{target.stem}-{n}") for n in itertools.count(2))
    source.rename(next(path for path in itertools.chain([target], numbered) if not path.exists()))


def _copy(source: dict[str, Tensor], target: dict[str, Tensor], where: Path) -> None:
    if source.keys() != target.keys():
        raise ValueError(
            f"expected {len(target)} tensors in {where}, got {len(source)}: it belongs to another model; remove it"
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
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # a moment; the fused kernel wants it laid out as its parameter is
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: nothing. Without digests (older ones) only torn files are seen."""
    try:
        if (checkpoint / DIGESTS).exists():
            lines = [line.partition("  ") for line in (checkpoint / DIGESTS).read_text().splitlines()]
            listed = {name: digest for digest, _, name in lines}
            files = {path.name for path in checkpoint.iterdir()} - {DIGESTS}
            if odd := [name for name in sorted(files | listed.keys()) if sha256(checkpoint / name) != listed.get(name)]:
                return f"the SHA-256 of {', '.join(odd)} is not that of {DIGESTS}"
        else:
            read_json(checkpoint / "state.json")
            for path in checkpoint.glob("*.safetensors"):
                with safe_open(path, "pt"):
                    pass
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return None


def checksum(*tensors: Tensor) -> str:
    """Changes when a bit of the tensors, their shapes or types do, and with nothing else: 16 hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
