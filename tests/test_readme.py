"""The Python of the README and of docs/ runs, and their commands and links exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from codalib.experiments.paper import CLAIMS
from codalib.experiments.sweeps import BEST, PAPER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = 200  # of a README that one reads to its end
TESTED_ELSEWHERE = "tokens.md"  # with tokens to read, tests/tools/test_tokens.py


def test_it_leads_with_a_picture_and_two_commands_and_is_short():
    assert len(README.splitlines()) < LINES
    assert README.index("![") < README.index("    make reproduce") < README.index("## ", README.index("make test"))


def test_its_python_runs(tmp_path, monkeypatch):
    pages = [path.read_text() for path in PAGES if path.name != TESTED_ELSEWHERE]
    blocks = [block for text in pages for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_its_verdicts_are_the_long_runs_own():
    stages = json.loads((ROOT / "reports" / "emoji-long" / "manifest.json").read_text())
    found = {}
    for claim in (claim for stage in stages for claim in stage["results"].get("claims", [])):
        found.setdefault(claim["id"], {})[claim["setting"]] = claim
    rows = [re.split(r" *\| *", line.strip("| ")) for line in README.splitlines() if line.startswith("| ")]
    shown = {cells[0]: cells[1:] for cells in rows if len(cells) == 4}
    for name, own in found.items():
        best = own.get(BEST) or own[""]
        effect = best["effect"].replace("quantization_error", "error").replace("->", "→")
        paper = own[PAPER]["verdict"] if PAPER in own else ""
        assert shown[CLAIMS[name].title] == [paper, best["verdict"], effect], name


def test_its_make_targets_and_files_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in PAGES:
        text = path.read_text()
        commands = re.findall(r"(?:^ *|`)make (\w+)", text, flags=re.MULTILINE)
        assert set(commands) <= targets, path
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text) + re.findall(r'src="([^":]+)"', text):
            assert (path.parent / link).exists(), (path, link)
    assert all(f"](docs/{path.name}" in README for path in PAGES if path.parent.name == "docs")
    assert {"reproduce", "test", "lab"} <= set(re.findall(r"(?:^ *|`)make (\w+)", README, flags=re.MULTILINE))


def test_its_notebooks_and_profiles_exist():
    for page in PAGES:
        named = re.findall(r"(?<![\w/])(?:notebooks|profiles|data|codalib)/[\w./-]*\w", page.read_text())
        for path in (path for path in named if not Path(path).stem.isupper()):  # NAME stands for one
            assert (ROOT / path).exists(), (page, path)
    listed = (ROOT / "docs" / "contents.md").read_text()
    assert [path.name for path in (ROOT / "notebooks").glob("*.ipynb") if path.name not in listed] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_the_set_up_says_first_how_much_it_downloads(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = ["make", "--no-print-directory", "setup", "PYTHON=false"]  # nothing is installed
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.match(r"The environment in \.venv: [\d.]+ GB to download", result.stdout), result.stderr
    assert result.returncode != 0
