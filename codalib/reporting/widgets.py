"""The widgets of `notebooks/explore.ipynb`: thin faces of `reporting.explorer`, one class an experiment.

Each has a `view`, the ipywidgets to be shown, and a `still`, the same state as plain HTML for a page without a running
kernel; `show` hands a notebook both.
"""

import base64
import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import anywidget
import ipywidgets as w
import torch
import traitlets
from IPython.display import display
from torch import Tensor

from codalib.base.seeds import sample_generators
from codalib.datasets.images import DataError, ImageDataset
from codalib.datasets.text import CaptionTable, TextEncoder
from codalib.models.editing import keep_outside, with_token
from codalib.models.maskgit import Condition, MaskGIT
from codalib.models.sampling import ORDERS
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import Tokens
from codalib.reporting import display as rich
from codalib.reporting.explorer import Explained, Frame, explain, images_of_code, read_image, through_levels, unmask

SIDE = 224  # pixels of a large picture on the screen
SMALL = 88  # of one in a strip
BARS = 12  # codes in a list of scores
VISIBLE = 0.02  # of the range of a pixel: a change that is counted
SAMPLES = 4  # pictures drawn at once
SEEDS_A_RUN = 1000  # numbers of noise that belong to one seed of a widget


class Picture(anywidget.AnyWidget):
    """A picture to look at, to point at a cell of, or to drag a box on; `cell` and `box` follow the pointer."""

    _esm = Path(__file__).with_name("templates") / "picture.js"
    source = traitlets.Unicode().tag(sync=True)  # a data URL
    alt = traitlets.Unicode().tag(sync=True)
    side = traitlets.Int(SIDE).tag(sync=True)  # pixels on the screen
    mode = traitlets.Enum(["view", "cell", "box"], "view").tag(sync=True)
    grid = traitlets.Int(1).tag(sync=True)  # cells a side, for "cell"
    cell = traitlets.List([0, 0]).tag(sync=True)  # row, column
    box = traitlets.List([0.25, 0.25, 0.75, 0.75]).tag(sync=True)  # top, left, bottom, right as fractions of the side

    def put(self, image: Tensor, alt: str) -> None:
        """Show an image (3, h, w) in [-1, 1]."""
        with self.hold_sync():
            self.source = "data:image/png;base64," + base64.b64encode(rich.png(rich.to_bytes(image))).decode("ascii")
            self.alt = alt

    def divide(self, grid: int) -> None:
        """Let a cell of GRID x GRID be pointed at; the one that is stays inside."""
        with self.hold_sync():
            self.cell = [min(place, grid - 1) for place in self.cell]
            self.grid = grid


def show(explorer: "Explorer") -> None:
    """Show an explorer in a notebook: live where there is a kernel, as its still where there is none."""
    bundle = dict(explorer.view._repr_mimebundle_())
    display(bundle | {"text/html": explorer.still()}, raw=True)


class Explorer(Protocol):
    """What all have: a view, and a still of its state."""

    view: w.Widget

    def still(self) -> str: ...


def call(function: Callable[[], None], *sources: tuple[traitlets.HasTraits, str]) -> None:
    """Call FUNCTION whenever a trait of one of the (widget, name of the trait) changes."""
    for widget, name in sources:
        widget.observe(lambda _: function(), name)


class ImageChoice(traitlets.HasTraits):
    """Which image is looked at: one of a data set's, or an uploaded one; `explained` is what became of it."""

    explained = traitlets.Instance(Explained)

    def __init__(self, tokenizer: CodaTokenizer, images: ImageDataset, first: int = 0):
        super().__init__()
        self.tokenizer, self.images = tokenizer, images
        names = [(f"{number}: {item.caption}", number) for number, item in enumerate(images.items)]
        shown = images.readable(1, [*range(first, len(images)), *range(first)])[0]
        self.number = w.Dropdown(options=names, value=shown["index"], description="image")
        self.upload = w.FileUpload(accept="image/*", multiple=False, description="your own")
        self.message = w.HTML()
        self.view = _row(self.number, self.upload, self.message)
        call(self._chosen, (self.number, "value"))
        self.upload.observe(self._uploaded, "value")
        self._take(shown["image"])

    def _chosen(self) -> None:
        item = self.images[self.number.value]
        if item is None:
            self.message.value = "this image cannot be read: choose another"
        else:
            self._take(item["image"])

    def _take(self, image: Tensor) -> None:
        self.message.value = ""
        self.explained = explain(self.tokenizer, image)

    def _uploaded(self, change: dict) -> None:
        if change["new"]:
            file = change["new"][0]
            try:
                self._take(read_image(bytes(file["content"]), self.tokenizer.resolution, file["name"]))
            except DataError as error:
                self.message.value = html.escape(str(error))


class LevelExplorer:
    """Slide the number of levels; the picture, its error and its bits follow."""

    def __init__(self, choice: ImageChoice):
        self.choice = choice
        levels = len(choice.explained.views)
        self.levels = w.IntSlider(levels, 1, levels, description="levels", continuous_update=True)
        self.original, self.decoded, self.text = Picture(), Picture(), w.HTML()
        self.view = w.VBox([choice.view, self.levels, _row(self.original, self.decoded, self.text)])
        call(self.draw, (self.levels, "value"), (choice, "explained"))
        self.draw()

    def draw(self) -> None:
        explained = self.choice.explained
        view = explained.views[self.levels.value - 1]
        self.original.put(explained.image, "the image itself")
        self.decoded.put(view.picture, f"decoded from {view.levels} levels")
        self.text.value = rich.table(
            ["", f"{view.levels} of {len(explained.views)} levels"],
            [
                ("tokens", f"{view.tokens:,}"),
                ("bits", f"{view.bits:,.0f}"),
                ("latents' mean squared error", f"{view.error:.4f}"),
                ("PSNR, dB", f"{view.psnr:.2f}"),
            ],
        )

    def still(self) -> str:
        explained = self.choice.explained
        texts = {view.levels: f"{view.levels}: {view.bits:,.0f} bits, {view.psnr:.1f} dB" for view in explained.views}
        views = [_captioned(view.picture, texts[view.levels]) for view in explained.views]
        return _cells([_captioned(explained.image, "the image"), *views])


class AssignmentExplorer:
    """Point at a position; see which codes suit it at a level, which one is taken, and where else that is at home."""

    def __init__(self, choice: ImageChoice, counts: Tensor):
        self.choice, self.counts = choice, counts
        scales = choice.explained.tokens.scales
        self.level = w.IntSlider(len(scales) // 2, 1, len(scales), description="level")
        self.picture, self.map = Picture(mode="cell"), w.HTML()
        self.text, self.through, self.homes = w.HTML(), w.HTML(), w.HTML()
        self.view = w.VBox([self.level, _row(self.picture, self.map, self.text, self.through), self.homes])
        call(self.draw, (self.level, "value"), (choice, "explained"))
        call(self.point, (self.picture, "cell"))
        self.draw()

    def draw(self) -> None:
        explained = self.choice.explained
        grid = explained.tokens.scales[self.level.value - 1]
        self.picture.divide(grid)
        self.picture.put(explained.views[self.level.value - 1].picture, f"decoded from {self.level.value} levels")
        codes = explained.tokens[self.level.value - 1][0]
        self.map.value = rich.picture(
            rich.token_map(codes, SIDE), f"the {grid} x {grid} codes of this level", side=SIDE
        )
        self.point()

    def point(self) -> None:
        row, column = self.picture.cell
        ranking = self.choice.explained.ranking[self.level.value - 1]
        scores = ranking.scores[0, row, column, :BARS].tolist()
        codes = ranking.codes[0, row, column, :BARS].tolist()
        self.text.value = f"<b>level {self.level.value}, row {row}, column {column}</b>" + _bars(codes, scores)
        self.through.value = "<b>the same place at each level</b>" + rich.table(
            ["level", "cell", "code", "score", "second"],
            [
                (number, f"{at.row}, {at.column}", at.code, f"{at.score:.3f}", f"{at.second:.3f}")
                for number, at in enumerate(through_levels(self.choice.explained, *self._place()), start=1)
            ],
        )
        images = self.choice.images
        homes = [
            _captioned(images[number]["image"], f"{_count(times, 'time')}: {images.items[number].caption}")
            for number, times in images_of_code(self.counts, codes[0])
        ]
        total = int((self.counts[:, codes[0]] > 0).sum())
        self.homes.value = (
            f"code {codes[0]} is in use in {total} of {len(self.counts)} images, most often in{_cells(homes)}"
        )

    def _place(self) -> tuple[float, float]:
        """The middle of the cell, from the top and from the left as fractions of the side."""
        row, column = self.picture.cell
        return (row + 0.5) / self.picture.grid, (column + 0.5) / self.picture.grid

    def still(self) -> str:
        shown = _captioned(self.choice.explained.views[self.level.value - 1].picture, "decoded so far")
        parts = (shown, self.map.value, self.text.value, self.through.value)
        parts = "".join(f"<div>{part}</div>" for part in parts)
        return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{parts}</div>{self.homes.value}'


class EditExplorer:
    """Point at a token, put another code in its place or mask it, and decode."""

    def __init__(self, choice: ImageChoice):
        self.choice = choice
        scales = choice.explained.tokens.scales
        size = choice.explained.tokens.codebook_size
        self.level = w.IntSlider(1, 1, len(scales), description="level")
        self.code = w.BoundedIntText(0, min=0, max=size - 1, description="code")
        self.swap = w.Button(description="put this code there")
        self.erase = w.Button(description="erase the token")
        self.undo = w.Button(description="start again")
        self.picture, self.text = Picture(mode="cell"), w.HTML()
        buttons = _row(self.code, self.swap, self.erase, self.undo)
        self.view = w.VBox([self.level, buttons, _row(self.picture, self.text)])
        call(self.draw, (self.level, "value"))
        call(self.start, (choice, "explained"))
        self.swap.on_click(lambda _: self.edit(self.code.value))
        self.erase.on_click(lambda _: self.edit(-1))
        self.undo.on_click(lambda _: self.start())
        self.start()

    def start(self) -> None:
        self.tokens: Tokens = self.choice.explained.tokens
        self.changed = 0
        self.draw()

    def edit(self, code: int) -> None:
        """Put CODE at the level and cell that are pointed at; -1 masks the token."""
        self.tokens = with_token(self.tokens, self.level.value - 1, *self.picture.cell, code)
        self.changed += 1
        self.draw()

    def draw(self) -> None:
        self.picture.divide(self.tokens.scales[self.level.value - 1])
        self.decoded = self.choice.tokenizer.decode(self.tokens, partial=True)[0].cpu()
        self.picture.put(self.decoded, f"decoded after {_count(self.changed, 'change')}")
        far = (self.decoded.clamp(-1, 1) - self.choice.explained.views[-1].picture.clamp(-1, 1)).abs() / 2
        moved = (far.amax(dim=0) > VISIBLE).float().mean()
        self.text.value = (
            f"{_count(self.changed, 'change')}; {moved:.0%} of the pixels differ by more than {VISIBLE:.0%} of the "
            f"range, the most by {far.max():.0%}"
        )

    def still(self) -> str:
        """Three edits side by side: a coarse token masked, a fine one, and a coarse one replaced."""
        tokens, decode = self.choice.explained.tokens, self.choice.tokenizer.decode
        last, middle = len(tokens) - 1, tokens.scales[-1] // 2
        edits = {
            "as it is": tokens,
            "level 1 erased": with_token(tokens, 0, 0, 0, -1),
            "level 1 replaced": with_token(tokens, 0, 0, 0, (int(tokens[0][0, 0, 0]) + 1) % tokens.codebook_size),
            f"one token of level {last + 1} erased": with_token(tokens, last, middle, middle, -1),
        }
        return _cells([_captioned(decode(own, partial=True)[0], name) for name, own in edits.items()])


class _Sampler:
    """Sliders of decoding, a button, and the frames on the way; a subclass says what is asked for and what is fixed."""

    def __init__(self, tokenizer: CodaTokenizer, model: MaskGIT, encoder: TextEncoder | None = None, steps: int = 8):
        self.tokenizer, self.model = tokenizer, model
        self.table = None if encoder is None else CaptionTable(encoder)
        classes = [(name, label) for label, name in enumerate(model.info.get("classes", []))]
        if model.text_dim is not None:
            self.wanted: w.Widget = w.Text("red heart", description="caption", continuous_update=False)
        else:
            self.wanted = w.Dropdown(options=classes, value=0, description="class")
        self.steps = w.IntSlider(steps, 1, 32, description="steps")
        self.guidance = w.FloatSlider(2.0, min=0, max=8, step=0.5, description="guidance")
        self.temperature = w.FloatSlider(
            1.0, min=0.1, max=2, step=0.1, description="temperature", style={"description_width": "initial"}
        )
        self.order = w.Dropdown(options=ORDERS, value=ORDERS[0], description="order")
        self.seed = w.BoundedIntText(0, min=0, max=9999, description="seed")
        self.button = w.Button(description="draw", button_style="primary")
        self.moment = w.IntSlider(1, 1, 1, description="step")
        self.play = w.Play(value=1, min=1, max=1, interval=300)
        w.jslink((self.play, "value"), (self.moment, "value"))
        self.result, self.message = w.HTML(), w.HTML()
        self.frames: list[Frame] = []
        self.button.on_click(lambda _: self.draw())
        call(self.look, (self.moment, "value"))
        self.controls = _row(
            self.wanted, self.steps, self.guidance, self.temperature, self.order, self.seed, self.button
        )
        self.watch = _row(self.play, self.moment, self.message)

    def condition(self) -> Condition:
        device = self.model.positions.device
        if self.table is not None:
            return self.table.condition([self.wanted.value] * SAMPLES, device)
        return torch.full((SAMPLES,), self.wanted.value, device=device)

    def fixed(self) -> Tokens | None:
        return None

    def draw(self) -> None:
        """Generate with the sliders' values; a value that the sampler refuses is said beside them."""
        self.button.disabled, self.message.value = True, "drawing"
        started = time.monotonic()
        numbers = [SEEDS_A_RUN * self.seed.value + number for number in range(SAMPLES)]
        try:
            self.drawn, self.frames = unmask(
                self.model,
                self.tokenizer,
                self.condition(),
                fixed=self.fixed(),
                steps=self.steps.value,
                guidance=self.guidance.value,
                temperature=self.temperature.value,
                order=self.order.value,
                generator=sample_generators(0, numbers),
            )
        except ValueError as error:
            self.message.value = html.escape(str(error))
        else:
            self.seconds = time.monotonic() - started
            self.message.value = f"{SAMPLES} pictures in {self.seconds:.1f} s"
            self.play.max = self.moment.max = len(self.frames)
            self.moment.value = len(self.frames)
            self.look()
        finally:
            self.button.disabled = False

    def look(self) -> None:
        self.result.value = _frame(self.frames[self.moment.value - 1]) if self.frames else ""


class SampleExplorer(_Sampler):
    """Generate pictures of a class or a caption, and watch them come out of nothing."""

    def __init__(
        self,
        tokenizer: CodaTokenizer,
        model: MaskGIT,
        encoder: TextEncoder | None = None,
        steps: int = 8,
        label: int = 0,
    ):
        super().__init__(tokenizer, model, encoder, steps)
        if encoder is None:
            self.wanted.value = label
        self.view = w.VBox([self.controls, self.watch, self.result])
        self.draw()

    def still(self) -> str:
        shown = [self.frames[int(i)] for i in torch.linspace(0, len(self.frames) - 1, min(4, len(self.frames))).round()]
        asked = str(getattr(self.wanted, "label", None) or self.wanted.value)
        return f"{html.escape(asked)}{''.join(map(_frame, shown))}"


class InpaintExplorer(_Sampler):
    """Drag a box on an image and let a generator of classes fill it."""

    def __init__(self, tokenizer: CodaTokenizer, model: MaskGIT, images: ImageDataset, first: int = 0, steps: int = 8):
        super().__init__(tokenizer, model, steps=steps)
        self.choice = ImageChoice(tokenizer, images, first)
        levels = len(tokenizer.quantizer.scales)
        self.coarse = w.IntSlider(1, 0, levels - 1, description="kept levels")
        self.picture, self.masked = Picture(mode="box"), Picture()
        self.view = w.VBox(
            [self.choice.view, self.controls, self.coarse, _row(self.picture, self.masked), self.watch, self.result]
        )
        call(self.mask, (self.picture, "box"), (self.coarse, "value"))
        call(self.start, (self.choice, "explained"))
        self.start()
        self.draw()

    def start(self) -> None:
        self.picture.put(self.choice.explained.image, "the image; drag a box on it")
        label = self.choice.images.items[self.choice.number.value].label
        self.wanted.value = min(label, self.model.num_classes - 1)
        self.mask()

    def mask(self) -> None:
        """Mask the tokens that the box meets, and show what the others say."""
        self.known = keep_outside(self.choice.explained.tokens, tuple(self.picture.box), self.coarse.value)
        self.masked.put(self.tokenizer.decode(self.known, partial=True)[0], "what is left without the box's tokens")

    def fixed(self) -> Tokens:
        return Tokens((level.expand(SAMPLES, -1, -1) for level in self.known), self.model.codebook_size)

    def still(self) -> str:
        top, left, bottom, right = (f"{part:.0%}" for part in self.picture.box)
        cells = [
            _captioned(self.choice.explained.image, "the image"),
            _captioned(self.tokenizer.decode(self.known, partial=True)[0], "without the box's tokens"),
        ]
        cells += [_captioned(picture, "filled") for picture in self.frames[-1].guess]
        return f"a box from {top}, {left} to {bottom}, {right} (from the top, from the left){_cells(cells)}"


# --- pieces of HTML ---------------------------------------------------------------------------------------------------
def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _row(*widgets: w.Widget) -> w.Box:
    return w.Box(widgets, layout=w.Layout(flex_flow="row wrap", align_items="flex-start"))


def _captioned(image: Tensor, text: str) -> str:
    picture = rich.picture(rich.png(rich.to_bytes(image)), text, side=SMALL)
    return (
        f'<span style="display:inline-block;width:{SMALL + 4}px;margin:2px;vertical-align:top;font-size:11px;'
        f'line-height:1.2">{picture}<br>{html.escape(text)}</span>'
    )


def _cells(cells: list[str]) -> str:
    return f"<div>{''.join(cells)}</div>"


def _bars(codes: list[int], scores: list[float]) -> str:
    """Codes and their scores as bars, the first the one that is taken."""
    widest = max(max(scores), 1e-12)
    rows = [
        (
            f"<b>{code}</b>" if rank == 0 else code,
            f'<div style="background:{"#0072B2" if rank == 0 else "#9DB7C9"};height:10px;'
            f'width:{140 * score / widest:.0f}px"></div>',
            f"{score:.3f}",
        )
        for rank, (code, score) in enumerate(zip(codes, scores, strict=True))
    ]
    return rich.table(["code", "", "score"], rows, ["code", ""])


def _frame(frame: Frame) -> str:
    known = [_captioned(image, f"{int(n)} known") for image, n in zip(frame.known, frame.unmasked, strict=True)]
    guess = [_captioned(image, f"step {frame.number}") for image in frame.guess]
    return f"{_cells(known)}{_cells(guess)}"
