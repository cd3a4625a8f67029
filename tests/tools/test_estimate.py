"""What a training on one's own images will take."""

import math

import pytest

from codalib.datasets.images import load_dataset
from codalib.models.checkpoints import load_vae
from codalib.models.quantizer import FLUX_SCALES, MAR_SCALES
from codalib.tools.estimate import GIB, DoesNotFit, Estimate, brief_settings, estimate, scales_for


def measured(**changes):
    values = {
        "batch_size": 8,
        "fixed_bytes": 2 * GIB,
        "bytes_an_image": GIB,
        "free_bytes": 20 * GIB,
        "seconds_a_step": 1.0,
        "seconds_a_fit_step": 0.02,
        "seconds_an_image": 0.01,
    }
    return Estimate(**values | changes)


@pytest.mark.parametrize("side", [1, 2, 5, 8, 16, 24, 32, 64])
def test_scales_rise_to_the_latent_grid(side):
    scales = scales_for(side)
    assert len(scales) == 10
    assert scales[-1] == side
    assert list(scales) == sorted(scales)


def test_scales_are_the_releases_where_it_has_them():
    assert (scales_for(16), scales_for(32)) == (MAR_SCALES, FLUX_SCALES)
    assert scales_for(8) == (1, 2, 3, 4, 5, 6, 7, 8, 8, 8)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        scales_for(0)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    measured(batch_size=16).check_memory()
    with pytest.raises(DoesNotFit, match=r"batch_size 17 takes about 19\.0 GiB.*20\.0 GiB.*batch_size 16 fits"):
        measured(batch_size=17).check_memory()
    with pytest.raises(DoesNotFit, match=r"batch_size 16 fits; with gradient_checkpointing batch_size 32 fits$"):
        measured(batch_size=17, bytes_checkpointed=GIB // 2).check_memory()
    with pytest.raises(DoesNotFit, match=r"batch_size 16 fits$"):
        measured(batch_size=17, bytes_checkpointed=GIB).check_memory()
    with pytest.raises(DoesNotFit, match="smaller resolution"):
        measured(free_bytes=3 * GIB).check_memory()


def test_a_run_that_takes_too_long_is_refused_with_steps_that_fit():
    found = measured()
    fitting = found.steps_within(5, images=500)
    fit, settings = 1500 if 1.5 * fitting > 1500 else round(1.5 * fitting), fitting
    found.check_time(5, settings, fit, 500)
    assert found.minutes(settings + 2, fit + 3, 500) > 5
    with pytest.raises(
        DoesNotFit, match=rf"1000 steps take about .* 5 were given: steps {fitting} fits, or give minutes"
    ):
        found.check_time(5, 1000, 1500, 500)
    with pytest.raises(DoesNotFit, match="set limit"):
        found.check_time(0.1, 1000, 1500, 5000)


def test_a_few_real_steps_are_measured_and_leave_nothing(tmp_path):
    vae, train = load_vae("emoji"), load_dataset("emoji", "train", 64, limit=8)
    fit, settings = brief_settings(vae, 64, 64, batch_size=2, steps=500)
    found = estimate(fit, settings, vae, train, tmp_path / "estimate")
    assert not (tmp_path / "estimate").exists()
    assert found.seconds_a_step > found.seconds_a_fit_step > 0
    assert 2**20 < found.bytes_checkpointed < found.bytes_an_image < found.fixed_bytes < found.free_bytes
    found.check_memory()


def test_a_batch_beyond_the_memory_is_not_tried(tmp_path, monkeypatch):
    vae, train = load_vae("emoji"), load_dataset("emoji", "train", 64, limit=4)
    fit, settings = brief_settings(vae, 64, 16, batch_size=4096, steps=5)
    monkeypatch.setattr("codalib.tools.estimate._memory", lambda: (GIB, 2 * GIB))
    found = estimate(fit, settings, vae, train, tmp_path / "estimate")
    assert math.isnan(found.seconds_a_step)
    with pytest.raises(DoesNotFit, match="batch_size 4096 takes"):
        found.check_memory()
