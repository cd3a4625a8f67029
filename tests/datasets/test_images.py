import dataclasses
import io
import itertools
import json
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, TiffImagePlugin

from codalib.base import files
from codalib.datasets.images import (
    EMOJI_FOLDER,
    DataError,
    EndlessOrder,
    ImageDataset,
    Item,
    evaluation_batches,
    load_dataset,
    training_batches,
)
from codalib.datasets.pictures import UnreadableImage, read_rgb, square, to_rgb, to_tensor


def folder_of_images(root, count=3, classes=("cat", "dog"), size=(40, 30)):
    for number, (split, name) in enumerate(itertools.product(("train", "val"), classes)):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((number, i)).integers(0, 256, (*size, 3), dtype=np.uint8)
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


def test_each_process_stops_at_a_hundredth_of_its_own_images(tmp_path):
    dataset = load_dataset(folder_of_images(tmp_path, count=101, size=(8, 8)), "val", 8)
    for item in dataset.items[:8]:  # two for each of four processes, which reads about 50
        Path(item.name).write_bytes(b"")
    for rank in range(4):
        with pytest.raises(DataError, match=r"2 unreadable images among the 51 .* that this process reads, at most 1%"):
            list(evaluation_batches(dataset, 64, rank, 4))


def test_images_that_cannot_be_read_are_left_out_for_results_by_image(tmp_path):
    dataset = load_dataset(folder_of_images(tmp_path, size=(8, 8)), "val", 8)
    assert dataset.without_unreadable() is dataset
    Path(dataset.items[1].name).write_bytes(b"no picture")
    kept = dataset.without_unreadable()
    assert kept.items == [dataset.items[0], *dataset.items[2:]]


def test_bad_sources_are_one_sentence(tmp_path):
    name = folder_of_images(tmp_path / "images")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for source, split, message in [
        ("mnist", "train", "expected 'emoji'"),
        (f"imagefolder:{tmp_path / 'nowhere'}", "train", "not a folder"),
        (f"imagefolder:{tmp_path / 'empty'}", "val", "no folder 'val'"),
        (f"imagefolder:{tmp_path / 'empty'}", "train", "got no images"),
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


def test_coco_takes_both_splits_of_one_year_and_no_file_elsewhere(tmp_path):
    """A part of train2017 is val2014."""
    (tmp_path / "annotations").mkdir()

    def add(split, year, name="1.jpg"):
        (tmp_path / f"{split}{year}").mkdir(exist_ok=True)
        shade = {"train": 9, "val": 99}[split]
        Image.new("L", (20, 30), shade).save(tmp_path / f"{split}{year}" / "1.jpg")
        contents = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "A dog."}]}
        (tmp_path / "annotations" / f"captions_{split}{year}.json").write_text(json.dumps(contents))

    add("train", 2017)
    add("val", 2014)
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"expected both .* got captions_val2014\.json and captions_train2017"):
            load_dataset(f"coco:{tmp_path}", split, 16)
    add("val", 2017)
    for split in ("train", "val"):
        (item,) = load_dataset(f"coco:{tmp_path}", split, 16).items
        assert f"{split}2017" in item.name
    add("val", 2017, "../val2014/1.jpg")
    with pytest.raises(DataError, match="leaves its folder"):
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
    with pytest.raises(DataError, match=r"expected at least 2 images .* got 1"):
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


def noise(seed, size=(20, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_hidden_files_are_no_images_and_a_folder_is_visited_once(tmp_path):
    root = tmp_path / "pictures"
    for place in ("", "deep", ".ipynb_checkpoints", "__MACOSX", "deep/.hidden"):
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(5):
            noise(number + 5 * (place == "deep")).save(root / place / f"{place.strip('._')[:4]}{number}.png")
    (root / "._0.png").write_bytes(b"of a Mac")
    (root / ".DS_Store").mkdir()
    (tmp_path / "elsewhere").mkdir()
    noise(99).save(tmp_path / "elsewhere" / "far.png")
    for link in ("a", "z"):
        (root / link).symlink_to(root)
        (root / f"{link}{link}").symlink_to(tmp_path / "elsewhere")
        (root / f"to_deep_{link}").symlink_to(root / "deep")
    sides = [load_dataset(f"folder:{root}", split, 16).items for split in ("train", "val")]
    names = {os.path.relpath(item.name, root) for side in sides for item in side}
    assert sum(map(len, sides)) == len(names) == 11
    assert {name for name in names if name.startswith(("deep/", "to_deep"))} == {f"deep/deep{i}.png" for i in range(5)}
    assert {os.path.basename(name) for name in names} >= {"far.png", "0.png"}


def test_hidden_folders_are_no_classes(tmp_path):
    name = folder_of_images(tmp_path)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / hidden).mkdir()
        noise(0).save(tmp_path / "train" / hidden / "0.png")
    dataset = load_dataset(name, "train", 16)
    assert (dataset.classes, len(dataset)) == (["cat", "dog"], 6)


def test_a_picture_on_both_sides_of_a_split_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    name = folder_of_images(tmp_path / "classes")
    load_dataset(name, "val", 16)
    train, val = tmp_path / "classes" / "train" / "cat" / "1.png", tmp_path / "classes" / "val" / "dog" / "copy.png"
    val.write_bytes(train.read_bytes())
    for split in ("train", "val"):
        with pytest.raises(DataError, match=rf"{train} \(to train on\) and {val} \(held out\) are the same picture"):
            load_dataset(name, split, 16)
    monkeypatch.setattr("codalib.datasets.images.COMPARED_IMAGES", 12)
    load_dataset(name, "val", 16)
    monkeypatch.undo()
    for number in range(20):
        noise(number // 2).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="are the same picture"):
        load_dataset(f"folder:{tmp_path}", "train", 16)


def saved(path, values, **tags):
    """A TIFF of grey VALUES with some tags, by number."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag[1:])] = value
    Image.fromarray(values).save(path, tiffinfo=info)
    return str(path)


RAMP = np.linspace(0, 1, 20).reshape(4, 5)


@pytest.mark.parametrize(
    ("values", "tags", "guess"),
    [
        (RAMP.astype(np.float32), {}, None),
        ((RAMP * 1.2 - 0.1).astype(np.float32), {}, None),  # resampling overshoots
        ((RAMP * 255).astype(np.float32), {}, 255),
        ((RAMP * 100).astype(np.float32), {"_341": 100.0}, None),
        ((RAMP * 100 - 50).astype(np.float32), {"_340": -50.0, "_341": 50.0}, None),
        ((RAMP * 255).round().astype(np.int32), {}, 255),
        ((RAMP * 4095).round().astype(np.int32), {}, 4095),
        ((RAMP * 4095).round().astype(np.uint16), {}, 4095),  # 12 bits in 16
        ((RAMP * 4095).round().astype(np.uint16), {"_341": 4095}, None),
        ((RAMP * 65535).round().astype(np.uint16), {}, None),
        ((RAMP * 65535).round().astype(np.int32), {}, 65535),
    ],
)
def test_deep_grey_is_scaled_by_the_range_that_its_file_states_or_that_holds_it(tmp_path, values, tags, guess):
    said = []
    rgb = np.asarray(read_rgb(saved(tmp_path / "grey.tif", values, **tags), said.append))
    expected = RAMP * 1.2 - 0.1 if values.min() < 0 and not tags else RAMP
    assert np.abs(rgb - expected.clip(0, 1)[..., None] * 255).max() <= 1
    assert bool(said) == (guess is not None)
    assert all(f"{guess} is taken as white" in text for text in said)


def test_12_packed_bits_16_bit_png_and_inverted_grey_keep_their_values(tmp_path):
    row = [0, 4095, 2048, 1024]
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(row[::2], row[1::2], strict=True)
    )
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in tags)
    file = struct.pack("<2sHI", b"II", 42, 16) + packed.ljust(8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(read_rgb(file, pytest.fail))[0, :, 0].tolist() == [0, 255, 128, 64]
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "dark.png")  # PNG: white is 65535
    said = []
    assert np.asarray(read_rgb(str(tmp_path / "dark.png"), said.append)).max() == 16
    assert said == ["holds 16 bits and comes out dark, as its highest value is 4000: if white is less, save 8 bits"]
    inverted = saved(tmp_path / "inverted.tif", (RAMP * 65535).astype(np.uint16), _262=0)
    assert np.asarray(read_rgb(inverted, pytest.fail))[0, 0, 0] == 255


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_12_bits_in_the_16_of_a_colour_png_are_refused_and_16_are_not(channels):
    def png(pixels):
        kind = {2: 4, 3: 2, 4: 6}[channels]  # PNG's numbers of LA, RGB and RGBA
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
        parts = (struct.pack(">I", len(own)) + name + own for name, own in (*chunks, (b"IEND", b"")))
        return b"\x89PNG\r\n\x1a\n" + b"".join(p + struct.pack(">I", zlib.crc32(p[4:])) for p in parts)

    pixels = np.full((4, 4, channels), 4095)
    pixels[..., 3 if channels == 4 else 1 :] = 65535  # opaque
    if channels == 3:
        pixels[:] = 4095
    with pytest.raises(UnreadableImage, match=r"12 bits or less in its 16 a colour \(15 of 255 is left\)"):
        read_rgb(png(pixels))
    assert np.asarray(read_rgb(png(np.full((4, 4, channels), 65535)))).min() == 255


def test_pictures_of_kinds_that_are_not_read_are_told_and_jfif_is_jpeg(tmp_path, caplog):
    for name in ("a.jfif", "b.JPE", "c.png"):
        Image.new("RGB", (4, 4), (ord(name[0]), 0, 0)).save(tmp_path / name, "PNG" if name == "c.png" else "JPEG")
    for name in ("d.HEIC", "e.avif", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert sum(len(load_dataset(f"folder:{tmp_path}", split, 4)) for split in ("train", "val")) == 3
    assert "2 pictures of" in caplog.text
    assert "are of kinds that are not read and are left out" in caplog.text


def test_transparency_of_every_mode_is_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = clear.quantize()
    for number, (image, settings) in enumerate([(clear, {}), (palette, {}), (Image.new("LA", (4, 4)), {})]):
        image.save(tmp_path / f"{number}.png", **settings)
        assert np.asarray(read_rgb(str(tmp_path / f"{number}.png"))).min() == 255
    with_palette = Image.new("P", (4, 4))
    with_palette.putpalette([255, 0, 0, 0], "RGBA")
    assert np.asarray(to_rgb(with_palette)).min() == 255
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "16.png", transparency=300)
    assert np.asarray(read_rgb(str(tmp_path / "16.png"))).min() == 255
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    cmyk.save(tmp_path / "cmyk.tif")
    assert np.asarray(read_rgb(str(tmp_path / "cmyk.tif")))[0, 0].tolist() == [255, 0, 0]


def test_values_without_a_range_are_one_sentence_and_a_guess_is_told_once(tmp_path, caplog):
    for name, values, message in [
        ("nan", np.full((3, 3), np.nan, np.float32), "not finite"),
        ("negative", np.full((3, 3), -7, np.int32), "go from -7 to -7, expected 0 to 1, 255, 4095 or 65535"),
        ("large", np.full((3, 3), 10**6, np.int32), r"1e\+06"),
    ]:
        with pytest.raises(UnreadableImage, match=message):
            read_rgb(saved(tmp_path / f"{name}.tif", values))
    for number in range(4):
        saved(tmp_path / "grey" / f"{number}.tif", (RAMP * (250 + number)).astype(np.float32)) if number else (
            tmp_path / "grey"
        ).mkdir()
    dataset = load_dataset(f"folder:{tmp_path / 'grey'}", "train", 4)
    assert all(dataset[i] is not None for i in (0, 1, 0, 1))
    assert caplog.text.count("255 is taken as white") == 1


def test_a_thin_picture_is_resized_only_where_its_crop_lies(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    thin = noise(0, (3, 60))
    for generator in (None, torch.Generator().manual_seed(5)):
        state = generator and generator.get_state()
        part = np.asarray(square(thin, 9, 8, generator), dtype=int)
        assert sizes.pop() == (8, 8)
        if generator:
            generator.set_state(state)
        monkeypatch.setattr("codalib.datasets.pictures.ELONGATED", 99)
        whole = np.asarray(square(thin, 9, 8, generator), dtype=int)
        monkeypatch.setattr("codalib.datasets.pictures.ELONGATED", 8)
        assert sizes.pop() == (180, 9)
        assert np.abs(part - whole).max() <= 1
    assert square(noise(0, (60_000, 1)), 256, 256, None).size == (256, 256)
    assert sizes == [(256, 256)]


def test_a_picture_of_too_many_pixels_is_one_sentence(tmp_path, monkeypatch, recwarn):
    noise(0).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert read_rgb(str(tmp_path / "scan.png")).size == (20, 20)  # Pillow would warn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"too large, .* pixels are read at most: make it smaller"):
        read_rgb(str(tmp_path / "scan.png"))


def test_the_first_readable_images_are_given_and_the_others_counted(tmp_path, caplog):
    dataset = load_dataset(folder_of_images(tmp_path), "val", 16)
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"broken")
    assert [item["index"] for item in dataset.readable(2)] == [1, 2]
    assert "1 unreadable images" in caplog.text
    assert [item["index"] for item in dataset.readable(9, [5, 0, 3])] == [5, 3]
    with pytest.raises(DataError, match="can be read"):
        dataset.readable(1, [0])
    with pytest.raises(DataError, match="1 unreadable images among the 1"):
        list(evaluation_batches(dataset.subset([0]), 4))


def test_captions_that_are_missing_are_skipped(tmp_path, caplog):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    rows = [(1, None), (1, "A dog."), (2, None), (2, " "), (3, "A \ud83d cat.")]
    contents = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)],
        "annotations": [{"image_id": i, "caption": caption} for i, caption in rows],
    }
    annotations = tmp_path / "annotations" / "captions_val2014.json"
    annotations.write_text(json.dumps(contents))
    for i in (1, 2, 3):
        noise(i).save(tmp_path / "val2014" / f"{i}.png")
    dataset = load_dataset(f"coco:{tmp_path}", "val", 16)
    assert [item.captions for item in dataset.items] == [("A dog.",), ("A \ufffd cat.",)]
    assert "1 images of" in caplog.text
    whole = annotations.read_text()
    for broken in (whole[:-20], "[]", whole.replace('"A dog."', "7"), whole.replace("file_name", "name")):
        annotations.write_text(broken)
        with pytest.raises(DataError, match="not a file of MS-COCO captions"):
            load_dataset(f"coco:{tmp_path}", "val", 16)
    annotations.write_text(json.dumps(contents | {"annotations": contents["annotations"][2:4]}))
    with pytest.raises(DataError, match=r"captions_val2014\.json has no caption"):
        load_dataset(f"coco:{tmp_path}", "val", 16)


def test_names_that_are_not_utf8_are_shown_with_replacement_characters(tmp_path, caplog):
    for split, number in (("train", 1), ("val", 2)):
        folder = os.fsencode(tmp_path) + f"/{split}/".encode() + b"Caf\xe9 <i>"
        os.makedirs(folder)
        noise(number).save(tmp_path / "one.png")
        os.rename(tmp_path / "one.png", folder + b"/\xff.png")
        with open(folder + b"/broken\xff.png", "wb") as file:
            file.write(split.encode())
    dataset = load_dataset(f"imagefolder:{tmp_path}", "val", 16)
    assert dataset.classes == ["Caf\ufffd <i>"]
    assert len(dataset.content_digest) == 16
    assert dataset.readable(1)[0]["caption"] == "Caf\ufffd <i>"
    assert next(i for i, item in enumerate(dataset.items) if dataset[i] is None) == 0
    assert "broken\ufffd.png" in caplog.text
    caplog.text.encode()
    plain = load_dataset(f"folder:{tmp_path}", "train", 16)
    "".join(item.caption for item in plain.items).encode()
    with pytest.raises(DataError) as error:
        load_dataset(f"folder:{tmp_path}/\udcff", "train", 16)
    str(error.value).encode()


def test_a_git_lfs_pointer_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    for number in range(3):
        (tmp_path / f"{number}.png").write_text(pointer)
    with pytest.raises(ValueError, match=r"0\.png is a Git LFS pointer.*git lfs pull"):
        load_dataset(f"folder:{tmp_path}", "train", 16)
    noise(0).save(tmp_path / "0.png")
    noise(1).save(tmp_path / "1.png")
    noise(2).save(tmp_path / "2.png")
    dataset = load_dataset(f"folder:{tmp_path}", "train", 16)
    (tmp_path / os.path.basename(dataset.items[0].name)).write_text(pointer)
    with pytest.raises(ValueError, match="git lfs pull"):
        dataset[0]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(pointer)
    with pytest.raises(ValueError, match=r"^[^(]*captions_val2014\.json is a Git LFS pointer"):
        load_dataset(f"coco:{tmp_path}", "val", 16)


@pytest.mark.parametrize(("images", "held_out"), [(2, 1), (3, 1), (4, 2), (14, 2), (25, 2), (30, 3)])
def test_a_small_folder_holds_out_two_images_where_it_can(tmp_path, images, held_out):
    for number in range(images):
        noise(number).save(tmp_path / f"{number}.png")
    assert len(load_dataset(f"folder:{tmp_path}", "val", 16)) == held_out


@pytest.mark.parametrize("images", [3, 9, 20])
def test_one_unreadable_image_does_not_end_the_training_on_a_small_set(tmp_path, images):
    for number in range(images):
        noise(number, (8, 8)).save(tmp_path / f"{number}.png")
    dataset = load_dataset(f"folder:{tmp_path}", "train", 8)
    (tmp_path / os.path.basename(dataset.items[0].name)).write_bytes(b"broken")
    batches = list(itertools.islice(training_batches(dataset, 8, seed=0, start_step=1), 15))
    assert 0 not in torch.cat([batch["index"] for batch in batches])
    with pytest.raises(DataError, match="1 unreadable images among the 1"):
        next(training_batches(dataset.subset([0]), 8, seed=0))


def coordinates(height, width):
    """A picture whose pixel at (y, x) is (x, y, 0)."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def corners(crop):
    return crop.getpixel((0, 0))[:2], crop.getpixel((crop.width - 1, crop.height - 1))[:2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_of_an_unreadable_image_alone_keeps_its_steps_number(tmp_path, world_size):
    """Where it was passed over, all steps behind it came one earlier than those of a resumed run."""
    for number in range(7):
        noise(number, (8, 8)).save(tmp_path / f"{number}.png")
    dataset = load_dataset(f"folder:{tmp_path}", "train", 8)
    (tmp_path / os.path.basename(dataset.items[2].name)).write_bytes(b"broken")
    for rank in range(world_size):
        whole = training_batches(dataset, 1, 0, 0, rank, world_size)
        indices = [next(whole)["index"].item() for _ in range(9)]
        assert 2 not in indices
        for start in range(9):
            resumed = training_batches(dataset, 1, 0, start, rank, world_size)
            assert [next(resumed)["index"].item() for _ in range(9 - start)] == indices[start:], (rank, start)


def test_a_crop_is_in_the_centre_or_anywhere_with_a_generator():
    assert corners(square(coordinates(10, 16), 10, 8, None)) == ((4, 1), (11, 8))
    assert corners(square(coordinates(17, 10), 10, 10, None)) == ((0, 3), (9, 12))  # of 7 pixels 3 go first
    rng = torch.Generator().manual_seed(0)
    found = {corners(square(coordinates(10, 12), 10, 8, rng)) for _ in range(300)}
    assert found == {((x, y), (x + 7, y + 7)) for x in range(5) for y in range(3)}


def test_training_crops_from_a_picture_enlarged_by_an_eighth_and_black_is_minus_one():
    stored = io.BytesIO()
    coordinates(18, 18).save(stored, "PNG")
    item = Item("a", 0, ("a",), stored.getvalue())
    crops = [ImageDataset([item], ["a"], 16, random_crop=True)[0, seed]["image"] for seed in range(40)]
    pixels = [((crop + 1) * 127.5).round().int() for crop in crops]  # 18 = 1.125 * 16: nothing was resized
    assert {(int(p[0, 0, 0]), int(p[1, 0, 0])) for p in pixels} == set(itertools.product(range(3), range(3)))
    assert all((p[0].diff(dim=1) == 1).all() and (p[1].diff(dim=0) == 1).all() for p in pixels)
    assert all((crop[2] == -1).all() for crop in crops)
    assert to_tensor(Image.new("RGB", (1, 1), (255, 0, 51)))[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6])


def test_every_epoch_has_an_order_and_crops_of_its_own():
    endless = list(itertools.islice(EndlessOrder(12, seed=3), 60))
    epochs = [tuple(index for index, _ in endless[at : at + 12]) for at in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({*epochs, tuple(index for index, _ in itertools.islice(EndlessOrder(12, seed=4), 12))}) == 6
    assert len({crop for _, crop in endless}) == 60
    assert list(itertools.islice(EndlessOrder(12, seed=3, start=17), 43)) == endless[17:]
    assert list(itertools.islice(EndlessOrder(12, seed=3, start=4, rank=1, world_size=2), 28)) == endless[5::2]
