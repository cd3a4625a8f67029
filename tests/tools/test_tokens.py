"""`codalib encode` and `codalib decode`: resumed, checked against the tokenizer, the same pictures as its own."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from codalib.base.paths import project_folder
from codalib.datasets.token_cache import TokenCache, tokenizer_hash
from codalib.models.checkpoints import load_tokenizer
from codalib.models.tokens import split_levels
from codalib.reporting.display import to_bytes
from codalib.tools import tokens

LIMIT = 6


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "emoji"
    assert encode(folder) == 0
    return folder


def encode(folder, *more):
    common = ["emoji", "--tokenizer", "emoji-small", "--out", str(folder), "--batch-size", "4", "--limit", str(LIMIT)]
    return tokens.encode([*common, *more])


def decode(folder, out, *more, tokenizer="emoji-small"):
    return tokens.decode([str(folder), "--tokenizer", tokenizer, "--out", str(out), "--batch-size", "4", *more])


def test_encode_writes_every_image_and_goes_on_where_it_stopped(encoded, caplog):
    cache = TokenCache.open(encoded)
    tokenizer = load_tokenizer("emoji-small")
    assert cache.indices.shape == (LIMIT, tokenizer.num_tokens)
    assert cache.codebook_size == tokenizer.quantizer.codebook_size
    column = encoded / "columns" / "indices.npy"
    written, time = column.read_bytes(), column.stat().st_mtime_ns
    caplog.set_level("INFO")
    assert encode(encoded) == 0
    assert "all were there" in caplog.text
    assert "images a second" not in caplog.text  # of what was not done
    assert column.stat().st_mtime_ns == time  # it was there: not encoded again
    shutil.rmtree(column.parent)
    assert decode(encoded, encoded.parent / "none") == 1
    assert "indices.npy cannot be read" in caplog.text
    assert encode(encoded) == 0
    assert column.read_bytes() == written
    assert re.search(rf"{LIMIT} images of .* codes; \d+\.\d images a second", caplog.text)
    (encoded / "captions.json").unlink()
    caplog.clear()
    assert encode(encoded) == 0
    assert f"{LIMIT} images of" in caplog.text
    assert "all were there" in caplog.text
    assert encode(encoded, "--seed", "1") == 1  # other settings, another folder


def test_decode_writes_what_the_tokenizer_decodes(encoded, tmp_path, caplog):
    caplog.set_level("INFO")
    assert decode(encoded, tmp_path / "all") == 0
    assert re.search(rf"all: {LIMIT} images, \d+\.\d a second", caplog.text)
    assert decode(encoded, tmp_path / "some", "--limit", "2", "--levels", "3") == 0
    assert decode(encoded, tmp_path / "all", "--levels", "3") == 1
    assert decode(encoded, tmp_path / "all", "--limit", "2") == 1  # the others would stay, and be counted with these
    assert "expected no pictures but these 2" in caplog.text
    cache, tokenizer = TokenCache.open(encoded), load_tokenizer("emoji-small")
    with torch.inference_mode():
        levels = split_levels(cache.batch(range(LIMIT))["tokens"], cache.scales)
        expected = {"all": tokenizer.decode(levels), "some": tokenizer.decode(levels, 3)[:2]}
    ends = {"all": "", "some": "-levels-3"}  # never taken for those of all levels
    for name, images in expected.items():
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == [f"{number:08d}-0{ends[name]}.png" for number in range(len(images))]
        for file, image in zip(files, images, strict=True):
            difference = np.asarray(Image.open(file)).astype(int) - to_bytes(image)
            assert np.abs(difference).max() <= 1  # a batch of another size may round otherwise


def test_what_does_not_fit_is_one_sentence(encoded, tmp_path, caplog):
    assert decode(encoded, tmp_path / "out", tokenizer="emoji") == 1
    assert "were made by the tokenizer" in caplog.text
    assert not (tmp_path / "out").exists()
    assert decode(tmp_path, tmp_path / "out") == 1
    assert "holds no whole token cache" in caplog.text
    (tmp_path / "file").touch()
    assert decode(encoded, tmp_path / "file") == 1
    assert "expected a folder that can be written" in caplog.text
    assert decode(encoded, tmp_path / "out", "--levels", "99") == 1
    assert encode(tmp_path / "other", "--tokenizer", "no such tokenizer") == 1


@pytest.mark.parametrize("option", ["--batch-size", "--limit", "--views"])
def test_a_count_below_one_is_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        encode(tmp_path, option, "0")
    assert "expected a whole number above 0, got '0'" in capsys.readouterr().err


def test_the_table_holds_what_the_cache_holds_and_says_what_it_means(encoded):
    assert encode(encoded, "--parquet") == 0
    table, cache = pq.read_table(encoded / tokens.PARQUET), TokenCache.open(encoded)
    about = json.loads(table.schema.metadata[b"codalib"])
    assert about == {
        "codebook_size": 1024,
        "scales": [1, 2, 4, 8, 8],
        "classes": cache.classes,
        "tokenizer": tokenizer_hash(load_tokenizer("emoji-small")),
    }
    assert np.array_equal(table["tokens"].to_pylist(), cache.indices)
    assert table["label"].to_pylist() == cache.labels.tolist()
    assert table["caption"].to_pylist() == cache.batch(range(LIMIT))["caption"]
    assert table["image"].to_pylist() == cache.image.tolist()


def test_the_documents_example_goes_from_tokens_to_pictures(encoded, tmp_path):
    assert encode(encoded, "--parquet") == 0
    (code,) = re.findall(r"```python\n(.*?)```", (project_folder() / "docs" / "tokens.md").read_text(), re.DOTALL)
    (tmp_path / "tokens").symlink_to(encoded)
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code, "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert re.search(r"step 2: \d\.\d+ nats a token\n4 pictures of \(3, 64, 64\)\n$", run.stdout), run.stderr
