"""The same pictures from folders, COCO, Parquet, `datasets` and tars give the same tensors, in the same order."""

import errno
import io
import itertools
import json
import math
import os
import pickle
import tarfile
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from codalib.datasets import archives
from codalib.datasets.images import load_dataset, training_batches
from codalib.datasets.pictures import DataError

SPLITS = {"train": 8, "validation": 4}
CLASSES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()


def jpeg(number):
    stored = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 50)).save(stored, "JPEG")
    return stored.getvalue()


PICTURES = {  # split -> (picture, label), one class after the other, as in a folder
    split: [(jpeg(1000 * offset + 100 * label + i), label) for label in (0, 1) for i in range(count // 2)]
    for offset, (split, count) in enumerate(SPLITS.items())
}


def add(tar, name, stored):
    member = tarfile.TarInfo(name)
    member.size = len(stored)
    tar.addfile(member, io.BytesIO(stored))


def write_tars(root, shard=4):
    for split, pictures in PICTURES.items():
        for start in range(0, len(pictures), shard):
            with tarfile.open(root / f"{split}-{start // shard:03d}.tar", "w") as tar:
                for number, (stored, label) in enumerate(pictures[start : start + shard], start):
                    add(tar, f"./{number:05d}.jpg", stored)
                    add(tar, f"./{number:05d}.cls", CLASSES[label].encode())


def table(split):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    images = [{"bytes": stored, "path": f"{i}.jpg"} for i, (stored, _) in enumerate(PICTURES[split])]
    columns = {"image": images, "label": [label for _, label in PICTURES[split]]}
    return datasets.Dataset.from_dict(columns, features=features)


def write_all(root):
    """Source -> its name, for `load_dataset`."""
    for place in ("parquet/data", "tars", "coco/annotations"):
        (root / place).mkdir(parents=True)
    for split, pictures in PICTURES.items():
        short = {"validation": "val"}.get(split, split)
        (root / "coco" / f"{short}2017").mkdir()
        for number, (stored, label) in enumerate(pictures):
            place = root / "folder" / short / CLASSES[label] / f"{number:05d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(stored)
            (root / "coco" / f"{short}2017" / f"{number}.jpg").write_bytes(stored)
        rows = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(pictures))],
            "annotations": [{"image_id": i, "caption": CLASSES[label]} for i, (_, label) in enumerate(pictures)],
        }
        (root / "coco" / "annotations" / f"captions_{short}2017.json").write_text(json.dumps(rows))
        table(split).to_parquet(root / "parquet" / "data" / f"{split}-00000-of-00001.parquet", batch_size=3)
    datasets.DatasetDict({split: table(split) for split in SPLITS}).save_to_disk(root / "saved")
    write_tars(root / "tars")
    return {
        "imagefolder": f"imagefolder:{root}/folder",
        "coco": f"coco:{root}/coco",
        "parquet": f"parquet:{root}/parquet",
        "hf": f"hf:{root}/parquet",
        "hf, a folder of images": f"hf:{root}/folder",
        "hf, saved to disk": f"hf:{root}/saved",
        "webdataset": f"webdataset:{root}/tars/{{train-{{000..001}},validation-000}}.tar",
        "webdataset, a folder": f"webdataset:{root}/tars",
    }


def test_every_source_gives_the_same_tensors_labels_captions_and_order(tmp_path):
    names = write_all(tmp_path)
    digests = {}
    for split in ("train", "val"):
        expected = load_dataset(names["imagefolder"], split, 16)
        assert len(expected) == SPLITS.get(split, 4)
        first = list(itertools.islice(training_batches(expected, 3, seed=1, start_step=2), 4))
        for source, name in names.items():
            found = load_dataset(name, split, 16)
            assert len(found) == len(expected), source
            for batch, other in zip(first, training_batches(found, 3, seed=1, start_step=2), strict=False):
                assert torch.equal(batch["image"], other["image"]), source
                assert batch["caption"] == other["caption"], source
                if source != "coco":  # which has no classes
                    assert torch.equal(batch["label"], other["label"]), source
                    assert found.classes == CLASSES, source
            digests[source, split] = found.content_digest
    assert digests["parquet", "val"] == digests["hf", "val"]
    assert digests["webdataset", "train"] == digests["webdataset, a folder", "train"]
    assert len({digests[source, "val"] for source in ("imagefolder", "coco", "parquet", "webdataset")}) == 4
    moved = (tmp_path / "tars").rename(tmp_path / "moved")
    assert load_dataset(f"webdataset:{moved}", "train", 16).content_digest == digests["webdataset", "train"]


def test_pictures_are_decoded_as_fast_as_by_torchvision(tmp_path):
    stored = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (25, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(stored, "JPEG", quality=92)
    roots = {kind: tmp_path / kind for kind in ("imagefolder", "parquet", "webdataset")}
    for split, count in (("train", 16), ("val", 1)):
        picture = stored.getvalue() + split.encode()  # a picture in both splits would be refused
        (roots["imagefolder"] / split / "cat").mkdir(parents=True)
        for number in range(count):
            (roots["imagefolder"] / split / "cat" / f"{number}.jpg").write_bytes(picture)
        roots["parquet"].mkdir(exist_ok=True)
        table = pa.table({"image": [{"bytes": picture, "path": None}] * count})
        pq.write_table(table, roots["parquet"] / f"{split}.parquet")
        roots["webdataset"].mkdir(exist_ok=True)
        with tarfile.open(roots["webdataset"] / f"{split}.tar", "w") as tar:
            for number in range(count):
                add(tar, f"{number}.jpg", picture)
    lanczos = transforms.Resize(288, transforms.InterpolationMode.LANCZOS)
    steps = [lanczos, transforms.RandomCrop(256), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    theirs = ImageFolder(roots["imagefolder"] / "train", transforms.Compose(steps))
    sources = {kind: load_dataset(f"{kind}:{root}", "train", 256) for kind, root in roots.items()}
    sources["torchvision"] = theirs
    seconds = {name: [] for name in sources}
    for _ in range(5):  # in turn, so that whatever else the machine does falls on all
        for name, source in sources.items():
            began = time.thread_time()
            assert all(source[number] for number in range(16))
            seconds[name].append(time.thread_time() - began)
    rates = {name: 16 / np.median(own) for name, own in seconds.items()}
    print(", ".join(f"{name} {rate:.0f} images a second" for name, rate in rates.items()))
    assert min(rates.values()) > 0.7 * rates["torchvision"], rates  # equal, but for the noise of a busy machine


def test_a_picture_stays_in_its_archive_and_its_place_travels_to_other_processes(tmp_path):
    for name in (value for key, value in write_all(tmp_path).items() if key in ("parquet", "webdataset")):
        item = load_dataset(name, "train", 16).items[2]
        assert pickle.loads(pickle.dumps(item.stored)).read() == item.picture == PICTURES["train"][2][0]
        assert not isinstance(item.stored, bytes)


def test_an_archive_that_changed_is_read_anew_and_has_another_digest(tmp_path, monkeypatch):
    write_tars(tmp_path, shard=8)
    name, path = f"webdataset:{tmp_path}/{{train,validation}}-000.tar", tmp_path / "train-000.tar"
    before = load_dataset(name, "train", 16)
    calls = []
    monkeypatch.setattr(archives.Tar, "_samples", lambda self, own=archives.Tar._samples: calls.append(1) or own(self))
    load_dataset(name, "train", 16)
    assert not calls  # the kept index was read
    time.sleep(0.02)
    with tarfile.open(path, "w") as tar:
        add(tar, "a/x.y.PNG", jpeg(5))
        add(tar, "a/x.json", json.dumps({"label": "dog", "captions": ["one", "two"]}).encode())
        add(tar, "a/z.txt", b"of no picture")
    after = load_dataset(name, "train", 16)
    assert [(item.label, item.captions) for item in after.items] == [(1, ("one", "two"))]
    assert after.content_digest != before.content_digest


def test_an_archive_of_the_same_size_and_date_is_seen_to_be_another(tmp_path):
    for place in ("tars", "parquet"):
        (tmp_path / place).mkdir()

    def write(labels):
        """Files that differ in their labels and pictures, not in their sizes and dates."""
        for split in SPLITS:
            with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
                for number, label in enumerate(labels):
                    add(tar, f"{number}.png", bitmap(label))
                    add(tar, f"{number}.cls", str(label).encode())
            rows = [{"image": {"bytes": bitmap(label), "path": None}, "label": label} for label in labels]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / f"{split}.parquet")
        for path in (*tmp_path.glob("tars/*.tar"), *tmp_path.glob("parquet/*.parquet")):
            os.utime(path, (10**9, 10**9))

    def bitmap(label):
        stored = io.BytesIO()
        Image.new("L", (8, 8), 50 * label).save(stored, "BMP")
        return stored.getvalue()

    for labels in ([0, 1, 2, 3], [3, 2, 1, 0]):
        write(labels)
        for name in (f"webdataset:{tmp_path / 'tars'}", f"parquet:{tmp_path / 'parquet'}"):
            found = load_dataset(name, "val", 8)
            assert found.labels.tolist() == labels, name
            assert [round((found[i]["image"][0, 0, 0].item() + 1) * 127.5) // 50 for i in range(4)] == labels, name


def test_a_damaged_index_of_a_tar_is_made_anew_with_a_warning(tmp_path, caplog):
    write_tars(tmp_path, shard=8)
    opened = archives.Tar(str(tmp_path / "train-000.tar"))
    rows = opened.rows()
    (kept,) = (tmp_path / "runs" / "tars").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-9], b"", b"no Parquet", whole[:150] + bytes([whole[150] ^ 1]) + whole[151:]):
        kept.write_bytes(damaged)
        caplog.clear()
        assert opened.rows() == rows
        assert f"{kept} is damaged" in caplog.text
        assert kept.read_bytes() == whole
    pq.write_table(pa.table({"key": ["other"]}), kept)
    caplog.clear()
    assert opened.rows() == rows
    assert "its columns are not those of an index" in caplog.text
    caplog.clear()
    assert opened.rows() == rows
    assert not caplog.text


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(path, mode):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(archives, "atomic_write", refuse)
    write_tars(tmp_path, shard=8)
    assert len(archives.Tar(str(tmp_path / "train-000.tar")).rows()) == 8
    assert "cannot be written ([Errno 30] Read-only file system" in caplog.text


def test_without_a_validation_split_a_tenth_is_held_out(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(30)]
    path = tmp_path / "all.parquet"
    pq.write_table(pa.table({"img": images, "label": [i % 3 for i in range(30)], "text": ["", None, "c"] * 10}), path)
    train, val = (load_dataset(f"parquet:{path}", split, 16) for split in ("train", "val"))
    assert (len(train), len(val)) == (27, 3)
    assert not {item.name for item in train.items} & {item.name for item in val.items}
    assert train.classes == ["0", "1", "2"]
    assert {(item.label, item.caption) for item in train.items} == {(0, "0"), (1, "1"), (2, "c")}
    numbers = [f"{i % 3:02d}" for i in range(30)]  # as text, which sorts
    pq.write_table(pa.table({"img": images, "label": numbers}), path)
    spelt = load_dataset(f"parquet:{path}", "train", 16)
    assert [item.label for item in spelt.items] == [int(item.name.split()[-1]) % 3 for item in spelt.items]


def test_bad_archives_are_one_sentence(tmp_path, monkeypatch):
    def message(name):
        with pytest.raises(ValueError, match=r"\w") as error:
            load_dataset(name, "train", 16)
        return str(error.value)

    assert "got 2 of 2 missing" in message(f"webdataset:{tmp_path}/{{0..1}}.tar")
    (tmp_path / "0.tar").write_bytes(b"no tar" * 500)
    assert "no whole, uncompressed tar" in message(f"webdataset:{tmp_path}/0.tar")
    (tmp_path / "0.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in message(f"webdataset:{tmp_path}/0.tar")
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    assert "expected a picture at least for each split" in message(f"webdataset:{tmp_path}/0.tar")
    assert "cannot be opened" in message(f"parquet:{tmp_path}/nowhere")
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "odd.parquet")
    assert "has the columns pixels, expected image" in message(f"parquet:{tmp_path}/odd.parquet")
    images = [{"bytes": jpeg(i), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": images, "label": [0, -1, 1]}), tmp_path / "odd.parquet")
    assert "has the label -1" in message(f"parquet:{tmp_path}/odd.parquet")
    pq.write_table(pa.table({"image": images, "label": ["a", None, "b"]}), tmp_path / "odd.parquet")
    assert "a label of each picture or of none" in message(f"parquet:{tmp_path}/odd.parquet")
    pq.write_table(pa.table({"img": images, "fine_label": [0, 1, 2]}), tmp_path / "odd.parquet")
    assert "rename fine_label" in message(f"parquet:{tmp_path}/odd.parquet")  # or all would be of one class
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name in ("0.jpg", "0.seg.png", "1.jpg"):  # a mask, which would stand for the picture
            add(tar, name, jpeg(0))
    said = message(f"webdataset:{tmp_path}/pairs.tar")
    assert "sample /0 holds several picture files (0.seg.png too)" in said
    assert "no whole, uncompressed tar" not in said
    (tmp_path / "odd.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in message(f"parquet:{tmp_path}/odd.parquet")

    def unreachable(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(archives.huggingface_hub.HfApi, "dataset_info", unreachable)
    assert "cannot be fetched from the Hub (Name or service not known)" in message("hf:someone/pictures")


def write_tar(path, **members):
    """A tar of members: endings with two underscores for a dot; a number stands for its picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, stored in members.items():
            add(tar, name.replace("__", "."), jpeg(stored) if isinstance(stored, int) else stored)
    return f"webdataset:{path}"


def test_a_tars_endings_may_be_written_in_any_letters(tmp_path):
    own = {"a__PNG": 0, "a__CLS": b"dog", "b__v1__jpg": 1, "b__v1__cls": b"cat", "b__Txt": b"a cat"}
    both = [load_dataset(write_tar(tmp_path / "0.tar", **own), split, 16) for split in ("train", "val")]
    found = {item.name[-1]: (one.classes[item.label], item.captions) for one in both for item in one.items}
    assert found == {"a": ("dog", ("dog",)), "b": ("cat", ("a cat",))}


@pytest.mark.parametrize("order", [1, -1])
def test_a_text_of_the_plain_ending_stands_before_one_with_more(tmp_path, order):
    texts = dict([("a__cls", b"cat"), ("a__old__cls", b"dog")][::order])
    own = {"a__jpg": 0, "b__jpg": 1, "b__cls": b"cat"}
    assert load_dataset(write_tar(tmp_path / "0.tar", **own, **texts), "train", 16).classes == ["cat"]
    with pytest.raises(DataError, match="holds several cls files"):
        load_dataset(write_tar(tmp_path / "1.tar", a__jpg=0, a__v1__cls=b"1", a__v2__cls=b"2"), "train", 16)


def test_a_tar_holds_the_kinds_of_pictures_that_a_folder_does(tmp_path, caplog):
    (tmp_path / "pictures").mkdir()
    endings = ["gif", "bmp", "tif", "jpe", "jfif", "webp", "avif", "svg"]
    for number, ending in enumerate(endings):
        (tmp_path / "pictures" / f"{number}.{ending}").write_bytes(jpeg(number))
    name = write_tar(tmp_path / "0.tar", **{f"{i}__{ending}": i for i, ending in enumerate(endings)})
    for source in (name, f"folder:{tmp_path}/pictures"):
        caplog.clear()
        assert sum(len(load_dataset(source, split, 16)) for split in ("train", "val")) == 6, source
        assert "2 pictures of " in caplog.text


def test_hidden_tars_are_left_out(tmp_path):
    for number, place in enumerate(("train-0.tar", "._train-0.tar", ".trash/train-1.tar", "__MACOSX/train-2.tar")):
        write_tar(tmp_path / "tars" / place, a__jpg=number, b__jpg=9)
    assert sum(len(load_dataset(f"webdataset:{tmp_path}/tars", split, 16)) for split in ("train", "val")) == 2


def test_validation_is_measured_on_before_test(tmp_path):
    for number, name in enumerate(("train-0", "val-0", "test-0", "test-1")):
        write_tar(tmp_path / "tars" / f"{name}.tar", a__jpg=number)
    (one,) = load_dataset(f"webdataset:{tmp_path}/tars", "val", 16).items
    assert one.name.startswith("val-0.tar")
    (tmp_path / "tars" / "val-0.tar").unlink()
    assert [item.name for item in load_dataset(f"webdataset:{tmp_path}/tars", "val", 16).items] == [
        "test-0.tar/a",
        "test-1.tar/a",
    ]


def test_a_tar_that_is_cut_or_damaged_between_two_members_is_not_whole(tmp_path):
    path = tmp_path / "0.tar"
    name = write_tar(path, **{f"{i}__jpg": i for i in range(5)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset
    for damaged in (whole[:third], whole[: third + 100], whole[:third] + b"x" * 512 + whole[third + 512 :]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"0.tar is no whole, uncompressed tar of WebDataset \(.*\): write it anew"):
            load_dataset(name, "train", 16)


@pytest.mark.parametrize(
    ("label", "caption", "words"),
    [
        ([1], "x", "expected a name or a whole number as the label of a picture, got [1]"),
        ({"x": 1}, "x", "expected a name or a whole number as the label of a picture"),
        (1.5, "x", "expected a name or a whole number as the label of a picture, got 1.5"),
        (0, 5, "expected a text or a list of texts as caption, got 5"),
        (0, {"en": "x"}, "expected a text or a list of texts as caption"),
        (0, [1, 2], "expected a text or a list of texts as caption, got [1, 2]"),
    ],
)
def test_labels_and_captions_of_other_types_are_one_sentence(tmp_path, label, caption, words):
    said = {f"{i}__json": json.dumps({"label": label, "caption": caption}).encode() for i in range(3)}
    tar = write_tar(tmp_path / "0.tar", **{f"{i}__jpg": i for i in range(3)}, **said)
    images = [{"bytes": jpeg(i), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": images, "label": [label] * 3, "caption": [caption] * 3}), tmp_path / "0.parquet")
    for name in (tar, f"parquet:{tmp_path}/0.parquet"):
        with pytest.raises(DataError) as error:
            load_dataset(name, "train", 16)
        assert words in str(error.value)


def test_whole_floats_are_labels_and_what_is_blank_is_none(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(4)]

    def classes(labels):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "0.parquet")
        both = [load_dataset(f"parquet:{tmp_path}/0.parquet", split, 16) for split in ("train", "val")]
        return {int(item.name.split()[-1]): one.classes[item.label] for one in both for item in one.items}

    assert classes([0.0, 1.0, 2.0, 0.0]) == {0: "0", 1: "1", 2: "2", 3: "0"}  # as pandas writes whole numbers
    assert set(classes([math.nan] * 4).values()) == {"image"}
    for some in ([0.0, 1.0, math.nan, 0.0], ["a", "b", "", "a"]):
        with pytest.raises(DataError, match="expected a label of each picture or of none"):
            classes(some)


def test_odd_members_and_patterns_are_one_sentence(tmp_path):
    def message(name):
        with pytest.raises(DataError) as error:
            load_dataset(name, "train", 16)
        return str(error.value)

    assert "0.tar: a.json: expected JSON, got" in message(write_tar(tmp_path / "0.tar", a__jpg=0, a__json=b"{"))
    assert "0.tar: a.txt: expected UTF-8, got" in message(write_tar(tmp_path / "0.tar", a__jpg=0, a__txt=b"\xe4"))
    assert "expected braces such as {000..127}" in message(f"webdataset:{tmp_path}/{{0.tar")
    assert "expected each tar once" in message(f"webdataset:{tmp_path}/{{0,0}}.tar")
    os.symlink(tmp_path / "0.tar", tmp_path / "1.tar")
    assert "expected each tar once" in message(f"webdataset:{tmp_path}/{{0,1}}.tar")


def test_a_members_folder_is_the_same_however_it_is_written(tmp_path):
    name = write_tar(tmp_path / "0.tar", **{"./a__jpg": 0, "a__cls": b"cat", "/b__jpg": 1, "./x/../b__cls": b"dog"})
    assert {item.name for item in load_dataset(name, "train", 16).items} <= {"0.tar/a", "0.tar/b"}


def test_a_picture_that_is_gone_is_skipped(tmp_path):
    write_tars(tmp_path, shard=8)
    dataset = load_dataset(f"webdataset:{tmp_path}/train-000.tar", "train", 16)
    (tmp_path / "train-000.tar").unlink()
    assert dataset[0] is None
