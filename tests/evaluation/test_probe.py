import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from codalib import load_dataset, load_tokenizer
from codalib.evaluation import probe
from codalib.evaluation.probe import encode_labelled, histograms, linear_probe, probe_features
from codalib.models.tokens import Tokens


def test_histograms_count_each_code_at_each_level():
    tokens = Tokens([torch.tensor([[[3]], [[0]]]), torch.tensor([[[0, 1], [1, 3]], [[2, 2], [2, 2]]])], 4)
    assert histograms(tokens).toarray().tolist() == [[0, 0, 0, 1, 1, 2, 0, 1], [1, 0, 0, 0, 0, 0, 4, 0]]


def parts(features, labels):
    return dict(zip(("fit", "held out", "val"), np.split(features, 3), strict=True)), dict(
        zip(("fit", "held out", "val"), np.split(labels, 3), strict=True)
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_the_probe_reads_what_is_linear_and_only_that(sparse):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    linear, crossed = (x[:, 0] + 0.1 * x[:, 1] > 0).astype(int), (x[:, 0] * x[:, 1] > 0).astype(int)
    for labels, low, high in ((linear, 0.9, 1.0), (crossed, 0.35, 0.65)):
        features, truth = parts(x, labels)
        features = {name: csr_array(part) for name, part in features.items()} if sparse else features
        predicted, strength = linear_probe(features, truth)
        assert low <= (predicted == truth["val"]).mean() <= high
        assert strength in probe.STRENGTHS


def test_the_strength_is_that_of_the_held_out_images_not_of_the_validation_images(monkeypatch):
    right = {0.1: 0.3, 1.0: 0.8, 10.0: 0.5}  # of the held out images, by strength
    asked = []

    def predicted(features, labels, others, strength):
        asked.append((len(features), len(others), strength))
        return np.arange(len(others)) < right[strength] * len(others)

    monkeypatch.setattr(probe, "_predicted", predicted)
    features = {"fit": np.zeros((5, 1)), "held out": np.zeros((10, 1)), "val": np.zeros((3, 1))}
    labels = {name: np.ones(len(part), bool) for name, part in features.items()}
    assert linear_probe(features, labels, tuple(right))[1] == 1.0
    assert asked == [(5, 10, 0.1), (5, 10, 1.0), (5, 10, 10.0), (15, 3, 1.0)]  # fitted to both at the end


def test_images_are_encoded_with_their_classes_and_concepts():
    tokenizer, images = load_tokenizer("emoji-small"), load_dataset("emoji", "val", 64, limit=5)
    encoded = encode_labelled(tokenizer, images, batch_size=3)
    assert encoded.labels.tolist() == images.labels.tolist()
    assert encoded.groups == [item.group for item in images.items]
    whole = tokenizer.encode(torch.stack([images[i]["image"] for i in range(5)]), sample=False)
    assert sum((one != two).sum().item() for one, two in zip(encoded.tokens, whole, strict=True)) <= 2  # rounding
    features = probe_features(tokenizer.quantizer, encoded)
    assert {name: part.shape for name, part in features.items()} == {
        "continuous latents, mean over positions": (5, 16),
        "continuous latents, all positions": (5, 1024),
        "quantized latents, mean over positions": (5, 16),
        "quantized latents, all positions": (5, 1024),
        "token histograms of each level": (5, 5 * 1024),
    }
    quantized = tokenizer.quantizer.decode(encoded.tokens).detach().flatten(1).numpy()
    assert np.allclose(features["quantized latents, all positions"], quantized, atol=1e-5)
