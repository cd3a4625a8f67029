"""The quantizers that Table 1 and Figures 3 to 6 compare."""

import pytest
import torch

from codalib.experiments.ablation import (
    ATTENTION,
    METHODS,
    ONE_LEVEL_ATTENTION,
    RESIDUAL,
    VQ,
    Fitted,
    ablation_rows,
    chosen,
    load_quantizers,
    save_quantizers,
)
from codalib.experiments.sweeps import BEST, PAPER
from codalib.training.settings import QuantizerSettings


def row(grid, kind, start, setting, seed=0, error=1.0):
    settings = {"kind": kind, "start": start, "seed": seed}
    found = {"grid": grid, "setting": setting, "settings": settings, "choose": {"relative_error": error}, "test": {}}
    return found | {"name": (grid, kind, start, setting, seed)}


def whole_factorial():
    """Attention from data is better on one grid, from random codes on the other; nearest codes from data."""
    errors = {("nearest", "random"): 3, ("nearest", "data"): 2}
    own = {"flat": errors | {("attention", "random"): 5, ("attention", "data"): 4}}
    own["deep"] = errors | {("attention", "random"): 4, ("attention", "data"): 5}
    return [
        row(grid, kind, start, setting, seed, error + (setting == "paper") * 10 + seed)
        for grid, cells in own.items()
        for (kind, start), error in cells.items()
        for setting in ("tried", "best", "paper")
        for seed in ((0,) if setting == "tried" else (0, 1))
    ]


@pytest.mark.parametrize("without", [(), [("nearest", "random")]], ids=["both starts", "nearest from data alone"])
def test_each_method_is_a_cell_of_the_factorial_at_its_better_start_and_the_papers_from_random_codes(without):
    whole = [own for own in whole_factorial() if own["name"][1:3] not in without]
    cells = {VQ: ("flat", "nearest", "data"), ONE_LEVEL_ATTENTION: ("flat", "attention", "data")}
    cells |= {RESIDUAL: ("deep", "nearest", "data"), ATTENTION: ("deep", "attention", "random")}
    starts = {(method, BEST): start for method, (_, _, start) in cells.items()}
    starts |= {(method, PAPER): "data" if without and cells[method][1] == "nearest" else "random" for method in cells}
    rows = ablation_rows(whole, "flat", "deep")
    assert [(method, setting, own["name"]) for method, setting, own in rows] == [
        (method, setting, (*cells[method][:2], starts[method, setting], name, seed))
        for method in METHODS
        for setting, name in ((BEST, "best"), (PAPER, "paper"))
        for seed in (0, 1)
    ]


def test_a_method_without_a_finished_trial_is_refused():
    rows = whole_factorial()
    with pytest.raises(ValueError, match=r"expected a finished trial of nearest codes on 'x', best setting, got none"):
        ablation_rows(rows, "flat", "x")
    for own in rows:
        if own["setting"] == "paper" and own["settings"]["kind"] == "attention":
            del own["test"]  # a loss that was not finite
    with pytest.raises(ValueError, match=r"attention codes on 'flat', paper setting"):
        ablation_rows(rows, "flat", "deep")


def fitted(method, setting, seed, steps=()):
    kind, residual = METHODS[method]
    settings = QuantizerSettings(9, 2, kind=kind, codebook_size=16, scales=(1, 4) if residual else (4,), seed=seed)
    torch.manual_seed(seed)
    first, *states = [settings.build_quantizer(4).requires_grad_(False) for _ in (0, *steps)]
    return Fitted(method, setting, settings, first, tuple(zip(steps, states, strict=True)))


def weights(quantizer):
    return torch.cat([value.flatten() for value in quantizer.state_dict().values()])


def test_quantizers_are_read_as_they_were_written(tmp_path):
    written = [fitted(VQ, BEST, 3, (0, 7)), fitted(VQ, BEST, 4), fitted(ATTENTION, PAPER, 3)]
    save_quantizers(written, tmp_path / "q", "emoji")
    state = torch.random.get_rng_state()
    read, vae = load_quantizers(tmp_path / "q")
    assert torch.equal(state, torch.random.get_rng_state())
    assert vae == "emoji"
    for one, two in zip(read, written, strict=True):
        assert (one.method, one.setting, one.settings) == (two.method, two.setting, two.settings)
        assert torch.equal(weights(one.quantizer), weights(two.quantizer))
        assert [step for step, _ in one.snapshots] == [step for step, _ in two.snapshots]
        for (_, left), (_, right) in zip(one.snapshots, two.snapshots, strict=True):
            assert torch.equal(weights(left), weights(right))
    assert [own.settings.seed for own in chosen(read, VQ, BEST)] == [3, 4]
    with pytest.raises(ValueError, match=r"expected one of \+ attention.*, paper's setting; .* got 'Vector"):
        chosen(read, VQ, PAPER)
    with pytest.raises(ValueError, match="01_quantizer_factorial"):
        load_quantizers(tmp_path / "nothing")


def test_the_embedded_quantizers_are_whole():
    quantizers, vae = load_quantizers("emoji")
    assert vae == "emoji"
    for method, (kind, residual) in METHODS.items():
        for setting in (BEST, PAPER):
            own = chosen(quantizers, method, setting)
            assert len({one.settings.seed for one in own}) >= 3
            assert all(one.settings.kind == kind and (len(one.settings.scales) > 1) == residual for one in own)
            rates = {one.settings.learning_rate for one in own}
            assert rates == {0.0005} if setting == PAPER else len(rates) == 1
    assert chosen(quantizers, VQ, BEST)[0].snapshots
