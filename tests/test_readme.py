"""The Python of the README and of docs/ runs, and their commands and links exist."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = 200  # of a README that one reads to its end
SPEC = importlib.util.spec_from_file_location("build_readme", ROOT / "docs" / "build_readme.py")
build_readme = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_readme)
ALL = len(build_readme.CLAIMS)
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


def claim(name, verdict, setting="", **rest):
    return {"id": name, "verdict": verdict, "setting": setting, "effect": f"error {setting or 'once'}", **rest}


def test_what_they_say_of_the_report_is_what_make_readme_writes():
    texts = README, build_readme.RESULTS.read_text()
    assert build_readme.written(*texts) == texts


def test_table_1_has_means_spreads_and_the_papers_numbers():
    row = {
        "method": "VQ",
        "psnr": "19.181",
        "psnr_std": "0.0071",
        "paper_psnr": "18.9",
        "ssim": "0.5",
        "utilization": "",
    }
    assert build_readme.table_1([row]).splitlines()[2] == "| VQ |  |  | 19.18 ± 0.01 (18.9) | 0.500 |  |"


def test_what_does_not_hold_comes_first_with_what_was_measured():
    own = [claim("residual_error", "holds"), claim("ladder", "holds", "a"), claim("ladder", "does not hold", "b")]
    found = build_readme.blocks([{"results": {"claims": own}}, {"results": {}}, {}])
    mixed, holds, rest = found["outcomes"].splitlines()
    assert mixed == f"- **Holds in one setting and not in another** (1 of {ALL}): Each step of the ablation helps."
    assert holds.startswith(f"- **Holds** (1 of {ALL})")
    assert rest.startswith(f"- **Not checked** ({ALL - 2} of {ALL})")
    assert found["claims"].splitlines() == [
        build_readme.HEAD.splitlines()[0],
        build_readme.HEAD.splitlines()[1],
        "| Each step of the ablation helps | does not hold (1), holds (1) | b: error b |",
        "| Residual levels lower the error | holds (1) | error once |",
    ]


def test_what_a_run_could_not_test_leaves_the_other_verdicts_as_they_are():
    own = [claim("ladder", "not tested", "a"), claim("ladder", "holds", "b"), claim("residual_error", "not tested")]
    own += [claim("attention_error", "undecided"), claim("attention_error", "holds")]
    found = build_readme.blocks([{"results": {"claims": own}}])
    undecided, untested, holds, _ = found["outcomes"].splitlines()
    assert undecided.endswith(": Attention lowers the error.")
    assert untested.endswith(": Residual levels lower the error.")
    assert holds.endswith(": Each step of the ablation helps.")
    assert "| holds (1), is not tested (1) | b: error b |" in found["claims"]


def test_verdicts_with_a_p_are_corrected_for_their_number_as_the_report_does():
    own = [claim("residual_error", "holds", p=0.04, detail=""), claim("attention_error", "holds", p=0.03, detail="")]
    found = build_readme.blocks([{"results": {"claims": own}}])
    assert found["outcomes"].startswith(f"- **Undecided** (2 of {ALL})")
    assert "| is undecided (1) | error once |" in found["claims"]


def test_a_mark_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="expected one block <!-- claims"):
        build_readme.fill("no marks", {"claims": ""})


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
def test_the_newest_versions_are_taken_also_where_an_environment_is(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()

    def planned(*more):
        command, outer = ["make", "--dry-run", "setup", *more], os.environ | {"MAKEFLAGS": "", "LATEST": ""}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=outer).stdout

    assert "pip install" not in planned()
    assert "--upgrade --upgrade-strategy eager" in planned("LATEST=1")
    assert "--constraint" not in planned("LATEST=1")
    (tmp_path / "requirements.lock").touch()
    assert "--constraint requirements.lock" in planned()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_lock_has_a_fitting_version_of_each_dependency(python, system):
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system}
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    locked = {one.name: one.specifier for one in locked if one.marker is None or one.marker.evaluate(here)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, sum(project["optional-dependencies"].values(), project["dependencies"])):
        (pin,) = locked[canonicalize_name(wanted.name)]
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), wanted


def test_conda_installs_the_lock_for_the_same_pythons():
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert wanted[-1] == {"pip": ["--constraint requirements.lock", "--editable .[test]"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = (name.removeprefix("python") for name in wanted[:-1] if name.startswith("python"))
    assert python.startswith(project["requires-python"])


def test_a_wheel_holds_the_templates_and_no_data(tmp_path):
    source = tmp_path / "source"  # not where the build would leave its files
    shutil.copytree(ROOT / "codalib", source / "codalib")
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    command = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    templates = [path for path in (ROOT / "codalib/reporting/templates").rglob("*") if path.is_file()]
    assert templates
    assert {str(path.relative_to(ROOT)) for path in templates} <= held
    assert not [name for name in held if name.startswith("data/")]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_the_set_up_says_first_how_much_it_downloads(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = ["make", "--no-print-directory", "setup", "PYTHON=false"]  # nothing is installed
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.match(r"The environment in \.venv: [\d.]+ GB to download", result.stdout), result.stderr
    assert result.returncode != 0
