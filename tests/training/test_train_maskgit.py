import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch.nn import functional as F

from codalib.base.files import write_json
from codalib.base.seeds import sample_generators
from codalib.datasets.images import load_dataset
from codalib.datasets.text import TextEncoder
from codalib.datasets.token_cache import CAPTIONS, CODES, MANIFEST, SHARDS, CacheMismatch, TokenCache
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.checkpoints import load_tokenizer, load_vae
from codalib.models.maskgit import MaskGIT
from codalib.models.masks import sample_mask
from codalib.models.sampling import generate
from codalib.models.tokens import join_levels
from codalib.training.maskgit import (
    MaskGITStage,
    condition_from,
    encode_splits,
    find_start,
    last_metrics,
    metrics_from,
    parameter_groups,
    train_and_save,
    train_maskgit,
    validation_sums,
)
from codalib.training.settings import EncodingSettings, MaskGITSettings
from codalib.training.trainer import Trainer, read_log

SCALES = (1, 2, 3)  # 14 tokens
K = 20
SMALL = MaskGITSettings(
    steps=4, batch_size=3, accumulation=2, width=16, depth=2, heads=2, warmup_steps=2, log_every=1, checkpoint_every=2
)


def write_cache(folder, indices, labels, classes, scales=SCALES, codes=K, tokenizer="abc", views=1):
    """A token cache of given indices (N, L), with captions of its labels."""
    images = len(indices) // views
    (folder / SHARDS).mkdir(parents=True)
    columns = {
        "indices": np.asarray(indices, np.uint16),
        "label": np.asarray(labels, np.int32),
        "image": np.arange(len(indices), dtype=np.int32) % images,
        "view": np.arange(len(indices), dtype=np.int32) // images,
    }
    save_file(columns, folder / SHARDS / "00000.safetensors")
    save_file({"values": np.random.default_rng(0).normal(size=(codes, 4)).astype(np.float32)}, folder / CODES)
    write_json(folder / CAPTIONS, [[f"picture {classes[label]}", classes[label]] for label in labels[:images]])
    manifest = {"tokenizer": tokenizer, "codebook_size": codes, "scales": scales, "dataset": "test", "shards": 1}
    write_json(folder / MANIFEST, manifest | {"classes": classes, "images": images, "views": views})
    return TokenCache.open(folder)


def random_cache(folder, count=10, seed=0, **settings):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    return write_cache(folder, generator.integers(0, K, (count, 14)), labels, ["a", "b", "c"], **settings)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return random_cache(folder / "train"), random_cache(folder / "val", 6, seed=1)


class LetterText(TextEncoder):
    """An encoder without weights: a letter's embedding is its number."""

    name, dim, length = "letters", 5, 20

    def __init__(self):
        torch.nn.Module.__init__(self)

    def tokens(self, captions):
        size = max(map(len, captions))
        mask = torch.tensor([[i < len(caption) for i in range(size)] for caption in captions])
        numbers = torch.tensor([[ord(letter) for letter in caption.ljust(size)] for caption in captions])
        return torch.sin(numbers[..., None] * torch.arange(1, 6)), mask


def weights(model):
    return model.state_dict()


@pytest.fixture(scope="module")
def trained(caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train_maskgit(SMALL, *caches, folder), folder


def test_losses_and_accuracies_per_level_are_logged(trained, caches):
    rows = read_log(trained[1])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(2 < row["loss"] < 4 for row in rows)  # log 20 = 3.0
    names = {"val_loss", "val_accuracy"} | {f"val_{kind}_level_{i}" for kind in ("loss", "accuracy") for i in (1, 2, 3)}
    assert names <= rows[-1].keys()
    assert not names & rows[0].keys()
    assert trained[0].info == {"tokenizer": "abc", "classes": ["a", "b", "c"], "dataset": "test", "text_encoder": None}
    assert not trained[0].training
    assert not any(p.requires_grad for p in trained[0].parameters())


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, caches, tmp_path, monkeypatch):
    update = Trainer.update

    def interrupted(self, *arguments, **keywords):
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_maskgit(SMALL, *caches, tmp_path)
    monkeypatch.undo()
    resumed = weights(train_maskgit(SMALL, *caches, tmp_path))
    assert all(torch.equal(value, resumed[name]) for name, value in weights(trained[0]).items())
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(tmp_path)]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(trained[1])]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"mask_ratio": "beta"},
        {"coarse_first": 1.0},
        {"label_smoothing": 0.0},
        {"code_embeddings": True},
        {"level_positions": False},
    ],
)
def test_settings_change_the_result(trained, caches, tmp_path, change):
    changed = weights(train_maskgit(dataclasses.replace(SMALL, **change), *caches, tmp_path))
    same = weights(trained[0])
    assert changed.keys() != same.keys() or any(
        value.shape != same[name].shape or not torch.equal(value, same[name]) for name, value in changed.items()
    )


def test_dropped_conditions_train_no_class_and_the_others_train_theirs(caches, tmp_path):
    def classes(**change):
        own = dataclasses.replace(SMALL, ema=0.0, **change)
        return train_maskgit(own, *caches, tmp_path / str(change)).classes.weight

    start = classes(learning_rate=0.0)
    for dropped, trained_rows in ((1.0, [False, False, False, True]), (0.0, [True, True, True, False])):
        assert (classes(condition_dropout=dropped) != start).any(dim=1).tolist() == trained_rows


def test_a_step_updates_all_parameters_at_its_last_micro_batch(caches, tmp_path, monkeypatch):
    update, lasts = Trainer.update, []

    def noted(self, loss, terms, name, parameters, last):
        assert {id(p) for p in parameters} == {id(p) for p in self.module.parameters()}
        assert self.optimizers[name].param_groups[0]["betas"] == (0.9, 0.96)
        lasts.append(last)
        update(self, loss, terms, name, parameters, last)

    monkeypatch.setattr(Trainer, "update", noted)
    train_maskgit(dataclasses.replace(SMALL, steps=2), *caches, tmp_path)
    assert lasts == [False, True] * 2


def test_processes_average_their_gradients_once_a_step(caches, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(MaskGITStage, "gradients_apart", lambda _, apart, *__: asked.append(apart) or nullcontext())
    train_maskgit(dataclasses.replace(SMALL, steps=2, accumulation=3), *caches, tmp_path)
    assert asked == [True, True, False] * 2


def test_captions_condition_too(caches, tmp_path):
    settings = dataclasses.replace(SMALL, condition="text")
    model = train_maskgit(settings, *caches, tmp_path, encoder=LetterText())
    assert model.text_dim == 5
    assert model.info["text_encoder"] == "letters"
    assert not torch.equal(model.no_text, settings.build_model(caches[0], 5).no_text)  # dropped captions train it
    assert train_maskgit(dataclasses.replace(SMALL, condition="none"), *caches, tmp_path / "free").num_classes is None
    with pytest.raises(ValueError, match="'text' and no text encoder is given"):
        train_maskgit(settings, *caches, tmp_path)
    with pytest.raises(ValueError, match="'class' and a text encoder is given"):
        train_maskgit(SMALL, *caches, tmp_path, encoder=LetterText())


def test_two_tokenizers_tokens_are_refused(caches, tmp_path):
    other = random_cache(tmp_path / "other", tokenizer="def")
    with pytest.raises(ValueError, match="tokenizer abc and the validation tokens of def"):
        train_maskgit(SMALL, caches[0], other, tmp_path)


def test_going_on_from_other_weights(trained, caches, tmp_path):
    still = dataclasses.replace(SMALL, steps=1, learning_rate=0.0)
    model = train_maskgit(still, *caches, tmp_path, start=trained[0])
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(trained[0]).items())
    with pytest.raises(ValueError, match=r"differ in depth \d and 3: expected the same"):
        train_maskgit(dataclasses.replace(still, depth=3), *caches, tmp_path, start=trained[0])
    others = [random_cache(tmp_path / name, tokenizer="def") for name in ("train", "val")]
    with pytest.raises(ValueError, match="of the tokenizer abc, the cache's of def"):
        train_maskgit(still, *others, tmp_path, start=trained[0])


def test_other_inputs_are_another_run(trained, caches, tmp_path):
    text = dataclasses.replace(SMALL, condition="text")
    other, encoder = random_cache(tmp_path / "other", seed=2), LetterText()
    renamed = LetterText()
    renamed.name = "other letters"
    moved = SMALL.build_model(caches[0], None)
    moved.info = trained[0].info

    def run(settings, train, val, encoder=None, start=None):
        return MaskGITStage(settings, train, val, tmp_path, encoder, start).trainer.checkpoints

    plain = run(SMALL, *caches)
    assert run(SMALL, *caches) == plain
    others = [run(SMALL, other, caches[1]), run(SMALL, caches[0], other)]
    others += [run(SMALL, *caches, start=start) for start in (trained[0], moved)]
    others += [run(text, *caches, own) for own in (encoder, renamed)]
    assert len({plain, *others}) == 7


def test_captions_can_follow_classes(trained, caches, tmp_path):
    still = dataclasses.replace(SMALL, steps=1, learning_rate=0.0, condition="text")
    model = train_maskgit(still, *caches, tmp_path, encoder=LetterText(), start=trained[0])
    before, after = weights(trained[0]), weights(model)
    assert before.keys() - after.keys() == {"classes.weight"}
    assert after.keys() - before.keys() == {"text.0.weight", "text.0.bias", "text.1.weight", "text.1.bias", "no_text"}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


def test_validation_is_the_mean_over_hidden_tokens_and_shared_by_processes(trained, caches):
    model, val = trained[0], caches[1]

    def condition_of(batch):
        return condition_from("class", batch["label"], batch["caption"], None, "cpu")

    sums = validation_sums(model, val, condition_of, batch_size=4, seed=0)
    halves = sum(validation_sums(model, val, condition_of, 2, 0, rank, 2) for rank in (0, 1))
    torch.testing.assert_close(sums, halves)
    batch = val.batch(range(6))
    mask = torch.cat([sample_mask(1, SCALES, generator=own) for own in sample_generators(0, range(6))])
    logits = model.logits(model.features(batch["tokens"].masked_fill(mask, K), batch["label"]))
    measures = metrics_from(sums)
    assert measures["val_loss"] == pytest.approx(F.cross_entropy(logits[mask], batch["tokens"][mask]).item(), rel=1e-5)
    right = logits.argmax(dim=2) == batch["tokens"]
    assert measures["val_accuracy"] == pytest.approx(right[mask].float().mean().item())
    fine = mask & (model.token_levels == 2)
    assert measures["val_accuracy_level_3"] == pytest.approx(right[fine].float().mean().item())


def test_validation_looks_at_each_image_once(tmp_path, trained):
    generator = np.random.default_rng(3)
    labels = np.tile(generator.integers(0, 3, 4), 2)
    twice = write_cache(tmp_path, generator.integers(0, K, (8, 14)), labels, ["a", "b", "c"], views=2)
    sums = validation_sums(trained[0], twice, lambda batch: batch["label"], 4)
    mask = torch.cat([sample_mask(1, SCALES, generator=own) for own in sample_generators(0, range(4))])
    assert sums[:, 2].sum() == mask.sum()


def test_both_splits_are_encoded_and_only_the_training_images_have_views(tmp_path):
    encoding, settings = EncodingSettings(views=2, flip=True), dataclasses.replace(SMALL, seed=5)
    folders = tmp_path / "train", tmp_path / "val"
    encode_splits("emoji-small", "emoji", folders, (3, 2), encoding, settings, 1)
    train, val = map(TokenCache.open, folders)
    assert (len(train), len(val)) == (6, 2)
    told = {name: (train.manifest[name], val.manifest[name]) for name in ("views", "flip", "seed", "random_crop")}
    assert told == {"views": (2, 1), "flip": (True, False), "seed": (5, 5), "random_crop": (False, False)}
    assert train.manifest["content"] != val.manifest["content"]
    crops = tmp_path / "crops", tmp_path / "val"
    encode_splits("emoji-small", "emoji", crops, (3, 2), dataclasses.replace(encoding, random_crop=True), settings, 1)
    assert TokenCache.open(crops[0]).manifest["random_crop"]


def test_what_a_process_trains_is_saved_in_the_type_that_is_asked_for(caches, tmp_path):
    train, val = (cache.folder for cache in caches)
    train_and_save(SMALL, train, val, tmp_path, dtype="float32")
    again = weights(train_maskgit(SMALL, *caches, tmp_path / "again"))
    saved = load_file(tmp_path / "generator" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in again.items() if name in saved)
    train_and_save(SMALL, train, val, tmp_path / "on", start=tmp_path / "generator")
    assert load_file(tmp_path / "on/generator/model.safetensors").popitem()[1].dtype == torch.float16
    from_it = train_maskgit(
        SMALL, *caches, tmp_path / "on-again", start=MaskGIT.from_pretrained(tmp_path / "generator")
    )
    on = MaskGIT.from_pretrained(tmp_path / "on" / "generator")
    assert all(torch.allclose(value, weights(on)[name], atol=1e-3) for name, value in weights(from_it).items())


def test_a_start_belongs_to_the_tokenizer():
    small = load_tokenizer("emoji-small")
    assert find_start(None, small) is None
    assert MaskGIT.from_pretrained(find_start("emoji-class", small)).num_tokens == 149
    with pytest.raises(CacheMismatch, match="trained on the tokens of the tokenizer"):
        find_start("emoji-class", load_tokenizer("emoji"))


def test_the_last_metrics_are_the_last_validations(trained):
    log = [{"step": 1, "val_loss": 3.0, "val_accuracy": 0.1, "seconds": 1.0}]
    log += [{"step": 2, "val_loss": 2.0, "val_accuracy": 0.2, "seconds": 2.0}, {"step": 3, "loss": 1.0, "seconds": 4.0}]
    size = sum(p.numel() for p in trained[0].parameters())
    expected = {"val_loss": 2.0, "val_accuracy": 0.2, "training_seconds": 4.0, "parameters": size}
    assert last_metrics(log, trained[0]) == expected


def test_weight_decay_falls_on_matrices_alone(caches):
    decayed, others = parameter_groups(SMALL.build_model(caches[0]), 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) == 2 * 4 + 1  # four linear layers a block, and the head
    assert all(p.ndim == 2 for p in decayed["params"])
    total = sum(1 for _ in SMALL.build_model(caches[0]).parameters())
    assert len(others["params"]) == total - 9


def test_the_defaults_are_the_papers():
    paper = MaskGITSettings()
    assert (paper.steps, paper.batch_size * 8, paper.learning_rate, paper.preset) == (500_000, 2048, 4e-4, "L")
    assert (paper.betas, paper.label_smoothing, paper.dropout, paper.condition_dropout) == ((0.9, 0.96), 0.1, 0.1, 0.1)
    assert (paper.weight_decay, paper.clip, paper.warmup_steps, paper.ema) == (0.045, 1.0, 5000, 0.9999)
    assert (paper.final_learning_rate, paper.mask_ratio, paper.coarse_first) == (0, "cosine", 0)
    for wrong in (
        {"condition": "image"},
        {"preset": "M"},
        {"mask_ratio": "sine"},
        {"dropout": 1.5},
        {"latent_context": True},
    ):
        with pytest.raises(ValueError, match="expected"):
            MaskGITSettings(**wrong)


def test_64_images_are_learnt_by_heart(tmp_path):
    """Tokens of real images, each a class of its own: masked tokens are predicted, whole images from their class."""
    images = load_dataset("emoji", "train", 64, random_crop=False, limit=64)
    with torch.no_grad():
        latents = load_vae("emoji").encode(torch.stack([images[i]["image"] for i in range(64)]), sample=False)
        latents = F.adaptive_avg_pool2d(latents, 4)
        quantizer = ResidualNearestQuantizer(16, 64, (1, 2, 4))
        features = latents.movedim(1, -1).flatten(0, 2)
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:64]
        quantizer.codebooks.weight.data = features[chosen].detach()
        tokens = join_levels(quantizer.encode(latents))  # (64, 21)
    assert len(tokens.unique()) > 32
    names = [str(i) for i in range(64)]
    cache = write_cache(tmp_path / "cache", tokens.numpy(), np.arange(64), names, (1, 2, 4), 64)
    settings = MaskGITSettings(
        steps=180,
        batch_size=64,
        width=96,
        depth=2,
        heads=4,
        learning_rate=6e-3,
        warmup_steps=20,
        weight_decay=0.0,
        label_smoothing=0.0,
        dropout=0.0,
        condition_dropout=0.0,
        ema=0.0,
    )
    model = train_maskgit(settings, cache, cache, tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["val_accuracy"] >= 0.99
    drawn = join_levels(generate(model, torch.arange(64), steps=4, generator=sample_generators(0, range(64))))
    assert (drawn == tokens).float().mean() >= 0.99
    model.save_pretrained(tmp_path / "model", "float16")
    again = MaskGIT.from_pretrained(tmp_path / "model")
    stored = join_levels(generate(again, torch.arange(64), steps=4, generator=sample_generators(0, range(64))))
    assert (stored == tokens).float().mean() >= 0.99
