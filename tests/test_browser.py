"""Notebooks in JupyterLab and the committed pages as a person sees them: headless Chromium, driven through Playwright.

Skipped, with the reason, where no Chromium is installed; `.ci/run` installs Debian's. CODALIB_SCREENSHOTS names a
folder that receives pictures of the widgets, for the README.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from codalib.models.tokens import Tokens
from codalib.reporting import codes, pages
from codalib.reporting.figures import data_uri
from codalib.reporting.levels import level_slider
from codalib.reporting.tables import html_table

ROOT = Path(__file__).parents[1]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
START_SECONDS = 90  # JupyterLab's first start on a busy machine
RUN_SECONDS = 300  # all cells of explore.ipynb on a busy machine; alone they take half a minute
REACTION_SECONDS = 20  # the same of one reaction, which takes a tenth of a second
TOKEN = "codalib-test"
PLAIN = data_uri(Image.new("RGB", (20, 20), "red"))
# What Lab itself writes to the console without a fault: extensions that look for servers that are not there.
HARMLESS = re.compile(r"favicon|Failed to load resource.*(404|403)|deprecat|source ?map|ResizeObserver", re.IGNORECASE)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab's address; it serves a copy of explore.ipynb and writes nothing into the checkout."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(ROOT / "notebooks" / "explore.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)  # what is seen comes from this run
    nbformat.write(notebook, folder / "explore.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # they ask the network
    (folder / "jupyter_config_dir" / "labconfig").mkdir(parents=True)
    (folder / "jupyter_config_dir" / "labconfig" / "page_config.json").write_text(json.dumps(news))
    own |= {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--notebook-dir={folder}"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None, (folder / "lab.log").read_text()
            try:
                with urlopen(f"{address}/api?token={TOKEN}", timeout=5):
                    break
            except (URLError, OSError):
                assert time.monotonic() < until, (folder / "lab.log").read_text()
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, width, height=1000):
    """A page that keeps what its console says in `page.said`."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.said = []
    page.on("console", lambda message: message.type == "error" and page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    return page


@pytest.fixture(scope="module")
def page(lab, browser):
    """explore.ipynb open in JupyterLab, all its cells run, with what the console said in `page.said`."""
    page = open_page(browser, 1280)
    page.goto(f"{lab}/lab/tree/explore.ipynb?token={TOKEN}", timeout=1000 * START_SECONDS)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=1000 * START_SECONDS)
    page.get_by_text(re.compile(r"\(ipykernel\) \| Idle")).first.wait_for(timeout=1000 * START_SECONDS)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    page.locator("pre", has_text="tokens after each level").wait_for(timeout=1000 * RUN_SECONDS)
    yield page
    if folder := os.environ.get("CODALIB_SCREENSHOTS"):
        for label in ("levels", "level", "guidance", "kept levels"):
            view = page.locator(".jp-OutputArea-output", has=slider(page, label)).first
            view.screenshot(path=f"{folder}/explore-{label.replace(' ', '-')}.png")


@pytest.fixture
def figure(browser, tmp_path):
    """A page's figure with a level slider, of a white image and of one that darkens level by level."""
    white = torch.ones(2, 3, 16, 16)
    more = level_slider(white, {"a": [white - level for level in (0.5, 1.0, 2.0)], "b": [white - 0.2]}, (1, 2, 4))
    path = tmp_path / "page.html"
    path.write_text(pages.page("A page", f'<figure><img id="plain" src="{PLAIN}" alt="plain">{more}</figure>'))
    page = open_page(browser, 390)
    page.goto(path.as_uri())
    yield page
    assert not page.said
    page.close()


def slider(page, label):
    return page.locator(".widget-slider", has=page.get_by_text(label, exact=True))


def wait_for_change(read, before):
    until = time.monotonic() + REACTION_SECONDS
    while (now := read()) == before:
        assert time.monotonic() < until, "nothing changed"
        time.sleep(0.02)
    return now


def test_the_level_slider_changes_the_picture_and_its_numbers(page):
    view = page.locator(".jp-OutputArea-output", has=slider(page, "levels")).first
    view.scroll_into_view_if_needed()
    decoded, table = view.locator(".codalib-picture img").nth(1), view.locator(".widget-html-content table")
    view.get_by_text("10 of 10 levels").wait_for()
    picture, numbers = decoded.get_attribute("src"), table.inner_text()
    handle = slider(page, "levels").locator(".noUi-handle")
    handle.focus()
    for _ in range(6):
        handle.press("ArrowLeft")
    changed = wait_for_change(lambda: table.inner_text(), numbers)
    wait_for_change(lambda: decoded.get_attribute("src"), picture)
    until = time.monotonic() + REACTION_SECONDS
    while "4 of 10 levels" not in (changed := table.inner_text()):
        assert time.monotonic() < until, changed
        time.sleep(0.02)
    assert "300" in changed  # bits: 1 + 4 + 9 + 16 tokens of 10 bits
    assert decoded.get_attribute("alt") == "decoded from 4 levels"


def test_pointing_at_a_cell_shows_its_scores(page):
    view = page.locator(".jp-OutputArea-output", has=slider(page, "level")).first
    view.scroll_into_view_if_needed()
    text = view.locator(".widget-html", has=page.get_by_text("score", exact=True)).first
    before = text.inner_text()
    picture = view.locator(".codalib-picture").first
    box = picture.bounding_box()
    picture.click(position={"x": 0.7 * box["width"], "y": 0.7 * box["height"]})
    after = wait_for_change(lambda: text.inner_text(), before)
    assert "row 0, column 0" in before
    assert re.search(r"row [1-9], column [1-9]", after)
    picture.press("ArrowRight")
    assert wait_for_change(lambda: text.inner_text(), after) != after


def test_drawing_gives_pictures_and_the_frames_on_the_way(page):
    view = page.locator(".jp-OutputArea-output", has=slider(page, "guidance")).first
    view.scroll_into_view_if_needed()
    result = view.locator(".widget-html", has=page.locator("img")).last
    first = result.locator("img").first.get_attribute("src")
    view.get_by_label("seed").fill("7")
    view.get_by_label("seed").press("Enter")
    view.get_by_role("button", name="draw").click()
    wait_for_change(lambda: result.locator("img").first.get_attribute("src"), first)
    assert result.locator("img").count() == 8
    assert "149 known" in result.inner_text()
    handle = view.locator(".widget-slider", has=page.get_by_text("step", exact=True)).locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowLeft")
    until = time.monotonic() + REACTION_SECONDS
    while "step 7" not in result.inner_text():
        assert time.monotonic() < until, result.inner_text()
        time.sleep(0.02)


def test_a_dragged_box_hides_its_tokens(page):
    view = page.locator(".jp-OutputArea-output", has=slider(page, "kept levels")).first
    view.scroll_into_view_if_needed()
    picture, hidden = view.locator(".codalib-picture").nth(0), view.locator(".codalib-picture img").nth(1)
    before = hidden.get_attribute("src")
    box = picture.bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.3 * box["height"], steps=4)
    page.mouse.up()
    wait_for_change(lambda: hidden.get_attribute("src"), before)


def test_the_console_has_no_error(page):
    assert not [text for text in page.said if not HARMLESS.search(text)]
    assert (
        page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] pre").all_inner_texts()
        == []
    )


def colours(page):
    """The pixels (left, right) at a quarter and at three quarters of the first picture, as one sees them."""
    shot = np.asarray(Image.open(io.BytesIO(page.locator(".stage").screenshot())).convert("L"))
    return [int(shot[shot.shape[0] // 2, shot.shape[1] * place // 8]) for place in (1, 3)]


def test_a_pages_levels_move_by_keyboard_and_its_wipe_by_mouse(figure):
    level, wipe = figure.get_by_label("Levels"), figure.get_by_label("Wipe")
    assert "Right of it: b, " in figure.locator("output").inner_text()
    figure.get_by_label("Right").select_option("a")
    assert colours(figure) == [255, 0]  # the image, three levels
    level.press("ArrowLeft")
    assert "2 of 3 levels, 5 tokens an image" in figure.locator("output").inner_text()
    assert level.get_attribute("aria-valuetext") == "2 of 3 levels"
    assert colours(figure) == [255, 128]
    wipe.press("End")
    assert colours(figure) == [255, 255]
    box = figure.locator(".stage").bounding_box()
    figure.mouse.click(box["x"] + 0.05 * box["width"], box["y"] + 0.5 * box["height"])  # a tenth of the first picture
    assert wipe.input_value() == "10"
    assert colours(figure) == [128, 128]
    figure.get_by_label("Left").select_option("a")
    assert "Left of the line: a, 2 of 3" in figure.locator("output").inner_text()
    assert figure.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_without_scripts_shows_the_plain_picture_alone(figure, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(figure.url)
    assert page.locator("#plain").is_visible()
    assert not page.locator(".levels").is_visible()
    context.close()


@pytest.fixture(params=[390, 1280])
def coded(request, browser, tmp_path):
    """A page's codebook of four codes on two levels, and the token maps of two images."""
    counts = torch.tensor([[0, 0, 2, 0], [3, 0, 1, 4]])
    order = counts.argsort(dim=1, descending=True, stable=True)
    effects = [torch.full((used, 3, 8, 8), -0.5) for used in (1, 3)]
    atlas = codes.codebook_atlas(effects, order, counts, (1, 2))
    tokens = Tokens([torch.tensor([[[2]], [[2]]]), torch.tensor([[[0, 0], [3, 3]], [[3, 0], [2, 3]]])], 4)
    pictures = torch.ones(2, 3, 16, 16)
    pictures[:, :, 8:, :8] = -1  # the lower left is black
    maps = codes.token_maps(tokens, [pictures, pictures], ["first", "second"], counts)
    (tmp_path / "page.html").write_text(pages.page("A page", f"<figure>{atlas}</figure><figure>{maps}</figure>"))
    page = open_page(browser, request.param)
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    assert not page.said
    page.close()


def point(page, board, across, down):
    box = board.bounding_box()
    page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])


def test_a_pages_codes_tell_their_use_by_mouse_and_keyboard(coded):
    atlas = coded.locator(".codes").first
    board, text = atlas.locator(".board"), atlas.locator("output")
    assert text.inner_text().startswith(
        "Level 1 of 2 (1 x 1 tokens an image), rank 1 of 4: code 2, 2 of the level's 2 to"
    )
    point(coded, board, 0.5, 0.25)  # of three columns and two rows
    assert "rank 2 of 4: code 0, not used at this level" in text.inner_text()
    atlas.get_by_label("Level").press("ArrowRight")
    assert (
        "Level 2 of 2 (2 x 2 tokens an image), rank 2 of 4: code 0, 3 of the level's 8 tokens (38 %)"
        in text.inner_text()
    )
    assert atlas.get_by_label("Level").get_attribute("aria-valuetext") == "2 of 2"
    board.focus()
    board.press("ArrowRight")
    assert "rank 3 of 4: code 2, 1 of" in text.inner_text()
    for key in ("ArrowRight", "ArrowDown"):  # stays at the row's end; below is no code, the last one is nearest
        board.press(key)
    assert "rank 4 of 4: code 1, not used" in text.inner_text()


def test_a_pages_tokens_mark_the_patch_that_they_decode_to(coded):
    maps = coded.locator(".codes").last
    left, right = maps.locator(".board").all()
    maps.get_by_label("Level").press("ArrowRight")
    maps.get_by_label("Image").select_option("second")
    point(coded, left, 0.2, 0.8)
    assert "row 2, column 1: code 2, 1 of the level's 8 tokens" in maps.locator("output").inner_text()
    mark, whole = right.locator("i").bounding_box(), right.bounding_box()
    assert (mark["x"] - whole["x"]) / whole["width"] == pytest.approx(0, abs=0.02)
    assert (mark["y"] - whole["y"]) / whole["height"] == pytest.approx(0.5, abs=0.02)
    lens = np.asarray(Image.open(io.BytesIO(maps.locator(".lens").screenshot())).convert("L"))
    assert lens[10:-10, 10:-10].max() < 10  # the black quarter, enlarged
    point(coded, right, 0.8, 0.2)  # the picture can be pointed at as well
    assert "row 1, column 2: code 0" in maps.locator("output").inner_text()
    lens = np.asarray(Image.open(io.BytesIO(maps.locator(".lens").screenshot())).convert("L"))
    assert lens[10:-10, 10:-10].min() > 245
    right.press("ArrowDown")
    assert "row 2, column 2: code 3" in maps.locator("output").inner_text()


def test_a_pages_table_filters_and_sorts_by_keyboard(browser, tmp_path):
    rows = [(claim, method, seed) for claim in ("error", "codes") for method in ("VQ", "CODA") for seed in (1, 2, 11)]
    table = html_table(pd.DataFrame(rows, columns=["Claim", "Method", "Seed"]))
    (tmp_path / "page.html").write_text(pages.page("A page", table + html_table(pd.DataFrame({"Short": [1, 2]}))))
    page = open_page(browser, 390)
    page.goto((tmp_path / "page.html").as_uri())

    def seen():
        rows = page.locator("table").first.locator("tbody tr:visible").all_inner_texts()
        return [tuple(row.split("\t")) for row in rows]

    field = page.get_by_label("Filter rows")
    assert field.count() == 1  # the short table has none
    field.fill("coda seed:1")
    assert seen() == [("error", "CODA", "1"), ("codes", "CODA", "1")]
    assert page.get_by_role("status").inner_text() == "2 of 12 rows"
    page.get_by_role("button", name="Claim").press("Enter")
    assert seen() == [("codes", "CODA", "1"), ("error", "CODA", "1")]
    field.fill("claim:error method:vq")
    page.get_by_role("button", name="Seed").press("Enter")
    page.get_by_role("button", name="Seed").press("Enter")
    assert [row[2] for row in seen()] == ["11", "2", "1"]  # as numbers, downwards
    field.fill("")
    assert len(seen()) == 12
    assert not page.said
    page.close()


@pytest.mark.parametrize("width", [390, 1280])  # a phone, a desktop
def test_the_committed_pages_are_whole_and_fit_the_window(browser, width):
    committed = sorted((ROOT / "reports").rglob("*.html"))
    assert committed
    page = open_page(browser, width)
    for path in committed:
        assert path.stat().st_size < 5e6, path
        page.goto(path.as_uri())
        needed, broken, text = page.evaluate(
            "[document.documentElement.scrollWidth, [...document.images].filter(i => !i.naturalWidth).length, "
            "(document.querySelector('main') ?? document.body).clientWidth]"
        )
        assert needed <= width, path
        assert text >= 300, path  # 40 characters of 16 pixels
        assert not broken, path
        assert not page.said, (path, page.said)
    page.close()
