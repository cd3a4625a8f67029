"""What a person at a notebook looks at, and the widgets' states."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from codalib.base.seeds import sample_generators
from codalib.datasets.images import DataError, load_dataset
from codalib.models.editing import keep_outside, with_token
from codalib.models.maskgit import MaskGIT
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import Tokens
from codalib.reporting.explorer import (
    code_counts,
    code_effects,
    explain,
    images_of_code,
    read_image,
    through_levels,
    unmask,
)
from codalib.reporting.widgets import (
    AssignmentExplorer,
    EditExplorer,
    ImageChoice,
    InpaintExplorer,
    LevelExplorer,
    SampleExplorer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return CodaTokenizer.from_pretrained("emoji-small")


@pytest.fixture(scope="module")
def model():
    return MaskGIT.from_pretrained("emoji-class")


@pytest.fixture(scope="module")
def images():
    return load_dataset("emoji", "val", 64, limit=6)


@pytest.fixture
def choice(tokenizer, images):
    return ImageChoice(tokenizer, images, 1)


def png(size=(90, 70)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_is_explained_level_by_level(tokenizer, images):
    image = images[0]["image"]
    explained = explain(tokenizer, image, top=5)
    expected = tokenizer.encode(image[None], sample=False)
    assert all(torch.equal(own, other) for own, other in zip(explained.tokens, expected, strict=True))
    assert [view.tokens for view in explained.views] == [1, 5, 21, 85, 149]
    assert [view.bits for view in explained.views] == [10, 50, 210, 850, 1490]
    torch.testing.assert_close(explained.views[2].picture, tokenizer.decode(expected, levels=3)[0], atol=1e-5, rtol=0)
    assert explained.views[0].error > explained.views[-1].error
    for level, ranking in zip(explained.tokens, explained.ranking, strict=True):
        assert torch.equal(ranking.codes[..., 0], level)
        assert (ranking.scores.diff(dim=-1) <= 0).all()
    with pytest.raises(ValueError, match="latents of shape"):
        explain(tokenizer, image[:, :32, :32])


def test_a_place_is_followed_through_the_levels(tokenizer, images):
    explained = explain(tokenizer, images[0]["image"])
    through = through_levels(explained, 0.99, 0.4)
    assert [(at.row, at.column) for at in through] == [(0, 0), (1, 0), (3, 1), (7, 3), (7, 3)]
    assert [at.code for at in through] == [
        int(level[0, at.row, at.column]) for level, at in zip(explained.tokens, through, strict=True)
    ]
    assert all(0 < at.second <= at.score <= 1 for at in through)


def test_an_uploaded_file_becomes_an_image():
    image = read_image(png(), 64)
    assert image.shape == (3, 64, 64)
    assert image[0].min() == 1
    assert image[1].max() == -1
    with pytest.raises(DataError, match=r"notes\.txt cannot be read as an image"):
        read_image(b"words", 64, "notes.txt")


def test_images_of_a_code_are_those_that_use_it_most(tokenizer, images):
    counts = code_counts(tokenizer, images, batch_size=4)
    assert counts.sum(dim=1).tolist() == [149] * 6
    code = int(counts.sum(dim=0).argmax())
    found = images_of_code(counts, code, most=3)
    assert found[0] == (int(counts[:, code].argmax()), int(counts[:, code].max()))
    assert [times for _, times in found] == sorted((times for _, times in found), reverse=True)
    unused = int((counts.sum(dim=0) == 0).nonzero()[0])
    assert images_of_code(counts, unused) == []


def test_a_changed_token_changes_the_latents_at_its_place(tokenizer, images):
    tokens = explain(tokenizer, images[0]["image"]).tokens
    changed = with_token(tokens, 4, 0, 0, -1)
    assert [int((level < 0).sum()) for level in changed] == [0, 0, 0, 0, 1]
    assert not any((level < 0).any() for level in tokens)  # the original stays
    decode = tokenizer.quantizer.decode
    difference = (decode(changed, partial=True) - decode(tokens)).abs().amax(dim=1)[0]  # (8, 8)
    assert (difference > 0).nonzero().tolist() == [[0, 0]]
    assert not torch.equal(tokenizer.decode(changed, partial=True), tokenizer.decode(tokens))
    for place in ((5, 0, 0, 1), (4, 8, 0, 1), (4, 0, 0, 1024)):
        with pytest.raises(ValueError, match="expected "):
            with_token(tokens, *place)


def test_frames_lead_to_the_drawn_tokens(tokenizer, model):
    settings = {"steps": 5, "generator": sample_generators(0, range(2))}
    tokens, frames = unmask(model, tokenizer, torch.tensor([2, 7]), most=3, **settings)
    assert [frame.number for frame in frames] == [1, 3, 5]
    known = torch.stack([frame.unmasked for frame in frames])
    assert (known.diff(dim=0) > 0).all()
    assert known[-1].tolist() == [149, 149]
    torch.testing.assert_close(frames[-1].guess, tokenizer.decode(tokens), atol=1e-5, rtol=0)


def test_the_level_slider_shows_that_many_levels(choice):
    explorer = LevelExplorer(choice)
    before = explorer.decoded.source
    explorer.levels.value = 2
    assert explorer.decoded.source != before
    assert "2 of 5 levels" in explorer.text.value
    assert explorer.still().count("<img") == 6


def test_another_image_reaches_every_view_of_it(choice, images):
    levels, edits = LevelExplorer(choice), EditExplorer(choice)
    edits.edit(3)
    before = levels.original.source
    choice.number.value = 2
    assert levels.original.source != before
    assert edits.changed == 0


def test_an_image_that_cannot_be_read_is_said_and_changes_nothing(tokenizer, images):
    broken = images.subset([0, 1, 2])
    broken.items[0] = dataclasses.replace(broken.items[0], stored=b"broken")
    choice = ImageChoice(tokenizer, broken)
    assert choice.number.value == 1
    before = choice.explained
    choice.number.value = 0
    assert choice.explained is before
    assert "cannot be read" in choice.message.value


def test_a_file_that_is_no_image_is_said_and_changes_nothing(choice):
    before = choice.explained
    upload = {"name": "notes.txt", "content": memoryview(b"words")}
    choice._uploaded({"new": (upload,)})
    assert "notes.txt cannot be read" in choice.message.value
    assert choice.explained is before
    choice._uploaded({"new": ({"name": "red.png", "content": memoryview(png())},)})
    assert choice.message.value == ""
    assert choice.explained.image[0].min() == 1


def test_pointing_at_a_cell_shows_its_scores(choice, tokenizer, images):
    explorer = AssignmentExplorer(choice, code_counts(tokenizer, images))
    explorer.level.value = 4
    explorer.picture.cell = [7, 5]
    assert "level 4, row 7, column 5" in explorer.text.value
    taken = int(choice.explained.tokens[3][0, 7, 5])
    assert f"<b>{taken}</b>" in explorer.text.value
    assert f"code {taken} is in use in" in explorer.homes.value
    assert f"<td>4</td><td>7, 5</td><td>{taken}</td>" in explorer.through.value
    explorer.level.value = 2  # a coarser grid: the cell stays inside it
    assert explorer.picture.cell == [1, 1]


def test_an_edit_changes_the_picture_and_can_be_taken_back(choice):
    explorer = EditExplorer(choice)
    before = explorer.picture.source
    explorer.edit(-1)
    assert explorer.picture.source != before
    assert "1 change;" in explorer.text.value
    explorer.start()
    assert explorer.picture.source == before


def test_samples_follow_the_sliders(tokenizer, model):
    explorer = SampleExplorer(tokenizer, model, steps=2, label=7)
    assert explorer.wanted.label == "Symbols"
    assert len(explorer.frames) == 2
    first = explorer.result.value
    explorer.moment.value = 1
    assert "step 1" in explorer.result.value
    explorer.seed.value = 5
    explorer.draw()
    assert explorer.result.value != first
    explorer.seed.value = 0
    explorer.draw()
    assert explorer.result.value == first  # seeded
    assert "4 pictures in" in explorer.message.value


def test_inpainting_keeps_what_lies_outside_the_box(tokenizer, model, images):
    explorer = InpaintExplorer(tokenizer, model, images, 1, steps=2)
    explorer.picture.box = [0.5, 0.5, 1.0, 1.0]
    explorer.draw()
    original = explain(tokenizer, images[1]["image"]).tokens
    for drawn, own, kept in zip(
        explorer.drawn, original, keep_outside(original, (0.5, 0.5, 1.0, 1.0), coarse_kept=1), strict=True
    ):
        outside = (kept >= 0).expand_as(drawn)
        assert (drawn == own)[outside].all()
        assert (drawn >= 0).all()
    assert len(set(np.stack([level[:, -1, -1] for level in explorer.drawn[3:]], 1).ravel().tolist())) > 1
    assert "filled" in explorer.still()


def test_a_code_changes_the_window_around_the_middle_of_its_level(tokenizer):
    quantizer, mean = tokenizer.quantizer, torch.full((16,), 0.1)
    codes = [torch.tensor([3, 5]), torch.tensor([5]), torch.tensor([5]), torch.tensor([3, 5]), torch.tensor([5, 3])]
    effects = code_effects(tokenizer, mean, codes, batch_size=1)
    assert [tuple(level.shape) for level in effects] == [
        (len(own), 3, w, w) for own, w in zip(codes, (64, 64, 48, 24, 24), strict=True)
    ]
    assert torch.equal(effects[3], effects[4].flip(0))  # two levels of one grid
    alone = Tokens((torch.full((1, p, p), -1) for p in quantizer.scales), 1024)
    alone[2][0, 2, 2] = 5
    base = mean[None, :, None, None].expand(-1, -1, 8, 8)
    added = quantizer.decode(alone, partial=True)
    expected = (tokenizer.vae.decode(base + added).clamp(-1, 1) - tokenizer.vae.decode(base).clamp(-1, 1)).detach()
    assert torch.allclose(effects[2][0], expected[0, :, 16:64, 16:64], atol=1e-5)  # the middle cell is at 32 to 48
    outside = expected[0].abs().sum() - effects[2][0].abs().sum()
    assert effects[2][0].abs().mean() > outside / (3 * (64**2 - 48**2))
