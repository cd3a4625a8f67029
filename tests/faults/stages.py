"""The training stages in tiny settings, each a function of its output folder that resumes what the folder holds."""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import save

from codalib.base.files import atomic_write
from codalib.base.processes import launch
from codalib.datasets.images import load_dataset
from codalib.datasets.token_cache import CacheSettings, cache_dataset
from codalib.training import maskgit, tokenizer
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import MaskGITSettings, PretrainSettings, QuantizerSettings, TokenizerSettings
from codalib.training.trainer import read_log
from codalib.training.vae import pretrain_vae

PARAMETERS = {"KILLS": 20, "KILLS_OF_TWO": 5, "SEED": 0}  # of the environment: kills of a stage, in one process, in two
LIMIT = 300  # s: a run that takes longer hangs
OFTEN = {"log_every": 1, "checkpoint_every": 1}
VAE = PretrainSettings(steps=10, batch_size=2, widths=(8, 8, 8, 8), evaluate_every=3, **OFTEN)
QUANTIZER = QuantizerSettings(steps=60, batch_size=8, codebook_size=256, scales=(1, 2, 4, 8), **OFTEN)
TOKENIZER = TokenizerSettings(steps=5, batch_size=2, codebook_size=32, scales=(1, 2, 4, 8), rank=2, **OFTEN)
MASKGIT = MaskGITSettings(steps=20, batch_size=3, width=16, depth=2, heads=2, evaluate_every=5, **OFTEN)
CACHE = CacheSettings(views=2, batch_size=2, shard_images=2)


def images():
    return load_dataset("emoji", "train", 64, limit=8), load_dataset("emoji", "val", 64, limit=4)


def store(model, folder):
    with atomic_write(folder / "model.safetensors", "wb") as file:
        file.write(save({name: value.contiguous() for name, value in model.state_dict().items()}))


def vae(folder):
    model = pretrain_vae(VAE, *images(), folder)
    if os.environ.get("RANK", "0") == "0":
        store(model, folder)


def quantizer(folder):
    latents = torch.randn(32, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    store(fit_quantizer(QUANTIZER, latents, folder, (0, 30)), folder)


def train_tokenizer(folder):
    tokenizer.train_and_save(TOKENIZER, "emoji", *images(), folder)


def tokens(folder):
    cache_dataset("emoji-small", "emoji", "train", folder, 16, True, CACHE)


def train_maskgit(folder):
    caches = [folder.parent / f"cache-{split}" for split in ("train", "val")]
    maskgit.train_and_save(MASKGIT, *caches, folder)


def make_caches(folder):
    for split in ("train", "val"):
        cache_dataset("emoji-small", "emoji", split, folder / f"cache-{split}", 8)


STAGES = {
    "VAE pretraining": vae,
    "quantizer fit": quantizer,
    "tokenizer training": train_tokenizer,
    "token cache": tokens,
    "MaskGIT training": train_maskgit,
}


def outcome(folder: Path) -> dict:
    """What must be equal: the digests of the final files (weights, settings, tokens), and the log but for its times."""
    kinds = (".safetensors", ".json", ".npy")
    kept = [p for p in folder.rglob("*") if p.suffix in kinds and "checkpoints" not in p.parts]
    files = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(kept)}
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder)]
    return {"files": files, "log": rows}


def begin(function, marker, *arguments):
    """FUNCTION, once MARKER says that this process has imported everything."""
    torch.set_num_threads(1)
    marker.touch()
    function(*arguments)


def child(function, processes, marker, output, *arguments):
    """The forked process: a group of its own, so that its processes can be killed together, and its own output."""
    os.setpgrp()
    with open(output, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            launch(begin, processes, function, marker, *arguments)
        except Exception as error:
            print(f"\nstopped by {type(error).__name__}: {error}", file=file, flush=True)
            sys.exit(1)


class Started:
    """A stage in a forked process (nothing is imported again), and in as many as it launches itself."""

    def __init__(self, function, folder, processes=1):
        beside = Path(tempfile.mkdtemp(prefix="faults-"))  # of the marker and the output: FOLDER's disk may be full
        marker, self.output = beside / "began", beside / "output.txt"
        arguments = (function, processes, marker, self.output, folder)
        self.process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
        self.process.start()
        while not marker.exists() and self.process.is_alive():
            time.sleep(0.005)
        self.began = time.monotonic()

    def wait(self, seconds=LIMIT):
        """Whether it ended by itself in SECONDS."""
        self.process.join(max(0.0, seconds))
        return not self.process.is_alive()

    def kill(self, rng=random):
        """All its processes as a power failure does, or one of those that it launched as the kernel does for memory."""
        ranks = []
        with suppress(psutil.NoSuchProcess):  # one that is at its end has no command line
            ranks = [p for p in psutil.Process(self.process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        if ranks and rng.random() < 0.5:
            with suppress(psutil.NoSuchProcess):
                rng.choice(ranks).kill()
            assert self.wait(), "the others go on for ever where one process was killed"
            return "one of the processes"
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.wait()
        return "all"

    def finish(self):
        """Wait for its end; what it said last, and None where it went well."""
        assert self.wait(), f"still running after {LIMIT} s"
        return None if self.process.exitcode == 0 else self.output.read_text(errors="replace").splitlines()[-1]
