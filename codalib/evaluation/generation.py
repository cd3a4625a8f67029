"""Evaluate generated images: samples of a MaskGIT, beside baselines that say what a number means.

The baselines are the validation images, as many training images, the tokenizer's reconstructions of both (those of the
training images are what a perfect model of the tokens would give: new pictures), and reconstructions of shuffled
tokens: what a model gives that knows nothing but how often each code stands at each place, or in each level.

The work is shared by the processes of `base.processes.launch`. Features and results are cached in files: an interrupted
run goes on.
"""

import dataclasses
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from codalib.base.files import write_json
from codalib.base.processes import make_accelerator
from codalib.base.seeds import check_seed, sample_generators
from codalib.datasets.images import ImageDataset, evaluation_batches, load_dataset, share_content_digests
from codalib.datasets.text import CaptionTable, build_text_encoder
from codalib.datasets.token_cache import CacheSettings, TokenCache, cache_tokens, check_generator, tokenizer_hash
from codalib.evaluation.generation_metrics import LinearProbe, Reference, nearest
from codalib.evaluation.metrics import COVARIANCE_IMAGES, FrechetDistance, build_frechet
from codalib.evaluation.results import digest, is_cached, read_results, result_file
from codalib.kernels.decoding import compile_decoding
from codalib.models.checkpoints import find_model, load_tokenizer
from codalib.models.checks import check_sampling, check_whole
from codalib.models.maskgit import Condition, MaskGIT
from codalib.models.sampling import ORDERS, generate, guidance_at, unmask_counts
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import split_levels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn: the arguments of `models.sampling.generate`."""

    steps: int = 8
    schedule: str = "cosine"  # "cosine", "linear" or "square"
    temperature: float = 1.0  # of the tokens
    choice_temperature: float = 4.5  # of the confidence, at the start
    guidance: float = 0.0  # 0: none
    guidance_schedule: str = "constant"  # "constant" or "linear"
    order: str = "confidence"  # over all levels (the paper's), or "coarse-to-fine"

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps)
        check_sampling(False, True, self.temperature, self.choice_temperature, self.guidance, self.order, ORDERS)
        unmask_counts(self.steps, self.steps, self.schedule)
        guidance_at(0, self.steps, self.guidance, self.guidance_schedule)


@dataclass(frozen=True)
class GenerationSettings:
    """What generated images are evaluated on, and by which network."""

    dataset: str  # "emoji", "imagefolder:PATH" or "coco:PATH"
    samples: int | None = None  # images; None: as many as there are validation images
    val_limit: int | None = None  # validation images, evenly spread; None: all
    train_limit: int | None = None  # training images for the probe and the copies; None: all, 0: neither
    reference: str = "val"  # of the Frechet distance, precision and recall: "val" or "train"
    batch_size: int = 50  # images a process and batch
    workers: int = 0  # processes that load images
    frechet: str = "auto"  # "fid" (Inception), "fd_effnet" or what is here
    frechet_resolution: int = 224  # side of EfficientNet's input, pixels
    neighbours: int = 3  # of precision and recall
    seed: int = 0  # of the samples' noise
    compile: bool = False  # the generator's code by torch.compile, CUDA graphs included: minutes at first, then faster

    def load_images(self, side: int) -> tuple[ImageDataset, ImageDataset | None]:
        """The validation images at SIDE pixels, and the training images of the probe and the copies, if any."""
        val = load_dataset(self.dataset, "val", side, limit=self.val_limit)
        if self.train_limit == 0:
            return val, None
        return val, load_dataset(self.dataset, "train", side, False, self.train_limit)

    def __post_init__(self) -> None:
        if self.reference not in ("val", "train") or (self.reference == "train" and self.train_limit == 0):
            raise ValueError(
                "expected reference 'val', or 'train' with training images, got "
                f"{self.reference!r} and train_limit {self.train_limit}"
            )
        least = ("batch_size", "frechet_resolution", "neighbours")
        check_whole(1, **{name: getattr(self, name) for name in least})
        check_whole(0, workers=self.workers)
        check_seed(self.seed)
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"expected at least 2 samples, got {self.samples}")


def sampler_grid(base: SamplerConfig, **values: Sequence[Any]) -> dict[str, SamplerConfig]:
    """Every combination of the VALUES of some fields, by a name that says them: sampler_grid(base, steps=(8, 32))."""
    samplers = {}
    for combination in itertools.product(*values.values()):
        changed = dict(zip(values, combination, strict=True))
        name = ", ".join(f"{field.replace('_', ' ')} {_short(value)}" for field, value in changed.items())
        if name in samplers:
            raise ValueError(f"expected values that differ in 6 digits, got two named {name!r}: leave one out")
        samplers[name] = dataclasses.replace(base, **changed)
    return samplers


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def shuffle_tokens(tokens: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Each place's tokens (N, L) exchanged between the images, by a permutation of its own.

    What stays is how often each code stands at each place of each level; what is lost is all that ties the tokens of an
    image to each other and to its class.
    """
    order = torch.rand(tokens.shape, generator=rng).argsort(dim=0)
    return tokens.gather(0, order)


def shuffle_levels(tokens: Tensor, scales: Sequence[int], rng: torch.Generator | None = None) -> Tensor:
    """Each level's tokens of all images and places (N, L) exchanged at random: how often each code is used stays."""
    parts = [part.flatten() for part in tokens.split([p * p for p in scales], dim=1)]
    shuffled = [part[torch.randperm(len(part), generator=rng)] for part in parts]
    return torch.cat([part.view(len(tokens), -1) for part in shuffled], dim=1)


def asked_images(samples: int, images: int) -> Tensor:
    """Which validation image's class or caption each sample is asked for, (samples,): evenly spread, or going round."""
    if samples > images:
        return torch.arange(samples) % images
    return torch.linspace(0, images - 1, samples, dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Inputs:
    """What all methods of one evaluation share: the data, the tokenizer and the feature extractors."""

    settings: GenerationSettings
    accelerator: Accelerator
    folder: Path  # of the cached features and tokens
    tokenizer: CodaTokenizer
    tokenizer_hash: str
    val: ImageDataset
    train: ImageDataset | None  # None: neither probe nor copies
    distance: FrechetDistance
    effnet: FrechetDistance | None  # None where the Frechet distance is EfficientNet's: its features serve for all

    @classmethod
    def load(cls, settings: GenerationSettings, tokenizer: str, folder: Path, accelerator: Accelerator) -> "Inputs":
        loaded = load_tokenizer(find_model(tokenizer)).to(accelerator.device)
        side = loaded.resolution
        val, train = settings.load_images(side)
        share_content_digests(*(images for images in (val, train) if images is not None))
        distance = build_frechet(settings.frechet, settings.frechet_resolution).to(accelerator.device)
        effnet = None
        if train is not None and distance.name == "fid":
            effnet = build_frechet("fd_effnet", settings.frechet_resolution).to(accelerator.device)
        identity = tokenizer_hash(loaded)
        return cls(settings, accelerator, folder, loaded, identity, val, train, distance, effnet)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def data(self) -> list[ImageDataset]:
        """The images that decide the metrics."""
        return [self.val] if self.train is None else [self.val, self.train]

    @property
    def samples(self) -> int:
        return self.settings.samples or len(self.val)

    def training_images(self) -> ImageDataset:
        """As many training images as there are samples, evenly spread."""
        train = self.train or load_dataset(self.settings.dataset, "train", self.tokenizer.resolution, False)
        return train.subset(asked_images(min(self.samples, len(train)), len(train)).tolist())

    def encode(self, split: str, images: ImageDataset) -> tuple[Tensor, Tensor]:
        """Images' tokens (N, L) and labels (N,), cached."""
        settings = self.settings
        key = digest(self.tokenizer_hash, images.content_digest, settings.seed)
        folder = self.folder / f"tokens-{split}-{key}"
        process = self.accelerator.process_index, self.accelerator.num_processes
        caching = CacheSettings(seed=settings.seed, batch_size=settings.batch_size, workers=settings.workers)
        cache_tokens(self.tokenizer, images, folder, caching, process)
        self.accelerator.wait_for_everyone()
        cache = TokenCache.open(folder, self.tokenizer_hash)
        batch = cache.batch(range(len(cache)))
        return batch["tokens"], batch["label"]

    @torch.no_grad()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """The pooled features of images (B, 3, h, w): "frechet" and, by a second network, "effnet"."""
        columns = {"frechet": self.distance.inception(images).float().cpu()}
        if self.effnet is not None:
            columns["effnet"] = self.effnet.inception(images).float().cpu()
        return columns

    def reference(self) -> Reference:
        settings = self.settings
        val = feature_columns(self, _real(self, "val", self.val))
        if (count := len(val["number"])) < COVARIANCE_IMAGES:
            raise ValueError(
                f"expected {COVARIANCE_IMAGES} validation images of {settings.dataset}, got {count}: add some"
            )
        train = None if self.train is None else feature_columns(self, _real(self, "train", self.train))
        columns, split = (val, "validation") if settings.reference == "val" else (train, "training")
        images = f"{split} images of {settings.dataset}"
        known = self.distance, columns["frechet"], images, settings.neighbours
        if train is None:
            return Reference(*known, None, None, None)
        features = train.get("effnet", train["frechet"])
        probe = LinearProbe(features, self.train.labels[train["number"]], len(self.train.classes))
        return Reference(*known, probe, features, nearest(val.get("effnet", val["frechet"]), features)[0])


# --- methods: where images come from ----------------------------------------------------------------------------------
Batch = tuple[Tensor, Tensor, dict[str, Tensor]]  # numbers (B,), images (B, 3, h, w), further columns (B,)


@dataclass(frozen=True)
class Method:
    """Images to evaluate: numbers 0 to N - 1, the classes they are asked for, and how to make some of them."""

    file: str  # begins the name of the file of its features
    labels: Tensor  # (N,)
    batches: Callable[[range], Iterator[Batch]]
    key: tuple[Any, ...] = ()  # what decides the images beside the data


def _real(inputs: Inputs, file: str, images: ImageDataset) -> Method:
    def batches(numbers: range) -> Iterator[Batch]:
        settings = inputs.settings
        for batch in evaluation_batches(images, settings.batch_size, numbers.start, numbers.step, settings.workers):
            yield batch["index"], batch["image"].to(inputs.device), {}

    return Method(file, images.labels, batches)


def _decoded(inputs: Inputs, file: str, tokens: Tensor, labels: Tensor) -> Method:
    if inputs.samples < len(tokens):  # as many as there are samples: a Frechet distance grows where there are fewer
        rows = asked_images(inputs.samples, len(tokens))
        tokens, labels = tokens[rows], labels[rows]

    def batches(numbers: range) -> Iterator[Batch]:
        for part in torch.tensor(numbers).split(inputs.settings.batch_size):
            levels = split_levels(tokens[part].to(inputs.device), inputs.tokenizer.quantizer.scales)
            yield part, inputs.tokenizer.decode(levels), {}

    return Method(file, labels, batches, (inputs.tokenizer_hash, inputs.settings.seed))


def _validation_images(inputs: Inputs) -> Method:
    return _real(inputs, "val", inputs.val)


def _training_images(inputs: Inputs) -> Method:
    images = inputs.training_images()
    return dataclasses.replace(_real(inputs, "training-images", images), key=(images.content_digest,))


def _reconstructions(inputs: Inputs) -> Method:
    return _decoded(inputs, "tokenizer", *inputs.encode("val", inputs.val))


def _training_reconstructions(inputs: Inputs) -> Method:
    images = inputs.training_images()
    method = _decoded(inputs, "tokenizer-on-training-images", *inputs.encode("train", images))
    return dataclasses.replace(method, key=(*method.key, images.content_digest))


def _shuffled(inputs: Inputs) -> Method:
    tokens, labels = inputs.encode("val", inputs.val)
    rng = torch.Generator().manual_seed(inputs.settings.seed)
    return _decoded(inputs, "shuffled-tokens", shuffle_tokens(tokens, rng), labels)


def _shuffled_levels(inputs: Inputs) -> Method:
    tokens, labels = inputs.encode("val", inputs.val)
    rng = torch.Generator().manual_seed(inputs.settings.seed)
    return _decoded(inputs, "shuffled-levels", shuffle_levels(tokens, inputs.tokenizer.quantizer.scales, rng), labels)


BASELINES = {  # name -> what its images are
    "validation images": _validation_images,
    "training images": _training_images,
    "tokenizer": _reconstructions,
    "tokenizer on training images": _training_reconstructions,
    "shuffled tokens": _shuffled,
    "shuffled levels": _shuffled_levels,
}
OF_TRAINING = ("training images", "tokenizer on training images")  # decided by these too, whatever the probe reads


@dataclass(frozen=True)
class Sampler:
    """A MaskGIT and what it is conditioned on; `method` gives the images of one sampler configuration."""

    inputs: Inputs
    model: MaskGIT
    captions: CaptionTable | None  # of a model that reads text
    weights: str  # digest of the parameters

    @classmethod
    def load(cls, folder: str, inputs: Inputs) -> "Sampler":
        model = check_generator(MaskGIT.from_pretrained(folder), inputs.tokenizer)
        if model.num_classes is not None and model.info.get("classes") != inputs.val.classes:
            raise ValueError(
                f"expected the classes {model.info.get('classes')} that the MaskGIT knows, got {inputs.val.classes} of "
                f"{inputs.settings.dataset}: evaluate it on the data it was trained on"
            )
        captions = None
        if model.text_dim is not None:
            encoder = build_text_encoder(model.info["text_encoder"]).to(inputs.device)
            captions = CaptionTable(encoder, [item.caption for item in inputs.val.items])
        state = sorted(model.state_dict().items())
        weights = hashlib.sha256(b"".join(v.cpu().contiguous().numpy().tobytes() for _, v in state)).hexdigest()
        if inputs.settings.compile:
            compile_decoding(model)
        return cls(inputs, model.to(inputs.device), captions, weights)

    def method(self, config: SamplerConfig) -> Method:
        settings, images = self.inputs.settings, asked_images(self.inputs.samples, len(self.inputs.val))
        key = self.inputs.tokenizer_hash, self.weights, asdict(config), settings.seed
        key += ("compiled",) * settings.compile  # it rounds otherwise
        return Method("samples", self.inputs.val.labels[images], partial(self._draw, config, images), key)

    def _draw(self, config: SamplerConfig, images: Tensor, numbers: range) -> Iterator[Batch]:
        settings = self.inputs.settings
        for part in torch.tensor(numbers).split(settings.batch_size):
            started = time.monotonic()
            rng = sample_generators(settings.seed, part.tolist())
            tokens = generate(self.model, self._condition(images[part]), len(part), generator=rng, **asdict(config))
            pictures = self.inputs.tokenizer.decode(tokens)
            pictures.sum().item()  # waits for the device
            yield part, pictures, {"seconds": torch.full((len(part),), (time.monotonic() - started) / len(part))}

    def _condition(self, images: Tensor) -> Condition:
        val, device = self.inputs.val, self.inputs.device
        if self.captions is not None:
            return self.captions.condition([val.items[i].caption for i in images.tolist()], device)
        return None if self.model.num_classes is None else val.labels[images].to(device)


def feature_columns(inputs: Inputs, method: Method) -> dict[str, Tensor]:
    """The columns of a method's images in the order of their "number", made by all processes or read from the cache."""
    accelerator, settings, count = inputs.accelerator, inputs.settings, len(method.labels)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if count < world_size:
        raise ValueError(f"expected at most {count} processes for {count} images, got {world_size}")
    networks = inputs.distance.name, inputs.distance.extractor_side, inputs.effnet is not None
    data = *(images.content_digest for images in inputs.data), inputs.tokenizer.resolution
    path = inputs.folder / f"{method.file}-{digest(count, data, networks, method.key)}.safetensors"
    if not is_cached(path, accelerator):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = range(rank, count, world_size)
        bar = {"total": -(-len(own) // settings.batch_size), "disable": rank > 0, "mininterval": 2.0}
        rows = [
            {"number": numbers, **inputs.extract(images), **further}
            for numbers, images, further in tqdm(method.batches(own), desc=method.file, **bar)
        ]
        parts = [path.with_suffix(f".part{number}") for number in range(world_size)]
        save_file({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, parts[rank])
        accelerator.wait_for_everyone()
        if rank == 0:
            _merge(parts, path)
        accelerator.wait_for_everyone()
    return load_file(path)


def _merge(parts: Sequence[Path], path: Path) -> None:
    """Join the processes' columns in the order of their numbers; PATH appears whole."""
    columns = [load_file(part) for part in parts]
    order = torch.cat([part["number"] for part in columns]).argsort()
    whole = path.with_suffix(".part")
    save_file({name: torch.cat([part[name] for part in columns])[order] for name in columns[0]}, whole)
    os.replace(whole, path)
    for part in parts:
        part.unlink()


# --- evaluation -------------------------------------------------------------------------------------------------------
def evaluate_maskgit(
    settings: GenerationSettings,
    maskgit: str | None,
    tokenizer: str,
    samplers: Mapping[str, SamplerConfig],
    folder: str | Path,
    baselines: Sequence[str] = tuple(BASELINES),
) -> None:
    """Evaluate the samples of one MaskGIT by several sampler configurations; run it through `base.processes.launch`.

    Sample i is asked for the class or the caption of a validation image, the samples spread evenly over these (or going
    round, where there are more samples), and its noise comes from the seed and i: neither depends on the number of
    processes. One file a method below FOLDER holds its row and the protocol of each number.

    Args:
        maskgit: a folder of `MaskGIT.save_pretrained` or an embedded name, looked for as `find_model` does; None: the
            baselines alone.
        tokenizer: what `find_model` and then `load_tokenizer` take: the one that the MaskGIT was trained with.
        samplers: name -> configuration.
        baselines: some of `BASELINES`.
    Raises:
        codalib.datasets.token_cache.CacheMismatch: the MaskGIT belongs to another tokenizer.
        ValueError: an unknown baseline, or a value that `generate` does not take.
    """
    if odd := set(baselines) - set(BASELINES):
        raise ValueError(f"expected baselines of {', '.join(BASELINES)}, got {odd.pop()!r}")
    if shared := set(baselines) & set(samplers):
        raise ValueError(f"expected sampler names that no baseline has, got {shared.pop()!r}: give it another name")
    if samplers and maskgit is None:
        raise ValueError(f"expected a MaskGIT to sample from by {', '.join(samplers)}, got None")
    accelerator = make_accelerator()
    inputs = Inputs.load(settings, tokenizer, Path(folder) / "generated", accelerator)
    sampler = None if maskgit is None else Sampler.load(find_model(maskgit), inputs)
    reference = inputs.reference()
    for name, file in _result_files(settings, maskgit, tokenizer, samplers, folder, baselines, inputs.data).items():
        if is_cached(file, accelerator):
            continue
        method = BASELINES[name](inputs) if name in baselines else sampler.method(samplers[name])
        columns = feature_columns(inputs, method)
        asked = method.labels[columns["number"]]
        if accelerator.is_main_process:
            row = {"method": name, "samples": len(asked), **reference.evaluate(columns, asked)}
            if name in samplers:
                row |= asdict(samplers[name]) | {"seconds_a_sample": columns["seconds"].double().mean().item()}
            write_json(file, {"row": row, "protocol": reference.protocol(len(asked))})
            log.info("%s: %s", name, {key: value for key, value in row.items() if isinstance(value, float)})
    accelerator.wait_for_everyone()


def read_generation_results(
    settings: GenerationSettings,
    maskgit: str | None,
    tokenizer: str,
    samplers: Mapping[str, SamplerConfig],
    folder: str | Path,
    baselines: Sequence[str] = tuple(BASELINES),
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows that `evaluate_maskgit` wrote, baselines first, and the protocol of each metric."""
    data = [images for images in settings.load_images(1) if images is not None]  # at any side: it is not looked at
    return read_results(_result_files(settings, maskgit, tokenizer, samplers, folder, baselines, data).values())


def _result_files(
    settings: GenerationSettings,
    maskgit: str | None,
    tokenizer: str,
    samplers: Mapping[str, SamplerConfig],
    folder: str | Path,
    baselines: Sequence[str],
    data: Sequence[ImageDataset],
) -> dict[str, Path]:
    place, both = Path(folder) / "generated", [tokenizer, maskgit]
    data, more = list(data), []
    if len(data) == 1 and set(OF_TRAINING) & set(baselines):
        more = [load_dataset(settings.dataset, "train", 1, False)]
    of = {name: data + more if name in OF_TRAINING else data for name in baselines}
    files = {name: result_file(place, name, settings, of[name], [tokenizer]) for name in baselines}
    return files | {name: result_file(place, name, settings, data, both, asdict(own)) for name, own in samplers.items()}
