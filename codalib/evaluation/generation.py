"""Measure generated images: Frechet distance, precision and recall, the asked class, copies of training images.

A method is a way to draw samples (`SamplerConfig`) from one generator, or one of six that need none and say what a
number means: the validation images, as many training images, the tokenizer's reconstructions of both (those of the
training images are what a perfect generator of tokens would give: new pictures), and reconstructions of shuffled
tokens: what a generator gives that knows nothing but how often each code stands at each place, or in each level.

Every number comes from the pooled features of one network, "fid" from Inception and "fd_effnet" from EfficientNet; the
class is told, and copies are looked for, in EfficientNet's. The work is shared by the processes of
`base.processes.launch`, and what is measured is kept in files: an interrupted run goes on.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from tqdm.auto import tqdm

from codalib.base.files import read_json, write_json
from codalib.base.processes import make_accelerator
from codalib.base.seeds import sample_generators
from codalib.datasets.images import ImageDataset, evaluation_batches, load_dataset
from codalib.datasets.text import CaptionTable, build_text_encoder
from codalib.datasets.token_cache import CacheSettings, TokenCache, cache_tokens, check_generator, tokenizer_hash
from codalib.evaluation.metrics import FrechetDistance, build_frechet, frechet_distance, precision_recall
from codalib.evaluation.reconstruction import file_stamps
from codalib.models.checkpoints import find_model, load_tokenizer
from codalib.models.maskgit import Condition, MaskGIT
from codalib.models.sampling import generate
from codalib.models.tokens import split_levels

log = logging.getLogger(__name__)


VALIDATION, TRAINING = "validation images", "training images"
RECONSTRUCTIONS, UNPAIRED = "tokenizer", "tokenizer on training images"
SHUFFLED, SHUFFLED_LEVELS = "shuffled tokens", "shuffled levels"
BASELINES = (VALIDATION, TRAINING, RECONSTRUCTIONS, UNPAIRED, SHUFFLED, SHUFFLED_LEVELS)
REFERENCES = ("val", "train")
COPY_QUANTILE = 0.01  # a sample is a copy where it is nearer to a training image than this share of unseen ones is


# Of the probe's least squares, times the features' mean variance. With it the probe is right for 81 % of the emoji's
# validation images, 74 % as the mean over their 9 classes; with ten times more or less for 3 % fewer.
PROBE_RIDGE = 0.1


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


@dataclass(frozen=True)
class GenerationSettings:
    """What generated images are measured on, and by which network."""

    dataset: str  # "emoji", "imagefolder:PATH" or "coco:PATH"
    samples: int | None = None  # images; None: as many as there are validation images
    val_limit: int | None = None  # validation images, evenly spread; None: all
    train_limit: int | None = None  # training images for the probe and the copies; None: all, 0: measure neither
    reference: str = "val"  # of the Frechet distance, precision and recall: "val" or "train"
    batch_size: int = 50  # images a process and batch
    workers: int = 0  # processes that load images
    frechet: str = "auto"  # "fid" (Inception), "fd_effnet" or what is here
    frechet_resolution: int = 224  # side of EfficientNet's input, pixels
    neighbours: int = 3  # of precision and recall
    seed: int = 0  # of the samples' noise

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES or (self.reference == "train" and self.train_limit == 0):
            raise ValueError(
                f"reference {self.reference!r} and train_limit {self.train_limit} got, expected 'val', or 'train' with "
                "training images"
            )
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"samples is {self.samples}, expected at least 2")


def sweep(base: SamplerConfig, **values: Sequence[Any]) -> dict[str, SamplerConfig]:
    """Every combination of the VALUES of some fields, by a name that says them: sweep(base, steps=(8, 32))."""
    samplings = {}
    for combination in itertools.product(*values.values()):
        changed = dict(zip(values, combination, strict=True))
        name = ", ".join(f"{field.replace('_', ' ')} {_short(value)}" for field, value in changed.items())
        samplings[name] = dataclasses.replace(base, **changed)
    return samplings


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


# --- measures of features ---------------------------------------------------------------------------------------------
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
    """Share of the labels (N,) that are as asked, and the mean of that share over the asked classes."""
    right = (predicted == asked).double()
    return right.mean().item(), torch.stack([right[asked == label].mean() for label in asked.unique()]).mean().item()


def shuffle_tokens(tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each place's tokens (N, L) exchanged between the images, by a permutation of its own.

    What stays is how often each code stands at each place of each level; what is lost is all that ties the tokens of an
    image to each other and to its class.
    """
    order = torch.rand(tokens.shape, generator=generator).argsort(dim=0)
    return tokens.gather(0, order)


def shuffle_levels(tokens: Tensor, scales: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Each level's tokens of all images and places (N, L) exchanged at random: how often each code is used stays."""
    parts = [part.flatten() for part in tokens.split([p * p for p in scales], dim=1)]
    shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    return torch.cat([part.view(len(tokens), -1) for part in shuffled], dim=1)


def inception_score(features: Tensor, distance: FrechetDistance) -> float:
    """The mean Inception Score of ten parts, from the pooled features (N, 2048) of InceptionFID (torch-fidelity's)."""
    logits = features @ distance.inception.extractor.model.fc.weight.detach().cpu().T  # without the bias, as usual
    return isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features (N, D) of the Frechet distance's network, and of EfficientNet."""

    settings: GenerationSettings
    distance: FrechetDistance
    features: Tensor  # of the reference images
    probe: LinearProbe | None
    train: Tensor | None  # EfficientNet's, of the training images
    unseen: Tensor | None  # (N,) distances of the validation images to their nearest training image

    def evaluate(self, columns: Mapping[str, Tensor], asked: Tensor) -> dict[str, float]:
        """The measures of some images, from their columns "frechet" (N, D) and "effnet" and their labels (N,)."""
        features = columns["frechet"]
        values = {self.distance.name: frechet_distance(*moments(self.features), *moments(features))}
        values["precision"], values["recall"] = precision_recall(self.features, features, self.settings.neighbours)
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
        """How each number is made, in words."""
        settings = self.settings
        split = {"val": "validation", "train": "training"}[settings.reference]
        network = (
            "TF-ported InceptionV3, 2048-d, images resized to 299 (bilinear, not antialiased)"
            if self.distance.name == "fid"
            else f"EfficientNet-Lite0, 1280-d, images resized to {settings.frechet_resolution} (bicubic, antialiased); "
            "not comparable with FID"
        )
        reference = f"{len(self.features):,} {split} images of {settings.dataset}, centre crop"
        texts = {
            self.distance.name: f"{network}; {samples:,} samples against {reference}; rounded to 8 bits",
            "precision": f"share of samples within {settings.neighbours} neighbours' distance of {reference}",
            "recall": f"share of {reference} within {settings.neighbours} neighbours' distance of a sample",
        }
        if self.distance.name == "fid":
            texts["inception_score"] = "mean of ten parts"
        if self.probe is not None:
            probe = f"a linear probe of EfficientNet's features, fitted to {len(self.train):,} training images"
            texts |= {
                "class_accuracy": f"share of samples in which {probe}, sees the asked class",
                "class_accuracy_balanced": "the same, the mean over the classes",
                "nearest_train": f"median distance to the nearest of {len(self.train):,} training images in "
                "EfficientNet's features, over that of validation images: well below 1 for copies",
                "copies": f"share of samples nearer to a training image than {COPY_QUANTILE:.0%} of validation images",
            }
        return texts


# --- the stage --------------------------------------------------------------------------------------------------------
def evaluate_generator(
    settings: GenerationSettings,
    generator: str | None,
    tokenizer: str,
    samplings: Mapping[str, SamplerConfig],
    folder: str | Path,
    baselines: Sequence[str] = BASELINES,
) -> None:
    """Draw and measure samples of one generator in several ways; run it through `base.processes.launch`.

    Sample i is asked for the class or the caption of a validation image, the samples spread evenly over these (or going
    round, where there are more samples), and its noise comes from the seed and i: neither depends on the number of
    processes. One file a method below FOLDER holds its row and the protocol of each number.

    Args:
        generator: a folder of `MaskGIT.save_pretrained` or an embedded name, looked for as `find_model` does; None
            measures the baselines alone.
        tokenizer: what `find_model` and then `models.checkpoints.load_tokenizer` take: the one that it was trained
        with.
        samplings: name -> how to draw.
        baselines: some of `BASELINES`.
    Raises:
        codalib.datasets.token_cache.CacheMismatch: the generator belongs to another tokenizer.
        ValueError: an unknown baseline, or a value that `generate` does not take.
    """
    if odd := set(baselines) - set(BASELINES):
        raise ValueError(f"baseline {odd.pop()!r} got, expected some of {', '.join(BASELINES)}")
    if shared := set(baselines) & set(samplings):
        raise ValueError(f"a way to draw samples is named {shared.pop()!r}, as a baseline is: give it another name")
    accelerator = make_accelerator()
    stage = _Stage(settings, generator, tokenizer, Path(folder), accelerator)
    for name in (*baselines, *samplings):
        file = generated_file(folder, name, settings, generator, tokenizer, samplings.get(name))
        done = file.exists()
        accelerator.wait_for_everyone()  # all have looked before the first writes
        if done:
            continue
        columns, asked = stage.columns(name, samplings.get(name))
        if accelerator.is_main_process:
            row = {"method": name, "samples": len(asked), **stage.reference.measure(columns, asked)}
            if name in samplings:
                row |= asdict(samplings[name]) | {"seconds_a_sample": columns["seconds"].double().mean().item()}
            write_json(file, {"row": row, "protocol": stage.reference.protocol(len(asked))})
            log.info("%s: %s", name, {key: value for key, value in row.items() if isinstance(value, float)})
    accelerator.wait_for_everyone()


def read_generated(
    settings: GenerationSettings,
    generator: str | None,
    tokenizer: str,
    samplings: Mapping[str, SamplerConfig],
    folder: str | Path,
    baselines: Sequence[str] = BASELINES,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows that `evaluate_generator` wrote, baselines first, and the protocol of each measure."""
    results = [
        read_json(generated_file(folder, name, settings, generator, tokenizer, samplings.get(name)))
        for name in (*baselines, *samplings)
    ]
    return [result["row"] for result in results], results[-1]["protocol"] if results else {}


def generated_file(
    folder: str | Path,
    name: str,
    settings: GenerationSettings,
    generator: str | None,
    tokenizer: str,
    sampling: SamplerConfig | None,
) -> Path:
    """Where a method's result lies; the name changes with everything that decides the numbers."""
    models = [tokenizer] if sampling is None else [tokenizer, generator]
    drawn = None if sampling is None else asdict(sampling)
    mark = _mark(_inputs(settings), drawn, [file_stamps(model) for model in models])
    return Path(folder) / "generated" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{mark}.json"


def _inputs(settings: GenerationSettings) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if key not in ("batch_size", "workers")}


def _mark(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


class _Stage:
    """What the methods of one run share: the models, the images, the networks and the reference's features."""

    def __init__(
        self,
        settings: GenerationSettings,
        generator: str | None,
        tokenizer: str,
        folder: Path,
        accelerator: Accelerator,
    ):
        self.settings, self.folder, self.accelerator = settings, folder, accelerator
        self.device = accelerator.device
        self.tokenizer = load_tokenizer(find_model(tokenizer)).to(self.device)
        self.hash = tokenizer_hash(self.tokenizer)
        self.model, self.captions, self.weights = None, None, ""
        resolution = self.tokenizer.resolution
        self.val = load_dataset(settings.dataset, "val", resolution, limit=settings.val_limit)
        self.distance = build_frechet(settings.frechet, settings.frechet_resolution).to(self.device)
        self.effnet = None  # where the Frechet distance is EfficientNet's, its features serve for all
        if self.distance.name == "fid" and settings.train_limit != 0:
            self.effnet = build_frechet("fd_effnet", settings.frechet_resolution).to(self.device)
        if generator is not None:
            self._load(find_model(generator))
        self.train, train_columns = None, None
        if settings.train_limit != 0:
            self.train = load_dataset(settings.dataset, "train", resolution, False, settings.train_limit)
            train_columns = self._kept("train", len(self.train), lambda share: self._real(self.train, share))
        val_columns = self._kept("val", len(self.val), lambda share: self._real(self.val, share))
        self.real = {"val": val_columns, "train": train_columns}
        self.reference = self._reference()

    def _load(self, generator: str) -> None:
        model = check_generator(MaskGIT.from_pretrained(generator), self.tokenizer)
        if model.num_classes is not None and model.info.get("classes") != self.val.classes:
            raise ValueError(
                f"the generator knows the classes {model.info.get('classes')}, {self.settings.dataset} has "
                f"{self.val.classes}: measure it on the data it was trained on"
            )
        self.model = model.to(self.device)
        if model.text_dim is not None:
            encoder = build_text_encoder(model.info["text_encoder"]).to(self.device)
            self.captions = CaptionTable(encoder, [item.caption for item in self.val.items])
        state = sorted(self.model.state_dict().items())
        self.weights = hashlib.sha256(b"".join(v.cpu().contiguous().numpy().tobytes() for _, v in state)).hexdigest()

    def _reference(self) -> Reference:
        features = self.real[self.settings.reference]["frechet"]
        if self.train is None:
            return Reference(self.settings, self.distance, features, None, None, None)
        train = self.real["train"].get("effnet", self.real["train"]["frechet"])
        probe = LinearProbe(train, self.train.labels[self.real["train"]["number"]], len(self.train.classes))
        unseen = nearest(self.real["val"].get("effnet", self.real["val"]["frechet"]), train)[0]
        return Reference(self.settings, self.distance, features, probe, train, unseen)

    def columns(self, name: str, sampling: SamplerConfig | None) -> tuple[dict[str, Tensor], Tensor]:
        """The columns of a method's images and the labels that they were asked for."""
        labels = self.val.labels
        if name == VALIDATION:
            return self.real["val"], labels[self.real["val"]["number"]]
        count = self.settings.samples or len(self.val)
        if name in (TRAINING, UNPAIRED):
            train = self.train or load_dataset(self.settings.dataset, "train", self.tokenizer.resolution, False)
            images = train.subset(asked_images(min(count, len(train)), len(train)).tolist())
            if name == TRAINING:
                columns = self._kept(name, len(images), lambda share: self._real(images, share))
                return columns, images.labels[columns["number"]]
        if name in (RECONSTRUCTIONS, UNPAIRED, SHUFFLED, SHUFFLED_LEVELS):
            tokens, asked = self._tokens("train", images) if name == UNPAIRED else self._tokens("val", self.val)
            generator = torch.Generator().manual_seed(self.settings.seed)
            if name == SHUFFLED:
                tokens = shuffle_tokens(tokens, generator)
            elif name == SHUFFLED_LEVELS:
                tokens = shuffle_levels(tokens, self.tokenizer.quantizer.scales, generator)
            if count < len(tokens):  # as many as there are samples: a Frechet distance grows where there are fewer
                rows = asked_images(count, len(tokens))
                tokens, asked = tokens[rows], asked[rows]
            key = self.hash, self.settings.seed
            return self._kept(name, len(tokens), lambda share: self._decoded(tokens, share), *key), asked
        if self.model is None:
            raise ValueError(f"no generator is given to draw {name!r} from")
        images = asked_images(count, len(self.val))
        key = self.hash, self.weights, asdict(sampling), self.settings.seed
        return self._kept("samples", count, lambda share: self._drawn(sampling, images, share), *key), labels[images]

    def _tokens(self, split: str, images: ImageDataset) -> tuple[Tensor, Tensor]:
        """Images' tokens (N, L) and labels."""
        process = self.accelerator.process_index, self.accelerator.num_processes
        settings, seed = self.settings, self.settings.seed
        limits = settings.val_limit, settings.train_limit
        mark = _mark(self.hash, settings.dataset, len(images), limits, seed)
        folder = self.folder / "generated" / f"tokens-{split}-{mark}"
        how = CacheSettings(seed=seed, batch_size=settings.batch_size, workers=settings.workers)
        cache_tokens(self.tokenizer, images, folder, how, process)
        self.accelerator.wait_for_everyone()
        cache = TokenCache.open(folder, self.hash)
        batch = cache.batch(range(len(cache)))
        return batch["tokens"], batch["label"]

    # What yields batches of (numbers, columns) for the numbers that fall to this process.

    def _real(self, dataset: ImageDataset, numbers: range) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        size, workers = self.settings.batch_size, self.settings.workers
        for batch in evaluation_batches(dataset, size, numbers.start, numbers.step, workers):
            yield batch["index"], self._features(batch["image"].to(self.device))

    def _decoded(self, tokens: Tensor, numbers: range) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in torch.tensor(numbers).split(self.settings.batch_size):
            levels = split_levels(tokens[part].to(self.device), self.tokenizer.quantizer.scales)
            yield part, self._features(self.tokenizer.decode(levels))

    def _drawn(
        self, sampling: SamplerConfig, images: Tensor, numbers: range
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in torch.tensor(numbers).split(self.settings.batch_size):
            started = time.monotonic()
            noise = sample_generators(self.settings.seed, part.tolist())
            drawn = generate(self.model, self._condition(images[part]), len(part), generator=noise, **asdict(sampling))
            pictures = self.tokenizer.decode(drawn)
            pictures.sum().item()  # waits for the device
            seconds = torch.full((len(part),), (time.monotonic() - started) / len(part))
            yield part, self._features(pictures) | {"seconds": seconds}

    def _condition(self, images: Tensor) -> Condition:
        if self.captions is not None:
            return self.captions.condition([self.val.items[i].caption for i in images.tolist()], self.device)
        return None if self.model.num_classes is None else self.val.labels[images].to(self.device)

    @torch.no_grad()
    def _features(self, images: Tensor) -> dict[str, Tensor]:
        columns = {"frechet": self.distance.inception(images).float().cpu()}
        if self.effnet is not None:
            columns["effnet"] = self.effnet.inception(images).float().cpu()
        return columns

    def _kept(
        self, name: str, count: int, work: Callable[[range], Iterable[tuple[Tensor, dict[str, Tensor]]]], *key: Any
    ) -> dict[str, Tensor]:
        """The columns of COUNT images by number, computed by all processes or read from where they were kept.

        KEY is what decides them beside the data and the networks.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if count < world:
            raise ValueError(f"{count} images for {world} processes: take fewer processes")
        settings, networks = self.settings, [self.distance.name, self.distance.extractor_side, self.effnet is not None]
        data = settings.dataset, settings.val_limit, settings.train_limit, self.tokenizer.resolution
        path = self.folder / "generated" / f"{name.replace(' ', '-')}-{_mark(count, data, networks, key)}.safetensors"
        done = path.exists()
        self.accelerator.wait_for_everyone()  # all have looked before the first writes
        if not done:
            path.parent.mkdir(parents=True, exist_ok=True)
            batches = work(range(rank, count, world))
            share = -(-len(range(rank, count, world)) // self.settings.batch_size)
            rows = list(tqdm(batches, total=share, desc=name, disable=rank > 0, mininterval=2.0))
            columns = {key: torch.cat([row[1][key] for row in rows]) for key in rows[0][1]}
            save_file(columns | {"number": torch.cat([row[0] for row in rows])}, _part(path, rank))
            self.accelerator.wait_for_everyone()
            if rank == 0:
                _merge([_part(path, number) for number in range(world)], path)
            self.accelerator.wait_for_everyone()
        return load_file(path)


def asked_images(samples: int, images: int) -> Tensor:
    """Which validation image's class or caption each sample is asked for, (samples,): evenly spread, or going round."""
    if samples > images:
        return torch.arange(samples) % images
    return torch.linspace(0, images - 1, samples, dtype=torch.float64).round().long()


def _part(path: Path, rank: int) -> Path:
    return path.with_suffix(f".part{rank}")


def _merge(parts: Sequence[Path], path: Path) -> None:
    """Join the processes' columns in the order of their numbers; PATH appears whole."""
    shares = [load_file(part) for part in parts]
    order = torch.cat([share["number"] for share in shares]).argsort()
    whole = path.with_suffix(".part")
    save_file({name: torch.cat([share[name] for share in shares])[order] for name in shares[0]}, whole)
    os.replace(whole, path)
    for part in parts:
        part.unlink()
