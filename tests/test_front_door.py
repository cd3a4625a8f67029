"""What `import codalib` gives, and that it gives it without loading anything heavy."""

import subprocess
import sys

import pytest

import codalib
from codalib.tools.cli import COMMANDS, call

CONTRACT = [
    "CodaTokenizer",
    "ContinuousVAE",
    "ResidualAttentionQuantizer",
    "ResidualNearestQuantizer",
    "MaskGIT",
    "Tokens",
    "load_vae",
    "load_tokenizer",
    "load_quantizer",
    "load_kl16",
    "load_dataset",
    "generate",
    "psnr",
    "ssim",
]


def test_every_promised_name_is_there():
    assert sorted(codalib.__all__) == sorted(CONTRACT)
    assert all(callable(getattr(codalib, name)) for name in CONTRACT)
    assert set(CONTRACT) <= set(dir(codalib))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'codalib' has no attribute 'no_such_name'"):
        codalib.no_such_name  # noqa: B018


def test_nothing_heavy_is_loaded_before_it_is_used():
    code = (
        "import sys, codalib; print(sorted({'torch', 'numpy', 'pandas', 'matplotlib', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_command_lists_its_sub_commands():
    def run(*arguments):
        command = [sys.executable, "-m", "codalib", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = run("--help").stdout
    for command in ("run", "fetch", "features", "rehearse", "bench", "encode", "decode", "info"):
        assert f"\n  {command} " in shown
    assert "invalid choice: 'sing'" in run("sing").stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_each_sub_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        call(command, ["--help"])
    assert capsys.readouterr().out.startswith(f"usage: codalib {command}")
