"""The paper can be read in the core files of `codalib.models`."""

import re
from pathlib import Path

import torch

from codalib import models
from codalib.models.quantizer import ResidualAttentionQuantizer
from codalib.tools.bench_cases import released_forward

FOLDER = Path(models.__file__).parent
TEXTS = {name: (FOLDER / f"{name}.py").read_text() for name in models.CORE}


def test_the_core_is_under_1000_lines():
    assert sum(len(text.splitlines()) for text in TEXTS.values()) < 1000


def test_every_equation_stands_where_the_table_says():
    rows = re.findall(r"^    Eq\. ([\d, ]+?)  +.*?  (\w+)\.py +([\w.]+)$", models.__doc__, re.M)
    numbers = {int(n): (file, name.split(".")[-1]) for row, file, name in rows for n in row.split(",")}
    assert set(numbers) == set(range(4, 13))
    for number, (file, name) in numbers.items():
        assert file in models.CORE
        body = re.split(rf"(?:def|class) {name}\b", TEXTS[file], maxsplit=1)[1]
        own = re.split(r"\n(?:    )?(?:def|class|@)", body, maxsplit=1)[0] if name[0].islower() else body
        assert re.search(rf"Eq\. {number}\b", own), f"Eq. {number} is not in {name} of {file}.py"


def test_the_release_s_way_in_the_benchmark_has_the_values_and_gradients_of_the_formula():
    torch.manual_seed(0)
    quantizer = ResidualAttentionQuantizer(4, 24, (1, 2, 4), 8, backend="reference").double()
    latents = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    out = quantizer(latents)
    ours = out.quantized, out.quantization_loss, out.entropy_loss
    theirs = released_forward(quantizer, latents)
    torch.testing.assert_close(ours, theirs)
    weights = list(quantizer.parameters())
    gradients = (torch.autograd.grad(x[0].square().sum() + x[1] + x[2], weights) for x in (ours, theirs))
    torch.testing.assert_close(*gradients)
