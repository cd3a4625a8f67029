"""Profiles, notebooks and the order of the runs agree."""

import dataclasses
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

from codalib.experiments.paper import TABLE_2
from codalib.training.settings import TokenizerSettings
from codalib.workflow.parameters import declared_parameters, validate
from codalib.workflow.profiles import STAGES as STAGES_KEY
from codalib.workflow.profiles import StageError, profile_section, profile_stages

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def sections(path):
    contents = yaml.safe_load(path.read_text()) or {}
    return {name: section for name, section in contents.items() if name != STAGES_KEY}


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


def test_a_profile_runs_the_stages_that_it_names(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "profiles").mkdir()
    monkeypatch.setattr("codalib.workflow.profiles.project_folder", lambda: tmp_path)
    profile = tmp_path / "profiles" / "p.yaml"

    for name in "abc":
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()

    def stages(text):
        profile.write_text(text)
        return profile_stages("p", ["a", "b", "c"])

    assert list(stages("")) == ["a", "b", "c"]
    assert stages("stages: [c, a]") == {"a": [], "c": []}
    reading = "b:\n  where: p/a/model\nc:\n  several: {x: [p/b], y: other/a, z: p/abc}\n"
    assert stages(reading) == {"a": [], "b": ["a"], "c": ["b"]}
    with pytest.raises(StageError, match=r"names d, expected some of a, b, c"):
        stages("stages: [d]")
    with pytest.raises(StageError, match=r"b needs a: add it to stages"):
        stages("stages: [b]\n" + reading)


IMAGENET = [path for path in PROFILES if path.stem.startswith("imagenet-")]  # the tokenizers


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_the_papers_profiles_have_the_papers_batch_and_length(path):
    values = sections(path)["01_train_tokenizer"]
    batch = values["batch_size"] * values["processes"] * values["accumulation"]
    assert batch == 512
    assert values["steps"] == 10 * (1_281_167 // batch)
    row = next(row for row in sections(path)["table2_reconstruction"]["tokenizers"])
    assert TABLE_2[row].codebook_size == values["codebook_size"]
    assert TABLE_2[row].iterations == pytest.approx(values["steps"] * batch / 256, rel=1e-2)
    side = {"kl16": 16, "flux": 8}[values["vae"]]
    assert values["scales"][-1] == values["resolution"] // side
    assert TABLE_2[row].ratio == side


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_the_papers_profiles_state_every_value_and_agree_with_the_defaults_of_the_library(path):
    """Each default of `TokenizerSettings` is the release's for MAR; a profile repeats it, with its source."""
    values = sections(path)["01_train_tokenizer"]
    free = {"steps", "batch_size", "accumulation", "workers", "precision", "evaluate_every", "checkpoint_every"}
    free |= {"log_every", "seed", "ema_start", "backend", "warmup_steps", "final_learning_rate", "codebook_size"}
    free |= {"perceptual_network", "discriminator_network"}
    if values["vae"] != "kl16":
        free |= {"scales", "adapted_layers"}
    for field in dataclasses.fields(TokenizerSettings):
        if field.name not in free:
            stated = values[field.name]
            assert (tuple(stated) if isinstance(stated, list) else stated) == field.default, field.name


def test_the_papers_comparisons_are_trained_as_its_tokenizer_is():
    tokenizer = sections(ROOT / "profiles" / "imagenet-mar-65536.yaml")["01_train_tokenizer"]
    compared = sections(ROOT / "profiles" / "ablations-imagenet.yaml")
    for stage in ("01_train_variants", "01_train_baselines"):
        values = compared[stage] | {"learning_rate": compared[stage]["learning_rates"][0]}
        own = {"halves", "codebook_sizes", "norms", "learning_rates", "kinds", "levels", "longer"}
        if stage == "01_train_baselines":
            own |= {"codebook_size"}  # Figure 1c's 16,384
        assert set(values) - own <= set(tokenizer)
        assert {name: values[name] for name in set(values) - own} == {
            name: tokenizer[name] for name in set(values) - own
        }
    fitted = compared["01_fit_quantizers"]
    assert (fitted["batch_size"], fitted["steps"]) == (512, tokenizer["steps"])
    assert fitted["codebook_size"] == tokenizer["codebook_size"]
    for stage, values in compared.items():
        if stage != "report":
            assert (values["dataset"], values["resolution"]) == (tokenizer["dataset"], tokenizer["resolution"]), stage


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
    return set(re.findall(r"codalib run notebooks/(\w+)\.ipynb", output))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The Snakefile and the library with three stages that do nothing, run once."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "codalib", root / "codalib")
    for folder in ("notebooks", "profiles"):
        (root / folder).mkdir()
    order = 'ORDER = ["00_first", "01_second", "fig_other"]'
    text, count = re.subn(r"ORDER = \[.*?\n\]", order, (ROOT / "Snakefile").read_text(), flags=re.DOTALL)
    assert count == 1
    (root / "Snakefile").write_text(text)
    for stage in STAGES:
        record = (
            f"from codalib.workflow.manifest import Run\nRun(output, '{stage}', {{'steps': steps}}, seed=0).finish()"
        )
        if stage == "report":
            record += "\nfrom codalib.reporting.report import build\nbuild('tiny')"
        values = 'output: str = "x"\nsteps: int = 1\nreads: str | None = None'
        parameters = v4.new_code_cell(values, metadata={"tags": ["parameters"]})
        notebook = v4.new_notebook(cells=[parameters, v4.new_code_cell(record)])
        nbformat.write(notebook, root / "notebooks" / f"{stage}.ipynb")
    (root / "profiles" / "tiny.yaml").write_text(TINY + "01_second:\n  reads: tiny/00_first/model\n  steps: 2\n")
    assert snakemake(root, *RUN) == set(STAGES)
    return root


TINY = "fig_other:\n  reads: tiny/00_first\n"
STAGES = ("00_first", "01_second", "fig_other", "report")
RUN = ("--printshellcmds", "--config", "profile=tiny")
DRY = ("-n", *RUN)


def test_a_second_run_does_nothing(project):
    assert snakemake(project, *DRY) == set()
    assert (project / "reports/tiny/index.html").exists()
    assert json.loads((project / "runs/tiny/01_second/manifest.json").read_text())["parameters"]["steps"] == 2


@pytest.mark.parametrize(
    ("section", "stages"),
    [
        ("  steps: 5\n01_second:\n  steps: 2\n", {"fig_other", "report"}),
        ("01_second:\n  steps: 3\n", {"01_second", "report"}),
        ("01_second:\n  steps: 2\n00_first:\n  steps: 3\n", set(STAGES)),
    ],
)
def test_one_changed_value_runs_only_what_depends_on_it(project, section, stages):
    profile = project / "profiles" / "tiny.yaml"
    before = profile.read_text()
    profile.write_text(TINY + section.replace("01_second:\n", "01_second:\n  reads: tiny/00_first/model\n"))
    assert snakemake(project, *DRY) == stages
    profile.write_text(before)


@pytest.mark.parametrize("result", ["reports/tiny/fig_other.html", "runs/tiny/fig_other/manifest.json"])
def test_a_stage_that_did_not_finish_runs_again(project, result):
    contents = (project / result).read_text()
    (project / result).unlink()
    assert snakemake(project, *DRY) == {"fig_other", "report"}
    (project / result).write_text(contents)


def test_every_notebook_has_its_place_in_the_order():
    text = (ROOT / "Snakefile").read_text()
    for path in NOTEBOOKS:
        if path.stem == "bench":  # `codalib bench` runs it, no profile
            continue
        assert f'"{path.stem}"' in text or f"notebooks/{path.name}" in text, path.stem
