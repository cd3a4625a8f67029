"""The generator's training stage: MaskGIT on cached tokens, by class or by caption (Eq. 12 of arXiv:2503.17760)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from codalib.base.hardware import to_device
from codalib.base.processes import launch
from codalib.base.seeds import sample_generators
from codalib.datasets.text import CaptionTable, TextEncoder, build_text_encoder
from codalib.datasets.token_cache import CacheSettings, TokenCache, cache_dataset, check_generator
from codalib.models.checkpoints import find_model
from codalib.models.maskgit import Condition, MaskGIT
from codalib.models.masks import sample_mask
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.execution import build_adamw, prepare_transformer
from codalib.training.settings import EncodingSettings, MaskGITSettings
from codalib.training.trainer import Stage, Trainer, checksum

SCORED_ROWS = 16_384  # masked tokens whose logits are held at once in validation


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the linear layers' matrices alone."""
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in matrices], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in matrices], "weight_decay": 0.0},
    ]


class MaskGITStage(Stage):
    """Mask tokens, predict them; cross-entropy with label smoothing."""

    def __init__(
        self,
        settings: MaskGITSettings,
        train: TokenCache,
        val: TokenCache,
        folder: str | Path,
        encoder: TextEncoder | None,
        start: MaskGIT | None,
    ):
        super().__init__(settings)
        self.train, self.val, self.captions = train, val, None
        self.model = settings.build_model(train, None if encoder is None else encoder.dim)
        if start is not None:
            _take_weights(self.model, start, train.tokenizer)
        text = None if encoder is None else encoder.name
        self.model.info = {
            "tokenizer": train.tokenizer,
            "classes": train.classes,
            "dataset": train.manifest["dataset"],
            "text_encoder": text,
        }
        self.model.to(self.device).train()
        prepare_transformer(self.model, settings)
        groups = parameter_groups(self.model, settings.weight_decay)
        optimizer = build_adamw(groups, settings)
        if encoder is not None:
            self.captions = CaptionTable(
                encoder, (caption for own in (*train.captions, *val.captions) for caption in own)
            )
        self.parallel = self.accelerator.prepare(self.model)
        inputs = {"tokens": [train.fingerprint, val.fingerprint], "encoder": text}
        inputs["start"] = None if start is None else checksum(*start.parameters())
        self.trainer = Trainer(settings, folder, self.accelerator, self.model, {"generator": optimizer}, **inputs)

    def condition(self, batch: dict[str, Any]) -> Condition:
        return condition_from(self.settings.condition, batch["label"], batch["caption"], self.captions, self.device)

    def batches(self, first: int) -> Iterator[dict[str, Any]]:
        return self.train.batches(self.settings.batch_size, self.settings.seed, first, self.rank, self.world_size)

    def train_step(self, micro_batches: list[dict], step: int) -> dict[str, Tensor]:
        own = self.settings
        for i, batch in enumerate(micro_batches):
            mask = sample_mask(len(batch["tokens"]), self.model.scales, own.mask_ratio, own.coarse_first)
            dropped = torch.rand(len(mask)) < own.condition_dropout
            rows = mask.flatten().nonzero()[:, 0]  # here, where nobody waits for it
            tokens, mask, dropped, rows = (to_device(x, self.device) for x in (batch["tokens"], mask, dropped, rows))
            last = i == len(micro_batches) - 1
            with self.gradients_apart(not last, self.parallel):
                with self.autocast():
                    loss = self.parallel(tokens, mask, self.condition(batch), dropped, own.label_smoothing, rows)
                self.trainer.update(loss, {"loss": loss}, "generator", list(self.model.parameters()), last)
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        own, place = self.settings, (self.rank, self.world_size)
        self.model.eval()
        with self.autocast():
            sums = validation_sums(self.model, self.val, self.condition, own.batch_size, own.seed, *place)
        self.model.train()
        return metrics_from(self.accelerator.reduce(sums, "sum").cpu())


def train_maskgit(
    settings: MaskGITSettings,
    train: TokenCache,
    val: TokenCache,
    folder: str | Path,
    encoder: TextEncoder | None = None,
    start: MaskGIT | None = None,
) -> MaskGIT:
    """Train a generator on cached tokens, resuming what `folder` holds, and return it with averaged weights, frozen.

    Logs `loss` (with label smoothing) and at every evaluation what `metrics_from` names. Every process takes its part
    of a step and of the validation; the processes' losses are averaged as they are, though each masks another number
    of tokens.

    Args:
        train, val: of one tokenizer; `val` gives the validation loss alone.
        encoder: the captions', with `condition="text"`; frozen, on the device that is to encode.
        start: go on from this model's weights: of the settings' size and the same tokenizer. Where its condition is of
            another kind (classes, and now captions), what reads the condition starts anew.
    Raises:
        ValueError: caches of two tokenizers, no encoder for text, or a start that does not fit.
        NonFiniteLoss: the loss is not finite.
    """
    if train.tokenizer != val.tokenizer:
        raise ValueError(
            f"the training tokens are of the tokenizer {train.tokenizer} and the validation tokens of {val.tokenizer}, "
            "expected the same: encode both with one"
        )
    if (settings.condition == "text") != (encoder is not None):
        raise ValueError(
            f"condition is {settings.condition!r} and {'no' if encoder is None else 'a'} text encoder is given, "
            "expected an encoder with 'text' and only then"
        )
    stage = MaskGITStage(settings, train, val, folder, encoder, start)
    stage.trainer.run(stage, "MaskGIT")
    return stage.model.eval().requires_grad_(False)


def _take_weights(model: MaskGIT, start: MaskGIT, tokenizer: str) -> None:
    """Give MODEL the weights of START, but for the parts of a condition that START has not."""
    if start.info.get("tokenizer") != tokenizer:
        raise ValueError(
            f"the given model's tokens are of the tokenizer {start.info.get('tokenizer')}, the cache's of {tokenizer}, "
            "expected the same: start from a model of this tokenizer, or without one"
        )
    free = {"num_classes", "text_dim", "dropout"}
    theirs, ours = ({k: v for k, v in m.config().items() if k not in free} for m in (start, model))
    if theirs != ours:
        odd = ", ".join(f"{name} {theirs[name]} and {ours[name]}" for name in ours if theirs[name] != ours[name])
        raise ValueError(f"the given model and the settings differ in {odd}: expected the same, see its config.json")
    state = model.state_dict()
    fitting = {k: v for k, v in start.state_dict().items() if k in state and v.shape == state[k].shape}
    model.load_state_dict(state | fitting)


def train_and_save(
    settings: MaskGITSettings,
    train: str | Path,
    val: str | Path,
    folder: str | Path,
    encoder: str | None = None,
    start: str | Path | None = None,
    dtype: str = "float16",
) -> None:
    """`train_maskgit` on the caches TRAIN and VAL, saved as FOLDER/generator; for `base.processes.launch`.

    `encoder` is what `datasets.text.build_text_encoder` takes, `start` what `MaskGIT.from_pretrained` takes, `dtype`
    how the weights are stored.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    text = None if encoder is None else build_text_encoder(encoder).to(state.device)
    first = None if start is None else MaskGIT.from_pretrained(start)
    model = train_maskgit(settings, TokenCache.open(train), TokenCache.open(val), folder, text, first)
    if state.is_main_process:
        model.save_pretrained(Path(folder) / "generator", dtype)
    state.wait_for_everyone()


def encode_splits(
    tokenizer: str,
    dataset: str,
    folders: tuple[Path, Path],
    limits: tuple[int | None, int | None],
    encoding: EncodingSettings,
    settings: MaskGITSettings,
    processes: int,
) -> None:
    """Encode the training and the validation images of a data set, on so many processes, into two token caches.

    `tokenizer` and `dataset` are what `cache_dataset` takes; `folders` and `limits` (images; None: all) are the
    training's and the validation's.
    """
    plain = CacheSettings(seed=settings.seed, workers=settings.workers)
    views = replace(plain, views=encoding.views, flip=encoding.flip)
    train = tokenizer, dataset, "train", folders[0], limits[0], encoding.random_crop
    launch(partial(cache_dataset, settings=views), processes, *train)
    launch(partial(cache_dataset, settings=plain), processes, tokenizer, dataset, "val", folders[1], limits[1])


def find_start(start: str | None, tokenizer: CodaTokenizer) -> str | None:
    """Where the MaskGIT to go on from lies; CacheMismatch where it was trained on another tokenizer's tokens."""
    if start is None:
        return None
    place = find_model(start)
    check_generator(MaskGIT.from_pretrained(place), tokenizer)
    return place


def last_metrics(log: Sequence[dict[str, float]], model: MaskGIT) -> dict[str, float]:
    """The last validation of a training log, the time that it took (seconds), and the model's size."""
    last = last_validation(log)
    metrics = {name: last[name] for name in ("val_loss", "val_accuracy")} | {"training_seconds": log[-1]["seconds"]}
    return metrics | {"parameters": sum(p.numel() for p in model.parameters())}


def last_validation(log: Sequence[dict[str, float]]) -> dict[str, float]:
    return next(row for row in reversed(log) if "val_loss" in row)


def condition_from(
    kind: str, labels: Tensor, captions: list[str], table: CaptionTable | None, device: torch.device
) -> Condition:
    """The condition of some images as the model takes it: their labels, their captions' embeddings, or None."""
    if kind == "class":
        return to_device(labels, device)
    return None if kind == "none" else table.condition(captions, device)


@torch.no_grad()
def validation_sums(
    model: MaskGIT, cache: TokenCache, condition_of, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Sums over a cache's first view that `metrics_from` turns into metrics: (levels, 3) float64.

    For each level: the cross-entropy (nats, without label smoothing), how many tokens are right, how many were masked.
    Which tokens of an image are masked (cosine) depends on the seed and the image alone. Process `rank` of
    `world_size` takes every world_size-th row.
    """
    device = model.positions.device
    sums = torch.zeros(len(model.scales), 3, dtype=torch.float64, device=device)
    rows = [int(row) for row in (cache.view == 0).nonzero()[0]][rank::world_size]
    for begin in range(0, len(rows), batch_size):
        batch = cache.batch(rows[begin : begin + batch_size])
        masks = [
            sample_mask(1, model.scales, generator=own) for own in sample_generators(seed, batch["index"].tolist())
        ]
        mask = torch.cat(masks)
        places = to_device(mask.flatten().nonzero()[:, 0], device)  # (M,)
        tokens, mask = to_device(batch["tokens"], device), to_device(mask, device)
        features = model.features(tokens.masked_fill(mask, model.mask_token), condition_of(batch))
        hidden, targets = features.flatten(0, 1)[places], tokens.flatten()[places]  # (M, D), (M,)
        levels = model.token_levels[places % model.num_tokens]
        for part in torch.arange(len(targets), device=device).split(max(1, SCORED_ROWS)):
            logits = model.logits(hidden[part]).float()  # (M, K)
            loss = nn.functional.cross_entropy(logits, targets[part], reduction="none")
            scores = torch.stack([loss, (logits.argmax(dim=1) == targets[part]).float(), torch.ones_like(loss)], dim=1)
            sums.index_add_(0, levels[part], scores.double())
    return sums


def metrics_from(sums: Tensor) -> dict[str, float]:
    """`val_loss` (nats a masked token), `val_accuracy`, and both `_level_1`, ... for the levels that hid a token."""
    loss, right, masked = sums.sum(0).tolist()
    metrics = {"val_loss": loss / masked, "val_accuracy": right / masked}
    for name, column in (("val_loss", 0), ("val_accuracy", 1)):
        metrics |= {f"{name}_level_{i + 1}": (row[column] / row[2]).item() for i, row in enumerate(sums) if row[2] > 0}
    return metrics
