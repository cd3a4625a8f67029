"""The README's Python runs, and its commands exist."""

import json
import re
from pathlib import Path

import torch

from codalib.experiments.paper import CLAIMS
from codalib.experiments.sweeps import BEST, PAPER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
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
    commands = re.findall(r"(?:^ *|`)make (\w+)", README, flags=re.MULTILINE)
    assert {"reproduce", "test", "lab"} <= set(commands) <= targets
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_its_notebooks_and_profiles_exist():
    for path in re.findall(r"(?:notebooks|profiles|data|codalib)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path
