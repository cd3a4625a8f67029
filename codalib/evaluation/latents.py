"""Metrics beside the pictures of Figures 3, 5 and 6: how latents, their approximations and codes lie to each other.

Latents are (N, C, H, W) and normalised; a feature is the vector of C numbers at one position.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codalib.base.seeds import sample_generators
from codalib.datasets.images import ImageDataset, evaluation_batches, training_batches
from codalib.evaluation.metrics import coverage, frechet_distance
from codalib.models.quantizer import ResidualQuantizer
from codalib.models.ranking import confidence
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE


def features_of(latents: Tensor, count: int | None = None, seed: int = 0) -> Tensor:
    """The features (N, C) of latents (B, C, H, W): one a position, or COUNT of them drawn without repetition."""
    features = latents.movedim(1, -1).reshape(-1, latents.shape[1])  # (B, C, H, W) -> (B H W, C)
    if count is None:
        return features
    if count > len(features):
        raise ValueError(f"{count} features asked for, expected at most {len(features)}: take more images")
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count]]


def approximation(latents: Tensor, quantized: Tensor, count: int, seed: int = 0) -> dict[str, float]:
    """How well quantized latents fill the space of the latents (B, C, H, W), beside Figure 3.

    `quantization_error` is the mean square, `latent_distance` the Frechet distance of Gaussians fitted to the features
    (N, C), `coverage` that of `evaluation.metrics.coverage` between two disjoint draws of COUNT features, `distinct`
    the fraction of different features among the quantized ones.
    """
    features, others = features_of(latents), features_of(quantized)
    drawn = features_of(torch.cat([latents, quantized], dim=1), 2 * count, seed)  # both at the same positions
    reference, samples = drawn[:count, : latents.shape[1]], drawn[count:, latents.shape[1] :]
    gaussians = [(x.double().mean(0), x.double().T.cov()) for x in (features, others)]
    return {
        "quantization_error": (quantized - latents).square().mean().item(),
        "latent_distance": frechet_distance(*gaussians[0], *gaussians[1]),
        "coverage": coverage(reference, samples),
        "distinct": len(others.unique(dim=0)) / len(others),
    }


@torch.no_grad()
def sharpness(quantizer: ResidualQuantizer, latents: Tensor, batch_size: int = 16) -> dict[str, float]:
    """The confidence of the assignment of latents (N, C, H, W), beside Figure 5: means over all tokens of all levels.

    `top_1_probability` is that of the top-1 code, `assignment_entropy` the entropy of the probabilities in nats (log K:
    no code is preferred). Attention's probabilities are its softmax scores. Distances have none; theirs are of the
    codes as centres of Gaussians whose variance is the level's own quantization error, the usual reading of nearest
    neighbours as a mixture. So the two are comparable in kind, not in scale.
    """
    device, sums, tokens = next(quantizer.parameters()).device, torch.zeros(2, dtype=torch.float64), 0
    variances = [None] * len(quantizer.scales)
    if quantizer.kind == "nearest":
        nearest = [confidence(quantizer, batch.to(device), top=1) for batch in latents.split(batch_size)]
        variances = [
            torch.cat(level).square().mean() / quantizer.latent_channels for level in zip(*nearest, strict=True)
        ]
    for batch in latents.split(batch_size):
        scores = confidence(quantizer, batch.to(device), top=quantizer.codebook_size)
        for level, variance in zip(scores, variances, strict=True):
            probabilities = level.flatten(0, 2)  # (B p p, K)
            if variance is not None:
                probabilities = (-probabilities.square() / (2 * variance)).softmax(dim=1)
            found = torch.stack([probabilities[:, 0].sum(), torch.special.entr(probabilities).sum()])
            sums, tokens = sums + found.double().cpu(), tokens + len(probabilities)
    return dict(zip(("top_1_probability", "assignment_entropy"), (sums / tokens).tolist(), strict=True))


def code_spread(quantizer: ResidualQuantizer, latents: Tensor, seed: int = 0) -> dict[str, float]:
    """How the codes of a quantizer of one level lie among latents (N, C, H, W), beside Figure 6.

    `coverage` is that of as many drawn features as there are codes, `latent_distance` the Frechet distance between
    Gaussians fitted to the codes' values and to all features; then `latent_scores`.
    """
    codes, features = quantizer.code_values.cpu(), features_of(latents)
    gaussians = [(x.double().mean(0), x.double().T.cov()) for x in (features, codes)]
    return {
        "coverage": coverage(features_of(latents, len(codes), seed), codes),
        "latent_distance": frechet_distance(*gaussians[0], *gaussians[1]),
    } | latent_scores(quantizer, latents)


@torch.no_grad()
def encode_images(
    vae: ContinuousVAE, dataset: ImageDataset, images: int, batch_size: int = 64, seed: int = 0
) -> Tensor:
    """Sampled, normalised latents (N, C, H, W) of N = `images` images, in seeded order, on the CPU.

    Beyond one pass over the data set the images come again, with other crops.
    """
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    stream = training_batches(dataset, batch_size, seed)
    count = -(-images // batch_size)
    parts = [vae.encode(next(stream)["image"].to(device), generator=generator).cpu() for _ in range(count)]
    return torch.cat(parts)[:images]


@torch.no_grad()
def latent_scores(quantizer: ResidualQuantizer, latents: Tensor, batch_size: int = 64) -> dict[str, float]:
    """`quantization_error` (mean squared) and `utilization` of a quantizer on latents (N, C, H, W)."""
    device = next(quantizer.parameters()).device
    error, used = 0.0, torch.zeros(quantizer.codebook_size, dtype=torch.bool)
    for batch in latents.split(batch_size):
        indices = quantizer.encode(batch.to(device))
        error += (quantizer.decode(indices).cpu() - batch).square().sum().item()
        used[torch.cat([level.flatten() for level in indices]).cpu()] = True
    return {"quantization_error": error / latents.numel(), "utilization": used.double().mean().item()}


@torch.no_grad()
def encode_posterior(
    vae: ContinuousVAE, dataset: ImageDataset, seed: int = 0, batch_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised latents of every image, (N, C, H, W) on the CPU: the posterior's means and two draws of it.

    An image's noise depends on the seed and the image alone.
    """
    device = next(vae.parameters()).device
    parts = []
    for batch in evaluation_batches(dataset, batch_size):
        posterior = vae.posterior(batch["image"].to(device))
        numbers = batch["index"].tolist()
        noise = [sample_generators(own, numbers) for own in (2 * seed, 2 * seed + 1)]
        draws = (posterior.mean, *(posterior.sample(own) for own in noise))
        parts.append([((draw - vae.shift) * vae.scale).cpu() for draw in draws])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def quantizer_scores(
    quantizer: ResidualQuantizer, means: Tensor, latents: Tensor, again: Tensor, batch_size: int = 64
) -> tuple[dict[str, Any], Tensor]:
    """What a quantizer makes of latents that it was not fitted on, and each image's relative error (N,).

    Args:
        means, latents, again: (N, C, H, W), see `encode_posterior`; errors are relative to the variance of `latents`.
    Returns {"latent_variance", "posterior_noise": the mean square of draw less mean, relative too,
    "quantization_error": mean square, "relative_error", "relative_error_to_mean": against the posterior's
    mean, "utilization", "perplexity": one a level, "bits_per_image": tokens x log2 K, "coded_bits_per_image": what an
    ideal entropy coder takes that knows each level's code frequencies, "token_change": the fraction of tokens that
    differ when the posterior is drawn again}.
    """
    device, variance = next(quantizer.parameters()).device, latents.var(correction=0).item()
    codes, scales = quantizer.codebook_size, quantizer.scales
    counts = torch.zeros(len(scales), codes, dtype=torch.float64)
    errors, to_mean, changed = [], [], 0
    for mean, own, other in zip(*(part.split(batch_size) for part in (means, latents, again)), strict=True):
        tokens = quantizer.encode(own.to(device))
        quantized = quantizer.decode(tokens).cpu()
        errors.append((quantized - own).square().flatten(1).mean(1))
        to_mean.append((quantized - mean).square().flatten(1).mean(1))
        for level, (one, two) in enumerate(zip(tokens, quantizer.encode(other.to(device)), strict=True)):
            counts[level] += torch.bincount(one.flatten().cpu(), minlength=codes).double()
            changed += (one != two).sum().item()
    errors, to_mean = torch.cat(errors), torch.cat(to_mean)
    frequencies = counts / counts.sum(1, keepdim=True)
    entropies = torch.special.entr(frequencies).sum(1)  # (levels,), nats a token
    per_level = torch.tensor([p * p for p in scales], dtype=torch.float64)
    scores = {
        "latent_variance": variance,
        "posterior_noise": (latents - means).square().mean().item() / variance,
        "quantization_error": errors.mean().item(),
        "relative_error": errors.mean().item() / variance,
        "relative_error_to_mean": to_mean.mean().item() / variance,
        "utilization": (counts.sum(0) > 0).double().mean().item(),
        "perplexity": entropies.exp().tolist(),
        "bits_per_image": per_level.sum().item() * math.log2(codes),
        "coded_bits_per_image": (per_level * entropies).sum().item() / math.log(2),
        "token_change": changed / (per_level.sum().item() * len(latents)),
    }
    return scores, errors / variance


@torch.no_grad()
def token_stability(tokenizer: CodaTokenizer, dataset: ImageDataset, batch_size: int = 64) -> dict[str, float]:
    """The fraction of tokens that another view of the same image changes, of the posterior's means.

    Returns {"shift_change": the image moved one pixel to the right, its left edge repeated, "reencoding_change": what
    the tokens decode to, encoded again}. For another draw of the posterior see `quantizer_scores`.
    """
    device, changed, count = next(tokenizer.parameters()).device, torch.zeros(2, dtype=torch.float64), 0
    for batch in evaluation_batches(dataset, batch_size):
        images = batch["image"].to(device)
        tokens = tokenizer.encode(images, sample=False)
        shifted = torch.cat([images[..., :1], images[..., :-1]], dim=-1)
        views = shifted, tokenizer.decode(tokens).clamp(-1, 1)
        for place, view in enumerate(views):
            again = tokenizer.encode(view, sample=False)
            changed[place] += sum((one != two).sum().item() for one, two in zip(tokens, again, strict=True))
        count += tokenizer.num_tokens * len(images)
    return dict(zip(("shift_change", "reencoding_change"), (changed / count).tolist(), strict=True))
