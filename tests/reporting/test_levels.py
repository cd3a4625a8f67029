import base64
import io

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

from codalib.reporting import levels, pages
from codalib.reporting.levels import level_slider

SCALES = (1, 2, 4)


def picture(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_level_of_every_series_is_there_with_its_numbers(images):
    near = [images + noise * torch.ones_like(images) for noise in (0.5, 0.2, 0.1)]
    soup = BeautifulSoup(level_slider(images, {"ceiling": [images], "<ours>": near}, SCALES), "html.parser")
    assert [image["data-series"] for image in soup.select("img")] == ["image", "ceiling", *["<ours>"] * 3]
    assert [image["alt"].split(", ")[1:3] for image in soup.select("img")[2:]] == [
        ["1 of 3 levels", "1 tokens an image"],
        ["2 of 3 levels", "5 tokens an image"],
        ["3 of 3 levels", "21 tokens an image"],
    ]
    decibels = [float(image["alt"].split()[-2]) for image in soup.select("img")[1:]]
    assert decibels[1:] == sorted(decibels[1:])
    assert decibels[0] > 60  # an exact one counts as finite
    assert soup.select_one(".levels").has_attr("hidden")
    assert soup.select_one("[name=level]")["max"] == "3"
    assert [one.get_text() for one in soup.select("[name=left] [selected], [name=right] [selected]")] == [
        "image",
        "<ours>",
    ]


def test_each_picture_stands_in_its_cell_without_loss(images):
    soup = BeautifulSoup(level_slider(images, {"same": [images]}, SCALES), "html.parser")
    sheet = picture(soup.img)
    cell = 34  # 32 pixels and a margin of one on each side
    assert sheet.shape == (2 * cell, 4 * cell, 3)
    fifth = sheet[cell + 1 : 2 * cell - 1, 1 : cell - 1]  # the first of the second row
    assert np.abs(fifth / 127.5 - 1 - images[4].permute(1, 2, 0).numpy()).max() < 0.005
    assert (sheet[cell:, 2 * cell :] == 255).all()


def test_another_number_of_levels_is_refused(images):
    with pytest.raises(ValueError, match="expected 1 or 3 levels of 'ours', got 2"):
        level_slider(images, {"ours": [images, images]}, SCALES)


def test_large_pictures_become_coarser_until_two_figures_fit_into_a_page_of_5_mb(monkeypatch):
    noise = torch.rand(8, 3, 256, 256) * 2 - 1  # the worst that a picture can be
    pictures = level_slider(noise, {"ours": [noise] * 3}, SCALES)
    assert 500_000 < len(pictures) < levels.BUDGET + 5000
    assert len(pages.page("x", 2 * pictures)) < 5e6
    monkeypatch.setattr(levels, "BUDGET", 100)
    with pytest.raises(ValueError, match="show fewer images"):
        level_slider(noise[:1, :, :64, :64], {"ours": [noise[:1, :, :64, :64]]}, SCALES)
