"""What objects look like in a notebook."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup

from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import Tokens
from codalib.reporting import display
from codalib.training.trainer import TrainingLog, read_log


@pytest.fixture(scope="module")
def tokenizer():
    return CodaTokenizer.from_pretrained("emoji-small")


def cells(html):
    return [
        [cell.get_text() for cell in row.find_all(["td", "th"])] for row in BeautifulSoup(html, "html.parser")("tr")
    ]


def test_tokens_show_their_levels_bits_and_codes_in_use():
    tokens = Tokens([torch.tensor([[[3]], [[5]]]), torch.tensor([[[0, 1], [1, 3]], [[-1, -1], [0, 1]]])], 8)
    html = display.tokens_html(tokens)
    assert "2 images: 2 levels, 5 tokens and 15 bits an image, codes 0 to 7, 50.0% of them in use" in html
    assert cells(html)[1:] == [["1", "1 x 1", "1", "3", "2"], ["2", "2 x 2", "4", "15", "3"]]
    assert len(BeautifulSoup(html, "html.parser")("img")) == 2


def test_a_code_has_one_colour_and_a_masked_one_is_grey():
    colours = display.code_colours(np.array([[0, 1], [1, -1]]))
    assert (colours[0, 1] == colours[1, 0]).all()
    assert not (colours[0, 0] == colours[0, 1]).all()
    assert len(set(colours[1, 1])) == 1


def test_a_tokenizer_shows_its_parts_sizes_and_codes(tokenizer):
    html = display.tokenizer_html(tokenizer)
    assert "images (B, 3, 64, 64) to 5 levels of sides 1, 2, 4, 8, 8: 149 tokens of 1,024 codes, 1,490 bits" in html
    rows = {row[0]: row[2] for row in cells(html)}
    count = sum(p.numel() for p in tokenizer.parameters())
    assert sum(int(rows[part].replace(",", "")) for part in ("VAE", "adapters", "quantizer")) == count
    pictures = BeautifulSoup(html, "html.parser")("img")
    assert len(pictures) == 16
    assert len({picture["src"] for picture in pictures}) == 16  # no two codes look the same
    assert all(picture["alt"] for picture in pictures)


def test_a_log_shows_each_term_and_its_curve(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "seconds": 2.0, "loss": 4.0, "rate": 1}\n{"step": 3, "seconds": 6.0, "loss": 1.0, "val": 9}\n'
    )
    html = display.log_html(read_log(tmp_path))
    assert "3 steps in 6 s, 2 s a step" in html
    assert [row[:5] for row in cells(html)[1:]] == [["loss", "4", "1", "4", "1"], ["val", "9", "9", "9", "9"]]
    first, last = re.search(r'points="([^"]*)"', html)[1].split(" ")
    assert float(first.split(",")[1]) < float(last.split(",")[1])  # a falling loss falls, and y counts downwards
    assert "nothing has been logged" in display.log_html(TrainingLog())


def test_a_notebook_shows_them_after_importing_codalib_alone():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "import codalib, torch\n"
        "tokens = codalib.Tokens([torch.tensor([[[3]]])], 8)\n"
        "print(shell.display_formatter.format(tokens)[0]['text/html'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "1 image: 1 levels, 1 tokens and 3 bits an image" in shown
