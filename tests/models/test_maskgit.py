import pytest
import torch
from torch.nn import functional as F

from codalib.datasets.text import CaptionTable, build_text_encoder
from codalib.datasets.token_cache import check_generator
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.checkpoints import EMBEDDED_GENERATORS
from codalib.models.maskgit import MaskGIT, TextCondition
from codalib.models.masks import sample_mask
from codalib.models.quantizer import FLUX_SCALES, MAR_SCALES
from codalib.models.sampling import generate
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.tokens import join_levels, split_levels, token_levels

SCALES = (1, 2, 3)  # 14 tokens
K = 11


def small(**settings):
    torch.manual_seed(0)
    return MaskGIT(K, SCALES, **{"width": 16, "depth": 2, "heads": 2} | settings).eval()


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(K, (count, 14), generator=generator), sample_mask(count, SCALES, generator=generator)


def captions(count=4, length=5, width=6):
    generator = torch.Generator().manual_seed(2)
    sizes = torch.arange(count) % length + 1
    mask = torch.arange(length) < sizes[:, None]
    return TextCondition(torch.randn(count, length, width, generator=generator), mask)


@pytest.mark.parametrize(("scales", "tokens"), [(MAR_SCALES, 680), (FLUX_SCALES, 2240)])
def test_l_has_the_papers_number_of_parameters(scales, tokens):
    with torch.device("meta"):
        model = MaskGIT.preset("L", codebook_size=16384, scales=scales, num_classes=1000)
    assert model.num_tokens == tokens
    assert (model.width, model.depth, model.heads) == (768, 24, 16)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 195e6 - 1) < 0.02 if scales == MAR_SCALES else count < 200e6


def test_a_preset_takes_other_settings_and_unknown_ones_raise():
    assert MaskGIT.preset("XS", K, SCALES, depth=1).depth == 1
    with pytest.raises(ValueError, match="expected a preset of L, S, XS, got 'M'"):
        MaskGIT.preset("M", K, SCALES)
    with pytest.raises(ValueError, match="heads divide"):
        small(heads=3)
    with pytest.raises(ValueError, match="a class or a text"):
        small(num_classes=2, text_dim=6)


@pytest.mark.parametrize("latent_context", [False, True])
def test_a_tokens_input_is_the_sum_of_what_is_known_of_it_and_logits_have_a_bias(latent_context):
    values = torch.randn(K, 4, generator=torch.Generator().manual_seed(3))
    model, seen = small(code_values=values, latent_context=latent_context), []
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.input_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens, mask = batch()
    tokens = tokens.masked_fill(mask, K)
    model.features(tokens)
    expected = model.code_embeddings(tokens) + model.levels.weight[token_levels(SCALES)] + model.positions
    if latent_context:
        expected = expected + model.context(model.known_latents(tokens))
    assert torch.allclose(seen[0], expected, atol=1e-5)
    x = torch.randn(3, 16)
    assert torch.allclose(model.logits(x), x @ model.head_weight().T + model.head.bias, atol=1e-5)


def test_sequences_are_levels_coarse_to_fine_and_back():
    levels = [torch.arange(p * p).view(1, p, p) + 100 * p for p in SCALES]
    tokens = join_levels(levels)
    assert tokens[0].tolist() == [100, *range(200, 204), *range(300, 309)]
    assert all(torch.equal(a, b) for a, b in zip(levels, split_levels(tokens, SCALES), strict=True))
    assert token_levels(SCALES).tolist() == [0] + [1] * 4 + [2] * 9
    with pytest.raises(ValueError, match="expected sequences of 14 tokens for scales"):
        split_levels(tokens[:, 1:], SCALES)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "mean"), [("cosine", 2 / torch.pi), ("beta", 12 / 15)])
def test_masks_follow_their_ratio_and_lie_anywhere(ratio, mean):
    scales = (1, 3, 6)
    mask = sample_mask(4000, scales, ratio, generator=torch.Generator().manual_seed(0))
    assert mask.sum(dim=1).min() >= 1
    assert mask.float().mean().item() == pytest.approx(mean + 0.5 / 46, abs=0.01)  # rounded up to whole tokens
    assert (mask.float().mean(dim=0) - mask.float().mean()).abs().max() < 0.04
    if ratio == "beta":
        spread = mask.float().mean(dim=1).std().item()
        assert spread == pytest.approx((12 * 3 / (15**2 * 16)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("ratio", ["cosine", "beta"])
def test_one_token_at_least_is_masked_whatever_is_drawn(ratio, monkeypatch):
    monkeypatch.setattr(
        torch, "rand", lambda *shape, generator=None: torch.full(shape, 1.0 if ratio == "cosine" else 0.0)
    )
    assert sample_mask(3, SCALES, ratio).sum(dim=1).tolist() == [1, 1, 1]


def test_masks_that_follow_levels_show_coarse_tokens_first():
    levels = token_levels(SCALES)
    mask = sample_mask(500, SCALES, coarse_first=1.0, generator=torch.Generator().manual_seed(0))
    for row in mask:
        if not row.all():
            assert levels[~row].max() <= levels[row].min()
    both = sample_mask(2000, SCALES, coarse_first=0.5, generator=torch.Generator().manual_seed(0))
    again = sample_mask(2000, SCALES, coarse_first=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(both, again)  # every number is the generator's
    orderly = [row.all() or levels[~row].max() <= levels[row].min() for row in both]
    assert 0.5 < sum(orderly) / 2000 < 0.8
    with pytest.raises(ValueError, match="expected a mask ratio of cosine, beta"):
        sample_mask(1, SCALES, "sine")


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_hidden_tokens_alone():
    model, (tokens, mask) = small(num_classes=3), batch()
    labels = torch.tensor([0, 1, 2, 0])
    logits = model.logits(model.features(tokens.masked_fill(mask, K), labels))  # (B, L, K)
    assert logits.shape == (4, 14, K)
    wanted = F.cross_entropy(logits[mask], tokens[mask], label_smoothing=0.1)
    torch.testing.assert_close(model(tokens, mask, labels), wanted)
    changed = tokens.clone()
    changed[mask] = (changed[mask] + 1) % K  # another answer, the same question
    assert torch.equal(
        model.features(changed.masked_fill(mask, K), labels), model.features(tokens.masked_fill(mask, K), labels)
    )
    model(tokens, mask, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_position_sees_every_other():
    model, (tokens, _) = small(), batch(1)
    embedded = model.codes.weight.detach()[tokens].requires_grad_()
    model.code_embeddings = lambda _: embedded
    for position in (0, 7, 13):
        (grad,) = torch.autograd.grad(model.features(tokens)[0, position].square().sum(), embedded)
        assert (grad[0].abs().sum(dim=1) > 0).all()


def test_a_dropped_condition_is_not_seen():
    tokens, _ = batch()
    dropped = torch.tensor([True, False, True, False])
    by_class = small(num_classes=3)
    a = by_class.features(tokens, torch.tensor([0, 0, 0, 0]), dropped)
    b = by_class.features(tokens, torch.tensor([1, 1, 2, 2]), dropped)
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(a[1], b[1], atol=1e-4)
    by_text, text = small(text_dim=6), captions()
    other = TextCondition(text.embeddings.flip(0), text.mask)
    a, b = by_text.features(tokens, text, dropped), by_text.features(tokens, other, dropped)
    torch.testing.assert_close(a[2], b[2])
    assert not torch.allclose(a[1], b[1], atol=1e-4)


def test_padding_behind_a_caption_changes_nothing():
    model, (tokens, _), text = small(text_dim=6), batch(), captions()
    longer = TextCondition(F.pad(text.embeddings, (0, 0, 0, 3), value=9.0), F.pad(text.mask, (0, 3)))
    torch.testing.assert_close(model.features(tokens, text), model.features(tokens, longer))
    noisy = TextCondition(torch.where(text.mask[..., None], text.embeddings, 7.0), text.mask)
    torch.testing.assert_close(model.features(tokens, text), model.features(tokens, noisy))


def test_positions_are_each_levels_own_or_one_set_averaged():
    own, shared = small(), small(level_positions=False)
    assert own.positions.shape == (14, 16)
    assert shared.positions.shape == (9, 16)
    table = shared._position_embeddings()
    assert torch.equal(table[5:], shared.positions)  # the finest level
    torch.testing.assert_close(table[0], shared.positions.mean(dim=0))  # the coarsest: one cell over all
    tokens = torch.full((1, 14), 3)
    with torch.no_grad():  # without its level a token of one place would be the same at each of two equal maps
        twice = MaskGIT(K, (2, 2), 16, 1, 2, level_positions=False).eval()
        first, second = twice.features(tokens[:, :8])[0].split(4)
    assert not torch.allclose(first, second, atol=1e-5)


def test_code_values_join_the_embeddings_but_not_the_masks():
    values = torch.randn(K, 4)
    model = small(code_values=values)
    embedded = model.code_embeddings(torch.arange(K + 1)[None])[0]
    torch.testing.assert_close(embedded[K], model.codes.weight[K])
    torch.testing.assert_close(embedded[:K], model.codes.weight[:K] + values @ model.code_projection.weight.T)
    with pytest.raises(ValueError, match="expected 11 code values, one a code, got 3"):
        small(code_values=values[:3])


def test_the_known_latents_are_the_quantizers_sum_of_the_visible_tokens():
    quantizer = ResidualNearestQuantizer(4, K, SCALES)
    tokens, mask = batch()
    model = small(code_values=quantizer.code_values, latent_context=True)
    known = model.known_latents(tokens.masked_fill(mask, K))
    shown = split_levels(tokens.masked_fill(mask, -1), SCALES)
    expected = quantizer.decode(shown, partial=True)  # (B, 4, 3, 3)
    start = 0
    for p in SCALES:
        part, start = known[:, start : start + p * p].transpose(1, 2).unflatten(2, (p, p)), start + p * p
        torch.testing.assert_close(part[:, :4], F.interpolate(expected, size=(p, p), mode="area"))
    everything = model.known_latents(tokens)
    torch.testing.assert_close(everything[..., 4:], torch.ones(*tokens.shape, len(SCALES)))
    assert model.known_latents(torch.full_like(tokens, K)).abs().max() == 0
    with pytest.raises(ValueError, match="expected code_values with latent_context"):
        small(latent_context=True)


def test_with_latent_context_the_loss_is_that_of_the_logits_and_it_is_saved(tmp_path):
    model, (tokens, mask) = small(code_values=torch.randn(K, 4), latent_context=True), batch()
    logits = model.logits(model.features(tokens.masked_fill(mask, K)))[mask]
    loss = model(tokens, mask, label_smoothing=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, tokens[mask]))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (model.context.weight, model.head_projection.weight))
    model.save_pretrained(tmp_path / "model")
    again = MaskGIT.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.logits(again.features(tokens)), model.logits(model.features(tokens)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_and_loaded_is_the_same(tmp_path, dtype):
    model, (tokens, _) = small(num_classes=3, level_positions=False, code_values=torch.randn(K, 4)), batch()
    model.info = {"tokenizer": "abc", "classes": ["a", "b", "c"]}
    model.save_pretrained(tmp_path / "model", dtype)
    model.save_pretrained(tmp_path / "model", dtype)  # replaces
    loaded = MaskGIT.from_pretrained(tmp_path / "model")
    assert loaded.info == model.info
    assert loaded.config() == model.config()
    assert not loaded.training
    labels = torch.tensor([0, 1, 2, 0])
    tolerance = {"float32": 0, "float16": 2e-2, "bfloat16": 2e-1}[dtype]
    torch.testing.assert_close(loaded.features(tokens, labels), model.features(tokens, labels), atol=tolerance, rtol=0)


def test_loading_what_is_not_there_or_does_not_fit_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json"):
        MaskGIT.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path / "a")
    small(depth=1).save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text((tmp_path / "b" / "config.json").read_text())
    with pytest.raises(ValueError, match="does not fit"):
        MaskGIT.from_pretrained(tmp_path / "a")
    for number, name in enumerate(("c", "d")):
        model = small()
        model.head.bias.data += number
        model.save_pretrained(tmp_path / name)
    (tmp_path / "c" / "model.safetensors").replace(tmp_path / "d" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors in .*d changed since its config.json was written"):
        MaskGIT.from_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match="expected a dtype of float32"):
        small().save_pretrained(tmp_path / "c", "int8")


@pytest.mark.parametrize(
    ("settings", "condition", "message"),
    [
        ({"num_classes": 3}, torch.tensor([0, 1, 2, 3]), "expected labels from 0 to 2, got 3"),
        ({"num_classes": 3}, torch.tensor([0, -1, 2, 1]), "expected labels from 0 to 2, got -1"),
        ({"num_classes": 3}, torch.tensor([0]), "expected one condition for each of 4 samples, got 1"),
        ({"num_classes": 3}, None, "expected labels as the condition, .*got no condition"),
        ({}, torch.tensor([0, 1, 2, 1]), "expected no condition as the condition, .*got labels"),
        ({"text_dim": 6}, torch.tensor([0, 1, 2, 1]), "expected text as the condition, .*got labels"),
        ({"text_dim": 5}, captions(), "of width 5, got 6"),
        ({"text_dim": 6}, ["a", "b", "c", "d"], "expected text as the condition, .*got a list, neither"),
        ({"num_classes": 3}, [0, 1, 2, 0], "expected labels as the condition, .*got a list, neither"),
        ({"num_classes": 3}, torch.tensor([0.5, 1, 2, 0]), r"expected labels \(B,\) of int64, got torch.float32"),
        ({"num_classes": 3}, torch.zeros(4, 1).long(), r"expected labels \(B,\) of int64, got .* of shape \(4, 1\)"),
    ],
)
def test_a_condition_that_does_not_fit_is_one_sentence(settings, condition, message):
    with pytest.raises(ValueError, match=message) as caught:
        small(**settings).features(batch()[0], condition)
    assert "\n" not in str(caught.value)


def test_other_lengths_raise():
    with pytest.raises(ValueError, match=r"expected tokens of shape \(B, 14\)"):
        small().features(torch.zeros(2, 13, dtype=torch.long))


@pytest.mark.parametrize("name", EMBEDDED_GENERATORS)
def test_an_embedded_generator_draws_for_its_tokenizer(name):
    tokenizer = CodaTokenizer.from_pretrained("emoji-small")
    model = check_generator(MaskGIT.from_pretrained(name), tokenizer)
    if model.text_dim is not None:
        captions = CaptionTable(build_text_encoder("minilm")).condition(["red heart", "red heart", "blue circle"])
        images = tokenizer.decode(generate(model, captions, steps=4, generator=torch.Generator().manual_seed(0)))
        red, blue = images[:2, 0].mean() - images[:2, 2].mean(), images[2, 0].mean() - images[2, 2].mean()
        assert red > blue
        return
    labels = torch.arange(model.num_classes)
    assert len(model.info["classes"]) == len(labels) == 9
    images = tokenizer.decode(generate(model, labels, steps=2, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (9, 3, 64, 64)
    flags = images[model.info["classes"].index("Flags")]
    assert flags.mean() < images.mean()  # a flag leaves little of the white ground
