"""A linear probe: how much of an image's class its latents and its tokens hold in a form that a linear map reads."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from codalib.datasets.images import ImageDataset, evaluation_batches
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import Tokens, join_levels, token_levels

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried: scikit-learn's C, the inverse of the L2 penalty
ITERATIONS = 200  # of L-BFGS

Features = np.ndarray | csr_array  # (N, D)


@dataclass(frozen=True)
class Encoded:
    """N labelled images as a tokenizer encodes them, at the posterior's mean."""

    latents: Tensor  # (N, C, H, W) before quantization
    tokens: Tokens
    labels: np.ndarray  # (N,)
    groups: list[str]  # (N,): of one group are the images of one concept


@torch.no_grad()
def encode_labelled(tokenizer: CodaTokenizer, images: ImageDataset, batch_size: int = 64) -> Encoded:
    """Every readable image of a data set, on the CPU."""
    device, latents, levels, labels, numbers = next(tokenizer.parameters()).device, [], [], [], []
    for batch in evaluation_batches(images, batch_size):
        latents.append(tokenizer.vae.encode(batch["image"].to(device), sample=False))
        levels.append(tokenizer.quantizer.encode(latents[-1]))
        labels, numbers = labels + batch["label"].tolist(), numbers + batch["index"].tolist()
    tokens = Tokens((torch.cat(own).cpu() for own in zip(*levels, strict=True)), tokenizer.quantizer.codebook_size)
    groups = [images.items[number].group or images.items[number].name for number in numbers]
    return Encoded(torch.cat(latents).cpu(), tokens, np.array(labels), groups)


@torch.no_grad()
def probe_features(quantizer: ResidualQuantizer, encoded: Encoded) -> dict[str, Features]:
    """What a probe sees of N images, by name: latents (N, C) or (N, C H W), and token histograms (N, levels K)."""
    device = next(quantizer.parameters()).device
    quantized = quantizer.decode([level.to(device) for level in encoded.tokens]).cpu()
    found: dict[str, Features] = {}
    for name, latents in (("continuous latents", encoded.latents), ("quantized latents", quantized)):
        found[f"{name}, mean over positions"] = latents.mean(dim=(2, 3)).numpy()
        found[f"{name}, all positions"] = latents.flatten(1).numpy()
    return found | {"token histograms of each level": histograms(encoded.tokens)}


def histograms(tokens: Tokens) -> csr_array:
    """How often each of N images uses each code at each level: (N, levels K), level after level."""
    columns = join_levels(tokens) + tokens.codebook_size * token_levels(tokens.scales)  # (N, L)
    starts, shape = np.arange(len(columns) + 1) * columns.shape[1], (len(columns), len(tokens) * tokens.codebook_size)
    counts = csr_array((np.ones(columns.numel(), np.float32), columns.numpy().ravel(), starts), shape=shape)
    counts.sum_duplicates()
    return counts


def linear_probe(
    features: Mapping[str, Features], labels: Mapping[str, np.ndarray], strengths: Sequence[float] = STRENGTHS
) -> tuple[np.ndarray, float]:
    """Multinomial logistic regression with an L2 penalty: the labels (N,) that it gives the images of "val".

    The strength is the one of highest accuracy on "held out" (of other concepts) after fitting to "fit"; the probe is
    then fitted to both. Dense features are standardised by the mean and deviation of those it is fitted to.

    Args:
        features, labels: (N, D) and (N,) of each of "fit", "held out" and "val".
    Returns the labels and the strength.
    """
    scores = [
        (_predicted(features["fit"], labels["fit"], features["held out"], one) == labels["held out"]).mean()
        for one in strengths
    ]
    best = strengths[int(np.argmax(scores))]
    parts = [features["fit"], features["held out"]]
    both = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else csr_array(vstack(parts))
    return _predicted(both, np.concatenate([labels["fit"], labels["held out"]]), features["val"], best), best


def _predicted(features: Features, labels: np.ndarray, others: Features, strength: float) -> np.ndarray:
    if isinstance(features, np.ndarray):
        mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
        features, others = (features - mean) / deviation, (others - mean) / deviation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty ends at ITERATIONS, an early stop
        probe = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(features, labels)
    return probe.predict(others)
