"""Images to tokens and back: `codalib encode DATASET --tokenizer NAME --out FOLDER`, `codalib decode FOLDER ...`."""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from codalib.base.files import atomic_write, writing
from codalib.base.hardware import compute_device
from codalib.base.processes import launch
from codalib.base.team import TeamError, launched_processes
from codalib.datasets.images import SPLITS, DataError
from codalib.datasets.token_cache import CacheSettings, TokenCache, cache_dataset, encoded_rows, tokenizer_hash
from codalib.models.checkpoints import find_model, load_tokenizer
from codalib.models.tokens import split_levels
from codalib.reporting.display import png, to_bytes

log = logging.getLogger(__name__)

PARQUET, ROWS = "tokens.parquet", 1024  # file of `codalib encode --parquet`; rows of one of its groups


def encode(arguments: Sequence[str] | None = None) -> int:
    """Encode a data set's images into a folder, shard by shard; goes on where an interrupted call stopped."""
    parser = _parser("encode", encode.__doc__)
    parser.add_argument("dataset", help='"emoji", imagefolder:PATH, webdataset:PATH/{000..127}.tar, ...')
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the data set (train)")
    parser.add_argument("--limit", type=positive, help="images, evenly spread (all)")
    parser.add_argument("--views", type=positive, default=1, help="encodings of an image, each with new noise (1)")
    started = launched_processes()
    parser.add_argument(
        "--processes", type=positive, default=started or 1, help="on this machine, one a GPU (1, or the launcher's)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each that encodes (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior's noise (0)")
    parser.add_argument("--parquet", action="store_true", help="write tokens.parquet beside them too")
    given = parser.parse_args(arguments)
    try:
        settings = CacheSettings(views=given.views, seed=given.seed, batch_size=given.batch_size, workers=given.workers)
        work = partial(cache_dataset, limit=given.limit, settings=settings)
        kept = encoded_rows(given.out)
        started = time.monotonic()
        launch(work, given.processes, find_model(given.tokenizer), given.dataset, given.split, given.out)
        cache, seconds = TokenCache.open(given.out), time.monotonic() - started
        if given.parquet:
            _write_parquet(cache, given.out / PARQUET)
    except (DataError, ValueError, OSError, TeamError) as error:
        return _failed(error)
    rate = f"{(len(cache) - kept) / seconds:.1f} images a second, with loading the model" if kept < len(cache) else ""
    words = "%s: %d images%s of %d tokens, %d codes; %s"
    views = f" ({given.views} views of each counted)" if given.views > 1 else ""
    log.info(words, given.out, len(cache), views, cache.indices.shape[1], cache.codebook_size, rate or "all were there")
    return 0


def _write_parquet(cache: TokenCache, path: Path) -> None:
    """One row an image and view: its number and name, label, first caption and tokens (L,), coarse to fine.

    The file's metadata hold what the columns mean: {"codebook_size", "scales", "classes", "tokenizer"} as JSON.
    """
    about = {"codebook_size": cache.codebook_size, "scales": cache.scales, "classes": cache.classes}
    about["tokenizer"] = cache.tokenizer
    number = pa.from_numpy_dtype(cache.indices.dtype)
    columns = {
        "image": pa.int64(),
        "name": pa.string(),
        "view": pa.int64(),
        "label": pa.int64(),
        "caption": pa.string(),
    }
    schema = pa.schema(columns | {"tokens": pa.list_(number)}, {"codalib": json.dumps(about)})
    with atomic_write(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(cache), ROWS):
            rows = range(len(cache))[start : start + ROWS]
            batch = cache.batch(rows)
            own = {"image": batch["index"].tolist(), "view": cache.view[rows].tolist()}
            own["name"] = [cache.names[image] for image in own["image"]]
            own |= {"label": batch["label"].tolist(), "caption": batch["caption"]}
            own["tokens"] = list(cache.indices[rows])
            writer.write_table(pa.table(own, schema))


def decode(arguments: Sequence[str] | None = None) -> int:
    """Decode a folder of `codalib encode` into PNG files, IMAGE-VIEW.png, of N levels IMAGE-VIEW-levels-N.png."""
    parser = _parser("decode", decode.__doc__)
    parser.add_argument("tokens", type=Path, help="folder of `codalib encode`")
    parser.add_argument("--levels", type=positive, help="decode the first levels alone (all)")
    parser.add_argument("--limit", type=positive, help="images, the first ones (all)")
    given = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(find_model(given.tokenizer))
        cache = TokenCache.open(given.tokens, tokenizer_hash(tokenizer))
        tokenizer.to(compute_device())
        rows, began = range(len(cache))[: given.limit], time.monotonic()
        end = f"-levels-{given.levels}.png" if given.levels else ".png"
        names = [f"{cache.image[row]:08d}-{cache.view[row]}{end}" for row in rows]
        with writing(given.out):
            there = {file.name for file in given.out.glob("*.png")}
        if odd := sorted(there - set(names)):
            raise ValueError(f"expected no pictures but these {len(rows)} in {given.out}, got {odd[0]}: another folder")
        for start in tqdm(range(0, len(rows), given.batch_size), desc="decoding", mininterval=2.0):
            own = rows[start : start + given.batch_size]
            levels = split_levels(cache.batch(own)["tokens"].to(compute_device()), cache.scales)
            with torch.inference_mode():
                images = tokenizer.decode(levels, given.levels)
            for row, image in zip(own, images, strict=True):
                with atomic_write(given.out / names[row], "wb") as file:
                    file.write(png(to_bytes(image)))
    except (ValueError, OSError) as error:
        return _failed(error)
    log.info("%s: %d images, %.1f a second", given.out, len(rows), len(rows) / (time.monotonic() - began))
    return 0


def positive(text: str) -> int:
    """A whole number above 0, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"codalib {command}", description=description)
    parser.add_argument("--tokenizer", required=True, help='"emoji", "emoji-small", a folder, or OWNER/NAME')
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time (64)")
    return parser


def _failed(error: Exception) -> int:
    log.error("%s", error)
    return 1
