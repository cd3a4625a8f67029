import io
import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from codalib.reporting import figures

LOG = [{"step": step, "l1": 1 / step, "name": "run", "entropy": None if step % 2 else -0.5} for step in range(1, 30)]


def test_one_panel_for_each_logged_term():
    figure = figures.training_curves(LOG)
    assert [axes.get_title() for axes in figure.axes] == ["l1", "entropy"]
    line, mean = figure.axes[0].lines
    assert list(line.get_xdata()) == [row["step"] for row in LOG]
    assert mean.get_ydata().var() < line.get_ydata().var()
    assert len(figure.axes[1].lines[0].get_xdata()) == 14  # rows without the term are left out


def test_an_empty_log_is_named():
    with pytest.raises(ValueError, match="expected a log with numbers"):
        figures.training_curves([{"step": 1}])


def test_a_metric_is_drawn_for_each_level_where_it_was_evaluated():
    log = [{"step": 1}, {"step": 2, "val_perplexity_level_1": 3.0, "val_perplexity_level_2": 9.0}, {"step": 3}]
    log += [{"step": 4, "val_perplexity_level_1": 4.0, "val_perplexity_level_2": 16.0}]
    axes = figures.level_curves(log, "perplexity", (1, 2), 64).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [[3, 4], [9, 16]]
    assert axes.lines[0].get_xdata().tolist() == [2, 4]
    assert [line.get_label() for line in axes.lines] == ["1: 1 x 1", "2: 2 x 2", "64"]
    with pytest.raises(ValueError, match="expected a log with val_perplexity_level_1"):
        figures.level_curves([{"step": 1}], "perplexity", (1,), 64)


def test_grid_shows_the_pixels_it_was_given():
    images = torch.full((2, 3, 4, 4), -1.0)
    images[1, 0] = 3.0  # above the range: clamped
    figure = figures.reconstruction_grid(
        {"a": images, "b": images.numpy()}, columns=["1", "2"], notes={"b": ["x", "y"]}
    )
    assert len(figure.axes) == 4
    black, red = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert black.max() == 0
    assert red[0, 0].tolist() == [1, 0, 0]
    assert figure.axes[3].get_xlabel() == "y"


def test_a_class_or_caption_with_dollars_is_no_formula():
    images = np.zeros((1, 3, 4, 4))
    figures.reconstruction_grid({r"a $\frac{$ b": images}, columns=[r"$\frac{$"]).savefig(io.BytesIO())


def test_grid_rows_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="same number of images"):
        figures.reconstruction_grid({"a": np.zeros((2, 3, 4, 4)), "b": np.zeros((1, 3, 4, 4))})


def test_usage_is_drawn_in_percent_for_each_level():
    figure = figures.usage_per_level({"ours": [0.5, 1.0]}, scales=(1, 2), codebook_size=1024)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [50, 100]
    assert figure.axes[0].get_xticklabels()[1].get_text() == "2\n2x2"


def test_ladder_shows_means_and_leaves_gaps():
    rows = [{"method": "Continuous VAE", "rfid": 1.0}, {"method": "ours", "rfid": [2.0, 4.0], "psnr": 20.0}]
    figure = figures.ablation_bars(rows, ["rfid", "psnr"])
    error, psnr = figure.axes
    assert [bar.get_width() for bar in error.patches] == [1.0, 3.0]
    assert "lower is better" in error.get_title()
    assert "higher is better" in psnr.get_title()
    assert [text.get_text() for text in psnr.texts] == ["20"]


def test_a_sweep_has_a_line_for_each_of_the_other_settings():
    rows = [
        {"steps": steps, "order": "confidence", "guidance": guidance, "fid": steps + guidance}
        for guidance in (2.0, 0.0)
        for steps in (8, 32)
    ]
    figure = figures.sweep_lines(rows, "guidance", ["fid"], ("steps", "order"), {"tokenizer": {"fid": 1.0}})
    eight, many, level = figure.axes[0].lines
    assert list(eight.get_xdata()) == [0.0, 2.0]
    assert list(many.get_ydata()) == [32.0, 34.0]
    assert list(level.get_ydata()) == [1.0, 1.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["8 steps", "32 steps", "tokenizer"]


def test_a_line_is_missing_where_its_rows_lack_the_metric():
    rows = [{"steps": n, "method": "x", "one": 1.0 * n, "two": 2.0 * n} for n in (1, 2)]
    rows += [{"steps": n, "method": "y", "two": 3.0 * n} for n in (1, 2)]
    one, two = figures.sweep_lines(rows, "steps", ["one", "two"], ("method",)).axes
    assert [list(line.get_ydata()) for line in one.lines] == [[1.0, 2.0], []]
    assert [list(line.get_ydata()) for line in two.lines] == [[2.0, 4.0], [3.0, 6.0]]
    assert [line.get_color() for line in one.lines] == [line.get_color() for line in two.lines]


def test_the_same_drawing_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        files = figures.save_figure(figures.training_curves(LOG), tmp_path / name, "curves")
    assert files == {"png": "curves.png", "svg": "curves.svg"}
    for file in files.values():
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert len(Image.open(tmp_path / "a" / "curves.png").convert("RGB").getcolors(100_000)) > 10


def test_drawing_leaves_the_callers_settings_alone():
    before = dict(mpl.rcParams)
    figures.training_curves(LOG)
    assert dict(mpl.rcParams) == before


def test_a_shown_figure_carries_its_caption_and_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda page: shown.append(page.data))
    figures.show(figures.training_curves(LOG), "Curves of l < 1.", 'it "falls"')
    assert 'alt="it &quot;falls&quot;"' in shown[0]
    assert "<figcaption>Curves of l &lt; 1.</figcaption>" in shown[0]


def test_points_stand_over_one_background_in_every_panel():
    cloud = np.random.default_rng(0).normal(size=(30, 2))
    figure = figures.embedding_panels(cloud, [{"a": cloud[:3], "b": cloud[:4]}, {"c": cloud[:5]}], ["one", "two"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    for axes, count in zip(figure.axes, (3, 4, 5, 0), strict=True):
        background, points = axes.collections
        assert np.array_equal(background.get_offsets(), cloud)
        assert len(points.get_offsets()) == count
        assert axes.get_xlim() == figure.axes[0].get_xlim()
    assert figure.axes[2].get_ylabel() == "two"


def test_confidence_has_a_line_for_each_feature_and_their_mean():
    scores = {"by distance": np.array([[1.0, 2.0], [3.0, 4.0]])}
    figure = figures.confidence_curves(scores, {"by distance": "distance"})
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 2], [3, 4], [2, 3]]
    assert axes.get_ylabel() == "distance"


def test_an_animation_shows_its_frames_in_turn(tmp_path):
    cloud = np.random.default_rng(0).normal(size=(30, 2))
    frames = [figures.embedding_panels(cloud, [{"step": cloud[:count]}]) for count in (1, 20)]
    name = figures.save_animation(frames, tmp_path, "a", seconds=0.5)["gif"]
    with Image.open(tmp_path / name) as picture:
        assert picture.n_frames == 2
        first = np.asarray(picture.convert("RGB")).copy()
        assert picture.info["duration"] == 500
        picture.seek(1)
        assert (np.asarray(picture.convert("RGB")) != first).any()
        assert picture.info["duration"] == 1500


def test_a_legend_of_long_names_stays_within_the_figure():
    names = [f"{method}, one level, {setting}" for method in ("Attention quantization", "VQ") for setting in "ab"]
    rows = [{"method": f"{name} of the sweep", "step": n, "psnr": 20.0 + n} for name in names for n in range(3)]
    figure = figures.sweep_lines(rows, "step", ["psnr"] * 3, ("method",))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_a_curve_of_one_point_is_seen():
    figure = figures.training_curves([{"step": 1, "loss": 2.0}])
    assert figure.axes[0].lines[1].get_marker() == "o"


def test_names_are_drawn_as_they_are_and_do_not_overlap():
    names = ["$5 and $6", "Smileys & Emotion", "Animals & Nature", "Travel & Places", "_x_", "Symbols", "Flags", "Food"]
    figure = figures.reconstruction_grid({"sample": torch.zeros(8, 3, 4, 4)}, columns=names)
    figure.draw_without_rendering()
    titles = [axes.title for axes in figure.axes]
    assert [title.get_text().replace("\n", " ") for title in titles] == names
    assert not any(title.get_parse_math() for title in titles)
    boxes = [title.get_window_extent() for title in titles]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert all(box.y1 <= figure.bbox.y1 + 3 for box in boxes)
