"""What an installed package lacks is one sentence that says how to get it."""

import os
import subprocess
import sys

import pytest

from codalib.base import paths
from codalib.datasets import images
from codalib.experiments import ablation
from codalib.models import maskgit
from codalib.models.checkpoints import load_tokenizer, ours
from codalib.workflow import profiles
from codalib.workflow.execute import execute

SENTENCE = "is not here: data/, notebooks/ and profiles/ come with the repository.* set CODALIB_DATA to"


def test_embedded_data_that_are_not_here_say_how_to_get_them(tmp_path, monkeypatch):
    gone = tmp_path / "data"
    monkeypatch.setattr(images, "EMOJI_FOLDER", gone / "emoji")
    monkeypatch.setattr(ours, "EMOJI_VAE", gone / "vae-emoji")
    monkeypatch.setitem(ours.EMBEDDED_TOKENIZERS, "emoji", gone / "tokenizer-emoji")
    monkeypatch.setitem(ours.EMBEDDED_GENERATORS, "emoji-class", gone / "maskgit-emoji-class")
    monkeypatch.setitem(ablation.EMBEDDED_QUANTIZERS, "emoji", gone / "quantizers-emoji")
    for load in (
        lambda: images.load_dataset("emoji", "train", 64),
        lambda: ours.load_vae("emoji"),
        lambda: load_tokenizer("emoji"),
        lambda: maskgit.MaskGIT.from_pretrained("emoji-class"),
        lambda: ablation.load_quantizers("emoji"),
    ):
        with pytest.raises(paths.MissingPart, match=SENTENCE):
            load()


def test_notebooks_and_profiles_that_are_not_here_say_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "project_folder", lambda: tmp_path)
    with pytest.raises(profiles.StageError, match=SENTENCE):
        profiles.profile_path("smoke")
    with pytest.raises(profiles.StageError, match=SENTENCE):
        execute(tmp_path / "notebooks" / "start_here.ipynb", "smoke")


def test_the_environment_names_the_folder_of_the_data(tmp_path):
    code = "from codalib.base.paths import DATA; print(DATA)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CODALIB_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(tmp_path)


HUB = "from codalib.models.checkpoints.names import find_model; find_model('unknown')"  # has a folder too


@pytest.mark.parametrize(("home", "more"), [(None, HUB), ("/nonexistent", ""), ("/proc", "")])
def test_libraries_get_a_folder_where_home_cannot_be_written(tmp_path, home, more):
    code = f"""import codalib, os, matplotlib, jupyter_core.paths as j, IPython.paths as i
{more}
print(os.environ["NUMBA_CACHE_DIR"], matplotlib.get_configdir(), j.jupyter_runtime_dir(), i.get_ipython_dir())"""
    environment = {name: value for name, value in os.environ.items() if name not in {"HOME", *paths.HOMES}}
    environment |= {"CODALIB_RUNS": str(tmp_path)} | ({} if home is None else {"HOME": home})
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(place.startswith(str(tmp_path / ".home")) for place in shown.stdout.split())
