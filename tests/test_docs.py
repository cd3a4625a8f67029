"""The API reference and the hooks before a commit, as CONTRIBUTING.md names them."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def test_the_api_reference_builds_without_a_warning(tmp_path):
    command = [sys.executable, ROOT / "docs" / "build_api.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warn" not in result.stderr
    modules = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "codalib").rglob("[!_]*.py")}
    pages = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")}
    assert modules <= pages
    front = (tmp_path / "codalib.html").read_text()
    assert 'id="CodaTokenizer.encode"' in front
    assert 'href="codalib/models.html"' in front


@pytest.fixture
def checkout(tmp_path):
    """A repository of its own that holds the hooks, a notebook and an environment."""
    (tmp_path / "notebooks").mkdir()
    for name in (".pre-commit-config.yaml", "pyproject.toml", "notebooks/fig7_reconstructions.ipynb"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "codalib").symlink_to(ROOT / "codalib")  # by which ruff knows our own imports
    (tmp_path / ".venv").symlink_to(sys.prefix)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def hooks(checkout):
    subprocess.run(["git", "add", "notebooks", "pyproject.toml", ".pre-commit-config.yaml"], cwd=checkout, check=True)
    command = [sys.executable, "-m", "pre_commit", "run", "--all-files"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git is installed")
def test_the_hooks_let_a_committed_notebook_be_and_strip_a_run_one(checkout):
    path = checkout / "notebooks" / "fig7_reconstructions.ipynb"
    committed = path.read_bytes()
    result = hooks(checkout)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("Passed") == 3
    notebook = nbformat.reads(committed.decode(), as_version=4)
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=7):
        cell.execution_count = number
        cell.outputs = cell.outputs or [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(notebook, path)
    result = hooks(checkout)
    assert result.returncode == 1
    assert result.stdout.count("Failed") == 1
    assert path.read_bytes() == committed
