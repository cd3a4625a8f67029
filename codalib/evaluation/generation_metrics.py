"""Metrics of generated images: Frechet distance, precision and recall, the class asked for, copies of training images.

Every number comes from the pooled features of one network, "fid" and "kid" from Inception, "fd_effnet@SIDE" and
"kd_effnet@SIDE" from EfficientNet; the class is predicted, and copies are looked for, in EfficientNet's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from codalib.evaluation.metrics import (
    COVARIANCE_IMAGES,
    KERNEL_PROTOCOL,
    FrechetDistance,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

COPY_QUANTILE = 0.01  # a sample is a copy if it is nearer to a training image than this fraction of validation images
# Of the probe's least squares, times the features' mean variance. With it the probe is right for 81 % of the emoji's
# validation images, 74 % as the mean over their 9 classes; with ten times more or less for 3 % fewer.
PROBE_RIDGE = 0.1


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64, as a Frechet distance takes them."""
    features = features.double()
    return features.mean(dim=0), features.T.cov()


def nearest(features: Tensor, others: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The Euclidean distance of each of (N, D) to the nearest of (M, D), and which that is: both (N,)."""
    found = [torch.cdist(part, others).min(dim=1) for part in features.split(chunk)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


class LinearProbe:
    """A linear classifier of frozen features, by regularised least squares: each class weighs the same.

    Args:
        features: (N, D) of labelled images.
        labels: (N,) in [0, classes).
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int):
        x = features.double()
        self.mean = x.mean(dim=0)
        x = torch.cat([x - self.mean, x.new_ones(len(x), 1)], dim=1)  # (N, D + 1)
        counts = torch.bincount(labels, minlength=classes).clamp(min=1)
        weighted = x / counts[labels, None]
        gram = weighted.T @ x
        ridge = PROBE_RIDGE * gram.diagonal()[:-1].mean()
        gram.diagonal()[:-1] += ridge
        targets = torch.nn.functional.one_hot(labels, classes).double()
        self.weight = torch.linalg.solve(gram, weighted.T @ targets)  # (D + 1, classes)

    def predict(self, features: Tensor) -> Tensor:
        """Features (N, D) -> labels (N,)."""
        x = features.double() - self.mean
        return (x @ self.weight[:-1] + self.weight[-1]).argmax(dim=1)


def class_accuracy(predicted: Tensor, asked: Tensor) -> tuple[float, float]:
    """Fraction of the labels (N,) that are as asked, and its mean over the asked classes."""
    right = (predicted == asked).double()
    return right.mean().item(), torch.stack([right[asked == label].mean() for label in asked.unique()]).mean().item()


def inception_score(features: Tensor, distance: FrechetDistance) -> float:
    """The mean Inception Score of ten parts (N at most), from features (N, 2048) of InceptionFID (torch-fidelity's)."""
    logits = features @ distance.inception.extractor.model.fc.weight.detach().cpu().T  # without the bias, as usual
    return isc_features_to_metric(logits, splits=min(10, len(features)))[KEY_METRIC_ISC_MEAN]


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features (N, D) of the Frechet distance's network, and of EfficientNet."""

    distance: FrechetDistance
    features: Tensor  # of the reference images
    images: str  # what these are, in words
    neighbours: int  # of precision and recall
    probe: LinearProbe | None
    train: Tensor | None  # EfficientNet's, of the training images
    unseen: Tensor | None  # (N,) distances of the validation images to their nearest training image

    def evaluate(self, columns: Mapping[str, Tensor], asked: Tensor) -> dict[str, float]:
        """The metrics of some images, from their columns "frechet" (N, D) and "effnet" and their labels (N,)."""
        features = columns["frechet"]
        values, left_out = {}, self._left_out(len(features))
        if self.distance.name not in left_out:
            values[self.distance.name] = frechet_distance(*moments(self.features), *moments(features))
            values[self.distance.kernel_name] = kernel_distance(self.features, features)
        if "precision" not in left_out:
            values["precision"], values["recall"] = precision_recall(self.features, features, self.neighbours)
        if self.distance.name == "fid":
            values["inception_score"] = inception_score(features, self.distance)
        if self.probe is not None:
            effnet = columns.get("effnet", features)
            values["class_accuracy"], values["class_accuracy_balanced"] = class_accuracy(
                self.probe.predict(effnet), asked
            )
            distances = nearest(effnet, self.train)[0]
            values["nearest_train"] = (distances.median() / self.unseen.median()).item()
            values["copies"] = (distances < self.unseen.quantile(COPY_QUANTILE)).double().mean().item()
        return values

    def protocol(self, samples: int) -> dict[str, str]:
        """How each number is made, in words, or why it was not."""
        network = (
            "TF-ported InceptionV3, 2048-d, images resized to 299 (bilinear, not antialiased)"
            if self.distance.name == "fid"
            else f"EfficientNet-Lite0, 1280-d, images resized to {self.distance.extractor_side} (bicubic, "
            "antialiased); not comparable with FID"
        )
        reference = f"{len(self.features):,} {self.images}, centre crop"
        texts = {
            self.distance.name: f"{network}; {samples:,} samples against {reference}; rounded to 8 bits",
            self.distance.kernel_name: KERNEL_PROTOCOL,
            "precision": f"fraction of samples within {self.neighbours} neighbours' distance of {reference}",
            "recall": f"fraction of {reference} within {self.neighbours} neighbours' distance of a sample",
        }
        if self.distance.name == "fid":
            texts["inception_score"] = "mean of ten parts"
        if self.probe is not None:
            probe = f"a linear probe of EfficientNet's features, fitted to {len(self.train):,} training images"
            texts |= {
                "class_accuracy": f"fraction of samples in which {probe}, sees the asked class",
                "class_accuracy_balanced": "the same, the mean over the classes",
                "nearest_train": f"median distance to the nearest of {len(self.train):,} training images in "
                "EfficientNet's features, over that of validation images: well below 1 for copies",
                "copies": f"fraction of samples nearer to a training image than {COPY_QUANTILE:.0%} of validation "
                "images",
            }
        return texts | self._left_out(samples)

    def _left_out(self, samples: int) -> dict[str, str]:
        """The metrics that take more images than there are, and why they are left out."""
        images = min(samples, len(self.features))
        needed = dict.fromkeys((self.distance.name, self.distance.kernel_name), COVARIANCE_IMAGES)
        needed |= dict.fromkeys(("precision", "recall"), self.neighbours + 1)
        return {name: f"left out: it takes {n} images, got {images}" for name, n in needed.items() if images < n}
