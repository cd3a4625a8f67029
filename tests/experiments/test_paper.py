import pytest

from codalib.experiments.paper import CLAIMS, COLUMNS, TABLE_1, TABLE_2, TABLE_3, TABLE_4A, TABLE_4B, TABLE_4C, TABLES

# The printed tables, typed by hand in the order of `Table.columns`; after a name † is more data, ~ a continuous VAE.
PRINTED = """
Table 1
Continuous VAE~ | - 0.69 24.9 0.716 -
Vector quantization | 0.181 41.52 18.9 0.461 49%
+ residual quantization | 0.094 14.23 20.6 0.533 51%
+ attention quantization | 0.065 7.06 21.4 0.571 100%
+ adapted VAE | 0.001 1.34 22.2 0.602 100%
Table 2
VQGAN 1024 | 16 1024 7.94 19.4 0.500 44% 300K
VQGAN 16384 | 16 16384 4.98 19.9 0.510 5.9% 300K
DF-VQGAN | 16 12288 5.16 - - - -
DQVAE | 16 1024 4.08 - - - 250K
DiVAE | 16 16384 4.07 - - - -
VQGAN-LC 16384 | 16 16384 3.01 23.2 0.564 99% 100K
VQGAN-LC 100000 | 16 100000 2.62 23.8 0.589 99% 100K
LlamaGen | 16 16384 2.19 20.8 0.675 97% 200K
RQVAE | - 16384 2.69 - - - 250K
BAE | 16 65536 3.32 - - - 2000K
MaskBit | 16 16384 1.61 - - - 1350K
CODA MAR 16384 | 16 16384 1.43 22.0 0.594 100% 50K
CODA MAR 65536 | 16 65536 1.34 22.2 0.602 100% 50K
MAR VAE~ | 16 - 0.69 24.9 0.716 - -
VQGAN 8x† | 8 16384 1.14 23.4 0.670 5.4% -
ViT-VQGAN 8x | 8 8192 1.28 - - - -
DF-VQGAN 8x | 8 8192 1.38 - - - -
DiVAE 8x | 8 16384 1.28 - - - -
OmniTokenizer† | 8 8192 1.11 24.0 0.752 100% -
CODA FLUX 65536 | 8 65536 0.43 25.9 0.771 100% 50K
FLUX VAE~ | 8 - 0.17 31.1 0.903 - -
Table 3
ADM | diffusion 554M 250 10.94
LDM-4-G | diffusion 400M 250 3.60
DiT-L/2 | diffusion 458M 250 5.02
UViT-L/2 | diffusion 287M 50 3.40
LDM-4-G, DPM-Solver | diffusion 400M 8 4.56
DiT-XL/2, DPM-Solver | diffusion 675M 8 5.18
RQVAE-GPT | autoregressive 480M 256 15.7
VQGAN-LC-GPT | autoregressive 404M 256 15.4
ViT-VQGAN-GPT | autoregressive 650M 1024 8.81
RQ-Transformer | autoregressive 3800M 64 7.55
LlamaGen-L-384 | autoregressive 343M 576 3.07
VAR | visual-autoregressive 310M 10 3.30
MaskGIT | masked 227M 12 4.92
MaskGIT-FSQ | masked 225M 12 4.53
MAGE | masked 230M 20 6.93
ENAT | masked 219M 8 3.53
CODA MaskGIT-L, 8 steps | masked 195M 8 3.17
CODA MaskGIT-L, 32 steps | masked 195M 32 2.66
Table 4a
none | 7.06 21.4 0.571
encoder | 5.75 21.3 0.551
decoder | 1.59 22.1 0.604
both | 1.34 22.2 0.602
Table 4b
1024 | 1024 2.07 21.2 0.561
4096 | 4096 1.76 21.7 0.582
16384 | 16384 1.43 22.0 0.594
65536 | 65536 1.34 22.2 0.602
Table 4c
none | 1.87 21.51 0.570
layer | 1.37 22.1 0.600
rms | 1.34 22.2 0.602
Table 5
VQ-Diffusion | 13.86
U-Net | 7.32
U-ViT-S | 5.95
CODA MaskGIT-S | 5.44
"""
UNITS = {"%": 0.01, "K": 1000, "M": 1}  # the columns' units: a fraction, steps, millions of weights


def number_of(text):
    if text[0].isalpha():
        return text.replace("-", " ")  # a kind of model
    return None if text == "-" else float(text.rstrip("%KM")) * UNITS.get(text[-1], 1)


@pytest.mark.parametrize("printed", PRINTED.split("Table ")[1:], ids=lambda printed: printed.split()[0])
def test_every_number_is_the_printed_one(printed):
    number, *lines = printed.strip().splitlines()
    table, rows = TABLES[number], [line.split(" | ") for line in lines]
    assert [row.method for row in table] == [name.rstrip("†~") for name, _ in rows]
    for row, (name, values) in zip(table, rows, strict=True):
        assert (row.extra_data, row.continuous) == ("†" in name, "~" in name), name
        for column, text in zip(table.columns, values.split(), strict=True):
            value, printed_value = getattr(row, column), number_of(text)
            same = value == printed_value or (text[0].isdigit() and value == pytest.approx(printed_value, rel=1e-9))
            assert same, f"{name}: {column} is {value}, printed {text}"


def test_every_table_is_compared_with_the_printed_one():
    assert [printed.split()[0] for printed in PRINTED.split("Table ")[1:]] == list(TABLES)


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
