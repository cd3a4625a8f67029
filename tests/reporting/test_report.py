import re
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup

from codalib.base.files import read_json, write_json
from codalib.base.paths import project_folder, reports_folder
from codalib.experiments.paper import CLAIMS, TABLE_1
from codalib.experiments.statistics import claim_verdict
from codalib.reporting import figures, report
from codalib.reporting.levels import level_slider
from codalib.reporting.tables import beside_paper
from codalib.workflow.manifest import Run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1100, 1280)  # a phone, a narrow and a wide desktop
HOSTILE = "12 images of <img src=x onerror=alert(1)>, $5 and $6, a_b_c."  # as a class's folder may be named


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Two finished stages and one that is still running."""
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path / "reports"))
    Run("tiny/00_first", "00_first", {"steps": 2, "scales": (1, 2)}, seed=3).finish({"metrics": {"psnr": 30.0}})
    run = Run("tiny/table1", "table1", {"steps": 5}, seed=3)
    rows = [{"method": row.method, "psnr": 31.234 + i, "utilization": 0.5} for i, row in enumerate(TABLE_1)]
    beside_paper(rows, TABLE_1, {"psnr": "psnr", "utilization": "utilization"}).to_csv(
        run.folder / "t.csv", index=False
    )
    files = figures.save_figure(figures.ablation_bars(rows, ["psnr"]), run.folder, "ladder")
    images = torch.zeros(1, 3, 8, 8)
    (run.folder / "slider.html").write_text(level_slider(images, {"ours": [images]}, (1, 2)))
    run.finish(
        {
            "tables": [{"file": "t.csv", "title": "Table 1", "caption": HOSTILE}],
            "figures": [{**files, "html": "slider.html", "caption": HOSTILE, "alt": 'Bars that "rise".'}],
            "claims": [
                claim_verdict("residual_error", {"quantization_error": [0.5, 0.51, 0.52]}, "0.2 → 0.1"),
                claim_verdict("attention_error", {"quantization_error": [-0.5, -0.51, -0.52]}, "0.1 → 0.2"),
                claim_verdict("ladder", {"psnr": [0.1, -0.1, 0.2]}, HOSTILE, detail=HOSTILE),
            ],
        }
    )
    Run("tiny/fig7", "fig7", {}, seed=3)
    (tmp_path / "reports" / "tiny").mkdir(parents=True)
    (tmp_path / "reports" / "tiny" / "table1.html").write_text("a page")
    return "tiny"


@pytest.fixture
def soup(profile):
    return BeautifulSoup(report.build(profile).read_text(), "html.parser")


def test_each_verdict_stands_with_its_effect_and_the_papers_numbers(soup):
    items = {item["id"]: item.get_text(" ") for item in soup.select(".claims li")}
    assert set(items) == {"claim-residual_error", "claim-attention_error", "claim-ladder"}
    assert list(items) == [f"claim-{name}" for name in CLAIMS if f"claim-{name}" in items]  # the paper's order
    assert re.search(r"(?s)Holds\s*\..*0\.2 → 0\.1.*0\.181 → 0\.094", items["claim-residual_error"])
    assert re.search(r"Does not hold\s*\.", items["claim-attention_error"])
    assert re.search(r"Undecided\s*\.", items["claim-ladder"])
    assert all(CLAIMS[name.removeprefix("claim-")].caution in text for name, text in items.items())
    assert "Of 3 checked claims of the paper, 1 holds, 1 does not hold, 1 is undecided." in " ".join(
        soup.get_text().split()
    )
    assert f"Not checked in this run: {len(CLAIMS) - 3}" in soup.get_text()


def test_a_claim_that_is_judged_twice_says_in_which_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path / "reports"))
    settings = ("paper's setting", "best of its sweep")
    claims = [
        claim_verdict("residual_error", {"psnr": [gain, gain + 0.01, gain - 0.01]}, "x", setting=own)
        for gain, own in zip((0.5, -0.5), settings, strict=True)
    ]
    Run("twice/table1", "table1", {}, seed=0).finish({"claims": claims})
    soup = BeautifulSoup(report.build("twice").read_text(), "html.parser")
    (item,) = (item.get_text(" ") for item in soup.select(".claims li"))
    assert re.search(r"Does not hold\s+\(best of its sweep\)", item)
    assert re.search(r"Holds\s+\(paper's setting\)", item)
    head, row = ([cell.get_text() for cell in line.select("th, td")] for line in soup.select("tr")[:2])
    assert head == ["Claim", "Paper's setting", "Best of its sweep"]
    assert row == [CLAIMS["residual_error"].title, "Holds", "Does not hold"]
    assert "of 2 verdicts, 1 holds, 1 does not hold." in " ".join(soup.get_text().split())
    assert "after Holm's correction for 2 tests" in soup.get_text()
    assert f"Not checked in this run: {len(CLAIMS) - 1}" in soup.get_text()


@pytest.mark.parametrize(("seeds", "verdict"), [(2, "Not tested"), (3, "Holds")])
def test_fewer_than_three_seeds_are_no_test(tmp_path, monkeypatch, seeds, verdict):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path / "reports"))
    claim = claim_verdict("residual_error", {"psnr": [0.5, 0.51, 0.52][:seeds]}, "x")
    Run("three/table1", "table1", {}, seed=0).finish({"claims": [claim]})
    soup = BeautifulSoup(report.build("three").read_text(), "html.parser")
    assert soup.select("tr")[1].find_all("td")[-1].get_text() == verdict
    assert ("two-sided test" in soup.select_one("h2").find_previous("p").get_text()) == (seeds == 3)


def test_the_runs_numbers_stand_beside_the_papers(soup):
    table = soup.find("h3", string="Table 1").find_next("table")
    head, *rows = ([cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.find_all("tr"))
    assert head == ["Method", "PSNR (dB)", "PSNR (dB) (paper)", "Utilization", "Utilization (paper)"]
    assert rows[1] == ["Vector quantization", "32.2", "18.9", "50 %", "49 %"]
    assert rows[0][-1] == "–"  # noqa: RUF001


def test_every_picture_is_inside_the_page_and_has_its_alternative(soup):
    assert [image["alt"] for image in soup.select("figure > img")] == ['Bars that "rise".']
    assert all(image["src"].startswith("data:image/webp;base64,") for image in soup.find_all("img"))
    assert not soup.select("link[href^=http], script[src]")


def test_a_figures_slider_stands_with_it(soup):
    assert [image["alt"] for image in soup.select("figure .levels img")] == ["image", "ours, 71.0 dB"]


def test_a_large_figure_that_moves_stays_on_its_own_page(profile, monkeypatch):
    monkeypatch.setattr(report, "MOST_HTML", 10)
    soup = BeautifulSoup(report.build(profile).read_text(), "html.parser")
    assert not soup.select(".levels")
    assert soup.find("a", string="Move it")["href"] == "table1.html"


def test_names_from_outside_stand_as_they_are(soup):
    assert soup.get_text().count(HOSTILE) == 4  # a table's and a figure's caption, a verdict's effect and detail
    assert not soup.select("img[onerror]")
    assert not soup.find("math")


def test_links_lead_to_files_that_exist(soup, profile):
    links = {link["href"] for link in soup.find_all("a") if not link["href"].startswith(("#", "https:"))}
    assert links == {
        "table1.html",
        "tables/table1-t.csv",
        "tables/table1-t.md",
        "figures/table1-ladder.png",
        "figures/table1-ladder.svg",
        "../index.html",
    }
    assert all((reports_folder(profile) / link).is_file() for link in links)
    assert pd.read_csv(reports_folder(profile) / "tables/table1-t.csv")["psnr"][0] == 31.234
    assert "| Vector quantization | 32.2 | 18.9 |" in (reports_folder(profile) / "tables/table1-t.md").read_text()


def test_a_report_to_be_committed_links_to_nothing_that_git_ignores(profile):
    soup = BeautifulSoup(report.build(profile, keep=True).read_text(), "html.parser")
    links = {link["href"] for link in soup.find_all("a")}
    assert "figures/table1-ladder.png" in links
    assert not {"figures/table1-ladder.svg", "../index.html"} & links


def test_the_committed_pages_link_to_committed_files():
    root = project_folder()
    if not (root / ".git").exists():
        pytest.skip("no checkout of git")
    listed = subprocess.run(["git", "-C", root, "ls-files", "reports"], capture_output=True, text=True, check=True)
    tracked = {root / name for name in listed.stdout.splitlines()}
    for page in (path for path in tracked if path.suffix == ".html"):
        links = {
            link["href"].partition("#")[0] for link in BeautifulSoup(page.read_text(), "html.parser").select("a[href]")
        }
        dead = [link for link in links if link and ":" not in link and (page.parent / link).resolve() not in tracked]
        assert not dead, page


def test_the_page_says_how_its_numbers_came_about(soup, profile):
    heading = soup.find("h2", string="How these numbers came about")
    rows = {row.td.get_text(): row.get_text(" ") for row in heading.find_next("table").tbody.find_all("tr")}
    assert list(rows) == ["fig7", "table1", "00_first"]
    assert "finished" in rows["table1"]
    assert "running" in rows["fig7"]
    assert "torch" in heading.find_next("strong", string="Versions.").parent.get_text()
    assert [manifest["notebook"] for manifest in read_json(reports_folder(profile) / "manifest.json")] == list(rows)


def test_no_stage_yet_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path))
    assert "No stage has run yet" in report.build("empty").read_text()


def test_a_table_that_is_gone_from_the_runs_is_gone_from_the_report(soup, profile, tmp_path):
    shutil.rmtree(tmp_path / "runs" / profile / "table1")
    page = report.build(profile).read_text()
    assert not list((reports_folder(profile) / "tables").iterdir())
    assert "What this run found" not in page


def test_a_stage_whose_run_is_on_another_machine_can_be_kept(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "project_folder", lambda: tmp_path)
    notebook = tmp_path / "notebooks" / "table1.ipynb"
    write_json(notebook, {"cells": [{"source": ["# Table 1: what it is\n", "Text."]}]})
    folder = report.build(profile).parent
    before = {path.name: path.read_bytes() for kind in ("tables", "figures") for path in (folder / kind).iterdir()}
    shutil.rmtree(tmp_path / "runs" / "tiny" / "table1")
    (folder / "figures" / "table1-ladder.svg").unlink()  # as a repository leaves it out
    Run("tiny/00_first", "00_first", {"steps": 9}, seed=3).finish({"metrics": {"psnr": 31.0}})

    soup = BeautifulSoup(report.build(profile, keep=True).read_text(), "html.parser")
    assert {item["id"] for item in soup.select(".claims li")} == {
        "claim-residual_error",
        "claim-attention_error",
        "claim-ladder",
    }
    assert "Table 1: what it is" in soup.get_text()
    after = {path.name: path.read_bytes() for kind in ("tables", "figures") for path in (folder / kind).iterdir()}
    assert after == {name: content for name, content in before.items() if name != "table1-ladder.svg"}
    stages = {own["notebook"]: own for own in read_json(folder / "manifest.json")}
    assert stages["00_first"]["parameters"] == {"steps": 9}  # this machine's run comes before the kept one
    assert stages["table1"]["parameters"] == {"steps": 5}

    notebook.unlink()  # a stage that the kit no longer has
    report.build(profile, keep=True)
    assert not list((folder / "tables").iterdir())
    assert "table1" not in {own["notebook"] for own in read_json(folder / "manifest.json")}


def test_one_page_leads_to_every_profile(soup, profile):
    bench = reports_folder("bench") / "index.html"
    bench.parent.mkdir()
    bench.write_text("a page")
    assert soup.select_one("p.home a")["href"] == "../index.html"
    report.build("smoke")
    front = BeautifulSoup((reports_folder() / "index.html").read_text(), "html.parser")
    links = {link.get_text(): link["href"] for link in front.table.select("td a")}
    assert links == {name: f"{name}/index.html" for name in ("bench", profile, "smoke")}
    lines = {
        row.td.get_text(): [cell.get_text() for cell in row.find_all("td")[1:]]
        for row in front.table.select("tbody tr")
    }
    assert "quantizers" in lines["bench"][0]
    assert lines["smoke"][0].startswith("Every notebook as it is")
    assert lines[profile][1:3] == ["3", "1 holds, 1 does not hold, 1 is undecided"]


def test_the_front_page_lists_every_verdict_with_what_it_can_be_found_by(soup, profile):
    front = BeautifulSoup((reports_folder() / "index.html").read_text(), "html.parser")
    table = front.find("h2", string="All verdicts").find_next("table")
    rows = [[cell.get_text() for cell in row.select("td")] for row in table.select("tbody tr")]
    title = CLAIMS["residual_error"].title
    assert [title, "–", "Holds", "0.2 → 0.1", profile, "table1", "3"] in rows  # noqa: RUF001
    assert len(rows) == 3
    assert table.a["href"] == f"{profile}/index.html#claim-{soup.select_one('.claims li')['id'].removeprefix('claim-')}"


def test_a_verdict_that_no_rule_gives_is_refused(profile, tmp_path):
    path = tmp_path / "runs" / profile / "table1" / "manifest.json"
    manifest = read_json(path)
    manifest["results"]["claims"][0]["verdict"] = "nearly"
    write_json(path, manifest)
    with pytest.raises(ValueError, match="expected a known claim and verdict"):
        report.build(profile)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["profile", "index"])
def test_a_browser_finds_no_error_no_overflow_and_readable_lines(profile, tmp_path, which, width):
    page = tmp_path / "page.html"
    probe = (
        "<p id=line style='display:inline-block;white-space:pre'>abcdefghijklmnopqrstuvwxyz abcdefghijklm</p>"  # 40
        "<script>const e = document.documentElement; const broken = [...document.images].filter(i => !i.naturalWidth);"
        "const text = document.querySelector('main').clientWidth, line = document.getElementById('line').clientWidth;"
        "document.title = [innerWidth, e.scrollWidth, broken.length, text, line].join();</script></body>"
    )
    built = report.build(profile)
    page.write_text((built if which == "profile" else report.build_index()).read_text().replace("</body>", probe))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path}/browser", f"--window-size={width},900"]
    result = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    numbers = re.search(r"<title>(\d+),(\d+),(\d+),(\d+),(\d+)<", result.stdout).groups()
    visible, needed, broken, text, line = map(int, numbers)
    assert text >= line
    assert needed <= visible
    assert visible <= max(width, 500)  # some builds of Chromium have no narrower window
    assert broken == 0
    assert "CONSOLE" not in result.stderr
