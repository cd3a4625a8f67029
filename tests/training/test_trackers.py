"""A training's curves reach the chosen tracker under the names of the log."""

import importlib.util

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codalib.base.processes import make_accelerator
from codalib.training.settings import LoopSettings
from codalib.training.trackers import VARIABLE
from codalib.training.trainer import Stage, Trainer, read_log


class Line(Stage):
    """One number that falls to 0."""

    def __init__(self, folder, **settings):
        super().__init__(LoopSettings(batch_size=1, log_every=1, checkpoint_every=1, **settings))
        self.module = torch.nn.Linear(1, 1)
        optimizers = {"all": torch.optim.SGD(self.module.parameters(), 0.1)}
        self.trainer = Trainer(self.settings, folder, self.accelerator, self.module, optimizers)

    def batches(self, first):
        while True:
            yield None

    def train_step(self, micro_batches, step):
        terms = {"square": self.module.weight.square().sum()}
        self.trainer.update(terms["square"], terms, "all", list(self.module.parameters()), last=True)
        return terms

    def evaluate(self):
        return {"val_square": self.module.weight.item() ** 2}


def train(folder, steps=3):
    stage = Line(folder, steps=steps, evaluate_every=2)
    stage.trainer.run(stage, "line")
    return read_log(folder)


def test_tensorboard_shows_what_the_log_does(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    rows = train(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {name for row in rows for name in row} - {"step", "seconds"}
    assert names == {"square", "rate", "val_square"} == set(events.Tags()["scalars"])
    for name in names:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({row["step"]: row[name] for row in rows if name in row})


def test_none_writes_the_log_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "none")
    assert len(train(tmp_path)) == 3
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_another_tracker_gets_the_settings_the_rows_and_its_end(tmp_path, monkeypatch, name):
    real, made = LOGGER_TYPE_TO_CLASS[name], []

    class Double(real):
        def __init__(self, **options):
            super().__init__(**options)
            self.options, self.rows, self.ended = options, {}, False
            made.append(self)

        def start(self):
            pass

        def store_init_configuration(self, values):
            self.settings = values

        def log(self, values, step):
            self.rows[step] = values

        def finish(self):
            self.ended = True

    monkeypatch.setenv(VARIABLE, name)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Double)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    rows = train(tmp_path / "a" / "b")
    (tracker,) = made
    assert tracker.rows == {row["step"]: {k: v for k, v in row.items() if k not in ("step", "seconds")} for row in rows}
    assert tracker.settings["steps"] == 3
    assert tracker.ended
    assert "a/b" in (tracker.options.get("name") or tracker.options["run_name"])
    assert not (tmp_path / "a" / "b" / "tensorboard").exists()


def test_the_tracker_does_not_decide_what_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "none")
    first = Line(tmp_path, steps=1).trainer.checkpoints
    monkeypatch.setenv(VARIABLE, "tensorboard")
    assert Line(tmp_path, steps=1).trainer.checkpoints == first


def test_an_unknown_or_missing_tracker_stops_before_any_work(tmp_path, monkeypatch):
    settings = LoopSettings(steps=1, batch_size=1)
    for name, message in (("excel", "one of tensorboard, wandb"), ("mlflow", "pip install mlflow")):
        monkeypatch.setenv(VARIABLE, name)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=message):
            Trainer(settings, tmp_path, make_accelerator(), torch.nn.Linear(1, 1), {})
    assert not list(tmp_path.iterdir())
