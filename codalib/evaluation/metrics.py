"""The metrics of the reports: PSNR, SSIM, perceptual distance, Frechet distance, quantization error, utilization.

The streaming ones are torchmetrics metrics: sums in float64 or int64, whose size does not depend on the number of
images, added over the processes of a distributed run by `compute`. `ReconstructionMetrics` holds them all and states
the protocol of each number. A Frechet or perceptual distance on another network than the paper's has another name.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from codalib.models.checks import IMAGE_BOUND
from codalib.pretrained.networks import EfficientNetLite0, InceptionFID, check_images, to_8bit
from codalib.pretrained.perceptual import PerceptualDistance, build_perceptual
from codalib.pretrained.registry import has_weights

SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_C1 = (0.01 * 255) ** 2
SSIM_C2 = (0.03 * 255) ** 2
COVARIANCE_IMAGES = 2  # that a covariance takes at least
KERNEL_PROTOCOL = "the kernel distance (KID) of the same features, over all pairs, unbiased"
CPU_BATCH = 4  # images: at 224 pixels the feature maps of more leave the cache, and each takes about twice as long


def _truncated_8bit(images: Tensor) -> Tensor:
    # The release truncates; the Frechet distances round (`pretrained.networks.to_8bit`).
    if not torch.isfinite(images).all():
        raise ValueError("expected images with values around [-1, 1], got NaN or inf: the model has diverged")
    return (((images.float() + 1) / 2).clamp(0, 1) * 255).to(torch.uint8).double()


def _check_pair(reference: Tensor, reconstruction: Tensor) -> None:
    check_images(reference)
    check_images(reconstruction)
    if reference.shape != reconstruction.shape:
        raise ValueError(
            f"expected a reference and a reconstruction of one shape (B, 3, h, w), got {tuple(reference.shape)} and "
            f"{tuple(reconstruction.shape)}"
        )
    if len(reference) and not reference.abs().max() <= IMAGE_BOUND:
        raise ValueError(f"expected a reference in [-1, 1], got values up to {reference.abs().max():g}: rescale it")


@torch.no_grad()
def psnr(reference: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, by the released protocol.

    Args:
        reference, reconstruction: (B, 3, h, w) in [-1, 1]; mapped to [0, 1], clamped, truncated to 8 bits.

    Returns:
        float64 (B,); infinite where the 8-bit images are equal.
    """
    _check_pair(reference, reconstruction)
    ours, theirs = _truncated_8bit(reconstruction), _truncated_8bit(reference)
    return peak_signal_noise_ratio(ours, theirs, data_range=255.0, reduction="none", dim=(1, 2, 3))


def finite_psnr(values: Tensor, images: Tensor) -> Tensor:
    """PSNR (B,) in dB of images (B, 3, h, w), where an exact one counts as if one 8-bit value were off by one."""
    return values.where(values.isfinite(), 10 * math.log10(255**2 * images[0].numel()))


@torch.no_grad()
def ssim(reference: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image, by the released protocol: the mean over the valid region and the channels.

    An 11 x 11 Gaussian window of sigma 1.5 on 8-bit images, K1 0.01, K2 0.03. torchmetrics's window is the same but on
    flat white images its float32 is off by 5e-4 (an image against itself gives 0.9994), and its float64 takes 14 times
    as long; here the window is separable and float64.

    Args:
        reference, reconstruction: (B, 3, h, w) in [-1, 1]; mapped to [0, 1], clamped, truncated to 8 bits.

    Returns:
        float64 (B,), at most 1.
    """
    _check_pair(reference, reconstruction)
    height, width = reference.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"expected images of at least {SSIM_WINDOW} pixels a side for SSIM, got {height} x {width}")
    x, y = _truncated_8bit(reference), _truncated_8bit(reconstruction)
    rows, columns = _window(height, x.device), _window(width, x.device)
    moments = rows.T @ torch.stack([x, y, x * x, y * y, x * y]) @ columns  # (5, B, 3, h - 10, w - 10)
    mean_x, mean_y, xx, yy, xy = moments
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    )
    return similarity.mean(dim=(1, 2, 3))  # (B,)


def _window(side: int, device: torch.device) -> Tensor:
    """The Gaussian window as a matrix (side, side - 10): one column for each position of the valid region."""
    offsets = torch.arange(side, device=device)[:, None] - torch.arange(side - SSIM_WINDOW + 1, device=device)
    weights = torch.exp(-((offsets.double() - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2))
    weights[(offsets < 0) | (offsets >= SSIM_WINDOW)] = 0
    return weights / weights.sum(dim=0)


class QuantizationError(Metric):
    """Mean squared difference of normalised latents and their quantized values, over all elements seen."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squared", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("elements", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, latents: Tensor, quantized: Tensor) -> None:
        """Add a batch: normalised latents and quantized values, both (B, C, H, W)."""
        if latents.shape != quantized.shape:
            raise ValueError(
                f"expected latents and quantized ones of one shape (B, C, H, W), got {tuple(latents.shape)} and "
                f"{tuple(quantized.shape)}"
            )
        self.squared += (latents.double() - quantized.double()).square().sum().to(self.squared.device)
        self.elements += latents.numel()

    def compute(self) -> Tensor:
        """The mean squared error, a float64 scalar."""
        return self.squared / self.elements


class Utilization(Metric):
    """Fraction of codes used at least once over all images seen, and perplexity of their use; in total and per level.

    All levels share one codebook of `codebook_size` codes, so a code counts as used in total if any level used it. A
    level of p x p tokens can have used at most (number of images) x p^2 codes: coarse levels need many images.

    Args:
        codebook_size: K.
        num_levels: number of levels.
    """

    full_state_update = False

    def __init__(self, codebook_size: int, num_levels: int) -> None:
        super().__init__()
        self.codebook_size, self.num_levels = codebook_size, num_levels
        counts = torch.zeros(num_levels, codebook_size, dtype=torch.long)  # (levels, K)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, indices: list[Tensor]) -> None:
        """Add a batch: one LongTensor (B, p, p) for each level, values in [0, K)."""
        if len(indices) != self.num_levels:
            raise ValueError(f"expected the indices of {self.num_levels} levels, got {len(indices)}")
        for level, codes in enumerate(indices):
            lowest, highest = codes.aminmax()
            if lowest < 0 or highest >= self.codebook_size:
                raise ValueError(
                    f"expected indices in [0, {self.codebook_size}) at level {level + 1}, got {lowest.item()} to "
                    f"{highest.item()}: is this the tokenizer's codebook_size?"
                )
            counts = torch.bincount(codes.flatten(), minlength=self.codebook_size)
            self.counts[level] += counts.to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """`utilization`, `perplexity` (1 to K), and each with `_level_1`, `_level_2`, ... appended.

        And of all images together `bits`, the tokens times log2 K, and `coded_bits`, what an ideal entropy coder takes
        that knows the frequencies of each level's codes.
        """
        values = {"utilization": _used(self.counts.sum(0)), "perplexity": _perplexity(self.counts.sum(0))}
        values |= {f"utilization_level_{i + 1}": _used(counts) for i, counts in enumerate(self.counts)}
        perplexities, tokens = torch.stack([_perplexity(counts) for counts in self.counts]), self.counts.sum(1)
        values |= {f"perplexity_level_{i + 1}": perplexity for i, perplexity in enumerate(perplexities)}
        bits = {
            "bits": tokens.sum() * math.log2(self.codebook_size),
            "coded_bits": (tokens * perplexities.log2()).sum(),
        }
        return values | bits


def _used(counts: Tensor) -> Tensor:
    return (counts > 0).double().mean()


def _perplexity(counts: Tensor) -> Tensor:
    frequencies = counts.double() / counts.sum()
    return torch.special.entr(frequencies).sum().exp()


class _PooledFeatures(nn.Module):
    """An extractor as torchmetrics wants it: images in [-1, 1] in, pooled features of their 8-bit versions out."""

    def __init__(self, extractor: InceptionFID | EfficientNetLite0, resolution: int) -> None:
        super().__init__()
        self.extractor, self.resolution = extractor, resolution
        self.num_features = extractor.num_features
        self.last: Tensor | None = None  # what it gave last

    def forward(self, images: Tensor) -> Tensor:
        self.last = self._pooled(images)
        return self.last

    def _pooled(self, images: Tensor) -> Tensor:
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            if isinstance(self.extractor, InceptionFID):
                return self.extractor.pooled(images.float())  # rounds to 8 bits itself
            images = to_8bit(images).float() / 127.5 - 1
            parts = images.split(CPU_BATCH if images.device.type == "cpu" else len(images))
            return torch.cat([self.extractor.pooled(part, self.resolution) for part in parts])


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance of Gaussians fitted to pooled features: torchmetrics's, on a named extractor.

    The features themselves are kept too, N x D numbers, for the kernel distance (`kernel`), which does not depend on N.

    `name` is "fid" with the paper's Inception, "fd_effnet@SIDE" with EfficientNet-Lite0 that sees images of so many
    pixels; no two names are comparable. Call `update(images, real=...)` with images (B, 3, h, w) in [-1, 1]; they are
    rounded to 8 bits first (the release reads unrounded floats).

    Args:
        extractor: an `InceptionFID` or an `EfficientNetLite0`.
        resolution: side in pixels to which EfficientNet's images are resized (Inception's is always 299).
    """

    def __init__(self, extractor: InceptionFID | EfficientNetLite0, resolution: int = 224) -> None:
        if not isinstance(extractor, InceptionFID | EfficientNetLite0):
            raise TypeError(f"expected an extractor InceptionFID or EfficientNetLite0, got {type(extractor).__name__}")
        super().__init__(feature=_PooledFeatures(extractor, resolution))
        inception = isinstance(extractor, InceptionFID)
        self.extractor_side = 299 if inception else resolution
        self.name = "fid" if inception else f"fd_effnet@{resolution}"
        self.kernel_name = "kid" if inception else f"kd_effnet@{resolution}"
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")

    @property
    def names_of_reconstructions(self) -> tuple[str, str]:
        """Of the Frechet and of the kernel distance where the images are reconstructions, as the field has it."""
        return ("rfid", "rkid") if self.name == "fid" else (self.name, self.kernel_name)

    def of_reconstructions(self) -> dict[str, float]:
        """Both distances by these names."""
        return dict(zip(self.names_of_reconstructions, (float(self.compute()), self.kernel()), strict=True))

    def update(self, imgs: Tensor, real: bool) -> None:
        super().update(imgs, real)
        (self.real_features if real else self.fake_features).append(self.inception.last)

    def kernel(self) -> float:
        """`kernel_distance` of the same features, over all processes."""
        with self.sync_context():
            return kernel_distance(dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features))

    def with_same_reference(self) -> "FrechetDistance":
        """A new distance with the same network and the real images seen so far, so that they are not read again."""
        twin = FrechetDistance(self.inception.extractor, self.inception.resolution)
        for state in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples"):
            setattr(twin, state, getattr(self, state).clone())
        twin.real_features = list(self.real_features)
        return twin.to(self.real_features_sum.device)


def frechet_column(row: Mapping[str, Any]) -> str | None:
    """Which of a row's columns is a Frechet distance, the first of them; None where there is none."""
    return next((name for name in row if name in ("rfid", "fid") or name.startswith("fd_effnet@")), None)


def kernel_column(row: Mapping[str, Any]) -> str | None:
    """The same for kernel distances."""
    return next((name for name in row if name in ("rkid", "kid") or name.startswith("kd_effnet@")), None)


def build_frechet(name: str | None, resolution: int = 224) -> FrechetDistance | None:
    """The Frechet distance of a name, or None for None.

    Args:
        name: "rfid" or "fid" (Inception), "fd_effnet", None, or "auto": Inception where its weights are, else
            EfficientNet (the returned metric's `name` tells which).
        resolution: for EfficientNet, see `FrechetDistance`.

    Raises:
        codalib.pretrained.registry.MissingWeights: the network's weights are not on this machine.
    """
    if name == "auto":
        name = "fid" if has_weights("inception_fid") else "fd_effnet"
    if name not in (None, "rfid", "fid", "fd_effnet"):
        raise ValueError(f"expected the Frechet distance rfid, fid, fd_effnet, auto or None, got {name!r}")
    if name is None:
        return None
    return FrechetDistance(EfficientNetLite0() if name == "fd_effnet" else InceptionFID(), resolution)


class ReconstructionMetrics(nn.Module):
    """Every metric of a tokenizer's (or a continuous VAE's) reconstructions, streaming.

    Args:
        codebook_size: K; None for a continuous VAE.
        num_levels: number of levels; None for a continuous VAE.
        frechet: a name for `build_frechet`, or a `FrechetDistance`, whose `with_same_reference` spares reading the
            same real images again for each of several models; None leaves it out.
        perceptual: a name for `pretrained.perceptual.build_perceptual`, or a loaded distance; None leaves it out.
        reference_set: what the reference images are, in words, for `protocol`.
        frechet_resolution: side in pixels of EfficientNet's input.
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        num_levels: int | None = None,
        frechet: str | FrechetDistance | None = "auto",
        perceptual: str | PerceptualDistance | None = None,
        reference_set: str = "the evaluated images themselves",
        frechet_resolution: int = 224,
    ) -> None:
        super().__init__()
        if (codebook_size is None) != (num_levels is None):
            raise ValueError(f"expected codebook_size and num_levels or neither, got {codebook_size} and {num_levels}")
        self.reference_set = reference_set
        self.images, self.pixels, self.exact = (SumMetric().set_dtype(torch.float64) for _ in range(3))
        self.psnr, self.ssim, self.distance = (
            MeanMetric(nan_strategy="error").set_dtype(torch.float64) for _ in range(3)
        )
        self.quantization_error = QuantizationError()
        self.utilization = None if codebook_size is None else Utilization(codebook_size, num_levels)
        self.perceptual = perceptual if isinstance(perceptual, nn.Module) else build_perceptual(perceptual)
        self.frechet = frechet if isinstance(frechet, Metric) else build_frechet(frechet, frechet_resolution)
        if self.frechet is not None and self.frechet.fake_features_num_samples > 0:
            raise ValueError("got a Frechet distance of another model's images: give its with_same_reference()")
        self._reference_is_known = self.frechet is not None and self.frechet.real_features_num_samples > 0

    def check_unused(self) -> None:
        """Raise ValueError where images were added, which would count for another model too."""
        if self.psnr.update_called:
            raise ValueError("expected metrics that have seen no image, got used ones: build new ones for each model")

    @torch.no_grad()
    def update(
        self,
        images: Tensor,
        reconstruction: Tensor,
        latents: Tensor | None = None,
        quantized: Tensor | None = None,
        indices: list[Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            images: (B, 3, h, w) in [-1, 1].
            reconstruction: the same shape, clamped here.
            latents, quantized: normalised latents and their quantized values (B, C, H, W), both or neither.
            indices: one LongTensor (B, p, p) for each level.
        """
        if (latents is None) != (quantized is None):
            raise ValueError("expected both latents and quantized or neither, got one")
        if indices is not None and self.utilization is None:
            raise ValueError(
                "expected no indices without a codebook_size and num_levels, got some: give ReconstructionMetrics both"
            )
        values = psnr(images, reconstruction)
        self.psnr.update(finite_psnr(values, images))
        self.exact.update(values.isinf().sum())
        self.ssim.update(ssim(images, reconstruction))
        self.images.update(len(images))
        self.pixels.update(len(images) * images.shape[-2] * images.shape[-1])
        images, reconstruction = images.float(), reconstruction.float().clamp(-1, 1)
        if self.perceptual is not None:
            self.distance.update(self.perceptual(images, reconstruction))
        if self.frechet is not None:
            if not self._reference_is_known:
                self.frechet.update(images, real=True)
            self.frechet.update(reconstruction, real=False)
        if latents is not None:
            self.quantization_error.update(latents, quantized)
        if indices is not None:
            self.utilization.update(indices)

    def compute(self) -> dict[str, float]:
        """The metrics by name, over all processes; those that were given nothing are left out, or too few images.

        `psnr` (dB), `ssim`, the perceptual distance's name, `quantization_error`, `utilization`, `perplexity` and both
        `_level_1`, ..., `bits_per_pixel` and `coded_bits_per_pixel` (see `Utilization`), and `rfid` and `rkid` or
        `fd_effnet@SIDE` and `kd_effnet@SIDE`.
        """
        if not self.psnr.update_called:
            raise RuntimeError("no image was measured: call update before compute")
        values = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        if self.perceptual is not None:
            values[self.perceptual.name] = self.distance.compute()
        if self.quantization_error.update_called:
            values["quantization_error"] = self.quantization_error.compute()
        if self.utilization is not None and self.utilization.update_called:
            values |= self.utilization.compute()
            values |= {f"{name}_per_pixel": values.pop(name) / self.pixels.compute() for name in ("bits", "coded_bits")}
        if self.frechet is not None and self.images.compute() >= COVARIANCE_IMAGES:
            real, fake = self.frechet.real_features_num_samples, self.frechet.fake_features_num_samples
            if real != fake:
                raise RuntimeError(
                    f"expected the {real.item()} images of an earlier evaluation as reference, got {fake.item()}: "
                    "evaluate the same set, or build a new Frechet distance"
                )
            values |= self.frechet.of_reconstructions()
        return {name: float(value) for name, value in values.items()}

    def protocol(self) -> dict[str, str]:
        """How each number of `compute` is made, or why it was not; in a distributed run call it on every process."""
        images = f"{int(self.images.compute()):,} images, per image, averaged"
        eight_bit = "clamped to [0, 1], truncated to 8 bits"
        texts = {
            "psnr": f"dB, {images}; {eight_bit}",
            "ssim": f"{images}; {eight_bit}; 11 x 11 Gaussian window, sigma 1.5, valid region, mean of three channels",
            "quantization_error": "mean squared difference in normalised latents, over all elements",
            "utilization": "fraction of codes used at least once over the evaluated images",
            "perplexity": "exp of the entropy in nats of the codes' frequencies over the evaluated images",
            "bits_per_pixel": "tokens x log2 of the number of codes, over the pixels of an image",
            "coded_bits_per_pixel": "the same after an ideal entropy coder that knows the codes' frequencies by level",
        }
        if self.perceptual is not None:
            network = "LPIPS, VGG16" if self.perceptual.name == "perceptual_vgg" else "EfficientNet-Lite0, not LPIPS"
            texts[self.perceptual.name] = f"{network}; {images}; reconstruction clamped, not rounded"
        if self.frechet is not None:
            frechet, kernel = self.frechet.names_of_reconstructions
            inception = frechet == "rfid"
            network = (
                "TF-ported InceptionV3, 2048-d" if inception else "EfficientNet-Lite0, 1280-d, not comparable with FID"
            )
            resize = "bilinear, not antialiased" if inception else "bicubic, antialiased"
            texts[frechet] = (
                f"{network}; {int(self.images.compute()):,} reconstructions against as many reference images: "
                f"{self.reference_set}; clamped, rounded to 8 bits, resized to {self.frechet.extractor_side} ({resize})"
            )
            texts[kernel] = KERNEL_PROTOCOL
        if exact := int(self.exact.compute()):
            texts["psnr"] += f"; {exact:,} equal in 8 bits, counted as if one of their values were off by one"
        made = {name: texts[name.split("_level_")[0]] for name in self.compute()}
        if self.frechet is not None and frechet not in made:
            made |= dict.fromkeys(
                self.frechet.names_of_reconstructions, f"left out: it takes {COVARIANCE_IMAGES} images, got 1"
            )
        return made


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64.

    Means are (D,), covariances symmetric (D, D), singular ones included.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(value).double() for value in (mean1, cov1, mean2, cov2))
    varied = cov1.diagonal() > 0  # the others add nothing to C1 C2, and where many are constant MKL's eigh may fail
    values, vectors = torch.linalg.eigh(cov1[varied][:, varied])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # C1^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov2[varied][:, varied] @ root).clamp_min(0).sqrt().sum()  # tr (C1 C2)^(1/2)
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def kernel_distance(reference: Tensor, samples: Tensor, chunk: int = 4096) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D) with the kernel (x . y / D + 1)^3, unbiased.

    KID (arXiv:1801.01401), over all pairs where the usual one averages over drawn subsets: of the same expectation, and
    no draw. Unlike a Frechet distance its mean does not depend on N; it is below 0 for about half of all equal sets.
    """
    if min(len(reference), len(samples)) < COVARIANCE_IMAGES:
        raise ValueError(f"expected two sets of {COVARIANCE_IMAGES} or more, got {len(reference)} and {len(samples)}")

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one.double() @ other.double().T / one.shape[1] + 1) ** 3

    def within(features: Tensor) -> float:
        total = sum(kernel(part, features).sum().item() for part in features.split(chunk))
        norms = features.double().square().sum(1)
        own = ((norms / features.shape[1] + 1) ** 3).sum().item()  # pairs of one with itself
        return (total - own) / (len(features) * (len(features) - 1))

    across = sum(kernel(part, samples).sum().item() for part in reference.split(chunk))
    return within(reference) + within(samples) - 2 * across / (len(reference) * len(samples))


def precision_recall(reference: Tensor, samples: Tensor, neighbours: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991) of two sets of features (N, D) and (M, D).

    Precision: fraction of samples within a reference's distance to its `neighbours`-th nearest other reference.
    Recall: the same with the sets exchanged. `chunk` rows of distances are held at once.
    """
    if min(len(reference), len(samples)) <= neighbours:
        raise ValueError(
            f"expected more than {neighbours} references and samples, got {len(reference)} and {len(samples)}"
        )

    def covered(points: Tensor, manifold: Tensor) -> float:
        # The nearest neighbour of a point in its own set is itself, hence + 1.
        radii = [torch.cdist(part, manifold).kthvalue(neighbours + 1).values for part in manifold.split(chunk)]
        radius = torch.cat(radii)  # (len(manifold),)
        inside = [(torch.cdist(part, manifold) <= radius).any(dim=1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return covered(samples, reference), covered(reference, samples)


def coverage(reference: Tensor, samples: Tensor, neighbours: int = 3, chunk: int = 1024) -> float:
    """Fraction of the references (N, D) that have a sample (M, D) within the distance to their `neighbours`-th nearest
    other reference (arXiv:2002.09797).

    Unlike the recall of `precision_recall` it needs no distances between samples, and so holds for quantized ones,
    many of which are equal. As many samples of the references' own distribution reach about 1 - 2^-neighbours.
    """
    if len(reference) <= neighbours or not len(samples):
        raise ValueError(
            f"expected more than {neighbours} references and a sample, got {len(reference)} and {len(samples)}"
        )
    found = []
    for part in reference.split(chunk):
        radius = torch.cdist(part, reference).kthvalue(neighbours + 1).values  # the nearest is the point itself
        found.append(torch.cdist(part, samples).min(dim=1).values <= radius)
    return torch.cat(found).double().mean().item()
