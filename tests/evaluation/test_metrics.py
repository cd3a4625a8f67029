"""The measures: golden values, known extremes, and the equality of one stream, several batches and two processes."""

import math
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from codalib.evaluation import metrics
from codalib.pretrained import networks as features
from codalib.pretrained import registry

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "psnr_ssim.safetensors")


def random_images(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def effnet():
    return features.EfficientNetLite0()


@pytest.mark.parametrize(("name", "measure"), [("psnr", metrics.psnr), ("ssim", metrics.ssim)])
def test_golden(name, measure):
    measured = measure(GOLDEN["reference"], GOLDEN["reconstruction"])
    torch.testing.assert_close(measured, GOLDEN[name], rtol=1e-5, atol=0)


def test_ssim_is_torchmetrics_valid_region():
    one = random_images(2, side=24)
    other = (one + 0.3 * random_images(2, side=24, seed=1))[..., :20]
    one = one[..., :20]
    eight_bit = [((x + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).double() for x in (one, other)]
    _, full = structural_similarity_index_measure(
        *eight_bit, sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    torch.testing.assert_close(metrics.ssim(one, other), full[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_psnr_and_ssim_at_their_extremes():
    white = torch.ones(1, 3, 16, 16)
    assert metrics.ssim(white, white).item() == pytest.approx(1, abs=1e-12)
    assert metrics.psnr(white, white).item() == math.inf
    assert metrics.psnr(white, -white).item() == pytest.approx(0, abs=1e-5)
    assert metrics.psnr(white, 3 * white).item() == math.inf  # clamped
    one_level = white - 1.5 / 127.5  # truncation: 253.5 -> 253, two levels below 255
    assert metrics.psnr(white, one_level).item() == pytest.approx(20 * math.log10(255 / 2))


def test_bad_pairs_are_refused():
    images = random_images(2)
    with pytest.raises(ValueError, match=r"of one shape \(B, "):
        metrics.psnr(images, images[:1])
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(images[..., :8, :], images[..., :8, :])
    with pytest.raises(ValueError, match="diverged"):
        metrics.psnr(images, images * math.nan)
    with pytest.raises(ValueError, match="expected floating"):
        metrics.ssim(images[:, :1], images[:, :1])


def test_a_reference_that_is_not_in_range_is_refused():
    images = 127.5 * (random_images(1) + 1)
    for measure in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=r"expected a reference in \[-1, 1\], got values up to"):
            measure(images, images)


def test_quantization_error_is_over_elements_not_batches():
    error = metrics.QuantizationError()
    error.update(torch.ones(3, 2, 2, 2), torch.zeros(3, 2, 2, 2))
    error.update(torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), -1.0))
    assert error.compute().item() == pytest.approx((3 * 1 + 1 * 4) / 4)
    with pytest.raises(ValueError, match=r"of one shape \(B, "):
        error.update(torch.ones(1, 2), torch.ones(2, 2))
    error.elements += 2**24  # where float32 no longer counts
    before = error.elements.clone()
    error.update(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert error.elements == before + 1


def test_utilization_counts_each_code_once():
    usage = metrics.Utilization(codebook_size=8, num_levels=2)
    usage.update([torch.tensor([[[0]]]), torch.tensor([[[1, 1], [2, 3]]])])
    usage.update([torch.tensor([[[0]]]), torch.tensor([[[3, 3], [3, 0]]])])
    values = {name: value.item() for name, value in usage.compute().items()}
    assert values["utilization"] == 4 / 8
    assert values["utilization_level_1"] == 1 / 8
    assert values["utilization_level_2"] == 4 / 8
    assert values["perplexity_level_1"] == pytest.approx(1)
    shares = torch.tensor([1, 2, 1, 4]) / 8
    assert values["perplexity_level_2"] == pytest.approx(math.exp(-(shares * shares.log()).sum()))
    assert values["bits"] == 10 * 3
    assert values["coded_bits"] == pytest.approx(8 * math.log2(values["perplexity_level_2"]))
    assert len(values) == 8


def test_perplexity_of_uniform_use_is_the_codebook_size():
    usage = metrics.Utilization(codebook_size=16, num_levels=1)
    usage.update([torch.arange(16).reshape(1, 4, 4)])
    assert usage.compute()["perplexity"].item() == pytest.approx(16)
    assert usage.compute()["utilization"].item() == 1


def test_indices_are_checked():
    usage = metrics.Utilization(codebook_size=4, num_levels=1)
    with pytest.raises(ValueError, match="expected the indices of 1 levels, got 2"):
        usage.update([torch.zeros(1, 1, 1).long()] * 2)
    with pytest.raises(ValueError, match="codebook_size"):
        usage.update([torch.tensor([[[4]]])])


def test_frechet_distance_of_known_gaussians():
    mean, spread = torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 0.0]))  # singular
    assert metrics.frechet_distance(mean, spread, mean, spread) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(mean, spread, mean + 2, spread) == pytest.approx(12)
    assert metrics.frechet_distance(mean, 0 * spread, mean + 2, spread) == pytest.approx(12 + 5)  # a point
    # Axis-aligned: the sum of (s1 - s2)^2.
    assert metrics.frechet_distance(mean, spread, mean, 4 * spread) == pytest.approx(1 + 4)


def test_frechet_metric_is_the_gaussian_distance_of_8bit_features(effnet):
    real, fake = random_images(12), 0.5 * random_images(12, seed=1)
    distance = metrics.FrechetDistance(effnet, resolution=32)
    assert distance.name == f"fd_effnet@{distance.extractor_side}"
    for part in real.split(5):
        distance.update(part, real=True)
    for part in fake.split(7):
        distance.update(part, real=False)
    pooled = [effnet.pooled(features.to_8bit(x).float() / 127.5 - 1, 32).double() for x in (real, fake)]
    moments = [moment for x in pooled for moment in (x.mean(0), x.T.cov())]
    assert distance.compute().item() == pytest.approx(metrics.frechet_distance(*moments), rel=1e-3)
    assert distance.kernel() == pytest.approx(metrics.kernel_distance(*pooled), rel=1e-4)
    twin = distance.with_same_reference()
    twin.update(fake, real=False)
    assert twin.compute().item() == pytest.approx(distance.compute().item(), rel=1e-4)
    assert twin.kernel() == pytest.approx(distance.kernel(), rel=1e-4)
    with pytest.raises(TypeError, match="expected an extractor InceptionFID"):
        metrics.FrechetDistance(torch.nn.Identity())


def test_frechet_names(monkeypatch, tmp_path):
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert metrics.build_frechet("auto").name == "fd_effnet@224"
    assert metrics.build_frechet(None) is None
    with pytest.raises(registry.MissingWeights):
        metrics.build_frechet("rfid")
    with pytest.raises(ValueError, match="expected the Frechet distance rfid"):
        metrics.build_frechet("kid")

    class Inception(features.InceptionFID):  # the real one needs its file; see test_networks.py
        num_features = 3  # 2,048 would take minutes

        def __init__(self):
            torch.nn.Module.__init__(self)

        def pooled(self, images):
            return images.mean((2, 3))

    monkeypatch.setattr(metrics, "InceptionFID", Inception)
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").touch()
    measured = metrics.ReconstructionMetrics(frechet="auto")
    assert measured.frechet.name == "fid"
    measured.update(random_images(3), random_images(3, seed=1))
    assert list(measured.compute()) == ["psnr", "ssim", "rfid", "rkid"]
    assert "TF-ported InceptionV3" in measured.protocol()["rfid"]


LEVELS = (1, 2)


def one_evaluation(seed: int = 0, count: int = 6) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 2, 2, generator=generator)
    return {
        "images": random_images(count, seed=seed),
        "reconstruction": 1.1 * random_images(count, seed=seed + 1),
        "latents": latents,
        "quantized": latents + 0.1 * torch.randn(latents.shape, generator=generator),
        "indices": [torch.randint(8, (count, p, p), generator=generator) for p in LEVELS],
    }


def part(evaluation: dict[str, object], rows: slice) -> dict[str, object]:
    return {k: [x[rows] for x in v] if k == "indices" else v[rows] for k, v in evaluation.items()}


def state_size(measured: metrics.ReconstructionMetrics) -> int:
    held = [module.metric_state for module in measured.modules() if isinstance(module, Metric)]
    return sum(tensor.numel() for states in held for tensor in states.values() if isinstance(tensor, torch.Tensor))


def test_reconstruction_metrics_stream():
    evaluation = one_evaluation()
    options = {"codebook_size": 8, "num_levels": 2, "frechet_resolution": 32, "frechet": "fd_effnet"}
    whole = metrics.ReconstructionMetrics(**options, perceptual="perceptual_effnet", reference_set="random images")
    whole.update(**evaluation)
    values = whole.compute()
    assert values["psnr"] == pytest.approx(
        metrics.psnr(evaluation["images"], evaluation["reconstruction"]).mean().item()
    )
    assert values["quantization_error"] == pytest.approx(
        (evaluation["latents"] - evaluation["quantized"]).square().mean().item()
    )
    assert {"ssim", "perceptual_effnet", "fd_effnet@32", "utilization", "perplexity_level_2"} <= set(values)
    assert all(isinstance(value, float) for value in values.values())

    streamed = metrics.ReconstructionMetrics(**options, perceptual=whole.perceptual)
    size = sum(
        buffer.numel()
        for metric in streamed.modules()
        for buffer in getattr(metric, "metric_state", {}).values()
        if isinstance(buffer, torch.Tensor)
    )
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):  # a ragged last batch, too
        streamed.update(**part(evaluation, rows))
    assert streamed.compute() == pytest.approx(values, rel=1e-4)
    assert 0 < size == state_size(streamed)  # but for the features, of which a kernel distance takes all
    assert sum(part.numel() for part in streamed.frechet.fake_features) == 6 * 1280

    protocol = whole.protocol()
    assert list(protocol) == list(values)
    assert "6 images" in protocol["psnr"]
    assert "random images" in protocol["fd_effnet@32"]
    assert "resized to 32 (bicubic, antialiased)" in protocol["fd_effnet@32"]
    assert "not LPIPS" in protocol["perceptual_effnet"]

    # A second model on the same images does not read them again.
    second = metrics.ReconstructionMetrics(8, 2, frechet=whole.frechet.with_same_reference())
    for rows in (slice(0, 3), slice(3, 6)):
        second.update(**part(evaluation, rows))
    for name in ("fd_effnet@32", "kd_effnet@32"):
        assert second.compute()[name] == pytest.approx(values[name], rel=1e-4)
    second.update(**part(evaluation, slice(0, 2)))
    with pytest.raises(RuntimeError, match=r"expected the 6 images .* got 8"):
        second.compute()
    with pytest.raises(ValueError, match="with_same_reference"):
        metrics.ReconstructionMetrics(frechet=whole.frechet)


def test_a_continuous_vae_has_no_discrete_measures():
    measured = metrics.ReconstructionMetrics(frechet=None)
    with pytest.raises(RuntimeError, match="no image"):
        measured.compute()
    measured.update(random_images(2), random_images(2, seed=1))
    assert list(measured.compute()) == ["psnr", "ssim"]
    assert list(measured.protocol()) == ["psnr", "ssim"]


def test_one_image_leaves_the_frechet_distance_out_and_says_why(effnet):
    measured = metrics.ReconstructionMetrics(frechet=metrics.FrechetDistance(effnet, 32))
    measured.update(random_images(1), random_images(1, seed=1))
    assert list(measured.compute()) == ["psnr", "ssim"]
    for name in ("fd_effnet@32", "kd_effnet@32"):
        assert measured.protocol()[name] == "left out: it takes 2 images, got 1"
    measured.update(random_images(1, seed=2), random_images(1, seed=3))
    assert measured.compute()["fd_effnet@32"] > 0


def test_reconstruction_metrics_refuse_half_a_pair():
    with pytest.raises(ValueError, match="num_levels or neither"):
        metrics.ReconstructionMetrics(codebook_size=8, frechet=None)
    measured = metrics.ReconstructionMetrics(frechet=None)
    images = random_images(1)
    with pytest.raises(ValueError, match="both latents and quantized or neither"):
        measured.update(images, images, latents=images)
    with pytest.raises(ValueError, match="codebook_size"):
        measured.update(images, images, indices=[torch.zeros(1, 1, 1).long()])


def test_bits_by_hand():
    """Two images of 16 x 16 pixels; one token of level 1 and four of level 2 each, of 8 codes."""
    measured, images = metrics.ReconstructionMetrics(8, 2, frechet=None), torch.zeros(1, 3, 16, 16)
    second = torch.tensor([[0, 1], [2, 3]])
    for first in (5, 5):  # always the same: no bits once that is known
        measured.update(images, images, indices=[torch.full((1, 1, 1), first), second[None]])
    found = measured.compute()
    assert found["bits_per_pixel"] == pytest.approx(5 * 3 / 256)
    assert found["coded_bits_per_pixel"] == pytest.approx(4 * 2 / 256)  # four codes, equally often
    assert "bits" not in found
    assert {"bits_per_pixel", "coded_bits_per_pixel"} <= measured.protocol().keys()


def evaluate_half(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    measured = metrics.ReconstructionMetrics(8, 2, frechet=None)
    measured.update(**part(one_evaluation(), slice(0, 2) if rank == 0 else slice(2, 6)))
    queue.put((measured.compute(), measured.protocol()["psnr"]))
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=evaluate_half, args=(rank, port, queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    single = metrics.ReconstructionMetrics(8, 2, frechet=None)
    single.update(**one_evaluation())
    for _ in processes:
        values, text = queue.get()
        assert values == pytest.approx(single.compute(), rel=1e-12)
        assert text == single.protocol()["psnr"]


def test_precision_and_recall():
    generator = torch.Generator().manual_seed(0)
    cloud, other = (torch.randn(200, 2, generator=generator) for _ in range(2))
    precision, recall = metrics.precision_recall(cloud, other, chunk=64)
    assert min(precision, recall) > 0.9
    assert metrics.precision_recall(cloud, cloud + 100) == (0, 0)
    narrow = 0.05 * other  # inside, but covers little
    precision, recall = metrics.precision_recall(cloud, narrow)
    assert precision > 0.9
    assert recall < 0.2
    point = torch.ones(5, 2)  # at no distance, which is that of its nearest
    assert metrics.precision_recall(point, point) == (1, 1)
    with pytest.raises(ValueError, match="more than 3 references and samples"):
        metrics.precision_recall(cloud[:3], other)
    with pytest.raises(ValueError, match="more than 3 references and samples"):
        metrics.precision_recall(cloud, other[:3])
    assert metrics.precision_recall(cloud[:4], cloud[:4]) == (1, 1)


def test_coverage_is_the_share_of_references_with_a_sample_close_by():
    line = torch.arange(8.0)[:, None]  # the third-nearest other of an end is 3 away, of the others 2
    assert metrics.coverage(line, line[[0]], neighbours=3) == 3 / 8  # 0, 1 and 2
    assert metrics.coverage(line, line[[0]].repeat(5, 1)) == 3 / 8  # equal samples count once
    cloud = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    assert metrics.coverage(cloud[:300], cloud[300:], chunk=64) == pytest.approx(1 - 2**-3, abs=0.05)
    assert metrics.coverage(cloud, cloud + 100) == 0
    with pytest.raises(ValueError, match="more than 3 references and a sample"):
        metrics.coverage(cloud[:3], cloud)


def test_an_exact_image_leaves_the_mean_psnr_finite():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = images.clone()
    other[1] = -images[1]
    measured = metrics.ReconstructionMetrics(frechet=None)
    measured.update(images, other)
    limit = 10 * math.log10(255**2 * 768)  # 76.99 dB: one of 768 values off by one
    expected = (limit + metrics.psnr(images, other)[1].item()) / 2
    assert measured.compute()["psnr"] == pytest.approx(expected)
    assert "1 equal in 8 bits" in measured.protocol()["psnr"]


def test_the_perceptual_distance_sees_the_clamped_reconstruction_and_the_image_first():
    class Distance(torch.nn.Module):
        name = "perceptual_effnet"

        def forward(self, images, reconstruction):
            return (images - reconstruction).mean(dim=(1, 2, 3))

    measured = metrics.ReconstructionMetrics(frechet=None, perceptual=Distance())
    white = torch.ones(2, 3, 16, 16)
    measured.update(white, torch.stack([3 * white[0], -5 * white[1]]))
    assert measured.compute()["perceptual_effnet"] == pytest.approx((0 + 2) / 2)


def test_precision_is_of_the_samples_and_recall_of_the_references():
    line = torch.arange(8.0)[:, None]  # each within 1 of its nearest other
    samples = torch.tensor([[0.0], [0.1], [50.0], [50.1]])  # each within 0.1 of its nearest other
    assert metrics.precision_recall(line, samples, neighbours=1) == (2 / 4, 1 / 8)


@pytest.mark.parametrize("name", ["fid", "rfid", "fd_effnet@64", None])
def test_the_column_of_a_frechet_distance_is_known_by_its_name(name):
    row = {"method": "ours", "psnr": 1.0, "kid": 2.0} | ({name: 3.0, "ssim": 4.0} if name else {})
    assert metrics.frechet_column(row) == name


def test_pixels_beyond_the_range_count_as_its_ends():
    black, white = (torch.full((1, 3, 16, 16), value) for value in (-1.0, 1.0))
    for measure in (metrics.psnr, metrics.ssim):
        assert torch.equal(measure(black, 3 * white), measure(black, white))
        assert torch.equal(measure(white, 3 * black), measure(white, black))


def test_kernel_distance_is_the_unbiased_mean_over_all_pairs():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=rng), torch.randn(9, 5, generator=rng) + 0.3

    def k(a, b):
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    within = [
        sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) ** 2 - len(z))
        for z in (x, y)
    ]
    expected = sum(within) - 2 * sum(k(a, b) for a in x for b in y) / 63
    assert metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert metrics.kernel_distance(x, y, chunk=2) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match="2 or more"):
        metrics.kernel_distance(x[:1], y)


def test_kernel_distance_of_one_distribution_is_around_nothing_for_few_and_for_many():
    rng = torch.Generator().manual_seed(1)
    draws = [metrics.kernel_distance(*torch.randn(2, n, 16, generator=rng)) for n in (20, 200) for _ in range(40)]
    few, many = torch.tensor(draws[:40]), torch.tensor(draws[40:])
    assert abs(few.mean()) < 3 * few.std() / 40**0.5
    assert abs(many.mean()) < 3 * many.std() / 40**0.5
    assert (few < 0).any()
    assert many.std() < few.std()
