"""Every kind of quantizer by its name: CODA's, the VQ baseline and those of vector-quantize-pytorch."""

from functools import partial

from torch import nn

from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.library_quantizers import LIBRARY_KINDS, LibraryQuantizer
from codalib.models.quantizer import ResidualAttentionQuantizer

KINDS = {cls.kind: cls for cls in (ResidualAttentionQuantizer, ResidualNearestQuantizer)} | {
    kind: partial(LibraryQuantizer, kind) for kind in LIBRARY_KINDS
}


def quantizer_from_config(config: dict, backend: str = "auto") -> nn.Module:
    """The quantizer of a `config()`, with fresh parameters; raises ValueError on an unknown kind or setting."""
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"expected a quantizer kind of {', '.join(KINDS)}, got {kind!r}")
    try:
        return KINDS[kind](**settings, backend=backend)
    except TypeError as error:
        raise ValueError(
            f"expected settings of the quantizer kind {kind!r}, got {sorted(settings)}: {error}"
        ) from error
