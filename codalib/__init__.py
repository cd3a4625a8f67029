"""CODA: continuous VAEs adapted into discrete tokenizers (arXiv 2503.17760).

The library in rooms; an upper one imports only from those below it:

    tools        what one types: the `codalib` command
    workflow     profiles, a notebook's parameters, a run's manifest, executing a notebook
    reporting    figures, tables, pages, what objects look like in a notebook, the explorer
    experiments  the paper's numbers and claims, sweeps, the statistics of a verdict
    training     settings, the trainer, the stages: VAE, quantizer, tokenizer, MaskGIT
    evaluation   metrics; measuring reconstructions, generated images, latents
    datasets     images, captions, the token cache
    models       THE PAPER, Eq. 4-12: quantizer, VAE with adapters, tokenizer, losses, discriminator, MaskGIT, sampling
    pretrained   frozen networks and where their weights come from
    kernels      softmax assignment and cross-entropy without tokens x codes
    base         files, paths, hardware, processes, seeds

Shapes are written with these letters everywhere:
B batch, C latent channels, H W latent grid, p side of one level's token map, L tokens, K codes, D attention width;
images are (B, 3, h, w) in [-1, 1].

The names of `__all__` are the library's front door; each loads its module when it is first used.
"""

import importlib
import sys
from typing import Any

from codalib.base.paths import move_home

__version__ = "0.1.0"

FRONT_DOOR = {  # name -> the module that defines it
    "CodaTokenizer": "models.tokenizer",
    "ContinuousVAE": "models.vae",
    "ResidualAttentionQuantizer": "models.quantizer",
    "ResidualNearestQuantizer": "models.baselines",
    "MaskGIT": "models.maskgit",
    "Tokens": "models.tokens",
    "load_vae": "models.checkpoints",
    "load_tokenizer": "models.checkpoints",
    "load_quantizer": "models.checkpoints",
    "load_kl16": "models.checkpoints",
    "load_dataset": "datasets.images",
    "generate": "models.sampling",
    "psnr": "evaluation.metrics",
    "ssim": "evaluation.metrics",
}
_SHOWN = {  # class -> the function of `reporting.display` that shows it in a notebook
    ("codalib.models.tokens", "Tokens"): "tokens_html",
    ("codalib.models.tokenizer", "CodaTokenizer"): "tokenizer_html",
    ("codalib.training.trainer", "TrainingLog"): "log_html",
}
__all__ = list(FRONT_DOOR)


def __getattr__(name: str) -> Any:
    if name not in FRONT_DOOR:
        raise AttributeError(f"module 'codalib' has no attribute {name!r}")
    return getattr(importlib.import_module(f"codalib.{FRONT_DOOR[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _show_in_notebooks() -> None:
    """Tell IPython, where it runs, how to show the library's objects; no module is loaded before it is needed."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return
    for (module, name), function in _SHOWN.items():

        def show(shown: object, function: str = function) -> str:
            return getattr(importlib.import_module("codalib.reporting.display"), function)(shown)

        shell.display_formatter.formatters["text/html"].for_type_by_name(module, name, show)


move_home()
_show_in_notebooks()
