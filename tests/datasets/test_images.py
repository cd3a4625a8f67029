import dataclasses
import itertools
import json
import os
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from codalib.base import files
from codalib.datasets.images import EMOJI_FOLDER, DataError, evaluation_batches, load_dataset, to_rgb, training_batches


def folder_of_images(root, count=3, classes=("cat", "dog"), size=(40, 30)):
    for split, name in itertools.product(("train", "val"), classes):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return f"imagefolder:{root}"


def test_no_concept_and_no_picture_is_on_both_sides_of_the_emoji_split():
    sides = [
        pq.read_table(EMOJI_FOLDER / f"{split}.parquet", columns=["concept", "image"]).to_pydict()
        for split in ("train", "val")
    ]
    for column in ("concept", "image"):
        assert not set(sides[0][column]) & set(sides[1][column])


def test_emoji_items_are_squares_in_range_with_class_and_caption():
    dataset = load_dataset("emoji", "val", 64, limit=9)
    assert len(dataset) == 9
    assert len(dataset.classes) == 9
    for i in range(9):
        item = dataset[i]
        assert item["image"].shape == (3, 64, 64)
        assert -1 <= item["image"].min() <= item["image"].max() <= 1
        assert item["caption"]
        assert item["label"] == dataset.labels[i]


def test_training_order_starts_anywhere_and_does_not_depend_on_the_processes():
    dataset = load_dataset("emoji", "train", 32, limit=10)

    def take(stream, n):
        return [next(stream) for _ in range(n)]

    whole = take(training_batches(dataset, 4, seed=3), 6)  # past the first epoch
    later = take(training_batches(dataset, 4, seed=3, start_step=2), 4)
    for a, b in zip(whole[2:], later, strict=True):
        assert torch.equal(a["image"], b["image"])
    halves = [take(training_batches(dataset, 2, seed=3, rank=r, world_size=2), 6) for r in (0, 1)]
    for a, *parts in zip(whole, *halves, strict=True):
        assert sorted(a["index"].tolist()) == sorted(torch.cat([p["index"] for p in parts]).tolist())
    assert sorted(torch.cat([b["index"] for b in whole])[:10].tolist()) == list(range(10))
    other = take(training_batches(dataset, 4, seed=4), 1)[0]
    assert other["index"].tolist() != whole[0]["index"].tolist()


def test_every_image_is_evaluated_once_by_all_processes_together(tmp_path):
    dataset = load_dataset(folder_of_images(tmp_path), "val", 16)
    seen = [b["index"] for rank in range(4) for b in evaluation_batches(dataset, 2, rank, 4)]
    assert sorted(torch.cat(seen).tolist()) == list(range(6))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "I;16", "1"])
def test_pictures_of_every_mode_become_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 4), 65535, dtype=np.uint16))
    else:
        image = Image.new("RGB", (4, 5), "white").convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.size == (4, 5)
    assert np.asarray(rgb).min() >= 250


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 6))
    image.getexif()[0x0112] = 6  # turned by a quarter
    assert to_rgb(image).size == (6, 4)


def test_unreadable_images_are_skipped_or_stop_the_run(tmp_path, caplog):
    name = folder_of_images(tmp_path, count=101, size=(8, 8))
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"no picture")
    dataset = load_dataset(name, "val", 8)
    assert sum(len(b["index"]) for b in evaluation_batches(dataset, 64)) == 201
    assert "0.png" in caplog.text
    assert "1 unreadable" in caplog.text
    for i in range(5):
        (tmp_path / "val" / "dog" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match="unreadable"):
        list(evaluation_batches(dataset, 64))


def test_bad_sources_are_one_sentence(tmp_path):
    name = folder_of_images(tmp_path / "images")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for source, split, message in [
        ("mnist", "train", "expected 'emoji'"),
        (f"imagefolder:{tmp_path / 'nowhere'}", "train", "not a folder"),
        (f"imagefolder:{tmp_path / 'empty'}", "val", "no folder 'val'"),
        (f"imagefolder:{tmp_path / 'empty'}", "train", "holds no images"),
        (name, "test", "expected one of"),
    ]:
        with pytest.raises(DataError, match=message):
            load_dataset(source, split, 16)
    (tmp_path / "images" / "val" / "cow").mkdir()
    with pytest.raises(DataError, match="cow"):
        load_dataset(name, "train", 16)


def test_an_environment_variable_in_the_path_is_filled_in(tmp_path, monkeypatch):
    folder_of_images(tmp_path)
    monkeypatch.setenv("PICTURES", str(tmp_path))
    assert len(load_dataset("imagefolder:$PICTURES", "val", 16)) == 6
    monkeypatch.delenv("PICTURES")
    with pytest.raises(DataError, match=r"\$PICTURES names an environment variable that is not set"):
        load_dataset("imagefolder:$PICTURES", "val", 16)
    with pytest.raises(DataError, match=r"for each of 7 processes, got 6"):
        load_dataset(f"imagefolder:{tmp_path}", "val", 16).check_enough_images(7)


def test_coco_has_every_caption_of_an_image(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    contents = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [
            {"image_id": 7, "caption": "A dog.\n"},
            {"image_id": 3, "caption": "A  cat."},
            {"image_id": 7, "caption": "A brown dog."},
        ],
    }
    annotations = tmp_path / "annotations" / "captions_val2014.json"
    annotations.write_text(json.dumps(contents))
    with pytest.raises(DataError, match=r"does not hold the 2 images of captions_val2014\.json"):
        load_dataset(f"coco:{tmp_path}", "val", 16)
    for number in (3, 7):
        Image.new("L", (20, 30)).save(tmp_path / "val2014" / f"{number}.jpg")
    dataset = load_dataset(f"coco:{tmp_path}", "val", 16)
    assert [item.captions for item in dataset.items] == [("A cat.",), ("A dog.", "A brown dog.")]
    assert dataset[1]["caption"] == "A dog."
    assert dataset[1, 3]["caption"] == "A brown dog."
    assert dataset[0]["image"].shape == (3, 16, 16)
    with pytest.raises(DataError, match=r"holds neither annotations/captions_train2014\.json nor"):
        load_dataset(f"coco:{tmp_path}", "train", 16)
    annotations.write_text("{}")
    with pytest.raises(DataError, match="not a file of MS-COCO captions"):
        load_dataset(f"coco:{tmp_path}", "val", 16)


def test_a_plain_folder_is_split_by_name(tmp_path):
    for number in range(30):
        place = tmp_path / f"{'deep/er' if number % 2 else '.'}" / f"photo_{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 40), (number, 0, 0)).save(place)
    (tmp_path / "notes.txt").write_text("no image")
    train, val = (load_dataset(f"folder:{tmp_path}", split, 16) for split in ("train", "val"))
    names = [{item.name for item in split.items} for split in (train, val)]
    assert [len(split) for split in names] == [27, 3]
    assert not names[0] & names[1]
    assert {item.caption for item in train.items + val.items} == {f"photo {number}" for number in range(30)}
    assert train[0]["image"].shape == (3, 16, 16)
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    again = load_dataset(f"folder:{moved}", "val", 16)  # by the names within the folder
    assert {item.caption for item in again.items} == {item.caption for item in val.items}


def test_a_folder_of_less_than_two_images_is_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"holds 1 images .* expected at least 2"):
        load_dataset(f"folder:{tmp_path}", "train", 16)
    with pytest.raises(DataError, match="not a folder"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}", "train", 16)


def test_the_content_digest_changes_with_names_labels_captions_order_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(files, "SETTLED", -1)  # so that files of this moment are remembered
    name = folder_of_images(tmp_path / "pictures")
    dataset = load_dataset(name, "val", 16)
    digest = dataset.content_digest
    assert len(digest) == 16
    assert load_dataset(name, "val", 16).content_digest == digest  # read from runs/digests
    assert load_dataset(f"imagefolder:{(tmp_path / 'pictures').rename(tmp_path / 'moved')}", "val", 16)
    name = f"imagefolder:{tmp_path / 'moved'}"
    dataset = load_dataset(name, "val", 16)
    assert dataset.content_digest == digest
    first, *rest = dataset.items
    for items in [
        [*rest, first],
        rest,
        [dataclasses.replace(first, label=1), *rest],
        [dataclasses.replace(first, captions=("dog", "cat")), *rest],
        [dataclasses.replace(first, stored=b"other"), *rest],
    ]:
        dataset = load_dataset(name, "val", 16)
        dataset.items = items
        assert dataset.content_digest != digest
    path = tmp_path / "moved" / "val" / "cat" / "0.png"
    bytes_, times = bytearray(path.read_bytes()), path.stat()
    bytes_[50] ^= 1
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_bytes(bytes_)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_dataset(name, "val", 16).content_digest != digest
    path.rename(path.with_name("00.png"))
    assert load_dataset(name, "val", 16).content_digest != digest
    emoji = load_dataset("emoji", "val", 16, limit=3)
    assert emoji.content_digest == load_dataset("emoji", "val", 16, limit=3).content_digest
    assert emoji.content_digest != load_dataset("emoji", "train", 16, limit=3).content_digest


def test_a_file_is_read_once_for_its_digest_unless_it_changed_a_moment_ago(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "old"
    path.write_bytes(b"1")
    first = files.file_digests([str(path)])
    assert not (tmp_path / "runs").exists()  # too new: it may change within the same tick
    monkeypatch.setattr(files, "SETTLED", -1)
    assert files.file_digests([str(path), str(tmp_path / "missing")]) == first | {str(tmp_path / "missing"): ""}
    monkeypatch.setattr(files.hashlib, "file_digest", None)  # would raise
    assert files.file_digests([str(path)]) == first
