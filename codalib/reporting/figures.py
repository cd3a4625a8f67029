"""Every plot: functions of plain data that return matplotlib figures, in one style and colour-blind-safe colours."""

import base64
import html
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from IPython.display import HTML, display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from codalib.base.files import atomic_write
from codalib.experiments.paper import title_and_direction

# Okabe and Ito's palette, which stays apart under the common colour blindnesses; one colour a method, everywhere.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7A7A7A",
)  # fmt: skip
METHOD_COLOURS = {
    "Continuous VAE": GREY,
    "Vector quantization": ORANGE,
    "+ residual quantization": SKY,
    "+ attention quantization": BLUE,
    "Attention quantization, one level": PURPLE,
    "+ adapted VAE": GREEN,
}
STYLE = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # labels hold names of folders and classes, whose dollar signs are no formulas
    "font.size": 9,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "grid.color": "#E3E6E8",
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "svg.hashsalt": "codalib",  # the same ids in every run
}
DIRECTIONS = {1: "higher is better", -1: "lower is better", 0: ""}
WIDTH = 6.4  # inches, of a whole column
PHOTOGRAPHIC = 90  # WebP's quality of a figure of photographs
SMOOTHING = 0.05  # fraction of the curve that one point of the running mean covers


Drawing = TypeVar("Drawing", bound=Callable[..., Figure])


def styled(draw: Drawing) -> Drawing:
    """Draw under STYLE, whatever the caller's settings are."""

    @wraps(draw)
    def drawing(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawing  # type: ignore[return-value]


@styled
def training_curves(
    log: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None, scale: str = "linear"
) -> Figure:
    """One panel per logged term against the training step; the thin line is the log, the thick one its running mean.

    Args:
        log: rows with "step" and numbers by name; a row need not hold every name.
        names: which to draw, in this order, those that the log lacks left out; None draws every numeric name but the
            bookkeeping ones.
        scale: "linear" or "log", of the vertical axes.
    """
    if names is None:
        skipped = {"step", "epoch", "time", "seconds"}
        found = {key: None for row in log for key, value in row.items() if isinstance(value, int | float)}
        names = [key for key in found if key not in skipped]
    names = [name for name in names if any(name in row for row in log)]
    if not names:
        raise ValueError("expected a log with numbers to draw, got none: it has no rows, or only steps")
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH, 1.7 * rows + 0.3), layout="constrained")
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        points = [(row["step"], row[name]) for row in log if row.get(name) is not None]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        half = round(SMOOTHING * len(values) / 2)
        means = [values[max(0, place - half) : place + half + 1].mean() for place in range(len(values))]
        axes.plot(steps, values, color=BLUE, alpha=0.35, linewidth=0.8)
        axes.plot(steps, means, color=BLUE, linewidth=1.6, marker="o" if len(steps) == 1 else None)
        axes.set(title=name.replace("_", " "), xlabel="step", yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return figure


@styled
def level_curves(log: Sequence[Mapping[str, Any]], name: str, scales: Sequence[int], limit: float) -> Figure:
    """A validation metric of each residual level against the training step, coarse levels dark and fine ones light.

    Args:
        log: rows with "step" and, where the model was evaluated, `val_NAME_level_1`, ...; without any ValueError.
        name: the metric, such as "perplexity".
        scales: side of each level's token grid.
        limit: the largest value there is, drawn as a line.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    for level, p in enumerate(scales, start=1):
        points = [(row["step"], row[key]) for row in log if (key := f"val_{name}_level_{level}") in row]
        if not points:
            raise ValueError(f"expected a log with {key}, got none: log it anew by training again")
        colour = mpl.colormaps["viridis"](0.9 * (level - 1) / max(1, len(scales) - 1))
        axes.plot(*zip(*points, strict=True), color=colour, marker="os^D"[level % 4], ms=4, label=f"{level}: {p} x {p}")
    axes.axhline(limit, color="#555555", linestyle="--", linewidth=1, label=f"{limit:,}")
    axes.set(xlabel="step", ylabel=name)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside right upper", title="level", fontsize=7, title_fontsize=8)
    return figure


@styled
def reconstruction_grid(
    rows: Mapping[str, Any], columns: Sequence[str] = (), notes: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Images in rows, one row a method, one column an image.

    Args:
        rows: label -> images (N, 3, h, w) in [-1, 1], tensors or arrays, N the same in every row.
        columns: a title for each image.
        notes: label -> a short text below each image of that row, such as its PSNR.
    """
    grids = {label: _pixels(images) for label, images in rows.items()}
    counts = {label: len(images) for label, images in grids.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"expected the same number of images in each row of a grid, got {counts}")
    number = next(iter(counts.values()))
    label_width = 1.2
    cell = (WIDTH - label_width) / number
    characters = max(4, int(cell / 0.07))  # what fits above an image at 7 points
    columns = [textwrap.fill(title, characters, max_lines=3, placeholder="…") for title in columns]
    lines = max((title.count("\n") + 1 for title in columns), default=0)
    height = cell * len(grids) + (0.16 * len(grids) if notes else 0) + 0.15 * lines + (0.1 if columns else 0)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    panels = figure.subplots(len(grids), number, squeeze=False)
    for line, (label, images) in zip(panels, grids.items(), strict=True):
        for index, (axes, image) in enumerate(zip(line, images, strict=True)):
            axes.imshow(image, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color="#C9CED2", linewidth=0.5)
            if notes and label in notes:
                axes.set_xlabel(notes[label][index], fontsize=6, labelpad=1)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
    for axes, title in zip(panels[0], columns, strict=False):
        axes.set_title(title, fontsize=7, parse_math=False)  # captions and classes are no formulas
    return figure


def _pixels(images: Any) -> np.ndarray:
    """(N, 3, h, w) in [-1, 1] -> (N, h, w, 3) in [0, 1]."""
    array = np.asarray(images.detach().cpu().float() if hasattr(images, "detach") else images)
    return np.clip(array / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


@styled
def usage_per_level(usage: Mapping[str, Sequence[float]], scales: Sequence[int], codebook_size: int) -> Figure:
    """The fraction of the codebook that each residual level uses, one line a method.

    Args:
        usage: method -> fraction of codes used at each level, 0 to 1.
        scales: side of each level's token grid.
    """
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    for marker, (method, fractions) in zip("osD^vPX" * len(usage), usage.items(), strict=False):
        levels = np.arange(1, len(fractions) + 1)
        axes.plot(levels, 100 * np.asarray(fractions), marker=marker, label=method, color=METHOD_COLOURS.get(method))
    axes.set_xticks(np.arange(1, len(scales) + 1), [f"{level}\n{p}x{p}" for level, p in enumerate(scales, 1)])
    axes.set(xlabel="residual level, and its tokens", ylabel=f"codes used (% of {codebook_size:,})", ylim=(0, 105))
    axes.legend()
    return figure


@styled
def ablation_bars(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Figure:
    """Bars of each metric for each method, one panel a metric.

    Args:
        rows: {"method": name, column: value or list of values over seeds}; missing or None values leave a gap.
        columns: names of metrics; those of the paper's tables are spelled out, with the better direction.
    """
    width = min(WIDTH, 1.5 + 1.6 * len(columns))
    figure = Figure(figsize=(width, 0.34 * len(rows) + 0.9), layout="constrained")
    methods = [row["method"] for row in rows]
    places = np.arange(len(rows))[::-1]
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False).flat, columns, strict=True):
        samples = [np.atleast_1d(np.asarray(row.get(column), dtype=float)) for row in rows]
        means = np.array([sample.mean() for sample in samples])
        spreads = [sample.std(ddof=1) if len(sample) > 1 else math.nan for sample in samples]
        axes.barh(places, means, color=[METHOD_COLOURS.get(method, BLUE) for method in methods], height=0.7)
        if np.isfinite(spreads).any():
            axes.errorbar(means, places, xerr=spreads, fmt="none", ecolor="#222222", elinewidth=0.8, capsize=2)
        for place, mean in zip(places, means, strict=True):
            if np.isfinite(mean):
                axes.annotate(
                    _short(mean), (mean, place), xytext=(2, 0), textcoords="offset points", va="center", fontsize=7
                )
        name, direction = title_and_direction(column)
        axes.set_title(f"{name}\n{DIRECTIONS[direction]}", fontsize=8)
        axes.set_yticks(places, methods)
        axes.margins(x=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


@styled
def sweep_lines(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    columns: Sequence[str],
    by: Sequence[str],
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """How metrics change with one setting, one panel a metric, one line a combination of the other settings.

    Args:
        rows: {setting: value, metric: number}; a line has no point in the panel of a metric that its row lacks.
        x: the setting on the horizontal axis.
        columns: the metrics.
        by: the other settings; those with one value in all rows are not named in the legend.
        levels: name -> metrics to be drawn as a horizontal line, such as a baseline's.
    """
    levels = levels or {}
    varied = [name for name in by if len({row[name] for row in rows}) > 1]
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in varied), []).append(row)
    figure = Figure(figsize=(min(WIDTH, 1.2 + 2.4 * len(columns)), 3.0 + 0.15 * len(groups)), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False).flat, columns, strict=True):
        for number, (values, group) in enumerate(groups.items()):
            points = sorted((row[x], row[column]) for row in group if column in row)
            text = ", ".join(_setting(name, value) for name, value in zip(varied, values, strict=True))
            style = {"marker": "osD^vPX*"[number % 8], "color": METHOD_COLOURS.get(text, f"C{number % 7}")}
            axes.plot(*np.reshape(points, (-1, 2)).T, label=text or column.replace("_", " "), **style)
        for style, (name, values) in zip(("--", ":", "-.") * len(levels), levels.items(), strict=False):
            axes.axhline(values[column], linestyle=style, color="#555555", linewidth=1, label=name)
        name, direction = title_and_direction(column)
        axes.set_title(f"{name}\n{DIRECTIONS[direction]}", fontsize=8)
        axes.set(xlabel=x.replace("_", " "))
        if all(isinstance(row[x], int) for row in rows):
            bins = 6 if max(row[x] for row in rows) < 100 else 4  # longer numbers would run into each other
            axes.xaxis.set_major_locator(MaxNLocator(bins, integer=True))
    handles, labels = axes.get_legend_handles_labels()
    wide = 0.5 + 0.05 * max(map(len, labels))  # inches of the longest entry: a mark, and letters of 7 points
    ncols = max(1, min(3, len(labels), int(figure.get_figwidth() / wide)))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, fontsize=7)
    return figure


@styled
def embedding_panels(
    background: np.ndarray, panels: Sequence[Mapping[str, np.ndarray]], rows: Sequence[str] = (), colour: str = BLUE
) -> Figure:
    """Small multiples of points in one embedding, each over the same pale background.

    Args:
        background: (N, 2) of what all panels are compared with.
        panels: one mapping a row, title -> points (M, 2).
        rows: a label for each row.
    """
    columns = max(map(len, panels))
    height = WIDTH / columns * len(panels) + 0.25
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    low, high = background.min(axis=0), background.max(axis=0)
    margin = 0.08 * (high - low)
    for line, (row, own) in zip(
        figure.subplots(len(panels), columns, squeeze=False), itertools.zip_longest(rows, panels), strict=True
    ):
        for axes, (title, points) in itertools.zip_longest(line, own.items(), fillvalue=("", np.zeros((0, 2)))):
            axes.scatter(*background.T, s=2, color="#C9CED2", linewidths=0, rasterized=True)
            axes.scatter(*points.T, s=3, color=colour, linewidths=0, alpha=0.7, rasterized=True)
            axes.set(xticks=[], yticks=[], xlim=(low[0] - margin[0], high[0] + margin[0]))
            axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
            axes.set_title(title, fontsize=8)
            axes.grid(visible=False)
        if row:
            line[0].set_ylabel(row, fontsize=8)
    return figure


@styled
def confidence_curves(scores: Mapping[str, np.ndarray], units: Mapping[str, str]) -> Figure:
    """The scores of the top codes, one panel a method, one line a feature (Figure 5).

    Args:
        scores: method -> (features, codes), the top-1 code first.
        units: method -> what its scores are.
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    for axes, (method, values) in zip(figure.subplots(1, len(scores), squeeze=False).flat, scores.items(), strict=True):
        ranks = np.arange(1, values.shape[1] + 1)
        axes.plot(ranks, values.T, color=METHOD_COLOURS.get(method, BLUE), alpha=0.4, linewidth=0.8)
        axes.plot(ranks, values.mean(axis=0), color="#222222", linewidth=1.4, label=f"mean of {len(values)}")
        axes.set(title=method, xlabel="code, by rank", ylabel=units[method])
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def _setting(name: str, value: Any) -> str:
    return f"{value:g} {name}" if name == "steps" else f"{name} {value:g}" if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# --- keeping and showing ----------------------------------------------------------------------------------------------
def save_figure(figure: Figure, folder: str | Path, name: str) -> dict[str, str]:
    """Write NAME.png and NAME.svg into FOLDER, the same bytes for the same drawing; returns {"png", "svg"}: names."""
    files = {}
    for kind, metadata in (("png", {"Software": "codalib"}), ("svg", {"Date": None, "Creator": "codalib"})):
        files[kind] = f"{name}.{kind}"
        with mpl.rc_context(STYLE), atomic_write(Path(folder) / files[kind], "wb") as file:
            figure.savefig(file, format=kind, metadata=metadata)
    return files


def show_figure(
    figure: Figure, folder: str | Path, name: str, caption: str, alt: str, more: str = ""
) -> dict[str, str]:
    """Save a figure (`save_figure`) and show it (`show`); returns its entry among the results of a run.

    MORE, HTML such as a `level_slider`, is shown below the picture and saved as NAME.html.
    """
    entry = save_figure(figure, folder, name) | {"caption": caption, "alt": alt}
    if more:
        entry["html"] = f"{name}.html"
        with atomic_write(Path(folder) / entry["html"]) as file:
            file.write(more)
    show(figure, caption, alt, more)
    return entry


def save_animation(frames: Sequence[Figure], folder: str | Path, name: str, seconds: float = 0.8) -> dict[str, str]:
    """Write figures of one size as NAME.gif, each shown for SECONDS and the last three times as long: {"gif": name}."""
    pictures = []
    for frame in frames:
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            frame.savefig(buffer, format="png")
        pictures.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    times = [round(1000 * seconds)] * (len(pictures) - 1) + [round(3000 * seconds)]
    with atomic_write(Path(folder) / f"{name}.gif", "wb") as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return {"gif": f"{name}.gif"}


def show(figure: Figure, caption: str, alt: str, more: str = "") -> None:
    """Show a figure in a notebook with its caption, plain text, what it says where it is not seen, and MORE HTML."""
    picture = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(picture, format="png")
    image = f'<img src="{figure_uri(Image.open(picture))}" alt="{html.escape(alt)}">'
    display(HTML(f"<figure>{image}{more}<figcaption>{html.escape(caption)}</figcaption></figure>"))


def data_uri(picture: Image.Image, quality: int | None = None) -> str:
    """A picture as an address that holds it: WebP of a QUALITY of 0 to 100, None: lossless."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", **({"lossless": True} if quality is None else {"quality": quality}))
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def figure_uri(picture: Image.Image) -> str:
    """A drawn figure as a `data_uri`: lossless, unless lossy takes less than half, as it does for photographs alone."""
    exact, photograph = data_uri(picture), data_uri(picture, PHOTOGRAPHIC)
    return photograph if len(photograph) < len(exact) / 2 else exact
