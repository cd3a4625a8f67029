"""A data set and a claim added as CONTRIBUTING.md says; nothing else knows of them.

tests/models/test_new_quantizer.py does it with a quantizer, tests/workflow/test_profiles.py with notebooks.
"""

import logging

import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image
from test_readme import build_readme

from codalib.datasets import images
from codalib.datasets.images import Item, load_dataset
from codalib.datasets.pictures import DataError
from codalib.experiments.paper import CLAIMS, Claim, Comparison
from codalib.experiments.statistics import claim_verdict
from codalib.reporting import report
from codalib.tools import tokens
from codalib.workflow.manifest import Run


def listed(path, split):
    """The pictures named in PATH/SPLIT.txt, one a line, all of one class."""
    names = path / f"{split}.txt"
    if not names.is_file():
        raise DataError(f"{path} holds no {names.name}: expected the names of the pictures, one a line")
    return [Item(str(path / name), 0, (name,)) for name in names.read_text().splitlines()], ["picture"]


def test_a_data_set_is_known_by_its_prefix_to_messages_order_and_encode(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(images.KINDS, "list", listed)
    for number in range(4):
        place = tmp_path / "folder" / "train" / "picture" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 70), (60 * number, 0, 0)).save(place)
    (tmp_path / "train.txt").write_text("".join(f"folder/train/picture/{number}.png\n" for number in range(4)))
    ours, folder = (
        load_dataset(name, "train", 64) for name in (f"list:{tmp_path}", f"imagefolder:{tmp_path / 'folder'}")
    )
    batches = (next(images.training_batches(data, 3, seed=1, start_step=2))["image"] for data in (ours, folder))
    assert torch.equal(*batches)
    with pytest.raises(DataError, match=r"holds no val\.txt: expected the names"):
        load_dataset(f"list:{tmp_path}", "val", 64)
    with pytest.raises(DataError, match=r"expected 'emoji' or one of .*'list:PATH'"):
        load_dataset("lists:x", "train", 64)
    caplog.set_level(logging.INFO)
    assert tokens.encode([f"list:{tmp_path}", "--tokenizer", "emoji-small", "--out", str(tmp_path / "tokens")]) == 0
    assert "4 images of 149 tokens" in caplog.text


def test_a_claim_reaches_the_report_and_the_readme(tmp_path, monkeypatch):
    published = Comparison("1", "psnr", "+ attention quantization", "+ adapted VAE")
    own = Claim("own", "Adapters raise the PSNR", "Adapting raises it.", "Table 1", "One VAE.", (published,))
    monkeypatch.setitem(CLAIMS, own.id, own)
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path / "reports"))
    verdict = claim_verdict("own", {"psnr": [0.9, 1.0, 1.1]}, "24 → 25 dB")
    Run("tiny/stage", "stage", {}, seed=0).finish({"claims": [verdict]})
    (tmp_path / "reports" / "tiny").mkdir(parents=True)
    (tmp_path / "reports" / "tiny" / "stage.html").write_text("a page")
    text = BeautifulSoup(report.build("tiny").read_text(), "html.parser").select_one("#claim-own").get_text(" ")
    assert "21.4 → 22.2" in text
    assert "24 → 25 dB" in text
    blocks = build_readme.blocks([{"results": {"claims": [verdict]}}])
    assert f"**Holds** (1 of {len(CLAIMS)}): Adapters raise the PSNR." in blocks["outcomes"]
