import fcntl
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from codalib.base.files import read_json
from codalib.base.paths import HOMES, project_folder, runs_folder
from codalib.base.team import TEAM, Place
from codalib.tools.run import main
from codalib.workflow import execute as runner
from codalib.workflow.dependencies import _listing, library_files, outside
from codalib.workflow.parameters import declared_parameters
from codalib.workflow.profiles import StageError, profile_section

HOLD = "import sys, pathlib; from codalib.base.files import hold; hold(pathlib.Path(sys.argv[1]))"
PARAMETERS = 'output: str = "smoke/stage"  # folder\nsteps: int = 2  # steps\nlabel: str = "a=b"  # words'
CHECK = """from codalib.workflow.manifest import Run
from codalib.workflow.parameters import check_parameters
run = Run(output, 'stage', check_parameters(globals()), seed=0)"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one profile and no notebook yet."""
    for name in ("profiles", "notebooks"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("codalib.workflow.profiles.project_folder", lambda: tmp_path)
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CODALIB_REPORTS", str(tmp_path / "reports"))
    (tmp_path / "profiles" / "tiny.yaml").write_text("stage:\n  steps: 3  # steps\n")
    return tmp_path


def write_notebook(project: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    path = project / "notebooks" / "stage.ipynb"
    tagged = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    headings = [v4.new_markdown_cell("# A stage"), tagged, v4.new_markdown_cell("## Run")]
    nbformat.write(v4.new_notebook(cells=[*headings, *map(v4.new_code_cell, cells)]), path)
    return path


def test_a_notebook_runs_with_its_profile_and_leaves_a_page(project, caplog):
    caplog.set_level(logging.INFO)
    loop = "from tqdm.auto import tqdm\nfor i in tqdm(range(steps), desc='training'): pass"
    path = write_notebook(project, CHECK, loop, "print('seen', steps, label)\nrun.finish()")
    assert main([str(path), "--profile", "tiny", "-p", "label", "c"]) == 0
    manifest = read_json(runs_folder("tiny/stage/manifest.json"))
    assert manifest["state"] == "finished"
    assert manifest["parameters"] == {"output": "tiny/stage", "steps": 3, "label": "c"}
    page = (project / "reports" / "tiny" / "stage.html").read_text()
    assert "seen 3 c" in page
    assert "3/3" not in page
    assert "stage: Run (cell" in caplog.text
    assert "training: 100%" in caplog.text
    assert "stage: seen 3 c" in caplog.text


def test_a_launchers_processes_are_the_notebooks(project, monkeypatch, caplog):
    monkeypatch.setenv(TEAM, "")  # taken away at the end
    Place("here", 1, "0", 0, 0, 4, 4, serves=False).lead()
    path = write_notebook(project, CHECK, parameters=PARAMETERS + "\nprocesses: int = 1  # one a GPU")
    assert main([str(path), "--profile", "tiny"]) == 0
    assert read_json(runs_folder("tiny/stage/manifest.json"))["parameters"]["processes"] == 4
    assert main([str(path), "--profile", "tiny", "-p", "processes", "2"]) == 1
    assert "processes is 2, expected 4, as many as the launcher has started" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "stepz", "3"], "got `stepz`: the closest is `steps`"),
        (["-p", "steps", "many"], "expected int for `steps`, got 'many'"),
        (["--profile", "huge"], "expected a profile of tiny, got 'huge'"),
    ],
)
def test_wrong_values_stop_before_anything_runs(project, caplog, arguments, words):
    path = write_notebook(project, "raise RuntimeError")
    assert main([str(path), "--profile", "tiny", *arguments]) == 1
    assert words in caplog.text
    assert not (project / "runs" / "tiny" / "stage.ipynb").exists()


def test_a_failing_cell_is_named_with_its_error(project, caplog):
    path = write_notebook(project, CHECK, "raise ValueError('the disk is full')")
    assert main([str(path), "--profile", "tiny"]) == 1
    assert "ValueError: the disk is full" in caplog.text
    assert (project / "runs" / "tiny" / "stage.ipynb").exists()
    assert not (project / "reports" / "tiny" / "stage.html").exists()
    assert read_json(runs_folder("tiny/stage/manifest.json"))["state"] == "running"


def test_a_dead_kernel_is_called_by_its_name(project, caplog):
    path = write_notebook(project, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert main([str(path), "--profile", "tiny"]) == 138
    assert "want of memory" in caplog.text


def test_a_notebook_that_runs_elsewhere_is_left_alone(project, caplog):
    path = write_notebook(project, CHECK)
    lock = project / "runs" / "tiny" / "stage.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([str(path), "--profile", "tiny"]) == 1
    assert "running already" in caplog.text


def test_parameters_are_read_with_types_and_defaults(project):
    notebook = nbformat.read(write_notebook(project), as_version=4)
    assert declared_parameters(notebook) == {
        "output": ("str", "smoke/stage"),
        "steps": ("int", 2),
        "label": ("str", "a=b"),
    }
    with pytest.raises(StageError, match="expected exactly one cell"):
        declared_parameters(v4.new_notebook())


def test_a_section_for_no_notebook_is_refused(project):
    write_notebook(project)
    assert profile_section("tiny", "stage") == {"steps": 3}
    assert profile_section("tiny", "other") == {}
    (project / "profiles" / "tiny.yaml").write_text("stge:\n  steps: 3\n")
    with pytest.raises(StageError, match="expected sections of notebooks, got stge"):
        profile_section("tiny", "stage")
    (project / "profiles" / "tiny.yaml").write_text("stage: 3\n")
    with pytest.raises(StageError, match="expected names and values in the section"):
        profile_section("tiny", "stage")


def test_progress_bars_become_a_line_now_and_then(caplog):
    caplog.set_level(logging.INFO)
    progress = runner._Progress("stage", v4.new_notebook(cells=[]))
    for step in range(100):
        progress.write(f"\r{step}%|")
    progress.write("\r100%| done\nand a message\nhalf a ")
    progress.write("line\n")
    assert [record.getMessage() for record in caplog.records] == [
        "stage: 0%|",
        "stage: 100%| done",
        "stage: and a message",
        "stage: half a line",
    ]


@pytest.mark.parametrize("given", [[], [v4.new_code_cell("", metadata={"tags": ["injected-parameters"]})]])
def test_progress_names_the_heading_above_the_cell_that_runs(caplog, given):
    caplog.set_level(logging.INFO)
    made = [
        v4.new_code_cell("", metadata={"tags": ["parameters"]}),
        v4.new_markdown_cell("## Work"),
        v4.new_code_cell(""),
        v4.new_markdown_cell("## Result"),
        v4.new_code_cell(""),
    ]
    progress = runner._Progress("stage", v4.new_notebook(cells=made))
    for index, cell in enumerate([made[0], *given, *made[1:3]]):
        progress.cell_start(cell, index)
    assert caplog.records[-1].getMessage() == "stage: Work (cell 2 of 5)"


def test_modules_behind_a_notebook_are_followed(tmp_path):
    def needs(name, code):
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(code)]), path)
        return {Path(file).stem for file in library_files(path)}

    drawing = "from codalib.reporting.figures import show\nfrom codalib import Tokens"
    assert {"figures", "paper", "tokens"} <= needs("fig1", drawing)
    assert needs("01_train", drawing) == {"tokens"}  # a changed colour trains nothing again
    trained = needs("01_train", "from codalib import CodaTokenizer")
    assert {"tokenizer", "quantizer", "assignment", "vae", "files", "library_quantizers"} <= trained
    assert not {"figures", "display", "tables", "pages", "manifest", "execute"} & trained
    assert needs("01_train", "import codalib.models.losses as x") == needs(
        "01_train", "from codalib.models import losses"
    )
    with pytest.raises(ValueError, match=r"imports codalib\.quantize, expected modules of codalib"):
        needs("01_train", "import codalib.quantize")
    assert all(os.path.exists(file) for file in library_files(tmp_path / "fig1.ipynb"))


@pytest.mark.parametrize("path", sorted((project_folder() / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_depends_on_modules_that_exist(path):
    files = library_files(path)
    assert len(files) > 5
    assert all(Path(file).exists() for file in files)
    assert not path.stem[0].isdigit() or not [file for file in files if "reporting" in file]


def test_a_notebook_keeps_the_outputs_of_its_checked_cells_only(project):
    (project / "profiles" / "smoke.yaml").write_text("")
    path = write_notebook(project, CHECK, "print('loose')\nsteps", "print('checked')\nsteps")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata.tags = ["nbval-check-output"]
    nbformat.write(notebook, path)
    assert main([str(path), "--keep-checked"]) == 0
    kept = nbformat.read(path, as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in notebook.cells]
    assert kept.cells[-1].execution_count == 4
    assert [output.get("text") or output.data["text/plain"] for output in kept.cells[-1].outputs] == ["checked\n", "2"]
    assert all(not cell.outputs and not cell.execution_count for cell in kept.cells[:-1] if cell.cell_type == "code")
    with pytest.raises(SystemExit):
        main([str(path), "--keep-checked", "-p", "steps", "3"])


def test_the_kernel_is_of_this_interpreter_whatever_is_named_python3_and_without_a_home(project, monkeypatch):
    site = project / "jupyter" / "kernels" / "python3"
    site.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Site", "language": "python"}
    (site / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "jupyter"))
    path = write_notebook(project, CHECK, f"import sys\nassert sys.executable == {sys.executable!r}\nrun.finish()")
    environment = {name: value for name, value in os.environ.items() if name not in {"HOME", *HOMES}}
    code = (
        "import sys; from pathlib import Path; import codalib.workflow.profiles as p\n"
        "p.project_folder = lambda: Path(sys.argv[1])\nfrom codalib.tools.cli import main\n"
        "sys.exit(main(['run', *sys.argv[2:], '--profile', 'tiny', '--threads', '1']))"
    )
    command = [sys.executable, "-c", code, str(project), str(path)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert read_json(runs_folder("tiny/stage/manifest.json"))["state"] == "finished"
    assert "threads: 1" in shown.stderr


@pytest.mark.parametrize("output", ["2026-11-26", "a: b", "a #b", "{steps} {x}", "a b"])
def test_a_folder_of_any_name_takes_a_run(project, monkeypatch, output):
    seen = {}

    def run(source, target, parameters, **rest):
        seen.update(parameters, source=source.format(), target=target.format())
        return v4.new_notebook()

    monkeypatch.setattr(runner.papermill, "execute_notebook", run)
    path = write_notebook(project)
    assert main([str(path), "--profile", "tiny", "-p", "output", output, "-p", "steps", "1e1"]) == 0
    assert seen["output"] == output
    assert seen["steps"] == 10
    assert seen["target"] == str(project / "runs" / f"{output}.ipynb")
    quoted = json.dumps(output) if output != "2026-11-26" else output
    (project / "profiles" / "tiny.yaml").write_text(f"stage:\n  output: {quoted}\n")
    assert main([str(path), "--profile", "tiny"]) == 0
    assert seen["output"] == output


def test_two_runs_of_one_notebook_into_two_folders_do_not_meet(project, monkeypatch):
    path = write_notebook(project)
    inner = []

    def run(source, target, parameters, **rest):
        if not inner:
            inner.append("other")
            other = subprocess.run(
                [sys.executable, "-c", HOLD, str(project / "runs" / "two.lock")], capture_output=True, text=True
            )
            assert other.returncode == 0
            same = subprocess.run(
                [sys.executable, "-c", HOLD, str(project / "runs" / "one.lock")], capture_output=True, text=True
            )
            assert f"one is in use, running already in process {os.getpid()} on " in same.stderr
        return v4.new_notebook()

    monkeypatch.setattr(runner.papermill, "execute_notebook", run)
    assert main([str(path), "--profile", "tiny", "-p", "output", "one"]) == 0
    assert inner


def test_a_broken_profile_and_a_folder_that_cannot_be_written_are_one_sentence(project, caplog, monkeypatch):
    path = write_notebook(project)
    (project / "profiles" / "tiny.yaml").write_text("stage:\n  output: a: b\n")
    assert main([str(path), "--profile", "tiny"]) == 1
    assert "tiny.yaml: expected YAML, got mapping values are not allowed here" in caplog.text
    (project / "profiles" / "tiny.yaml").write_text("")
    for name in ("CODALIB_RUNS", "CODALIB_REPORTS"):
        monkeypatch.setenv(name, "/proc/x")
        caplog.clear()
        assert main([str(path), "--profile", "tiny"]) == 1
        assert "expected a folder that can be written, got /proc/x/tiny" in caplog.text
        monkeypatch.setenv(name, str(project / "out"))


def test_a_stage_watches_the_data_and_models_that_its_values_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("PLACE", str(tmp_path / "data"))
    for name in ("data/train/a.png", "weights/kl16/config.json", "runs/smoke/x/tokenizer/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("old")
    values = {
        "dataset": "imagefolder:$PLACE",
        "vae": "kl16",
        "tokenizers": {"own": "smoke/x/tokenizer"},
        "tars": f"webdataset:{tmp_path}/data/{{000..127}}.tar",
        "kind": "attention",
        "embedded": "emoji",
    }

    def seen():
        _listing.cache_clear()
        return outside(values).get("outside", {})

    (tmp_path / "data/train/nowhere.png").symlink_to("gone.png")
    first = seen()
    assert set(first) == {values["dataset"], values["vae"], values["tars"]}
    assert seen() == first
    for name, keys in (("data/train/a.png", {"dataset", "tars"}), ("weights/kl16/config.json", {"vae"})):
        before = seen()
        (tmp_path / name).write_text("new")  # of the same size
        os.utime(tmp_path / name, ns=(1, 1))
        after = seen()
        assert {key for key in values if before.get(str(values[key])) != after.get(str(values[key]))} == keys
    assert outside({"dataset": "emoji", "steps": 3}) == {}
    assert "outside(values)" in Path("Snakefile").read_text()
