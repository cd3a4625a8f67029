"""Profiles, notebooks and the order of the runs agree."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import v4

from codalib.execute import declared_parameters, profile_section
from codalib.runs import validate

ROOT = Path(__file__).parents[1]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def sections(path):
    return yaml.safe_load(path.read_text()) or {}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_is_a_parameter_of_its_notebook_and_has_its_type(path):
    for stage in sections(path):
        notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)
        declared = {name: hint for name, (hint, _) in declared_parameters(notebook).items()}
        validate(declared, profile_section(path.stem, stage))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path):
    for line in path.read_text().splitlines():
        if re.match(r"  \w", line):
            assert re.search(r"  # \S", line), line


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_value_differs_from_the_notebooks_default(path):
    for stage, values in sections(path).items():
        declared = declared_parameters(nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4))
        same = [name for name, value in values.items() if declared[name][1] == value]
        assert same == [] or path.stem == "smoke"


def test_smoke_changes_nothing():
    for stage, values in sections(ROOT / "profiles" / "smoke.yaml").items():
        declared = declared_parameters(nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4))
        assert values == {name: declared[name][1] for name in values}


def snakemake(project, *arguments):
    """The stages that snakemake starts, or would start with -n, in a project of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CODALIB_")}
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--nolock", "--rerun-incomplete", *arguments]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    output = result.stdout + result.stderr
    return {stage for stage in re.findall(r"codalib\.execute notebooks/(\w+)\.ipynb", output)}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The Snakefile and the library with notebooks that do nothing, run once."""
    root = tmp_path_factory.mktemp("project")
    for name in ("codalib", "profiles"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / "notebooks").mkdir()
    needs = re.search(r"NEEDS = (\{.*?\n\})", (root / "Snakefile").read_text(), re.DOTALL).group(1)
    stages = [*json.loads(re.sub(r",(\s*[\]}])", r"\1", needs)), "report"]
    for stage in stages:
        record = f"from codalib.runs import Run\nRun(output, '{stage}', {{'steps': steps}}, seed=0).finish()"
        if stage == "report":
            record += "\nfrom codalib.report import build\nbuild('tiny')"
        parameters = 'output: str = "x"\nsteps: int = 1'
        cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), v4.new_code_cell(record)]
        nbformat.write(v4.new_notebook(cells=cells), root / "notebooks" / f"{stage}.ipynb")
    for path in (root / "profiles").iterdir():
        path.unlink()
    (root / "profiles" / "tiny.yaml").write_text("01_train_tokenizer:\n  steps: 2\n")
    assert snakemake(root, "--config", "profile=tiny", "--printshellcmds") == set(stages)
    return root


DRY = ("-n", "--printshellcmds", "--config", "profile=tiny")


def test_a_second_run_does_nothing(project):
    assert snakemake(project, *DRY) == set()
    assert (project / "reports/tiny/index.html").exists()
    assert json.loads((project / "runs/tiny/01_train_tokenizer/manifest.json").read_text())["parameters"]["steps"] == 2


def test_one_changed_value_runs_only_what_depends_on_it(project):
    profile = project / "profiles" / "tiny.yaml"
    before = profile.read_text()
    profile.write_text("fig7_reconstructions:\n  steps: 5\n01_train_tokenizer:\n  steps: 2\n")
    assert snakemake(project, *DRY) == {"fig7_reconstructions", "report"}
    profile.write_text("01_train_tokenizer:\n  steps: 3\n")
    changed = snakemake(project, *DRY)
    assert {"01_train_tokenizer", "table1_ablation", "fig7_reconstructions", "report"} <= changed
    assert "00_pretrain_vae" not in changed
    profile.write_text(before)


def test_a_stage_that_did_not_finish_runs_again(project):
    page = project / "reports/tiny/table1_ablation.html"
    contents = page.read_text()
    page.unlink()
    assert {"table1_ablation", "report"} == snakemake(project, *DRY)
    page.write_text(contents)


def test_every_notebook_has_its_place_in_the_order():
    text = (ROOT / "Snakefile").read_text()
    for path in NOTEBOOKS:
        assert f'"{path.stem}"' in text or f"notebooks/{path.name}" in text, path.stem
