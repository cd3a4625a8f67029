"""Every stage, evaluation, sampling and widget on the pretend device: nothing raises, and the host hardly waits."""

from collections import Counter

import pytest
import torch
from pretend_device import DEVICE, OneProcess, pretending
from safetensors.torch import load, save

from codalib.base.files import read_json
from codalib.base.seeds import sample_generators
from codalib.datasets.images import load_dataset
from codalib.datasets.text import build_text_encoder
from codalib.datasets.token_cache import TokenCache, cache_tokens, tokenizer_hash
from codalib.evaluation.generation import BASELINES, GenerationSettings, SamplerConfig, evaluate_maskgit
from codalib.evaluation.latents import code_spread, encode_images, encode_posterior, quantizer_scores, sharpness
from codalib.evaluation.metrics import ReconstructionMetrics, build_frechet
from codalib.evaluation.reconstruction import EvaluationSettings, evaluate_levels, evaluate_models
from codalib.models.maskgit import MaskGIT
from codalib.models.quantizer import ResidualAttentionQuantizer
from codalib.models.sampling import generate
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.reporting import widgets
from codalib.reporting.explorer import code_counts
from codalib.training.maskgit import train_maskgit
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import SCRATCH, MaskGITSettings, PretrainSettings, QuantizerSettings, TokenizerSettings
from codalib.training.tokenizer import train_tokenizer
from codalib.training.vae import build_autoencoder, pretrain_vae

LOOP = {"steps": 3, "batch_size": 1, "log_every": 100, "precision": "float32"}
SCALES = (1, 2, 4, 8)
WIDTHS = (8, 8, 8, 8)


@pytest.fixture
def waits(monkeypatch):
    for module in ("training.trainer", "evaluation.reconstruction", "evaluation.generation", "datasets.token_cache"):
        monkeypatch.setattr(f"codalib.{module}.make_accelerator", OneProcess)
    with pretending() as waits:
        yield waits


@pytest.fixture
def a_step(waits, monkeypatch):
    """Of a training with `LOOP`: the waits of a whole turn of the loop in which nothing is logged or kept."""
    seen = []
    monkeypatch.setattr("codalib.training.trainer.ThreadWatch.step", lambda *_: seen.append(Counter(waits)))
    return lambda: seen[2] - seen[1]


@pytest.fixture(scope="module")
def images():
    return load_dataset("emoji", "train", 64, limit=8), load_dataset("emoji", "val", 64, limit=4)


def small_vae():
    torch.manual_seed(0)
    return ContinuousVAE(build_autoencoder(PretrainSettings(steps=1, batch_size=1, widths=WIDTHS), 64)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return CodaTokenizer(small_vae(), ResidualAttentionQuantizer(16, 32, SCALES)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cache(tokenizer, images, tmp_path_factory):
    return TokenCache.open(cache_tokens(tokenizer, images[0], tmp_path_factory.mktemp("cache")))


def maskgit(cache, **condition):
    return MaskGIT(32, SCALES, 16, 2, 2, **condition).eval().requires_grad_(False).to(DEVICE)


# --- training: upper bounds of the host's waits a step, whatever the accumulation -------------------------------------
def test_a_step_of_the_vae(images, tmp_path, a_step):
    pretrain_vae(PretrainSettings(**LOOP, accumulation=2, widths=WIDTHS), *images, tmp_path)
    assert not a_step()


# SimVQ and FSQ need none; a residual VQ of the library has one a level.
@pytest.mark.parametrize(
    ("kind", "most"), [("attention", 0), ("nearest", 0), ("fsq", 0), ("lfq", 0), ("simvq", 0), ("rvq", 2)]
)
def test_a_step_of_a_quantizer(images, tmp_path, a_step, kind, most):
    latents = encode_images(small_vae().to(DEVICE), images[0], 8, batch_size=4)
    library = kind not in ("attention", "nearest")
    own = {"codebook_size": 256, "scales": (8,) * 2 if library else SCALES, "start": "random" if library else "data"}
    fit_quantizer(QuantizerSettings(**LOOP, **own, kind=kind), latents, tmp_path, snapshots=[0])
    assert a_step().total() <= most, a_step()


@pytest.mark.parametrize("change", [{"accumulation": 4}, {"kind": "nearest", "adapters": SCRATCH}])
def test_a_step_of_the_tokenizer(images, tmp_path, a_step, change):
    settings = TokenizerSettings(**LOOP | {"codebook_size": 32, "scales": SCALES, "rank": 2} | change)
    train_tokenizer(settings, small_vae(), *images, tmp_path)
    assert not a_step()


@pytest.mark.parametrize(
    "change",
    [
        {"accumulation": 4},
        {"condition": "text"},
        {"condition": "none", "level_positions": False, "code_embeddings": True, "latent_context": True},
        {"mask_ratio": "beta", "coarse_first": 0.5},
    ],
)
def test_a_step_of_maskgit(cache, tmp_path, a_step, change):
    settings = MaskGITSettings(**LOOP | {"batch_size": 2, "width": 16, "depth": 2, "heads": 2} | change)
    encoder = build_text_encoder("minilm").to(DEVICE) if settings.condition == "text" else None
    train_maskgit(settings, cache, cache, tmp_path, encoder)
    assert not a_step()


def test_a_training_goes_on_from_its_checkpoint(images, tmp_path, waits, monkeypatch):
    settings = TokenizerSettings(**LOOP | {"codebook_size": 32, "scales": SCALES, "rank": 2, "checkpoint_every": 1})
    steps = []

    def step(*_):
        steps.append(None)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("codalib.training.trainer.ThreadWatch.step", step)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(settings, small_vae(), *images, tmp_path)
    train_tokenizer(settings, small_vae(), *images, tmp_path)
    assert len(steps) == 4  # not 5: the first step was not made again


# --- sampling ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [{}, {"guidance": 2.0}, {"order": "coarse-to-fine", "schedule": "linear"}])
def test_a_decoding_step_waits_for_nothing(cache, waits, change):
    model, seen, labels = maskgit(cache, num_classes=9), [], torch.tensor([0, 3], device=DEVICE)
    fixed = [torch.full((2, p, p), -1) for p in SCALES]
    fixed[-1][1, :4] = 5  # another number of tokens to draw for the second sample
    own = {"steps": 4, "generator": sample_generators(0, range(2)), "fixed": fixed} | change
    waits.clear()
    generate(model, labels, on_step=lambda step: seen.append(Counter(waits)), **own)
    assert not seen[-1] - seen[0]
    assert seen[0].total() <= 6


def test_what_is_wrong_is_said_on_the_device_too(cache, waits):
    with pytest.raises(ValueError, match="expected labels from 0 to 8, got 9"):
        generate(maskgit(cache, num_classes=9), torch.tensor([0, 9], device=DEVICE))
    with pytest.raises(RuntimeError, match="expected all operands of"):
        generate(maskgit(cache, num_classes=9), torch.tensor([0, 8]))


# --- evaluation -------------------------------------------------------------------------------------------------------
def test_evaluation(waits, tokenizer, images, tmp_path):
    tokenizer.vae.save_pretrained(tmp_path / "vae")
    tokenizer.save_pretrained(tmp_path / "tokenizer", base=tmp_path / "vae")
    settings = EvaluationSettings("emoji", 64, 4, frechet_resolution=64)
    evaluate_models(settings, {"vae": str(tmp_path / "vae")}, {"coda": str(tmp_path / "tokenizer")}, tmp_path)
    rows = [read_json(file)["row"] for file in (tmp_path / "measured").iterdir()]
    assert all({"psnr", "fd_effnet@64", "perceptual_effnet"} <= row.keys() for row in rows)
    own = CodaTokenizer.from_pretrained(tmp_path / "tokenizer").to(DEVICE)
    metrics = [ReconstructionMetrics(None, None, frechet=None) for _ in SCALES]
    assert len(evaluate_levels(own, images[1], metrics)) == len(SCALES)
    latents = encode_posterior(own.vae, images[1])
    assert quantizer_scores(own.quantizer, *latents)[0]["token_change"] >= 0
    assert sharpness(own.quantizer, latents[0])["top_1_probability"] > 0
    assert code_spread(own.quantizer, latents[0])["coverage"] >= 0


def test_evaluation_of_samples(waits, tokenizer, cache, tmp_path):
    tokenizer.vae.save_pretrained(tmp_path / "vae")
    tokenizer.save_pretrained(tmp_path / "tokenizer", base=tmp_path / "vae")
    model = MaskGIT(32, SCALES, 16, 2, 2, num_classes=len(cache.classes)).eval()
    model.info = {"tokenizer": tokenizer_hash(tokenizer), "classes": cache.classes, "text_encoder": None}
    model.save_pretrained(tmp_path / "maskgit")
    settings = GenerationSettings("emoji", val_limit=8, train_limit=8, batch_size=8, frechet_resolution=64)
    places = str(tmp_path / "maskgit"), str(tmp_path / "tokenizer")
    evaluate_maskgit(settings, *places, {"two": SamplerConfig(steps=2, guidance=1.0)}, tmp_path, ["shuffled tokens"])
    assert len(list((tmp_path / "generated").glob("*.json"))) == 2
    assert "shuffled tokens" in BASELINES


# --- widgets ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["class", "text"])
def test_widgets(waits, tokenizer, cache, images, kind):
    own, encoder = CodaTokenizer(small_vae(), ResidualAttentionQuantizer(16, 32, SCALES)).eval().to(DEVICE), None
    model = maskgit(cache, num_classes=len(cache.classes)) if kind == "class" else maskgit(cache, text_dim=384)
    model.info = {"classes": cache.classes}
    if kind == "text":
        encoder = build_text_encoder("minilm").to(DEVICE)
    choice = widgets.ImageChoice(own, images[1])
    explorers = [widgets.LevelExplorer(choice), widgets.EditExplorer(choice)]
    explorers.append(widgets.AssignmentExplorer(choice, code_counts(own, images[1])))
    explorers.append(widgets.SampleExplorer(own, model, encoder, steps=2))
    if kind == "class":
        explorers.append(widgets.InpaintExplorer(own, model, images[1], steps=2))
    explorers[1].edit(3)
    explorers[2].picture.cell = [0, 1]
    assert all("<img" in explorer.still() for explorer in explorers)


def test_the_device_raises_where_cuda_would(waits):
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=DEVICE)
    for wrong in (
        lambda: here + there,
        lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()),
        lambda: torch.randn(2, generator=torch.Generator(DEVICE)),
        lambda: here[there.long()],
        lambda: there.numpy(),
    ):
        with pytest.raises(RuntimeError):
            wrong()
    assert not waits
    torch.testing.assert_close((there * torch.tensor(2.0)).sum().item(), 8.0)  # a scalar may come from the host
    there[there > 0].to("cpu")
    assert [what for what, _ in waits] == ["_local_scalar_dense", "mask as index", "copy to the host"]
    assert load(save({"there": there}))["there"].tolist() == there.tolist()
    waits.clear()
    assert not (here.to(DEVICE, non_blocking=True) + there).requires_grad
    assert not waits


def test_a_distance_with_the_same_reference_stays_on_the_device():
    with pretending():
        distance = build_frechet("fd_effnet", 32).to(DEVICE)
        images = torch.rand(4, 3, 32, 32).to(DEVICE)
        distance.update(images, real=True)
        twin = distance.with_same_reference()
        twin.update(images, real=False)
        assert twin.compute().item() == pytest.approx(0, abs=0.1)
