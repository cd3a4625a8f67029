import pytest
import torch

from codalib.ablation import best, paper_setting, sweep
from codalib.train import QuantizerSettings

SETTINGS = QuantizerSettings(steps=20, batch_size=8, codebook_size=16, scales=(1, 2, 4), ema=0.0, log_every=20)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trials(latents, tmp_path_factory):
    return sweep(SETTINGS, latents, tmp_path_factory.mktemp("sweep"), [0.0005, 0.02], [0.05, 0.0])


def test_every_setting_is_tried_once_and_the_best_has_the_lowest_error(trials):
    tried = [(trial.settings.learning_rate, trial.settings.entropy_weight) for trial in trials]
    assert tried == [(0.0005, 0.05), (0.0005, 0.0), (0.02, 0.05), (0.02, 0.0)]
    assert best(trials).quantization_error == min(trial.quantization_error for trial in trials)
    assert best(trials).settings.learning_rate == 0.02


def test_the_papers_setting_is_found_or_missed_in_words(trials):
    assert paper_setting(trials).settings.learning_rate == 0.0005
    assert paper_setting(trials).row("x")["entropy_weight"] == 0.05
    with pytest.raises(ValueError, match="the paper's"):
        paper_setting(trials[1:])


def test_held_out_latents_are_not_trained_on(latents, tmp_path):
    changed = latents.clone()
    changed[-4:] *= 10  # the last tenth
    first, second = (sweep(SETTINGS, x, tmp_path / n, [0.02]) for n, x in (("a", latents), ("b", changed)))
    codes = [trial[0].quantizer.codebooks.weight for trial in (first, second)]
    assert torch.equal(*codes)
    assert second[0].quantization_error > first[0].quantization_error
