import dataclasses
import errno
import json
import os
import shutil
import tempfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from codalib.base.files import write_json
from codalib.base.processes import launch
from codalib.datasets import token_cache as tokens_module
from codalib.datasets.images import load_dataset
from codalib.datasets.token_cache import (
    CacheMismatch,
    CacheSettings,
    TokenCache,
    cache_dataset,
    cache_tokens,
    index_type,
    tokenizer_hash,
)
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.checkpoints import load_vae
from codalib.models.quantizer import ResidualAttentionQuantizer
from codalib.models.tokenizer import CodaTokenizer

SCALES = (1, 2, 8)  # 69 tokens


def make_tokenizer(seed=0, codes=300, kind=ResidualAttentionQuantizer):
    torch.manual_seed(seed)
    return CodaTokenizer(load_vae("emoji"), kind(16, codes, SCALES)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def images():
    return load_dataset("emoji", "train", 64, random_crop=False, limit=7)


@pytest.fixture(scope="module")
def cached(tokenizer, images, tmp_path_factory):
    return cache_tokens(
        tokenizer, images, tmp_path_factory.mktemp("cache"), CacheSettings(batch_size=3, shard_images=4)
    )


def test_a_cache_holds_what_the_tokenizer_says(cached, tokenizer, images):
    cache = TokenCache.open(cached, tokenizer_hash(tokenizer))
    assert len(cache) == 7
    assert cache.indices.shape == (7, 69)
    assert cache.indices.dtype == np.uint16
    assert (cache.scales, cache.codebook_size, cache.classes) == (SCALES, 300, images.classes)
    batch = cache.batch([2, 5])
    assert batch["tokens"].dtype == torch.int64
    assert batch["caption"] == [images.items[i].caption for i in (2, 5)]
    assert batch["label"].tolist() == [images.items[i].label for i in (2, 5)]
    assert batch["index"].tolist() == [2, 5]
    # The seeds are 0 (run and view) times the stride plus the image's number.
    noise = [torch.Generator().manual_seed(i) for i in (2, 5)]
    indices = tokenizer.encode(torch.stack([images[i]["image"] for i in (2, 5)]), generator=noise)
    assert torch.equal(batch["tokens"], torch.cat([level.flatten(1) for level in indices], dim=1))
    torch.testing.assert_close(
        tokenizer.decode(indices), tokenizer.vae.decode(tokenizer.quantizer.decode(indices)), msg="decode is pure"
    )
    one = cache.code_values[batch["tokens"][:, 0]]  # the coarsest level adds its code's value everywhere
    torch.testing.assert_close(tokenizer.quantizer.decode(indices, levels=1)[:, :, 3, 4], one)


def test_processes_share_the_shards_and_batches_do_not_matter(cached, tokenizer, images, tmp_path):
    cache_tokens(tokenizer, images, tmp_path, CacheSettings(batch_size=2, shard_images=4), (1, 2))
    with pytest.raises(ValueError, match=r"lacks 1 of its 2 shards \(00000.safetensors"):
        TokenCache.open(tmp_path)
    cache_tokens(tokenizer, images, tmp_path, CacheSettings(batch_size=7, shard_images=4), (0, 2))
    whole, shared = TokenCache.open(cached), TokenCache.open(tmp_path)
    assert np.array_equal(whole.indices, shared.indices)
    assert sorted(shared.image.tolist()) == list(range(7))
    assert whole.fingerprint == shared.fingerprint


def test_an_interrupted_cache_goes_on_with_the_next_shard(cached, tokenizer, images, tmp_path, monkeypatch):
    encode, calls = tokens_module._encode, []

    def failing(*arguments):
        calls.append(arguments[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(tokens_module, "_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        cache_tokens(tokenizer, images, tmp_path, CacheSettings(shard_images=4))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000.safetensors"]  # no part of the second
    cache_tokens(tokenizer, images, tmp_path, CacheSettings(shard_images=4))
    assert [list(numbers) for numbers in calls] == [[0, 1, 2, 3], [4, 5, 6], [4, 5, 6]]
    cache_tokens(tokenizer, images, tmp_path, CacheSettings(shard_images=4))  # nothing is left to do
    assert len(calls) == 3
    assert np.array_equal(TokenCache.open(tmp_path).indices, TokenCache.open(cached).indices)


def test_another_tokenizers_cache_is_refused_with_both_hashes(cached, tokenizer, images):
    other = make_tokenizer(seed=1)
    for attempt in (
        lambda: TokenCache.open(cached, tokenizer_hash(other)),
        lambda: cache_tokens(other, images, cached, CacheSettings(shard_images=4)),
    ):
        with pytest.raises(CacheMismatch) as caught:
            attempt()
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert tokenizer_hash(other) in sentence
        assert tokenizer_hash(tokenizer) in sentence
    with pytest.raises(CacheMismatch, match="views 1 there and 2 here"):
        cache_tokens(tokenizer, images, cached, CacheSettings(views=2, shard_images=4))
    with pytest.raises(CacheMismatch, match="images 7 there and 6 here"):
        cache_tokens(tokenizer, images.subset(list(range(6))), cached, CacheSettings(shard_images=4))


def test_the_hash_follows_weights_and_settings(tokenizer):
    assert tokenizer_hash(make_tokenizer()) == tokenizer_hash(tokenizer)
    changed = make_tokenizer()
    with torch.no_grad():
        changed.vae.autoencoder.decoder.conv_out.bias[0] += 1e-6
    assert tokenizer_hash(changed) != tokenizer_hash(tokenizer)
    rescaled = make_tokenizer()
    rescaled.vae.autoencoder.register_to_config(scaling_factor=rescaled.vae.scale * 2)
    assert tokenizer_hash(rescaled) != tokenizer_hash(tokenizer)
    assert tokenizer_hash(make_tokenizer(kind=ResidualNearestQuantizer)) != tokenizer_hash(tokenizer)


def test_views_crop_flip_and_draw_anew(tokenizer, tmp_path):
    images = load_dataset("emoji", "train", 64, random_crop=False, limit=3)
    cache_tokens(tokenizer, images, tmp_path / "flip", CacheSettings(views=2, flip=True, sample=False))
    cache = TokenCache.open(tmp_path / "flip")
    assert cache.view.tolist() == [0, 0, 0, 1, 1, 1]
    assert cache.image.tolist() == [0, 1, 2, 0, 1, 2]
    mirrored = torch.stack([images[i]["image"].flip(2) for i in range(3)])
    wanted = torch.cat([level.flatten(1) for level in tokenizer.encode(mirrored, sample=False)], dim=1)
    assert torch.equal(cache.batch([3, 4, 5])["tokens"], wanted)
    assert cache.batch([4])["caption"] == [images.items[1].caption]
    cropped = load_dataset("emoji", "train", 64, random_crop=True, limit=3)
    cache_tokens(tokenizer, cropped, tmp_path / "crop", CacheSettings(views=2, sample=False))
    crops = TokenCache.open(tmp_path / "crop").indices
    assert (crops[:3] != crops[3:]).mean() > 0.1


def test_unreadable_images_are_left_out(tokenizer, tmp_path):
    images = load_dataset("emoji", "train", 64, random_crop=False, limit=5)
    read = images.__getitem__

    class Spoilt(type(images)):
        def __getitem__(self, key):
            return None if key[0] == 1 else read(key)

        def __len__(self):
            return 5

    spoilt = Spoilt(images.items, images.classes, 64, False, "spoilt")
    cache_tokens(tokenizer, spoilt, tmp_path, CacheSettings(views=2, batch_size=2, shard_images=3))
    cache = TokenCache.open(tmp_path)
    assert cache.image.tolist() == [0, 2, 3, 4] * 2
    assert cache.view.tolist() == [0] * 4 + [1] * 4
    assert cache.batch([1])["caption"] == [images.items[2].caption]


def test_training_order_is_seeded_resumable_and_shared(cached):
    cache = TokenCache.open(cached)

    def rows(steps, size=2, **settings):
        stream = cache.batches(size, **settings)
        return [next(stream)["index"].tolist() for _ in range(steps)]

    all_steps = rows(7, seed=3)
    assert rows(4, seed=3, start_step=3) == all_steps[3:]
    assert rows(7, seed=4) != all_steps
    assert sorted(index for step in all_steps for index in step) == sorted(
        list(range(7)) * 2
    )  # each epoch shows each image once
    halves = [rows(7, size=1, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == all_steps


@pytest.mark.parametrize(("codes", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_indices_take_the_smallest_type(codes, kind):
    assert index_type(codes) is kind
    assert np.asarray(codes - 1).astype(kind) == codes - 1


def test_broken_or_absent_caches_say_so(cached, tokenizer, images, tmp_path):
    with pytest.raises(ValueError, match="holds no whole token cache"):
        TokenCache.open(tmp_path)
    cache_tokens(tokenizer, images, tmp_path, CacheSettings(shard_images=4))
    shard = tmp_path / "shards" / "00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"00001.safetensors cannot be read .*: remove it"):
        TokenCache.open(tmp_path)
    assert json.loads((tmp_path / "captions.json").read_text())
    shard.write_bytes(whole)
    assert np.array_equal(TokenCache.open(tmp_path).indices, TokenCache.open(cached).indices)
    column = tmp_path / "columns" / "label.npy"
    whole = column.read_bytes()
    heads = [whole.replace(b"<i4", other) for other in (b">i4", b"<f4", b"|S4", b"<i2", b"<i\xb4")]
    heads += [whole.replace(old, new) for old, new in ((b"{", b"["), (b"(", b"8"), (b"'shape'", b"'shap!'"))]
    for damaged in (b"", b"half", whole[:40], whole[:-1], whole + b"0", *heads):
        column.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"label.npy cannot be read .*: remove"):
            TokenCache.open(tmp_path)
    column.write_bytes(whole)
    (tmp_path / "codes.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"codes.safetensors cannot be read .*: remove it"):
        _ = TokenCache.open(tmp_path).code_values
    (tmp_path / "manifest.json").write_text('{"tokenizer": "t"}')
    with pytest.raises(ValueError, match=r"manifest.json is damaged, expected 'scales' in it: remove it"):
        TokenCache.open(tmp_path)


def test_shards_where_nothing_can_be_written_say_so(tmp_path, monkeypatch):
    write_shards(tmp_path, 1, 2, 1)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(OSError, match=r"expected a folder that can be written, got .*Read-only file system"):
        TokenCache.open(tmp_path)


def write_shards(folder, shards, rows, length):
    """A cache as earlier versions left it: random tokens in shards alone."""
    rng, parts = np.random.default_rng(0), []
    manifest = {"tokenizer": "t", "codebook_size": 2**16, "scales": [1] * length, "classes": ["x"], "shards": shards}
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "captions.json", [["x"]] * (shards * rows))
    (folder / "shards").mkdir()
    for number in range(shards):
        part = {"indices": rng.integers(0, 2**16, (rows, length), dtype=np.uint16)}
        part["image"] = np.arange(number * rows, (number + 1) * rows, dtype=np.int32)
        part |= {"label": part["image"] % 7, "view": np.zeros(rows, np.int32)}
        save_file(part, folder / "shards" / f"{number:05d}.safetensors")
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_cache_of_shards_is_assembled_and_mapped_without_being_held(tmp_path):
    shards, rows, length = 12, 64, 4096
    columns = write_shards(tmp_path, shards, rows, length)  # 6 MiB of tokens, 0.5 MiB a shard
    tracemalloc.start()
    try:
        cache = TokenCache.open(tmp_path)
        batch = cache.batch([700, 3])
        assert tracemalloc.get_traced_memory()[1] < 0.4 * columns["indices"].nbytes
    finally:
        tracemalloc.stop()
    assert batch["tokens"].tolist() == columns["indices"][[700, 3]].tolist()
    assert not (tmp_path / "shards").exists()
    for name in ("indices", "image", "view"):
        array = getattr(cache, name)
        assert isinstance(array.base, np.memmap)
        assert np.array_equal(array, columns[name])
    assert np.array_equal(cache.labels.numpy(), columns["label"])
    again = TokenCache.open(tmp_path)
    assert again.fingerprint == cache.fingerprint
    batch["tokens"][:] = 0  # a copy: nothing of the cache changes
    assert np.array_equal(cache.indices, columns["indices"])


def test_a_cache_opened_twice_at_once_is_assembled_once(tmp_path, monkeypatch):
    columns, calls = write_shards(tmp_path, 12, 64, 512), []
    write, both = tokens_module._write_columns, threading.Barrier(2)
    monkeypatch.setattr(tokens_module, "_write_columns", lambda *given: calls.append(1) or write(*given))
    with ThreadPoolExecutor() as pool:  # a lock that holds between threads holds between processes
        caches = list(pool.map(lambda _: both.wait() >= 0 and TokenCache.open(tmp_path), range(2)))
    assert len(calls) == 1
    assert all(np.array_equal(cache.indices, columns["indices"]) for cache in caches)


def test_images_of_another_size_raise(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected images of 64 pixels, got 32"):
        cache_tokens(tokenizer, load_dataset("emoji", "val", 32, limit=2), tmp_path)
    for name, value in {"views": 0, "shard_images": 0, "batch_size": 2.5, "workers": -1}.items():
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least .*got {value}"):
            CacheSettings(**{name: value})
    with pytest.raises(ValueError, match=r"as seed, got -1"):
        CacheSettings(seed=-1)


def test_a_stage_from_names(tmp_path):
    launch(cache_dataset, 1, "emoji", "emoji", "val", tmp_path, 3)
    cache = TokenCache.open(tmp_path)
    assert cache.indices.shape == (3, 332)


def test_of_several_captions_each_epoch_draws_one(tmp_path, tokenizer):
    images = load_dataset("emoji", "train", 64, limit=2)
    items = [dataclasses.replace(item, captions=("a", "b", "c")) for item in images.items]
    images = type(images)(items, images.classes, images.resolution, False, images.name)
    cache = TokenCache.open(cache_tokens(tokenizer, images, tmp_path))
    assert cache.batch([0, 1], [4, 2])["caption"] == ["b", "c"]
    assert cache.batch([0, 1])["caption"] == ["a", "a"]
    stream = cache.batches(2, seed=0)
    assert {caption for _ in range(20) for caption in next(stream)["caption"]} == {"a", "b", "c"}


def test_replaced_pictures_of_the_same_names_are_other_tokens(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a" / "val" / "x").mkdir(parents=True)

    def draw():
        for i in range(2):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "a" / "val" / "x" / f"{i}.png")
        return load_dataset(f"imagefolder:{tmp_path / 'a'}", "val", 64)

    cache_tokens(tokenizer, draw(), tmp_path / "tokens")
    with pytest.raises(CacheMismatch, match="content"):
        cache_tokens(tokenizer, draw(), tmp_path / "tokens")


def test_data_that_was_moved_goes_on_and_tokens_without_their_manifest_do_not(tokenizer, images, tmp_path):
    cache_tokens(tokenizer, images, tmp_path / "t", CacheSettings(shard_images=4))
    moved = type(images)(images.items, images.classes, images.resolution, False, "folder:elsewhere")
    cache_tokens(tokenizer, moved, tmp_path / "t", CacheSettings(shard_images=4))
    for opened in (False, True):  # shards, and then columns
        if opened:
            TokenCache.open(tmp_path / "t")
        (tmp_path / "t" / "manifest.json").rename(tmp_path / "aside")
        with pytest.raises(CacheMismatch, match=r"has no manifest.json to say what it holds: remove"):
            cache_tokens(tokenizer, images.subset([6, 5, 4, 3, 2, 1, 0]), tmp_path / "t", CacheSettings(shard_images=4))
        (tmp_path / "aside").rename(tmp_path / "t" / "manifest.json")
    column = tmp_path / "t" / "columns" / "image.npy"
    np.save(column, np.load(column)[:-1])
    with pytest.raises(ValueError, match="columns of different lengths: remove"):
        TokenCache.open(tmp_path / "t")
    (tmp_path / "t" / "captions.json").unlink()
    with pytest.raises(ValueError, match=r"holds no whole token cache, captions\.json is missing"):
        TokenCache.open(tmp_path / "t")
    (tmp_path / "t" / "names.json").unlink()
    cache_tokens(tokenizer, moved, tmp_path / "t", CacheSettings(shard_images=4))  # what belongs to it is written again
    assert json.loads((tmp_path / "t" / "captions.json").read_text()) == [list(item.captions) for item in moved.items]
    assert json.loads((tmp_path / "t" / "names.json").read_text()) == [item.name for item in moved.items]
    (tmp_path / "t" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest.json is of no token cache: choose another folder"):
        cache_tokens(tokenizer, images, tmp_path / "t")


def test_a_row_of_other_than_its_scales_tokens_is_refused(cached, tmp_path):
    shutil.copytree(cached, tmp_path / "t")
    column = tmp_path / "t" / "columns" / "indices.npy"
    np.save(column, np.load(column)[:, :-1])
    with pytest.raises(ValueError, match=r"expected \d+ tokens a row in .*, as its scales say, got .*: remove"):
        TokenCache.open(tmp_path / "t")


def test_a_whole_cache_is_taken_where_nothing_can_be_written(cached, tokenizer, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    TokenCache.open(cached)
    assert cache_tokens(tokenizer, images, cached, CacheSettings(shard_images=4)) == cached
    shutil.copytree(cached, tmp_path / "of before")
    (tmp_path / "of before" / "names.json").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_tokens(tokenizer, images, tmp_path / "of before", CacheSettings(shard_images=4))


def test_a_cache_without_names_numbers_its_images(cached, tmp_path, images):
    assert TokenCache.open(cached).names == [item.name for item in images.items]
    shutil.copytree(cached, tmp_path / "t")
    (tmp_path / "t" / "names.json").unlink()
    assert TokenCache.open(tmp_path / "t").names == [str(number) for number in range(len(images))]


def test_two_runs_that_share_a_folder_by_mistake_are_seen(tokenizer, images, tmp_path):
    """Each began before the other had written anything; the manifest is the last one's."""
    for name, seed in (("a", 0), ("b", 1)):
        cache_tokens(tokenizer, images, tmp_path / name, CacheSettings(shard_images=4, seed=seed))
    shards = [tmp_path / name / "shards" / "00001.safetensors" for name in ("a", "b")]
    shards[0].replace(shards[1])
    with pytest.raises(CacheMismatch, match=r"00001.safetensors holds other tokens than manifest.json says: remove"):
        TokenCache.open(tmp_path / "b")
