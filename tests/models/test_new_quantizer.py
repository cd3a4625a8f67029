"""A quantizer added as CONTRIBUTING.md says: a class, and its kind in the table; nothing else knows of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codalib.evaluation.latents import latent_scores
from codalib.models import quantizer_kinds
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.checkpoints import load_tokenizer, load_vae
from codalib.models.quantizer import Level, ResidualAttentionQuantizer, ResidualQuantizer
from codalib.models.tokenizer import CodaTokenizer
from codalib.training.quantizer import fit_quantizer
from codalib.training.settings import QuantizerSettings, TokenizerSettings

SCALES = (1, 2, 8)


class Cosine(ResidualNearestQuantizer):
    """The code of the smallest angle to the feature, as in arXiv:2110.04627."""

    kind = "cosine"

    def choose(self, features: Tensor, keys: Tensor, backend: str) -> Tensor:
        return super().choose(F.normalize(features, dim=1), F.normalize(keys, dim=1), backend)


class FirstChannel(ResidualQuantizer):
    """Straight below the base: the code whose first number is nearest to the feature's."""

    kind = "first channel"

    def __init__(self, latent_channels, codebook_size, scales, beta=0.25, backend="auto"):
        super().__init__(latent_channels, codebook_size, scales, beta, backend)

    def project_codes(self):
        return self.codebooks.weight[:, :1], self.codebooks.weight

    def choose(self, features, keys, backend):
        return (features[:, :1] - keys.T).abs().argmin(dim=1)

    def assign(self, features, keys, values, backend):
        indices = self.choose(features.detach(), keys.detach(), backend)
        codes = F.embedding(indices, values)
        loss = F.mse_loss(codes, features.detach()) + self.beta * F.mse_loss(codes.detach(), features)
        return Level(codes.detach() + (features - features.detach()), indices, loss, loss.new_zeros(()))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for added in Cosine, FirstChannel:
        monkeypatch.setitem(quantizer_kinds.KINDS, added.kind, added)


def test_a_class_straight_below_the_base_needs_what_the_recipe_says(tmp_path):
    latents = torch.randn(16, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = QuantizerSettings(
        kind="first channel", codebook_size=32, scales=SCALES, steps=5, batch_size=8, learning_rate=0.05, ema=0.0
    )
    fitted = fit_quantizer(settings, latents, tmp_path / "fit").eval()
    indices = fitted.encode(latents)
    assert torch.allclose(fitted.decode(indices), fitted(latents).quantized, atol=1e-5)
    wanted = (latents.mean(dim=(2, 3))[:, :1] - fitted.codebooks.weight[:, 0]).abs().argmin(dim=1)
    assert torch.equal(indices[0].flatten(), wanted)


def test_settings_fit_it_and_a_tokenizers_folder_gives_it_back(tmp_path):
    torch.manual_seed(0)
    latents = torch.randn(16, 16, 8, 8)
    settings = QuantizerSettings(
        kind="cosine", codebook_size=32, scales=SCALES, steps=30, batch_size=8, learning_rate=0.05, ema=0.0
    )
    torch.manual_seed(settings.seed)
    before = latent_scores(settings.build_quantizer(16).eval(), latents)["quantization_error"]
    fitted = fit_quantizer(settings, latents, tmp_path / "fit").eval()
    assert latent_scores(fitted, latents)["quantization_error"] < before
    indices = fitted.encode(latents)
    assert torch.allclose(fitted.decode(indices), fitted(latents).quantized, atol=1e-5)
    directions = F.normalize(latents.mean(dim=(2, 3)), dim=1) @ F.normalize(fitted.codebooks.weight, dim=1).T
    assert torch.equal(indices[0].flatten(), directions.argmax(dim=1))  # by the angle, not by the distance

    CodaTokenizer(load_vae("emoji"), fitted).save_pretrained(tmp_path / "saved", "emoji")
    again = load_tokenizer(str(tmp_path / "saved")).quantizer
    assert isinstance(again, Cosine)
    assert torch.equal(again.decode(indices), fitted.decode(indices))


def test_settings_hand_a_new_kind_what_it_takes(monkeypatch):
    class Sharper(ResidualAttentionQuantizer):
        kind = "sharper"

    monkeypatch.setitem(quantizer_kinds.KINDS, Sharper.kind, Sharper)
    own = {"attention_dim": 8, "norm": None, "entropy_temperature": 0.5, "beta": 0.1}
    found = QuantizerSettings(1, 1, kind="sharper", codebook_size=8, scales=SCALES, **own).build_quantizer(4).config()
    assert {name: found[name] for name in own} == own


def test_a_tokenizers_settings_take_it_and_an_unknown_one_names_it():
    assert isinstance(
        TokenizerSettings(kind="cosine", scales=SCALES, steps=1, batch_size=1).build_quantizer(16), Cosine
    )
    with pytest.raises(
        ValueError, match=r"expected a quantizer kind of attention, nearest, .*cosine, first channel, got 'sine'"
    ):
        quantizer_kinds.quantizer_from_config({"kind": "sine"})
