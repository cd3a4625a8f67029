import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from codalib import load_dataset, load_tokenizer
from codalib.base.paths import DATA
from codalib.base.processes import launch
from codalib.evaluation import reconstruction, results
from codalib.evaluation.metrics import ReconstructionMetrics, build_frechet, psnr
from codalib.evaluation.reconstruction import (
    EvaluationSettings,
    evaluate,
    evaluate_levels,
    evaluate_models,
    image_scores,
    read_reconstruction_results,
    worst_reconstructions,
)
from codalib.evaluation.results import model_digest, result_file
from codalib.models.checkpoints import check_models, find_model, load_vae, present_models
from codalib.models.tokenizer import CodaTokenizer

SETTINGS = EvaluationSettings("emoji", 64, val_limit=7, batch_size=3, frechet_resolution=64)
VAES, TOKENIZERS = {"emoji VAE": "emoji"}, {"CODA, emoji": "emoji"}
MODELS = VAES | TOKENIZERS


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    evaluate_models(SETTINGS, VAES, TOKENIZERS, folder)
    return folder


def test_each_model_has_a_row_and_each_number_its_protocol(alone):
    rows, protocol = read_reconstruction_results(SETTINGS, MODELS, alone)
    assert [row["method"] for row in rows] == list(MODELS)
    assert [row["images"] for row in rows] == [7, 7]
    assert [row["ratio"] for row in rows] == [8, 8]
    assert [row["codebook_size"] for row in rows] == [None, 1024]
    assert 20 < rows[1]["psnr"] < rows[0]["psnr"]
    for row in rows:
        assert {"psnr", "ssim", "perceptual_effnet"} & row.keys() <= protocol.keys()
    assert "utilization" in rows[1]
    assert any("7 reconstructions" in text for text in protocol.values())


def test_the_numbers_are_those_of_the_images_one_by_one(alone):
    images, vae = SETTINGS.load_images(), load_vae("emoji")
    expected = []
    for i in range(len(images)):
        picture = images[i]["image"][None]
        with torch.no_grad():
            expected.append(psnr(picture, vae(picture, generator=torch.Generator().manual_seed(i))))
    assert read_reconstruction_results(SETTINGS, MODELS, alone)[0][0]["psnr"] == pytest.approx(
        torch.cat(expected).mean().item(), 1e-4
    )


def test_two_processes_count_no_image_twice(alone, tmp_path):
    launch(evaluate_models, 2, SETTINGS, VAES, TOKENIZERS, tmp_path)
    shared, whole = (read_reconstruction_results(SETTINGS, MODELS, folder)[0] for folder in (tmp_path, alone))
    for ours, theirs in zip(shared, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_a_measured_model_is_not_measured_again_until_something_changes(alone, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr("codalib.evaluation.reconstruction.evaluate", refuse)
    evaluate_models(SETTINGS, VAES, TOKENIZERS, alone)
    other = EvaluationSettings("emoji", 64, val_limit=7, batch_size=2, frechet_resolution=64, seed=1)
    with pytest.raises(AssertionError, match="measured again"):
        evaluate_models(other, VAES, TOKENIZERS, alone)


def test_a_damaged_result_is_measured_again_with_a_warning(alone, tmp_path, caplog):
    shutil.copytree(alone, tmp_path / "damaged")
    files = sorted((tmp_path / "damaged" / "measured").iterdir())
    for file, damaged in zip(files, ("{", '{"row": {}}'), strict=True):
        file.write_text(damaged)
    evaluate_models(SETTINGS, VAES, TOKENIZERS, tmp_path / "damaged")
    assert all(f"{file} is damaged" in caplog.text for file in files)
    again, before = (read_reconstruction_results(SETTINGS, MODELS, place) for place in (tmp_path / "damaged", alone))
    assert again == before


def test_a_changed_tokenizer_is_another_result(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    CodaTokenizer.from_pretrained("emoji").save_pretrained(tmp_path / "mine", base="emoji")
    before = result_file(tmp_path, "mine", SETTINGS, [], ["mine"])
    assert find_model("mine") == str(tmp_path / "mine")
    weights = tmp_path / "mine" / "quantizer.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1e-3 for name, value in tensors.items()}, weights)
    assert result_file(tmp_path, "mine", SETTINGS, [], ["mine"]) != before
    save_file(tensors, weights)  # anew, but the same
    assert result_file(tmp_path, "mine", SETTINGS, [], ["mine"]) == before


def test_replaced_pictures_of_the_same_names_are_measured_again(tmp_path):
    rng = np.random.default_rng(0)
    place = tmp_path / "pictures" / "val" / "a"
    place.mkdir(parents=True)
    settings = EvaluationSettings(f"imagefolder:{tmp_path / 'pictures'}", 64, frechet=None, perceptual=None)
    found = []
    for spread in (255, 40, 40):
        for i in range(2):
            pixels = rng.integers(0, spread, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
        evaluate_models(settings, {"vae": "emoji"}, {}, tmp_path)
        found.append(read_reconstruction_results(settings, {"vae": "emoji"}, tmp_path)[0][0]["psnr"])
    assert found[1] > found[0] + 3
    assert found[2] not in found[:2]


def test_models_named_alike_have_results_of_their_own(tmp_path):
    names = ["a b", "a-b", "模型", "模式", "--"]
    assert len({result_file(tmp_path, name, SETTINGS, [], ["emoji"]) for name in names}) == len(names)


def test_weights_that_were_fetched_since_are_another_result(tmp_path, monkeypatch):
    images = SETTINGS.load_images()
    before = result_file(tmp_path, "x", SETTINGS, [images], ["emoji"])
    monkeypatch.setattr(results, "has_weights", lambda name: name == "inception_fid")
    assert result_file(tmp_path, "x", SETTINGS, [images], ["emoji"]) != before  # "auto" is Inception now


def test_metrics_that_have_seen_images_are_not_mixed_with_another_models():
    images, vae = load_dataset("emoji", "val", 64, limit=2), load_vae("emoji")
    used = ReconstructionMetrics(frechet=None)
    evaluate(vae, images, used)
    with pytest.raises(ValueError, match="expected metrics that have seen no image, got used ones"):
        evaluate(vae, images, used)


def test_results_of_an_earlier_protocol_are_not_taken(tmp_path, monkeypatch):
    now = result_file(tmp_path, "mine", SETTINGS, [], ["emoji"])
    monkeypatch.setattr("codalib.evaluation.results.PROTOCOL", 1)
    assert result_file(tmp_path, "mine", SETTINGS, [], ["emoji"]) != now


def test_every_odd_picture_of_a_thousand_classes_is_measured(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(1000):
        folder = tmp_path / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        if i % 10 == 0:  # most classes keep an empty folder, for speed
            size = (int(rng.integers(5, 90)), int(rng.integers(5, 90))) if i else (1, 1)
            picture = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
            mode = ("RGB", "L", "CMYK")[i // 10 % 3]
            exif = Image.Exif()
            exif[0x0112] = 6  # rotated by a quarter
            picture.convert(mode).save(folder / f"{i}.JPEG", exif=exif if i % 20 else Image.Exif())
    broken = tmp_path / "val" / "n00000500" / "500.JPEG"
    broken.write_bytes(broken.read_bytes()[:40])
    settings = EvaluationSettings(f"imagefolder:{tmp_path}", 64, batch_size=50, frechet=None, perceptual=None)
    evaluate_models(settings, {}, TOKENIZERS, tmp_path / "out")
    rows, _ = read_reconstruction_results(settings, TOKENIZERS, tmp_path / "out")
    assert rows[0]["images"] == 99
    assert np.isfinite(rows[0]["psnr"])


def test_models_that_are_not_here_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path))
    (tmp_path / "coda" / "mar").mkdir(parents=True)
    here, absent = present_models({"a": "coda/mar", "b": "coda/flux"})
    assert here == {"a": "coda/mar"}
    assert absent == {"b": "coda/flux"}


def test_a_folder_named_as_an_embedded_model_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    (tmp_path / "emoji").mkdir()
    assert find_model("emoji") == "emoji"


def test_wrong_models_are_one_sentence():
    with pytest.raises(ValueError, match="expected a name of its own for each model"):
        check_models({"a": "emoji"}, {"a": "emoji"})
    with pytest.raises(ValueError, match="no model"):
        check_models({}, {})
    with pytest.raises(ValueError, match="'b' is not here"):
        check_models({}, {"b": "nowhere/at/all"})
    check_models(VAES, TOKENIZERS)


@pytest.mark.parametrize("changed", ["tokenizer-emoji", "vae-emoji"])
def test_an_embedded_name_stands_for_the_tokenizer_and_its_vae(tmp_path, monkeypatch, changed):
    before = model_digest("emoji")
    for name in ("tokenizer-emoji", "vae-emoji"):
        shutil.copytree(DATA / name, tmp_path / name)
    monkeypatch.setitem(results.EMBEDDED_TOKENIZERS, "emoji", tmp_path / "tokenizer-emoji")
    monkeypatch.setattr(results, "EMOJI_VAE", tmp_path / "vae-emoji")
    assert model_digest("emoji") == before
    with open(next((tmp_path / changed).rglob("*.safetensors")), "ab") as file:
        file.write(b" ")
    assert model_digest("emoji") != before


def test_the_levels_together_are_the_whole(tmp_path):
    model, images = CodaTokenizer.from_pretrained("emoji"), SETTINGS.load_images()
    found = evaluate_levels(model, images, [ReconstructionMetrics(frechet=None) for _ in range(10)], batch_size=3)
    whole = reconstruction.evaluate(model, images, ReconstructionMetrics(1024, 10, frechet=None), batch_size=4)
    for name in ("psnr", "ssim", "quantization_error"):
        assert found[-1][name] == pytest.approx(whole[name], rel=1e-4)
    errors = [row["quantization_error"] for row in found]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="expected 10 sets of metrics, one a level, got 1"):
        evaluate_levels(model, images, [ReconstructionMetrics(frechet=None)], batch_size=7)


def test_image_scores_are_those_of_the_streamed_metrics():
    tokenizer, images = load_tokenizer("emoji-small"), load_dataset("emoji", "val", 64, limit=5)
    distance = build_frechet("fd_effnet", 32)
    streamed = ReconstructionMetrics(1024, 5, frechet=None, perceptual="perceptual_effnet")
    expected = evaluate(tokenizer, images, streamed, batch_size=3)
    scores, features = image_scores(tokenizer, images, streamed.perceptual, distance, batch_size=2)
    for name in ("psnr", "ssim", "perceptual_effnet"):
        assert scores[name].mean().item() == pytest.approx(expected[name], rel=1e-5)
    assert features.shape == (5, distance.inception.num_features)
    mse = scores["l2"].mean().item()
    assert 10 * np.log10(4 / mse) == pytest.approx(expected["psnr"], abs=3)


def test_the_worst_images_are_those_of_the_lowest_psnr_and_of_the_largest_loss():
    tokenizer, vae, images = load_tokenizer("emoji-small"), load_vae("emoji"), load_dataset("emoji", "val", 64, limit=7)
    lowest, largest, scores = worst_reconstructions(tokenizer, vae, images, count=3, seed=1, batch_size=4)
    ceiling = image_scores(vae, images, seed=1)[0]["psnr"]
    ours = image_scores(tokenizer, images, seed=1)[0]["psnr"]
    assert torch.allclose(scores, torch.stack([ceiling, ours]), atol=1e-2)
    assert lowest.numbers == sorted(range(7), key=lambda i: ours[i].item())[:3]
    assert largest.numbers == sorted(range(7), key=lambda i: (ours - ceiling)[i].item())[:3]
    assert torch.equal(lowest.images[0], images[lowest.numbers[0]]["image"])
    assert torch.allclose(lowest.psnr[1], psnr(lowest.images, lowest.discrete))
    assert (largest.loss.diff() <= 0).all()  # the worst first
