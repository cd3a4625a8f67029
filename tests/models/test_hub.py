"""Models on the Hub, which a folder stands in for: what is uploaded is what is loaded, and the card says what it is."""

import shutil

import pytest
import torch
import yaml

from codalib import MaskGIT, load_dataset, load_tokenizer
from codalib.base.files import write_json
from codalib.base.paths import DATA
from codalib.models import hub

MANIFEST = {
    "state": "finished",
    "notebook": "01_train_tokenizer",
    "commit": "0123abc",
    "parameters": {"dataset": "emoji", "vae": "emoji", "steps": 150, "resolution": 64, "val_limit": 128, "seed": 0},
    "versions": {"python": "3.11.9", "torch": "2.10.0", "numpy": "2.0"},
    "results": {"metrics": {"psnr": 24.08123, "utilization": 0.99}},
}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A Hub whose repositories lie in a folder; `asked` lists the files that were asked for."""
    root, asked = tmp_path / "hub", []

    class Api:
        def create_repo(self, repository, private, exist_ok):
            (root / repository / "abc").mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, root / repo_id / "abc", dirs_exist_ok=True)

    def metadata(url, **_):
        asked.append(url)
        if not url.exists():
            raise hub.EntryNotFoundError("no such file")

    monkeypatch.setattr(hub.huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_url", lambda name, file, **_: root / name / "abc" / file)
    monkeypatch.setattr(hub.huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda name, file, **_: root / name / "abc" / file)
    return root, asked


def test_a_tokenizer_comes_back_as_it_was_with_a_card_of_its_run(remote, tmp_path):
    write_json(tmp_path / "run" / "manifest.json", MANIFEST)
    ours = load_tokenizer("emoji-small")
    assert (
        ours.push_to_hub("someone/coda-emoji", "mit", tmp_path / "run" / "tokenizer")
        == "https://hub/someone/coda-emoji"
    )
    again = load_tokenizer("someone/coda-emoji")
    images = torch.stack([row["image"] for row in load_dataset("emoji", "val", 64, limit=2)])
    assert all(map(torch.equal, again.encode(images, sample=False), ours.encode(images, sample=False)))
    assert torch.equal(again.decode(again.encode(images, sample=False)), ours.decode(ours.encode(images, sample=False)))
    card = (remote[0] / "someone/coda-emoji/abc/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    for words in (
        "| psnr | 24.08 |",
        "128 validation images",
        "| steps | 150 |",
        'from_pretrained("someone/coda-emoji")',
    ):
        assert words in card


def test_a_generator_comes_back_as_it_was_and_a_card_without_a_run_says_so(remote):
    ours = MaskGIT.from_pretrained(DATA / "maskgit-emoji-class")
    ours.push_to_hub("someone/maskgit", "cc-by-4.0", dtype="float16")
    again = MaskGIT.from_pretrained("someone/maskgit")
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))
    assert (remote[0] / "someone/maskgit/abc/README.md").read_text().count("Not recorded.") == 2


def test_what_is_not_there_is_one_sentence(remote, tmp_path):
    with pytest.raises(ValueError, match=r"someone/nothing on the Hub holds no config.json: expected what push_to_hub"):
        load_tokenizer("someone/nothing")
    ours = load_tokenizer("emoji-small")
    with pytest.raises(ValueError, match="expected a repository OWNER/NAME, got 'coda'"):
        ours.push_to_hub("coda", "mit")
    with pytest.raises(ValueError, match=r"holds no manifest.json: expected the folder of the run"):
        ours.push_to_hub("someone/coda", "mit", tmp_path)
    write_json(tmp_path / "manifest.json", MANIFEST | {"state": "running"})
    with pytest.raises(ValueError, match="a run that has not finished"):
        ours.push_to_hub("someone/coda", "mit", tmp_path)
    assert not remote[0].exists()
