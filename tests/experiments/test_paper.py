import pytest

from codalib.experiments.paper import CLAIMS, COLUMNS, TABLE_1, TABLE_2, TABLE_3, TABLE_4A, TABLE_4B, TABLE_4C, TABLES

ROWS = {"1": 5, "2": 21, "3": 18, "4a": 4, "4b": 4, "4c": 3, "5": 4}


def test_every_table_holds_every_row():
    assert {number: len(table.rows) for number, table in TABLES.items()} == ROWS
    for table in TABLES.values():
        assert len({row.method for row in table}) == len(table.rows)


@pytest.mark.parametrize(
    ("number", "column", "total"),
    [  # column sums, added up from the printed tables themselves: a slipped digit shows
        ("1", "quantization_error", 0.341),
        ("1", "rfid", 64.84),
        ("1", "psnr", 108.0),
        ("1", "ssim", 2.883),
        ("2", "rfid", 51.92),
        ("2", "codebook_size", 482_976),
        ("2", "psnr", 280.6),
        ("2", "ssim", 7.846),
        ("2", "utilization", 7.503),
        ("2", "iterations", 5_000_000),
        ("3", "fid", 112.27),
        ("3", "parameters", 10_052),
        ("3", "steps", 3094),
        ("4a", "rfid", 15.74),
        ("4b", "psnr", 87.1),
        ("4c", "ssim", 1.772),
        ("5", "fid", 32.57),
    ],
)
def test_columns_add_up(number, column, total):
    assert sum(row.published().get(column, 0) for row in TABLES[number]) == pytest.approx(total, abs=1e-6)


def test_each_row_publishes_only_its_tables_columns():
    for table in TABLES.values():
        for row in table:
            assert row.published().keys() <= set(table.columns)


def test_the_same_tokenizer_has_the_same_numbers_in_every_table():
    tokenizer, unadapted = TABLE_1["+ adapted VAE"], TABLE_1["+ attention quantization"]
    for column in ("rfid", "psnr", "ssim"):
        value = getattr(tokenizer, column)
        rows = (TABLE_2["CODA MAR 65536"], TABLE_4A["both"], TABLE_4B["65536"], TABLE_4C["rms"])
        assert [getattr(row, column) for row in rows] == [value] * 4
        assert getattr(TABLE_4A["none"], column) == getattr(unadapted, column)
        assert getattr(TABLE_4B["16384"], column) == getattr(TABLE_2["CODA MAR 16384"], column)
        assert getattr(TABLE_2["MAR VAE"], column) == getattr(TABLE_1["Continuous VAE"], column)


def test_the_published_ladder_is_monotone():
    for column in ("quantization_error", "rfid", "psnr", "ssim"):
        sign = COLUMNS[column][1]
        values = [sign * getattr(row, column) for row in TABLE_1.rows[1:]]
        assert values == sorted(values)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_every_claim_agrees_with_the_numbers_it_rests_on(claim):
    assert claim.comparisons or claim.caution
    for comparison in claim.comparisons:
        before, after = comparison.published
        assert COLUMNS[comparison.column][1] * (after - before) > 0


def test_the_training_budget_is_six_times_smaller():
    assert TABLE_2["VQGAN 16384"].iterations == 6 * TABLE_2["CODA MAR 65536"].iterations


def test_an_unknown_row_is_named_with_the_known_ones():
    with pytest.raises(KeyError, match=r"expected a row of Table 3, .*, got 'GAN'"):
        TABLE_3["GAN"]
