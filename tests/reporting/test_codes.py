import base64
import io
import json

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

from codalib.models.tokens import Tokens
from codalib.reporting import codes, pages
from codalib.reporting.display import code_colours

SCALES = (1, 2)
TOKENS = Tokens([torch.tensor([[[3]], [[5]]]), torch.tensor([[[0, 1], [1, 3]], [[2, 2], [0, 1]]])], 8)
COUNTS = torch.tensor([[0, 0, 0, 1, 0, 1, 0, 0], [2, 3, 2, 1, 0, 0, 0, 0]])


def views(text):
    return json.loads(BeautifulSoup(text, "html.parser").select_one(".codes")["data-views"])


def pixels(source):
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return np.asarray(picture.convert("RGB"))


def test_the_atlas_holds_each_level_in_its_order_with_its_use():
    order = COUNTS.argsort(dim=1, descending=True, stable=True)[:, :4]
    effects = [torch.full((2, 3, 6, 6), -0.2), torch.full((4, 3, 4, 4), -0.1)]
    first, second = views(codes.codebook_atlas(effects, order, COUNTS, SCALES))
    assert (first["codes"], first["uses"], first["total"]) == ([3, 5, 0, 1], [1, 1, 0, 0], 2)
    assert (second["codes"], second["uses"], second["total"]) == ([1, 0, 2, 3], [3, 2, 2, 1], 8)
    assert (second["columns"], second["rows"], second["note"]) == (3, 2, "contrast 10.0 times")
    sheet = pixels(first["pictures"][0])
    side = codes.TILE + 2
    assert sheet.shape == (2 * side, 3 * side, 3)
    middles = sheet[side // 2 :: side, side // 2 :: side].max(axis=2)
    assert np.abs(middles.astype(int) - [[0, 0, 230], [230, 255, 255]]).max() <= 2  # used at full contrast, unused pale
    assert pixels(second["pictures"][0])[codes.TILE // 2, codes.TILE // 2].max() <= 2


def test_a_level_is_stretched_so_that_all_but_the_largest_differences_fit():
    effects = torch.linspace(0, 0.5, 101).view(1, 1, 1, 101).clone()
    effects[..., -1] = -2.0
    assert codes.contrast(effects) == pytest.approx(1 / 0.5, rel=0.02)
    assert codes.contrast(torch.zeros(1, 3, 2, 2)) == pytest.approx(1e6)


def test_maps_hold_a_cell_for_each_token_beside_the_decoded_picture():
    decoded = [torch.full((2, 3, 4, 4), value) for value in (-1.0, 1.0)]
    text = codes.token_maps(TOKENS, decoded, ["<a>", "b"], COUNTS)
    found = views(text)
    assert [(view["level"], view["image"]) for view in found] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert found[3]["codes"] == [2, 2, 0, 1]
    assert found[3]["uses"] == [2, 2, 2, 3]
    assert np.abs(pixels(found[2]["pictures"][0]).astype(int) - code_colours(TOKENS[1][0].numpy())).max() == 0
    assert (pixels(found[0]["pictures"][1]) == 0).all()
    assert (pixels(found[2]["pictures"][1]) == 255).all()
    assert "<a>" not in text  # names are escaped
    assert "uses" not in views(codes.token_maps(TOKENS, decoded, ["a", "b"]))[0]


def test_a_map_drawn_as_a_picture_has_equal_cells_of_the_codes_colours():
    picture = codes.map_pictures(TOKENS[1], 6)
    assert picture.shape == (2, 3, 6, 6)
    colours = code_colours(TOKENS[1][1].numpy()) / 127.5 - 1
    assert np.allclose(picture[1, :, 2, 5], colours[0, 1])
    assert np.allclose(picture[1, :, 3, 0], colours[1, 0])


def test_other_levels_images_or_names_are_refused():
    decoded = [torch.zeros(2, 3, 4, 4)] * 2
    short = [one[:1] for one in decoded]
    for wrong in ((TOKENS, decoded[:1], "ab"), (TOKENS, decoded, "a"), (TOKENS, short, "ab")):
        with pytest.raises(ValueError, match="expected 2 levels of 2 images, each with a name, got"):
            codes.token_maps(*wrong)


def test_a_codebook_of_1024_codes_on_ten_levels_fits_into_a_page():
    effects = [torch.rand(1024, 3, 24, 24) - 0.5] * 10  # noise: the worst that pictures can be
    order, counts = torch.arange(1024).repeat(10, 1), torch.ones(10, 1024, dtype=torch.long)
    assert len(pages.page("x", codes.codebook_atlas(effects, order, counts, (1,) * 10))) < 2e6
