import dataclasses
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from codalib.base.processes import launch
from codalib.datasets.images import load_dataset
from codalib.datasets.token_cache import CacheMismatch, TokenCache, tokenizer_hash
from codalib.evaluation.generation import (
    BASELINES,
    GenerationSettings,
    SamplerConfig,
    asked_images,
    evaluate_maskgit,
    read_generation_results,
    sampler_grid,
    shuffle_levels,
    shuffle_tokens,
)
from codalib.evaluation.generation_metrics import (
    LinearProbe,
    Reference,
    class_accuracy,
    inception_score,
    moments,
    nearest,
)
from codalib.evaluation.metrics import FrechetDistance, frechet_distance
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.checkpoints import load_vae
from codalib.models.maskgit import MaskGIT
from codalib.models.tokenizer import CodaTokenizer
from codalib.pretrained.networks import EfficientNetLite0
from codalib.training.maskgit import train_maskgit
from codalib.training.settings import MaskGITSettings
from codalib.training.trainer import read_log

SCALES = (1, 2, 8)
SETTINGS = GenerationSettings(
    "emoji", val_limit=12, train_limit=24, batch_size=5, frechet="fd_effnet", frechet_resolution=32
)
SAMPLERS = sampler_grid(SamplerConfig(steps=2), guidance=(0.0, 2.0))


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_samples_that_are_all_alike_are_precise_and_recall_little():
    cloud = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    distance = SimpleNamespace(name="fd_effnet@32", kernel_name="kd_effnet@32")
    reference = Reference(distance, cloud, "images", 3, None, None, None)
    values = reference.evaluate({"frechet": 0.05 * cloud}, torch.zeros(60))
    assert values["precision"] == 1
    assert values["recall"] < 0.3


def test_moments_give_the_frechet_distance_of_the_other_metrics():
    distance = FrechetDistance(EfficientNetLite0(), 32)
    real, fake = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance.update(real, real=True)
    distance.update(fake, real=False)
    ours = frechet_distance(*moments(distance.inception(real)), *moments(distance.inception(fake)))
    assert ours == pytest.approx(distance.compute().item(), rel=1e-4)


def test_the_nearest_is_found_in_parts_too():
    points, others = torch.randn(7, 3), torch.randn(5, 3)
    distances, indices = nearest(points, others, chunk=2)
    table = (points[:, None] - others).square().sum(dim=2).sqrt()
    torch.testing.assert_close(distances, table.min(dim=1).values)
    assert torch.equal(indices, table.argmin(dim=1))


def test_the_probe_tells_classes_apart_however_rare():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 200 + [1] * 10 + [2] * 10)
    centres = 3 * torch.randn(3, 20, generator=generator)

    def features():
        return centres[labels] + torch.randn(len(labels), 20, generator=generator)

    probe = LinearProbe(features(), labels, 3)
    accuracy, balanced = class_accuracy(probe.predict(features()), labels)
    assert accuracy > 0.95
    assert balanced > 0.9
    noise, _ = class_accuracy(probe.predict(torch.randn(220, 20, generator=generator)), labels)
    assert noise < 0.8
    wide = LinearProbe(torch.randn(8, 50, generator=generator), torch.arange(8) % 2, 2)  # fewer images than features
    assert wide.weight.isfinite().all()


def test_class_accuracy_weighs_images_or_classes():
    asked = torch.tensor([0, 0, 0, 1])
    assert class_accuracy(torch.tensor([0, 0, 0, 0]), asked) == (0.75, 0.5)


def test_shuffled_tokens_keep_each_places_counts_and_nothing_else():
    tokens = torch.randint(5, (400, 6), generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = tokens[:, 0]
    shuffled = shuffle_tokens(tokens, torch.Generator().manual_seed(1))
    for place in range(6):
        assert torch.equal(shuffled[:, place].bincount(minlength=5), tokens[:, place].bincount(minlength=5))
    assert (shuffled[:, 1] == shuffled[:, 0]).float().mean() < 0.3


def test_shuffled_levels_keep_each_levels_counts_and_nothing_else():
    tokens = torch.cat([torch.zeros(50, 1), torch.arange(1, 5).repeat(50, 1)], dim=1).long()  # scales 1 and 2
    shuffled = shuffle_levels(tokens, (1, 2), torch.Generator().manual_seed(0))
    assert (shuffled[:, 0] == 0).all()
    assert shuffled.flatten().bincount().tolist() == [50] * 5
    assert (shuffled[:, 1] == 1).float().mean() < 0.5


def test_samples_are_asked_for_evenly_spread_images():
    assert asked_images(3, 5).tolist() == [0, 2, 4]
    assert asked_images(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert asked_images(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_inception_score_is_between_one_and_the_classes():
    head = torch.nn.Linear(4, 8)
    with torch.no_grad():
        head.weight.copy_(torch.eye(8, 4) * 50)
    extractor = type("", (), {"model": type("", (), {"fc": head})})
    distance = type("", (), {"inception": type("", (), {"extractor": extractor})})
    certain = torch.eye(4).repeat(250, 1)  # each of four classes, surely
    assert inception_score(certain, distance) == pytest.approx(4, abs=0.2)
    assert inception_score(torch.ones(100, 4), distance) == pytest.approx(1, abs=1e-3)


def test_a_grid_of_samplers_names_every_combination():
    found = sampler_grid(SamplerConfig(order="coarse-to-fine"), steps=(8, 32), guidance=(0.0, 1.5))
    assert list(found) == [
        "steps 8, guidance 0",
        "steps 8, guidance 1.5",
        "steps 32, guidance 0",
        "steps 32, guidance 1.5",
    ]
    assert found["steps 32, guidance 1.5"] == SamplerConfig(steps=32, guidance=1.5, order="coarse-to-fine")
    with pytest.raises(ValueError, match="got two named 'temperature 1'"):
        sampler_grid(SamplerConfig(), temperature=(1.0, 1.0000001))


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vae, quantizer = load_vae("emoji"), ResidualNearestQuantizer(16, 32, SCALES)
    images = load_dataset("emoji", "train", 64, random_crop=False, limit=16)
    latents = vae.encode(torch.stack([images[i]["image"] for i in range(16)]), sample=False)
    features = latents.movedim(1, -1).flatten(0, 2)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:32]
    quantizer.codebooks.weight.data = features[chosen].detach()
    tokenizer = CodaTokenizer(vae, quantizer)
    tokenizer.save_pretrained(folder / "tokenizer", base="emoji")
    generator = MaskGIT(32, SCALES, 16, 1, 2, num_classes=9).eval()
    with torch.no_grad():
        for parameter in generator.parameters():  # far from uniform, so that the class matters
            if parameter.ndim > 1:
                parameter.mul_(10)
    generator.info = {"tokenizer": tokenizer_hash(tokenizer), "classes": images.classes, "text_encoder": None}
    generator.save_pretrained(folder / "generator")
    by_text = MaskGIT(32, SCALES, 16, 1, 2, text_dim=384).eval()
    by_text.info = generator.info | {"text_encoder": "minilm"}
    by_text.save_pretrained(folder / "by-text")
    return str(folder / "generator"), str(folder / "tokenizer"), str(folder / "by-text")


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    evaluate_maskgit(SETTINGS, *models[:2], SAMPLERS, folder)
    return folder


def test_every_method_is_measured(models, measured):
    rows, protocol = read_generation_results(SETTINGS, *models[:2], SAMPLERS, measured)
    named = {row["method"]: row for row in rows}
    assert list(named) == [*BASELINES, "guidance 0", "guidance 2"]
    metrics = {
        "fd_effnet@32",
        "kd_effnet@32",
        "precision",
        "recall",
        "class_accuracy",
        "class_accuracy_balanced",
        "nearest_train",
        "copies",
    }
    assert metrics == protocol.keys()
    assert all(metrics <= row.keys() for row in rows)
    assert named["validation images"]["fd_effnet@32"] == pytest.approx(0, abs=1e-3)  # against themselves
    assert named["validation images"]["nearest_train"] == pytest.approx(1)
    assert named["training images"]["copies"] == 1
    assert named["training images"]["nearest_train"] == pytest.approx(0, abs=1e-2)
    for distance in ("fd_effnet@32", "kd_effnet@32"):
        assert named["tokenizer"][distance] < named["shuffled tokens"][distance]
    assert named["guidance 2"]["guidance"] == 2.0
    assert named["guidance 2"]["steps"] == 2
    assert named["guidance 2"]["samples"] == 12
    assert named["guidance 2"]["seconds_a_sample"] > 0
    assert named["guidance 0"]["fd_effnet@32"] != named["guidance 2"]["fd_effnet@32"]
    assert "12 validation images" not in protocol["copies"]
    assert "12 samples against 12 validation images of emoji" in protocol["fd_effnet@32"]


def test_what_is_measured_is_not_measured_again(models, measured, monkeypatch):
    monkeypatch.setattr("codalib.evaluation.generation.generate", lambda *_, **__: pytest.fail("drawn again"))
    evaluate_maskgit(SETTINGS, *models[:2], SAMPLERS, measured)
    files = sorted(path.stat().st_mtime_ns for path in measured.rglob("*.json"))
    evaluate_maskgit(dataclasses.replace(SETTINGS, batch_size=3), *models[:2], SAMPLERS, measured)
    assert files == sorted(path.stat().st_mtime_ns for path in measured.rglob("*.json"))
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        evaluate_maskgit(SETTINGS, *models[:2], {"new": SamplerConfig(steps=1)}, measured)


def test_compiled_samples_are_kept_apart(models, measured, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr("codalib.evaluation.generation.compile_decoding", compiled.append)
    shutil.copytree(measured, tmp_path / "measured")
    samples = {*(tmp_path / "measured").rglob("samples-*.safetensors")}
    assert samples
    settings = dataclasses.replace(SETTINGS, compile=True)
    evaluate_maskgit(settings, *models[:2], SAMPLERS, tmp_path / "measured")
    assert len(compiled) == 1
    assert len({*(tmp_path / "measured").rglob("samples-*.safetensors")}) == 2 * len(samples)


def test_damaged_features_are_drawn_again_with_a_warning(models, measured, tmp_path, caplog):
    shutil.copytree(measured, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "generated").glob("guidance-2-*.json"):
        file.unlink()
    for file in (features := list((tmp_path / "damaged" / "generated").glob("*.safetensors"))):
        file.write_bytes(file.read_bytes()[:-1])
    evaluate_maskgit(SETTINGS, *models[:2], SAMPLERS, tmp_path / "damaged")
    assert sum(f"{file} is damaged" in caplog.text for file in features) >= 2
    again, before = (
        [row | {"seconds_a_sample": None} for row in read_generation_results(SETTINGS, *models[:2], SAMPLERS, place)[0]]
        for place in (tmp_path / "damaged", measured)
    )
    assert again == before


def train_and_measure(settings, cache, folder, *arguments):
    train_maskgit(settings, cache, cache, folder)
    evaluate_maskgit(*arguments)


def test_two_processes_train_and_measure_as_one_does(models, measured, tmp_path):
    samplers = {"guidance 2": SAMPLERS["guidance 2"]}
    arguments = (SETTINGS, *models[:2], samplers, tmp_path, ("shuffled tokens",))
    (tokens,) = measured.glob("generated/tokens-val-*")
    cache = TokenCache.open(tokens)
    still = MaskGITSettings(steps=2, batch_size=3, width=16, depth=1, heads=2, learning_rate=0.0)
    launch(train_and_measure, 2, still, cache, tmp_path / "two", *arguments)
    train_maskgit(still, cache, cache, tmp_path / "one")
    log_of_two, log_of_one = read_log(tmp_path / "two")[-1], read_log(tmp_path / "one")[-1]
    assert log_of_two["val_loss"] == pytest.approx(log_of_one["val_loss"], rel=1e-5)  # each image once
    assert log_of_two["loss"] != log_of_one["loss"]  # the first process's images alone
    two, _ = read_generation_results(*arguments)
    one = read_generation_results(SETTINGS, *models[:2], samplers, measured, ("shuffled tokens",))[0]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["samples"] == theirs["samples"] == 12
        for name in ("fd_effnet@32", "precision", "recall", "class_accuracy", "nearest_train", "copies"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-6), name
    assert not list(tmp_path.rglob("*.part*"))


def test_captions_are_asked_for(models, tmp_path):
    settings = dataclasses.replace(SETTINGS, samples=6, train_limit=0)
    samplers = {"plain": SamplerConfig(steps=1, guidance=1.0)}
    evaluate_maskgit(settings, models[2], models[1], samplers, tmp_path)  # no baseline needs the whole training set
    (*baselines, row), _ = read_generation_results(settings, models[2], models[1], samplers, tmp_path)
    assert [baseline["samples"] for baseline in baselines] == [12, 6, 6, 6, 6, 6]
    assert row["samples"] == 6
    assert "class_accuracy" not in row
    assert row["fd_effnet@32"] > 0


def test_against_training_images(models, tmp_path):
    settings = dataclasses.replace(SETTINGS, reference="train", val_limit=8)
    evaluate_maskgit(settings, None, models[1], {}, tmp_path, ("validation images", "training images"))
    rows, protocol = read_generation_results(
        settings, None, models[1], {}, tmp_path, ("validation images", "training images")
    )
    assert rows[0]["fd_effnet@32"] > 0
    assert "24 training images" in protocol["recall"]
    with pytest.raises(ValueError, match="'val', or 'train' with training images"):
        dataclasses.replace(settings, train_limit=0)


def test_two_images_are_enough_and_what_takes_more_says_so(models, tmp_path):
    settings = dataclasses.replace(SETTINGS, samples=None, val_limit=2)
    asked = settings, *models[:2], {"plain": SamplerConfig(steps=1)}, tmp_path
    evaluate_maskgit(*asked)
    rows, protocol = read_generation_results(*asked)
    assert all(math.isfinite(row["fd_effnet@32"]) and "recall" not in row for row in rows)
    assert protocol["recall"] == "left out: it takes 4 images, got 2"
    with pytest.raises(ValueError, match="expected 2 validation images of emoji, got 1"):
        evaluate_maskgit(dataclasses.replace(settings, val_limit=1), *asked[1:])


def test_training_images_decide_their_baselines_where_no_probe_reads_them(models, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, train_limit=0, val_limit=4, samples=4)
    asked = settings, None, models[1], {}, tmp_path, ("training images", "tokenizer on training images")

    def evaluated(flipped):
        def load(name, split, side, *rest, **options):
            images = load_dataset(name, split, side, *rest, **options)
            images.items = images.items[::-1] if flipped and split == "train" else images.items
            return images if split == "val" else images.subset(list(range(6)))

        monkeypatch.setattr("codalib.evaluation.generation.load_dataset", load)
        evaluate_maskgit(*asked)
        return [row["fd_effnet@32"] for row in read_generation_results(*asked)[0]]

    first = evaluated(flipped=False)
    assert all(a != b for a, b in zip(first, evaluated(flipped=True), strict=True))
    assert evaluated(flipped=False) == first


def test_another_tokenizers_generator_and_bad_names_are_refused(models, tmp_path):
    torch.manual_seed(1)
    other = CodaTokenizer(load_vae("emoji"), ResidualNearestQuantizer(16, 32, SCALES))
    other.save_pretrained(tmp_path / "other", base="emoji")
    with pytest.raises(CacheMismatch, match=tokenizer_hash(other)):
        evaluate_maskgit(SETTINGS, models[0], str(tmp_path / "other"), SAMPLERS, tmp_path)
    with pytest.raises(ValueError, match=r"expected baselines of validation images, .*, got 'noise'"):
        evaluate_maskgit(SETTINGS, *models[:2], SAMPLERS, tmp_path, ("noise",))
    with pytest.raises(ValueError, match="expected a MaskGIT to sample from by guidance 0"):
        evaluate_maskgit(SETTINGS, None, models[1], SAMPLERS, tmp_path)
    with pytest.raises(ValueError, match="give it another name"):
        evaluate_maskgit(SETTINGS, *models[:2], {"tokenizer": SamplerConfig()}, tmp_path)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        dataclasses.replace(SETTINGS, samples=1)
