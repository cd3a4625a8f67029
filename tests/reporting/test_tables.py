import math

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from codalib.experiments.paper import TABLE_1, TABLE_2, TABLE_3
from codalib.experiments.statistics import claim_verdict, over_seeds
from codalib.reporting.tables import (
    beside_paper,
    clock,
    html_table,
    label,
    markdown_table,
    number,
    prose,
    read_table,
    readable,
    size,
    spread,
    verdicts,
)


@pytest.mark.parametrize("contents", [b"", b'a,b\n"1,2', b"a\n\xff"])
def test_a_table_that_is_none_is_named(tmp_path, contents):
    (tmp_path / "table.csv").write_bytes(contents)
    with pytest.raises(ValueError, match=r"table.csv is not a table \(.*\): remove it and run its stage again"):
        read_table(tmp_path / "table.csv")


def test_each_measure_stands_beside_the_papers():
    rows = [{"method": "Vector quantization", "psnr": 30.0, "fd_effnet": 5.0}, {"method": "ours", "psnr": 31.0}]
    frame = beside_paper(rows, TABLE_1, {"psnr": "psnr", "fd_effnet": "rfid", "perplexity": None})
    assert list(frame.columns) == ["method", "psnr", "paper_psnr", "fd_effnet", "paper_rfid", "perplexity"]
    assert frame.loc[0, "paper_psnr"] == 18.9
    assert frame.loc[0, "paper_rfid"] == 41.52
    assert frame.loc[1, ["paper_psnr", "fd_effnet"]].isna().all()


def test_ours_stand_among_all_rows_of_the_paper():
    rows = [
        {"method": "ours", "psnr": 1.0, "ratio": 8},
        {"method": "CODA MAR 16384, released weights", "psnr": 2.0, "ratio": 16},
        {"method": "MAR VAE", "psnr": 3.0},
    ]
    frame = beside_paper(rows, TABLE_2, {"ratio": "ratio", "psnr": "psnr", "iterations": "iterations"}, whole=True)
    assert list(frame.columns) == ["method", "ratio", "psnr", "paper_psnr", "iterations"]
    assert len(frame) == len(TABLE_2.rows) + 2
    methods = list(frame["method"])
    place = methods.index("CODA MAR 16384")
    assert methods[place + 1] == "CODA MAR 16384, released weights"
    assert methods[-1] == "ours"
    assert frame.loc[place + 1, ["ratio", "psnr", "paper_psnr", "iterations"]].tolist() == [16, 2.0, 22.0, 50_000]
    assert frame.set_index("method").loc["MAR VAE", ["ratio", "psnr", "paper_psnr"]].tolist() == [16, 3.0, 24.9]
    assert math.isnan(frame.loc[place, "psnr"])


def test_labels_tell_the_papers_columns_apart():
    assert label("paper_rfid") == "rFID (paper)"
    assert label("fd_effnet") == "FD-EfficientNet"
    assert label("learning_rate") == "Learning rate"


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (22.2, {}, "22.2"),
        (41.52, {}, "41.52"),
        (0.181, {}, "0.181"),
        (0.60249, {}, "0.602"),
        (0.00004, {}, "4e-05"),
        (123456.7, {}, "123,457"),
        (65536, {}, "65,536"),
        (3.0, {}, "3"),
        (-1.23612, {}, "-1.24"),
        (0.051, {"fraction": True}, "5.1 %"),
        (1.0, {"fraction": True}, "100 %"),
        (22.2, {"spread": 0.314}, "22.2 ± 0.31"),
        (3228.4, {"spread": 1432.1}, "3,228 ± 1,432"),
        (0.5, {"fraction": True, "spread": 0.01}, "50 ± 1 %"),
        (None, {}, ""),
        (math.nan, {"fraction": True}, ""),
        (np.bool_(True), {}, "yes"),
        ("attention", {}, "attention"),
        (0, {}, "0"),
    ],
)
def test_numbers_as_people_read_them(value, options, text):
    assert number(value, **options) == text


def test_a_readable_table_joins_means_and_spreads():
    frame = pd.DataFrame({"method": ["a"], "psnr": [22.2], "psnr_std": [0.1], "paper_utilization": [0.49]})
    assert readable(frame).to_dict("records") == [
        {"Method": "a", "PSNR (dB)": "22.2 ± 0.1", "Utilization (paper)": "49 %"}
    ]


def test_markdown_tables_keep_their_columns():
    table = markdown_table(pd.DataFrame({"a|b": ["1", "x|y"], "c": ["", "2"]}))
    assert table.splitlines() == ["| a\\|b | c |", "| --- | --- |", "| 1 |  |", "| x\\|y | 2 |"]


def test_times_and_sizes():
    assert [clock(s) for s in (None, 5, 65.4, 3720)] == ["", "5 s", "1 min 5 s", "1 h 2 min"]
    assert [size(b) for b in (None, 5_000_000, 2_340_000_000)] == ["", "5 MB", "2.3 GB"]


def test_the_papers_own_names_may_hold_commas():
    rows = [{"method": "CODA MaskGIT-L, 8 steps", "fid": 3.0}, {"method": "ours, 8 steps", "fid": 50.0}]
    frame = beside_paper(rows, TABLE_3, {"fid": "fid"}, whole=True).set_index("method")
    assert frame.loc["CODA MaskGIT-L, 8 steps"].tolist() == [3.0, 3.17]
    assert frame.loc["CODA MaskGIT-L, 32 steps", "paper_fid"] == 2.66
    assert frame.loc["LDM-4-G", "paper_fid"] == 3.60
    assert frame.loc["LDM-4-G, DPM-Solver", "paper_fid"] == 4.56
    assert list(frame.index)[-1] == "ours, 8 steps"


def test_rows_of_several_seeds_become_a_mean_and_a_spread():
    rows = over_seeds([{"method": "a", "seed": i, "psnr": 1.0 + 2 * i} for i in range(2)])
    frame = beside_paper(rows, TABLE_1, {"psnr": "psnr"})
    assert list(readable(frame)["PSNR (dB)"]) == ["2 ± 1.4"]
    assert spread([1.0, 3.0], " dB") == "2 ± 1.4 dB"
    assert spread([1.0]) == "1"


def test_a_verdict_names_its_setting():
    assert claim_verdict("residual_error", {"psnr": [0.1]}, "effect", setting="tuned")["setting"] == "tuned"


def test_verdicts_are_shown_whole_without_empty_columns():
    claims = [claim_verdict(name, {"psnr": [0.1]}, "a long effect " * 20) for name in ("residual_error", "ladder")]
    page = verdicts(claims).to_html()
    assert "a long effect " * 20 in page
    assert "setting" not in page
    assert "setting" in verdicts([claim_verdict("ladder", {"psnr": [1.0]}, "x", setting="paper's setting")]).to_html()
    assert verdicts([]).to_html()


def test_an_aligned_markdown_table_has_columns_of_one_width():
    lines = markdown_table(pd.DataFrame({"name": ["a", "long"], "n": ["1", ""]}), aligned=True).splitlines()
    assert lines == ["| name | n   |", "| ---- | --- |", "| a    | 1   |", "| long |     |"]


def test_html_tables_escape_text_and_mark_gaps():
    frame = pd.DataFrame({"name": ["<b>", "a & b"], "value": ["1.5", None], "link": ['<a href="x">x</a>', "<i>"]})
    soup = BeautifulSoup(html_table(frame, prose=["link"], markup=["link"]), "html.parser")
    rows = [[cell.text for cell in row.find_all("td")] for row in soup.tbody.find_all("tr")]
    assert rows[0][0] == "<b>"
    assert rows[1][:2] == ["a & b", "–"]  # noqa: RUF001
    assert soup.find("a")["href"] == "x"
    assert [head.get("class") for head in soup.find_all("th")] == [["text"], None, ["prose"]]


def test_tables_in_a_notebook_show_names_as_they_are():
    name = "<img src=x onerror=alert(1)> $5 and $6"
    frame = pd.DataFrame({"class": [name]})
    assert "tex2jax_ignore" in frame._repr_html_()
    assert "<img" not in prose(frame).to_html()
