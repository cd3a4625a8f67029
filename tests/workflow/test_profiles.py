"""Profiles, notebooks and the order of the runs agree."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from codalib.experiments.paper import TABLE_2
from codalib.tools import run
from codalib.training.settings import TokenizerSettings
from codalib.workflow.execute import check_profile
from codalib.workflow.parameters import filled_settings, notebook_values, resolved_values, settings_from
from codalib.workflow.profiles import Resources, StageError, profile_resources, profile_section, profile_stages

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEMS = [path.stem for path in NOTEBOOKS]


def notebook(stage):
    return nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)


def values(profile, stage):
    return resolved_values(notebook(stage), profile_section(profile, stage))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_is_a_parameter_or_a_field_of_its_notebook_and_has_its_type(path):
    for stage in STEMS:
        notebook_values(notebook(stage), profile_section(path.stem, stage))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_stage_fills_its_settings_from_it(path):
    """Values that do not go together are seen here, not by the one who waits for the stage."""
    check_profile(path.stem)
    stages = profile_stages(path.stem, STEMS)
    found = [settings for stage in stages for settings in filled_settings(notebook(stage), values(path.stem, stage))]
    filled = {type(settings).__name__ for settings in found}
    assert filled & {"TokenizerSettings", "MaskGITSettings", "QuantizerSettings"}


def test_what_is_wrong_with_a_profile_is_said_before_its_first_stage_runs(monkeypatch, caplog, tmp_path):
    """All of it at once: values of another type, and values that do not go together."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    stages = "stages: [01_train_tokenizer, 02_train_maskgit, 01_train_variants]\n"
    wrong = "02_train_maskgit: {steps: many}\n01_train_tokenizer: {rank: 0}\n01_train_variants: {seeds: []}\n"
    (tmp_path / "profiles" / "own.yaml").write_text(stages + wrong)
    for module in "profiles", "execute":
        monkeypatch.setattr(f"codalib.workflow.{module}.project_folder", lambda: tmp_path)
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: pytest.fail("a stage has begun"))
    assert run.main(["--profile", "own"]) == 1
    for stage, words in {
        "02_train_maskgit": "expected int for `steps`, got 'many'",
        "01_train_tokenizer": "expected rank",
        "01_train_variants": "expected",
    }.items():
        assert re.search(f"{stage}.ipynb, profile own: .*{re.escape(words)}", caplog.text), caplog.text


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path):
    for line in path.read_text().splitlines():
        if re.match(r"  \w", line):
            assert re.search(r"  # \S", line) or line.rstrip().endswith("seed-1/tokenizer"), line


def test_a_profile_goes_over_what_it_extends_section_by_section(profiles):
    profiles("base", "stages: [b]\na, b:\n  x: 1\n  where: PROFILE/a/model\nb:\n  y: 2\n  table: {p: 1}\n")
    profiles("own", "extends: base\na:\n  x: 3\nb:\n  table: {q: PROFILE/b}\n")
    assert profile_section("base", "b") == {"x": 1, "where": "base/a/model", "y": 2, "table": {"p": 1}}
    assert profile_section("own", "a") == {"x": 3, "where": "own/a/model"}
    assert profile_section("own", "b") == {"x": 1, "where": "own/a/model", "y": 2, "table": {"q": "own/b"}}
    profiles("own", "extends: base\nstages: [a, c]\n")
    assert profile_stages("own", ["a", "b", "c"]) == {"a": ["a"], "c": []}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: nothing", "expected a profile of other, own, got 'nothing'"),
        ("extends: other", "in a line, got own -> other -> own"),
        ("a, d:\n  x: 1", "expected sections of notebooks, got d"),
        ("a:\n  settings: {x: 1}", "expected the fields themselves as keys"),
        ("a: 3", "expected names and values in the section 'a', got 3"),
        ("a:\n  x: 1\na:\n  y: 2", "the key 'a' stands twice"),
    ],
)
def test_a_wrong_profile_is_one_sentence(profiles, text, words):
    profiles("other", "extends: own")
    profiles("own", text)
    with pytest.raises(StageError, match=words):
        profile_section("own", "a")


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """A project with the notebooks a, b and c; writes a profile."""
    for folder in ("notebooks", "profiles"):
        (tmp_path / folder).mkdir()
    for name in "abc":
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    monkeypatch.setattr("codalib.workflow.profiles.project_folder", lambda: tmp_path)
    return lambda name, text: (tmp_path / "profiles" / f"{name}.yaml").write_text(text)


def test_a_stages_resources_are_those_of_all_and_its_own(profiles):
    profiles("base", "resources:\n  all: {memory: 16, partition: short}\n  a, b: {gpus: 8, hours: 1.5}\n")
    profiles("own", "extends: base\nresources:\n  b: {partition: null, cores: 64}\n")
    assert profile_resources("own", "c") == Resources(memory=16, partition="short")
    assert profile_resources("own", "b") == Resources(8, 64, 16, 1.5)
    assert profile_resources("own", "a").for_snakemake() == {
        "gpu": 8,
        "mem_mb": 16000,
        "runtime": 90,
        "slurm_partition": "short",
        "slurm_account": None,
        "nodes": 1,
    }
    assert profile_section("own", "a") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  d: {gpus: 1}", "expected sections of notebooks, got d"),
        ("  a: {gpu: 1}", "expected resources of gpus, cores, memory, hours, partition, account, got gpu"),
        ("  a: {gpus: two}", "expected int above 0 for gpus in resources, got 'two'"),
        ("  a: {hours: 0}", "expected float above 0 for hours in resources, got 0"),
        ("  a: {partition: 3}", r"expected str \| None for partition in resources, got 3"),
        ("  a: 3", "expected notebooks with names and values in resources, got {'a': 3}"),
    ],
)
def test_wrong_resources_are_one_sentence(profiles, text, words):
    profiles("own", f"resources:\n{text}\n")
    with pytest.raises(StageError, match=words):
        profile_resources("own", "a")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_stage_has_a_gpu_for_each_of_its_processes_on_a_cluster(path):
    for stage in profile_stages(path.stem, STEMS):
        wanted, asked = values(path.stem, stage).get("processes", 1), profile_resources(path.stem, stage)
        assert wanted == 1 or asked.gpus == wanted, stage
        assert asked.cores >= wanted, stage


def test_the_profile_in_the_documentation_is_one(tmp_path, monkeypatch):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "servers.md").read_text(), flags=re.DOTALL)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "profiles" / "own.yaml").write_text(block)
    monkeypatch.setattr("codalib.workflow.profiles.project_folder", lambda: tmp_path)
    assert profile_resources("own", "01_train_tokenizer") == Resources(4, 40, 128, 12, "gpu", "vision")
    given = values("own", "01_train_tokenizer")
    assert given["batch_size"] * given["processes"] * given["accumulation"] == 512
    assert profile_stages("own", STEMS) == profile_stages("imagenet-mar-65536", STEMS)


def test_a_profile_runs_the_stages_that_it_names(profiles):
    def stages(text):
        profiles("p", text)
        return profile_stages("p", ["a", "b", "c"])

    assert list(stages("")) == ["a", "b", "c"]
    assert stages("stages: [c, a]") == {"a": [], "c": []}
    reading = "b:\n  where: p/a/model\nc:\n  several: {x: [p/b], y: other/a, z: p/abc}\n"
    assert stages(reading) == {"a": [], "b": ["a"], "c": ["b"]}
    with pytest.raises(StageError, match="expected stages of a, b, c, got d"):
        stages("stages: [d]")
    with pytest.raises(StageError, match="b needs a: add it to stages"):
        stages("stages: [b]\n" + reading)


IMAGENET = [path.stem for path in PROFILES if path.stem.startswith("imagenet-")]  # the tokenizers


def tokenizer_settings(profile, stage="01_train_tokenizer", **derived):
    return settings_from(TokenizerSettings, values(profile, stage), **derived)


@pytest.mark.parametrize("profile", IMAGENET)
def test_the_papers_profiles_have_the_papers_batch_and_length(profile):
    given = values(profile, "01_train_tokenizer")
    batch = given["batch_size"] * given["processes"] * given["accumulation"]
    assert batch == 512
    assert given["steps"] == 10 * (1_281_167 // batch)
    (row,) = values(profile, "table2_reconstruction")["tokenizers"]
    assert TABLE_2[row].codebook_size == given["codebook_size"]
    assert TABLE_2[row].iterations == pytest.approx(given["steps"] * batch / 256, rel=1e-2)
    side = {"kl16": 16, "flux": 8}[given["vae"]]
    assert given["scales"][-1] == given["resolution"] // side
    assert TABLE_2[row].ratio == side


@pytest.mark.parametrize("profile", IMAGENET)
def test_the_papers_tokenizers_are_trained_with_the_defaults_of_the_library(profile):
    """Each default of `TokenizerSettings` is the release's for MAR; what a machine or another VAE decides is free."""
    own = tokenizer_settings(profile)
    free = {"steps", "batch_size", "accumulation", "workers", "precision", "evaluate_every", "log_every", "ema_start"}
    free |= {"perceptual_network", "discriminator_network", "codebook_size"}
    free |= {"scales", "adapted_layers"} if "flux" in profile else set()
    for field in dataclasses.fields(own):
        assert field.name in free or getattr(own, field.name) == field.default, field.name
    assert (own.perceptual_network, own.discriminator_network) == ("perceptual_vgg", "dino")


def test_the_papers_comparisons_are_trained_as_its_tokenizer_is():
    tokenizer = tokenizer_settings("imagenet-mar-65536")
    others = {stage: {"learning_rate": 0.0005} for stage in ("01_train_variants", "01_train_baselines")}
    variants, baselines = (tokenizer_settings("ablations-imagenet", stage, **own) for stage, own in others.items())
    assert variants == dataclasses.replace(tokenizer, evaluate_every=0)
    assert baselines == dataclasses.replace(tokenizer, codebook_size=16384)  # Figure 1c's
    assert values("ablations-imagenet", "01_train_variants")["learning_rates"] == [tokenizer.learning_rate]
    fitted = values("ablations-imagenet", "01_quantizer_factorial")
    assert (fitted["batch_size"], fitted["steps"]) == (512, tokenizer.steps)
    assert fitted["codebook_size"] == tokenizer.codebook_size
    images = [values("ablations-imagenet", stage) for stage in profile_stages("ablations-imagenet", STEMS)]
    assert {(own["dataset"], own["resolution"]) for own in images} == {("imagefolder:$IMAGENET", 256)}


def test_smoke_changes_nothing():
    assert not [stage for stage in STEMS if profile_section("smoke", stage)]


def snakemake_says(project, *arguments):
    """What snakemake writes in a project of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CODALIB_")}
    environment["PYTHONPATH"] = str(project)  # its own copy of the library, whatever is set here
    cores = [] if "--cores" in arguments else ["--cores", "all"]
    command = [sys.executable, "-m", "snakemake", *cores, "--nolock", "--rerun-incomplete", *arguments]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def snakemake(project, *arguments):
    """The stages that snakemake starts, or would start with -n, in a project of its own."""
    return set(re.findall(r"codalib run notebooks/(\w+)\.ipynb", snakemake_says(project, *arguments)))


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


def test_on_a_cluster_each_stage_is_a_job_of_its_resources(project):
    profile = project / "profiles" / "tiny.yaml"
    before = profile.read_text()
    profile.write_text(before + "resources:\n  all: {memory: 16}\n  01_second: {gpus: 8, cores: 64, hours: 1.5}\n")
    arguments = "-n", "--forceall", "--cores", "99", "--config", "profile=tiny", "cluster=true"
    said = snakemake_says(project, *arguments)
    jobs = {re.search(r"output: runs/tiny/(\w+)", job)[1]: job for job in said.split("\nrule stage:")[1:]}
    second, first = jobs["01_second"], jobs["00_first"]
    for words in ("threads: 64", "gpu=8", "runtime=90", "mem_mb=16000", "nodes=1"):
        assert words in second
    assert "threads: 2" in first
    assert "gpu=" not in first
    assert "slurm_partition" not in said
    profile.write_text(before)


def test_what_is_missing_for_a_cluster_is_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    assert run.main(["--profile", "smoke", "--executor", "slurm"]) == 1
    assert "expected snakemake-executor-plugin-slurm with --executor slurm, got none: install the extra" in caplog.text
    monkeypatch.setattr(run, "find_spec", lambda _: "there")
    assert run.main(["--profile", "smoke", "--executor", "slurm"]) == 1
    assert "expected Slurm's sbatch with --executor slurm, got none: run it on the cluster's login node" in caplog.text


def test_a_cluster_gets_every_stage_with_its_logs_below_the_runs(monkeypatch, caplog, tmp_path):
    started = []
    monkeypatch.setattr(run.shutil, "which", lambda _: "there")
    monkeypatch.setattr(run, "find_spec", lambda _: "there")
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: started.append(command) or Namespace(returncode=1))
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    monkeypatch.setenv("CODALIB_THREADS", "auto")
    assert run.main(["--profile", "smoke", "--executor", "slurm"]) == 1
    (command,) = started
    assert command[command.index("--slurm-logdir") + 1] == str(tmp_path / "smoke" / "logs")
    assert command[-1] == "cluster=true"
    assert "CODALIB_THREADS" not in os.environ
    assert "The same command goes on where each stopped" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "fixed", "machine", "gpus", "cores", "stages", "threads", "nice"),
    [
        ([], None, 8, 0, "1", "1", "1", 15),
        (["--exclusive"], None, 2, 0, "2", "2", "auto", 0),
        (["--exclusive"], None, 1, 0, "1", "1", "auto", 0),
        (["--exclusive"], None, 9, 0, "8", "2", "auto", 0),  # two stages of four threads
        (["--exclusive"], None, 9, 1, "9", "1", "auto", 0),  # a GPU has room for one
        (["--exclusive"], "3", 4, 0, "4", "1", "3", 0),
        (["--exclusive"], "2", 4, 0, "4", "2", "2", 0),
    ],
)
def test_a_profile_runs_beside_other_work_or_alone(
    monkeypatch, arguments, fixed, machine, gpus, cores, stages, threads, nice
):
    started = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: started.append(command) or Namespace(returncode=1))
    monkeypatch.setattr(run.os, "nice", started.append)
    monkeypatch.setattr(run, "usable_cores", lambda: machine)
    monkeypatch.setattr(run, "gpu_count", lambda: gpus)
    monkeypatch.setenv("OMP_NUM_THREADS", fixed or "")
    monkeypatch.setenv("CODALIB_THREADS", "")
    monkeypatch.setenv("CODALIB_STAGES", "")
    assert run.main(["--profile", "smoke", *arguments]) == 1
    command = started[-1]
    assert os.environ["CODALIB_STAGES"] == stages
    assert command[command.index("--cores") + 1] == cores
    assert os.environ["CODALIB_THREADS"] == threads
    assert [found for found in started if isinstance(found, int)] == ([nice] if nice else [])
