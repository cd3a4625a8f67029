import pytest

from codalib.runs import runs_folder
from codalib.train import TokenizerSettings
from codalib.variants import table_4_rows, tokenizer_variants, variant_row, write_variants

SETTINGS = TokenizerSettings(steps=1, batch_size=1, codebook_size=64)


def test_each_variant_differs_from_the_base_in_one_thing():
    variants = tokenizer_variants(SETTINGS, ["none", "decoder"], [16, 256], [None])
    assert list(variants) == [
        "base",
        "adapters none",
        "adapters decoder",
        "codebook size 16",
        "codebook size 256",
        "norm none",
    ]
    for name, own in variants.items():
        differs = [field for field, value in vars(own).items() if value != getattr(SETTINGS, field)]
        assert len(differs) == (name != "base")
    with pytest.raises(ValueError, match="codebook_size 64 is asked for as a variant"):
        tokenizer_variants(SETTINGS, [], [64], [])


def test_the_base_stands_in_each_table_and_a_variant_in_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    variants = tokenizer_variants(SETTINGS, ["decoder"], [256], [None])
    write_variants([variant_row(name, own, f"{name}/tokenizer") for name, own in variants.items()], tmp_path / "x")
    rows = [(row["table"], row["method"]) for row in table_4_rows("x")]
    assert rows == [("4a", "both"), ("4a", "decoder"), ("4b", "64"), ("4b", "256"), ("4c", "rms"), ("4c", "none")]
    assert table_4_rows("x")[1]["tokenizer"] == str(runs_folder("x") / "adapters decoder/tokenizer")
    with pytest.raises(ValueError, match="01_train_variants wrote"):
        table_4_rows("y")


def test_the_embedded_tokenizer_is_one_row_of_each_table():
    assert [(row["table"], row["method"]) for row in table_4_rows(None)] == [
        ("4a", "both"),
        ("4b", "1024"),
        ("4c", "rms"),
    ]
