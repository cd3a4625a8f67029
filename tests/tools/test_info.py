"""What `codalib info` tells."""

import torch

from codalib.tools.cli import main


def test_info_names_versions_devices_networks_and_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # listed by a driver that is too old for torch
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == torch.__version__.split("+")[0]
    assert rows["GPUs"] == "none"
    assert "efficientnet_lite0" in rows["networks"]
    assert str(tmp_path / "not" / "yet") in rows["runs"]
    assert "GiB free" in rows["runs"]
