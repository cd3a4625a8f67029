"""Models come back as they were saved; what is missing, damaged or another's is one sentence and never silent."""

import json
import pwd
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import codalib
from codalib.base.files import read_json, write_json
from codalib.models import hub
from codalib.models.adapters import add_adapters
from codalib.models.baselines import ResidualNearestQuantizer
from codalib.models.checkpoints import EMBEDDED_TOKENIZERS, load_tokenizer, load_vae, ours, weights_digest
from codalib.models.checkpoints.names import find_model
from codalib.models.tokenizer import CodaTokenizer
from codalib.models.vae import ContinuousVAE
from codalib.pretrained import registry
from codalib.pretrained.vae_layouts import (
    FLUX_CONFIG,
    KL16_CONFIG,
    SD_CONFIG,
    plan,
    published_state,
    published_tensors,
    set_scale,
)

TINY = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
FILE = "diffusion_pytorch_model.safetensors"


def tiny_vae(seed=0, **config):
    torch.manual_seed(seed)
    return ContinuousVAE(AutoencoderKL(**TINY | config)).eval().requires_grad_(False)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def saved(tmp_path):
    """A VAE's folder."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def tokenizer(saved, tmp_path):
    """The folder of a tokenizer with adapters on the VAE `saved`."""
    vae = add_adapters(load_vae(saved), "both", rank=2)
    for name, parameter in vae.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    CodaTokenizer(vae, ResidualNearestQuantizer(4, 8, (1, 2))).save_pretrained(tmp_path / "tokenizer", base=saved)
    return tmp_path / "tokenizer"


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_records_its_parts_and_its_vae(tokenizer, saved, tmp_path, monkeypatch):
    config = read_json(tokenizer / "config.json")
    assert list(config["parts"]) == ["adapters.json", "adapters.safetensors", "quantizer.safetensors"]
    assert config["vae_digest"] == ours.vae_digest(load_vae(saved)) == ours.vae_digest(load_tokenizer(tokenizer).vae)
    monkeypatch.chdir(tmp_path)
    load_tokenizer("tokenizer").save_pretrained("again", base="vae")
    assert read_json("again/config.json") == config  # the base's place holds from any working directory
    load_tokenizer("tokenizer").save_pretrained("whole")
    shutil.rmtree(saved)
    whole = load_tokenizer("whole")
    assert whole.vae.adapter_settings["rank"] == 2
    assert list(read_json("whole/config.json")["parts"])[-1] == "vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"tokenizer: .*vae is not here: expected emoji"):
        load_tokenizer(tokenizer)


@pytest.mark.parametrize("lost", ["adapters.json", "adapters.safetensors", "quantizer.safetensors"])
def test_a_folder_without_one_of_its_parts_does_not_load(tokenizer, lost):
    (tokenizer / lost).unlink()
    with pytest.raises(ValueError, match=f"holds no {lost}, of the parts"):
        load_tokenizer(tokenizer)


def test_adapters_of_another_tokenizer_do_not_slip_in(tokenizer, saved, tmp_path):
    CodaTokenizer(load_vae(saved), ResidualNearestQuantizer(4, 8, (1, 2))).save_pretrained(tmp_path / "plain", saved)
    assert load_tokenizer(tmp_path / "plain").vae.adapter_settings is None
    for name in ("adapters.json", "adapters.safetensors"):
        shutil.copy(tokenizer / name, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"adapters\.safetensors, which its config\.json does not name"):
        load_tokenizer(tmp_path / "plain")


@pytest.mark.parametrize("part", ["quantizer.safetensors", "adapters.safetensors", "vae/config.json"])
def test_a_part_that_fits_but_is_not_its_own_is_refused(tokenizer, saved, tmp_path, part):
    """Of another training with the same shapes, damaged in one bit, or edited by hand."""
    load_tokenizer(tokenizer).save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / part
    if part.endswith(".json"):
        write_json(file, read_json(file) | {"sample_size": 7})
    else:
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part} in .*whole changed since its config.json was written.*: copy the"):
        load_tokenizer(tmp_path / "whole")


def test_weights_that_are_no_numbers_do_not_load(tokenizer):
    state = load_file(tokenizer / "quantizer.safetensors")
    state["codebooks.weight"][3, 1] = torch.nan
    save_file(state, tokenizer / "quantizer.safetensors")
    with pytest.raises(ValueError, match=r"quantizer.safetensors holds .*\(NaN\) in 1 tensors \(codebooks.weight"):
        load_tokenizer(tokenizer)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"scaling_factor": 0.6}, {"norm_num_groups": 2}, {"act_fn": "relu"}], ids=str
)
def test_another_vae_of_equal_shapes_is_refused(tokenizer, saved, change):
    tiny_vae(**change).save_pretrained(saved)
    with pytest.raises(ValueError, match=r"tokenizer: it was saved on the VAE \w{16}, got the VAE \w{16}"):
        load_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"adapters\.json: it was saved on the VAE \w{16}"):
        ours.load_adapters(load_vae(saved), tokenizer)


def test_folders_saved_before_the_record_still_load(tokenizer):
    config = read_json(tokenizer / "config.json")
    before = load_tokenizer(tokenizer)
    write_json(tokenizer / "config.json", {name: config[name] for name in ("vae", "quantizer")})
    assert same(load_tokenizer(tokenizer), before)
    settings = read_json(tokenizer / "adapters.json")
    del settings["vae_digest"]
    write_json(tokenizer / "adapters.json", settings)
    assert same(load_tokenizer(tokenizer), before)
    (tokenizer / "adapters.json").unlink()
    with pytest.raises(ValueError, match=r"holds no adapters\.json"):  # one without the other
        load_tokenizer(tokenizer)
    (tokenizer / "adapters.safetensors").unlink()
    assert load_tokenizer(tokenizer).vae.adapter_settings is None  # nothing tells that there were any
    write_json(tokenizer.parent / "manifest.json", {"parameters": {"adapters": "both"}})
    with pytest.raises(ValueError, match=r"holds no adapters\.json, adapters\.safetensors"):
        load_tokenizer(tokenizer)
    write_json(tokenizer.parent / "manifest.json", {"parameters": {"adapters": "none"}})
    load_tokenizer(tokenizer)


def test_the_embedded_tokenizers_carry_the_record():
    digest = ours.vae_digest(load_vae("emoji"))
    for folder in EMBEDDED_TOKENIZERS.values():
        config = read_json(folder / "config.json")
        assert config["vae_digest"] == digest
        assert set(config["parts"]) == {"adapters.json", "adapters.safetensors", "quantizer.safetensors"}


@pytest.mark.parametrize(("key", "value"), [("vae", "../vae"), ("parts", ["../vae/config.json"])])
def test_a_config_does_not_point_out_of_its_folder(tokenizer, key, value):
    write_json(tokenizer / "config.json", read_json(tokenizer / "config.json") | {key: value})
    with pytest.raises(ValueError, match=r"config\.json names the VAE \.\./vae|holds no \.\./vae/config\.json"):
        load_tokenizer(tokenizer)


@pytest.mark.parametrize("file", ["quantizer.safetensors", "adapters.safetensors"])
def test_tensors_that_do_not_fit_name_their_file(tokenizer, file):
    state = load_file(tokenizer / file)
    first = min(state)
    save_file({name: value for name, value in state.items() if name != first} | {"x": torch.ones(1)}, tokenizer / file)
    with pytest.raises(ValueError, match=rf"{file} .*2 tensors differ: {re.escape(first)} is missing.*x is not exp"):
        load_tokenizer(tokenizer)
    (tokenizer / file).write_bytes((tokenizer / file).read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{file} cannot be read as named tensors"):
        load_tokenizer(tokenizer)


# --- VAEs of diffusers' folders ---------------------------------------------------------------------------------------


def test_a_vae_without_its_decoder_does_not_load(saved):
    state = load_file(saved / FILE)
    save_file({name: value for name, value in state.items() if not name.startswith("decoder.")}, saved / FILE)
    count = sum(name.startswith("decoder.") for name in state)
    with pytest.raises(ValueError, match=rf"{FILE}: .*{count} tensors differ: decoder\.conv_in\.bias is mis.* more"):
        load_vae(saved)
    save_file(state | {"encoder.conv_in.bias": torch.zeros(5)}, saved / FILE)
    with pytest.raises(ValueError, match=r"1 tensors differ: encoder\.conv_in\.bias has shape \(5,\), expected \(4,\)"):
        load_vae(saved)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"])
def test_whatever_file_of_weights_a_folder_has_is_read(saved, name):
    half = {key: value.half() for key, value in load_file(saved / FILE).items()}
    (saved / FILE).unlink()
    save_file(half, saved / name) if name.endswith("safetensors") else torch.save(half, saved / name)
    loaded = load_vae(saved).autoencoder.state_dict()
    assert all(torch.equal(loaded[key], half[key].float()) for key in half)
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"holds no weights: expected {FILE}"):
        load_vae(saved)


def test_shards_lie_beside_their_index(saved):
    tiny_vae().autoencoder.save_pretrained(saved / "shards", max_shard_size="10KB")
    assert len(list((saved / "shards").glob("*.safetensors"))) > 1
    assert same(load_vae(saved / "shards"), load_vae(saved))
    index = next((saved / "shards").glob("*.index.json"))
    for outside in ("../" + FILE, str(saved / FILE), "..\\" + FILE):
        write_json(index, {"weight_map": {"encoder.conv_in.bias": outside}})
        with pytest.raises(ValueError, match="expected files beside it"):
            load_vae(saved / "shards")


def test_scale_and_shift_of_the_config_are_used(saved):
    vae, image = load_vae(saved), torch.rand(1, 3, 8, 8) * 2 - 1
    z = vae.posterior(image).mean
    latents = vae.encode(image, sample=False)
    assert torch.equal(latents, (z - 0.25) * 0.5)
    assert torch.equal(vae.decode(latents), vae.autoencoder.decode(latents / 0.5 + 0.25).sample)
    assert load_vae(saved / FILE).scale == 0.5  # the config.json beside it counts
    given = load_vae(saved, scale=2.0, shift=1.0)
    assert torch.equal(given.encode(image, sample=False), (z - 1) * 2)


def test_a_scale_of_each_channel_is_refused(saved):
    write_json(saved / "config.json", read_json(saved / "config.json") | {"latents_mean": [0.0] * 4})
    with pytest.raises(ValueError, match="got latents_mean and latents_std"):
        load_vae(saved)
    assert load_vae(saved, scale=2.0).scale == 2.0


def test_other_folders_are_no_vaes(tokenizer, saved):
    with pytest.raises(ValueError, match=r"expected the config of an AutoencoderKL .* got vae, vae_digest"):
        load_vae(tokenizer)
    (saved / "config.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file"):
        load_vae(saved)


def test_attention_under_diffusers_first_names_is_read(saved):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(saved / FILE)
    expected = load_vae(saved)
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    save_file(state, saved / FILE)
    assert same(load_vae(saved), expected)


# --- VAEs of single files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale", "shift"),
    [(KL16_CONFIG, 0.2325, None), (FLUX_CONFIG, 0.3611, 0.1159), (SD_CONFIG, 0.18215, None)],
)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_the_scale_belongs_to_the_architecture(config, scale, shift, layout):
    with torch.device("meta"):
        network = AutoencoderKL(**config)
    tensors = published_tensors(network, layout).items()
    shapes = {name: torch.empty(shape, device="meta") for name, (_, shape) in tensors}
    autoencoder, problems = plan(shapes, layout)
    assert problems == []
    found = set_scale(autoencoder).config
    assert (found.scaling_factor, found.shift_factor) == (scale, shift)


SMALL = KL16_CONFIG | {"block_out_channels": (32,) * 5, "layers_per_block": 1, "latent_channels": 2}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL)


def test_an_unknown_architecture_wants_its_scale(small, tmp_path):
    save_file(published_state(small, "ldm"), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"small\.safetensors: .* latent scale is not known: give scale \(and shift\)"):
        load_vae(tmp_path / "small.safetensors")
    vae = load_vae(tmp_path / "small.safetensors", scale=0.3, shift=0.1)
    assert (vae.scale, vae.shift) == (0.3, 0.1)


WRAPPED = {
    "Lightning": lambda state: {
        "state_dict": {f"first_stage_model.{n}": v for n, v in state.items()}
        | {"model.diffusion_model.out.weight": torch.ones(1), "cond_stage_model.encoder.mid": torch.ones(1)},
        "optimizer_states": [{"state": {0: torch.ones(1)}}],
        "epoch": 3,
    },
    "training": lambda state: state | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)},
    "wrapper": lambda state: {"model": {f"module.{n}": v for n, v in state.items()}, "optimizer": {}},
    "model": lambda state: {f"model.{n}": v for n, v in state.items()},
    "averaged": lambda state: {"ema": {f"ema.{n}": v for n, v in state.items()}},
    "both": lambda state: state | {f"ema_model.{n}": v + 1 for n, v in state.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_checkpoints_are_read(small, how, tmp_path):
    state = published_state(small, "ldm")
    torch.save(WRAPPED[how](state), tmp_path / "vae.ckpt")
    loaded = load_vae(tmp_path / "vae.ckpt", scale=1.0)
    assert same(loaded.autoencoder, small)


def test_files_that_hold_no_tensors_say_so(tmp_path, small):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    torch.save({"state_dict": published_state(small, "ldm")}, tmp_path / "whole")
    torch.save({"w": torch.ones(1), "callbacks": np.float64(1.0), "path": Path("x")}, tmp_path / "objects.ckpt")
    for name, content, message in [
        ("a.safetensors", pointer, "a Git LFS pointer, not the weights: run git lfs pull"),
        ("a.ckpt", pointer, "a Git LFS pointer"),
        ("cut.pth", (tmp_path / "whole").read_bytes()[:-100], "cannot be read as named tensors"),
        ("empty.pth", b"", "cannot be read as named tensors"),
        ("text.pth", b"<html>not found</html>", "cannot be read as named tensors"),
        ("cut.safetensors", b"\x10\x00", "cannot be read as named tensors"),
        ("objects.ckpt", None, r"holds objects \(\S+\) beside its tensors, which could run code"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(name)} .*{message}") as error:
            load_vae(tmp_path / name)
        assert "\n" not in str(error.value)


def test_nothing_loads_a_pickle():
    calls = r"\btorch\.load\(|\bpickle\b|\ballow_pickle\s*=\s*True|\bjoblib\b|\.jit\.load\("
    folder = Path(codalib.__file__).parent
    # What the first process hands the others of its own run; its digest comes another way (tests/base/test_team).
    own = folder / "base" / "processes.py"
    for file in folder.rglob("*.py"):
        for line in file.read_text().splitlines():
            if re.search(calls, line) and not (file == own and "pickle" in line):
                assert "torch.load(" in line, f"{file}: {line}"
                assert "weights_only=True" in line, f"{file}: {line}"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/data/models/my/vae",
        "./my/vae",
        "~/my-vae",
        "../vae",
        "runs/long/vae",
        "models\\vae",
        "here/vae",
        "owner/kl16.safetensors",
        "emojy",
    ],
)
def test_local_places_are_answered_here(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "_hub_folder", None)
    whole = re.escape(name.removeprefix("~").removeprefix("./"))
    with pytest.raises(ValueError, match=rf"{whole} is not here: expected emoji, kl16, flux, a diffusers folder"):
        load_vae(name)


def test_a_hub_name_is_asked_for_once(tmp_path, monkeypatch):
    asked = []

    def refuse(url, **_):
        asked.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub.huggingface_hub, "get_hf_file_metadata", refuse)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"owner/name-1\.0 could not be fetched from the Hub \(no network\)"):
        load_vae("owner/name-1.0")
    assert time.monotonic() - start < 2
    assert len(asked) == 1


def test_a_hub_name_gives_the_vae_or_its_subfolder(saved, monkeypatch):
    def kept(repository, file):
        path = saved.parent / file
        return str(path) if path.exists() else None

    def absent(*_, **__):
        raise hub.EntryNotFoundError("no such file")

    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", kept)
    monkeypatch.setattr(hub.huggingface_hub, "get_hf_file_metadata", absent)
    assert same(load_vae("owner/pipeline"), load_vae(saved))
    assert same(load_vae("owner/pipeline", subfolder="vae"), load_vae(saved))
    with pytest.raises(ValueError, match=r"owner/pipeline on the Hub holds no config\.json"):
        load_vae("owner/pipeline", subfolder="other")


def test_without_a_home_nothing_raises(monkeypatch, tmp_path):
    def unknown(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "CODALIB_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    assert registry.weights_folder() == tmp_path / "weights"
    assert not registry.has_weights("kl16")
    assert find_model("mine") == "mine"
    with pytest.raises(ValueError, match="is not here"):
        load_vae("~/mine")
    with pytest.raises(ValueError, match=r"expected emoji, emoji-small, a folder with our .*, or one of the release"):
        load_tokenizer("~/mine")


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_digest_follows_weights_and_settings_alone(tokenizer, saved):
    before = weights_digest(tokenizer)
    assert re.fullmatch(r"[0-9a-f]{16}", before)
    assert weights_digest(str(tokenizer / "quantizer.safetensors")) != before
    (tokenizer / "log.jsonl").write_text("{}")
    (tokenizer / "manifest.json").write_text("{}")
    assert weights_digest(tokenizer) == before
    shutil.copytree(tokenizer, tokenizer.parent / "copy")
    assert weights_digest(tokenizer.parent / "copy") == before  # neither times nor places count
    config = (tokenizer / "adapters.json").read_text()
    (tokenizer / "adapters.json").write_text(json.dumps(json.loads(config)))
    assert weights_digest(tokenizer) != before
    (tokenizer / "adapters.json").write_text(config)
    content = bytearray((tokenizer / "quantizer.safetensors").read_bytes())
    content[-1] ^= 1
    (tokenizer / "quantizer.safetensors").write_bytes(content)
    assert weights_digest(tokenizer) != before
    with pytest.raises(ValueError, match="holds no weights"):
        weights_digest(tokenizer / "nowhere")
