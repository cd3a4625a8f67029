import itertools
from dataclasses import replace

import pytest
import torch

from codalib.experiments.ablation import (
    ATTENTION,
    METHODS,
    ONE_LEVEL_ATTENTION,
    RESIDUAL,
    VQ,
    best,
    chosen,
    fit_methods,
    fit_trial,
    load_trials,
    paper_setting,
    save_trials,
)
from codalib.experiments.sweeps import BEST, PAPER
from codalib.training.settings import QuantizerSettings

SETTINGS = QuantizerSettings(steps=20, batch_size=8, codebook_size=16, scales=(1, 2, 4), ema=0.0, log_every=20)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trials(latents, tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("sweep"), itertools.product([0.0005, 0.02], [0.05, 0.0])
    settings = [replace(SETTINGS, learning_rate=rate, entropy_weight=weight) for rate, weight in pairs]
    return [fit_trial(ATTENTION, own, latents, folder) for own in settings]


@pytest.fixture(scope="module")
def fitted(latents, tmp_path_factory):
    rates = [0.0005, 0.05], [0.0005, 0.02]
    return fit_methods(
        SETTINGS, latents, tmp_path_factory.mktemp("fits"), *rates, [0.05], seeds=[3, 4], snapshots=[0, 7]
    )


def weights(quantizer):
    return torch.cat([value.flatten() for value in quantizer.state_dict().values()])


def test_the_best_has_the_lowest_error(trials):
    assert best(trials).quantization_error == min(trial.quantization_error for trial in trials)
    assert best(trials).settings.learning_rate == 0.02


def test_the_papers_setting_is_found_or_missed_in_words(trials):
    assert paper_setting(trials).settings.learning_rate == 0.0005
    assert paper_setting(trials).row()["entropy_weight"] == 0.05
    with pytest.raises(ValueError, match="the paper's"):
        paper_setting(trials[1:])


def test_held_out_latents_are_not_trained_on(latents, tmp_path):
    changed = latents.clone()
    changed[-4:] *= 10  # the last tenth
    first, second = (fit_trial(VQ, SETTINGS, x, tmp_path / n) for n, x in (("a", latents), ("b", changed)))
    codes = [trial.quantizer.codebooks.weight for trial in (first, second)]
    assert torch.equal(*codes)
    assert second.quantization_error > first.quantization_error


def test_the_chosen_settings_are_fitted_with_every_seed(fitted):
    for method, (kind, residual) in METHODS.items():
        own = [trial for trial in fitted if trial.method == method]
        assert {trial.quantizer.kind for trial in own} == {kind}
        assert {trial.settings.scales for trial in own} == {(1, 2, 4) if residual else (4,)}
        assert sum(trial.settings.seed == 3 for trial in own) == 2  # the sweep
        for setting in (BEST, PAPER):
            seeds = chosen(fitted, method, setting)
            assert [trial.settings.seed for trial in seeds] == [3, 4]
            assert len({(trial.settings.learning_rate, trial.settings.entropy_weight) for trial in seeds}) == 1
        assert {t.settings.learning_rate for t in chosen(fitted, method, PAPER)} == {0.0005}
    with pytest.raises(ValueError, match="got 'x'"):
        chosen(fitted, "x", BEST)


def test_a_sweep_without_the_papers_setting_is_refused(latents, tmp_path):
    with pytest.raises(ValueError, match=r"expected the paper's .* got \[\(0.05, 0.0\)\]"):
        fit_methods(SETTINGS, latents, tmp_path, [0.05], [0.0005], [0.05])
    assert not list(tmp_path.iterdir())


def test_trials_are_listed_by_seed(fitted):
    own = [(t.settings.seed, t.settings.learning_rate) for t in fitted if t.method == VQ]
    assert own[:2] == [(3, 0.0005), (3, 0.05)]
    assert own[2:] == sorted(own[2:])


def test_snapshots_are_states_on_the_way(fitted, latents, tmp_path):
    for trial in fitted:
        kept = trial.method in (VQ, ONE_LEVEL_ATTENTION) and trial.settings.seed == 3
        assert [step for step, _ in trial.snapshots] == ([0, 7] if kept else [])
    trial = chosen(fitted, VQ, BEST)[0]
    (_, start), (_, later) = trial.snapshots
    torch.manual_seed(3)
    assert torch.equal(weights(start), weights(trial.settings.build_quantizer(4)))
    assert not torch.equal(weights(start), weights(later))
    assert not torch.equal(weights(later), weights(trial.quantizer))
    # Keeping them changes nothing.
    plain = fit_trial(VQ, trial.settings, latents, tmp_path)
    assert torch.equal(weights(plain.quantizer), weights(trial.quantizer))


def test_trials_are_read_as_they_were_written(fitted, latents, tmp_path):
    save_trials(fitted, tmp_path / "q", "emoji")
    state = torch.random.get_rng_state()
    again, vae = load_trials(tmp_path / "q")
    assert torch.equal(state, torch.random.get_rng_state())
    assert vae == "emoji"
    assert [trial.row() for trial in again] == [trial.row() for trial in fitted]
    for one, two in zip(again, fitted, strict=True):
        assert one.settings == two.settings
        assert torch.equal(weights(one.quantizer), weights(two.quantizer))
        assert [step for step, _ in one.snapshots] == [step for step, _ in two.snapshots]
        for (_, left), (_, right) in zip(one.snapshots, two.snapshots, strict=True):
            assert torch.equal(weights(left), weights(right))
    with pytest.raises(ValueError, match="01_fit_quantizers"):
        load_trials(tmp_path / "nothing")


def test_one_level_and_residual_are_told_apart():
    assert METHODS[VQ] == ("nearest", False)
    assert METHODS[RESIDUAL] == ("nearest", True)


def test_the_embedded_quantizers_are_whole():
    trials, vae = load_trials("emoji")
    assert vae == "emoji"
    for method in METHODS:
        for setting in (BEST, PAPER):
            assert len(chosen(trials, method, setting)) >= 3
    assert chosen(trials, VQ, BEST)[0].snapshots
