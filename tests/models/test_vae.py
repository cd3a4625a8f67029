import copy
import math

import pytest
import torch
from diffusers import AutoencoderKL

from codalib.models.adapters import add_adapters
from codalib.models.baselines import fresh_copy
from codalib.models.checkpoints import load_adapters, load_vae, save_adapters
from codalib.models.checkpoints.ours import plain_copy
from codalib.models.loss_weights import adaptive_weight_layer
from codalib.models.vae import ContinuousVAE


def adapter_parameters(vae):
    return [parameter for name, parameter in vae.named_parameters() if "lora_" in name]


@pytest.fixture(scope="module")
def vae() -> ContinuousVAE:
    return load_vae("emoji")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def train_adapters(vae):
    for parameter in adapter_parameters(vae):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return vae


def test_the_embedded_vae_reconstructs_and_is_normalised(vae):
    from codalib.datasets.images import load_dataset
    from codalib.evaluation.metrics import psnr

    dataset = load_dataset("emoji", "val", 64, limit=32)
    batch = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    latents = vae.encode(batch, generator=torch.Generator().manual_seed(0))
    assert latents.shape == (32, 16, 8, 8)
    assert 0.8 < latents.std() < 1.25
    assert psnr(batch, vae.decode(latents)).mean() > 25


def test_a_fresh_copy_has_new_weights_everywhere_and_no_noise(vae, images):
    before = {name: value.clone() for name, value in vae.named_parameters()}
    fresh = fresh_copy(vae)
    new = dict(fresh.named_parameters())
    assert new.keys() == before.keys()
    assert not any(torch.equal(value, before[name]) for name, value in new.items() if value.ndim > 1)
    assert all(torch.equal(value, before[name]) for name, value in vae.named_parameters())
    assert all(value.requires_grad for value in new.values())
    assert (fresh.scale, fresh.shift) == (1, 0)
    torch.testing.assert_close(fresh.encode(images), fresh.encode(images, sample=False), atol=1e-4, rtol=0)


def test_sampling_is_seeded_and_the_mean_is_not_random(vae, images):
    def sampled(seed):
        return vae.encode(images, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))
    assert torch.equal(vae.encode(images, sample=False), vae.encode(images, sample=False))


@pytest.mark.parametrize(
    ("where", "parts"), [("both", {"encoder", "decoder"}), ("encoder", {"encoder"}), ("none", set())]
)
def test_adapters_start_as_the_identity_and_only_they_are_trained(vae, images, where, parts):
    adapted = add_adapters(copy.deepcopy(vae), where, rank=4)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable)
    assert {name.split(".")[1] for name in trainable} == parts
    assert torch.equal(adapted(images, sample=False), vae(images, sample=False))
    assert (adaptive_weight_layer(adapted) is None) == ("decoder" not in parts)


def test_merged_adapters_are_the_same_function(vae, images):
    adapted = train_adapters(add_adapters(copy.deepcopy(vae), "both", rank=4))
    ours, plain = adapted(images, sample=False), plain_copy(adapted, merge=True)
    assert not torch.allclose(ours, vae(images, sample=False), atol=1e-3)
    assert torch.allclose(plain(images, sample=False), ours, atol=1e-5)
    assert not adapter_parameters(plain)


def test_without_its_adapters_it_is_the_vae_that_it_was(vae, images):
    adapted = train_adapters(add_adapters(copy.deepcopy(vae), "both", rank=4))
    plain = plain_copy(adapted, merge=False)
    assert torch.equal(plain(images, sample=False), vae(images, sample=False))
    assert not adapter_parameters(plain)
    assert adapter_parameters(adapted)


def test_an_images_noise_can_be_its_own(vae, images):
    def noise(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = vae.encode(images, generator=noise(3, 4))
    assert torch.allclose(together[1:], vae.encode(images[1:], generator=noise(4)), atol=1e-5)
    assert not torch.allclose(together[:1], vae.encode(images[:1], generator=noise(4)), atol=1e-2)


def test_published_vaes_are_looked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path))
    for name, file in (("kl16", "kl16.safetensors"), ("flux", "flux-vae")):
        with pytest.raises(ValueError, match=f"{file}: .* are not here, looked in"):
            load_vae(name)
    torch.save({"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, tmp_path / "kl16.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_vae("kl16")


def test_a_checkpoint_of_unknown_scale_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    from codalib.pretrained.vae_layouts import KL16_CONFIG, published_state

    small = AutoencoderKL(**KL16_CONFIG | {"block_out_channels": (32,) * 5, "layers_per_block": 1})
    torch.save(published_state(small, "ldm"), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="latent scale is not known"):
        load_vae(tmp_path / "small.pth")
    torch.save({"encoder.conv_in.lora_layer.up.weight": torch.zeros(1)}, tmp_path / "adapted.ckpt")
    with pytest.raises(ValueError, match="load_tokenizer"):
        load_vae(tmp_path / "adapted.ckpt")


def test_adapters_are_saved_apart_from_their_base(vae, images, tmp_path):
    adapted = train_adapters(add_adapters(copy.deepcopy(vae), "decoder", rank=4))
    save_adapters(adapted, tmp_path)
    again = load_adapters(copy.deepcopy(vae), tmp_path)
    assert torch.equal(again(images, sample=False), adapted(images, sample=False))
    with pytest.raises(ValueError, match="adapters"):
        adapted.save_pretrained(tmp_path / "base")


def test_a_vae_survives_its_folder(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    assert torch.equal(load_vae(tmp_path)(images, sample=False), vae(images, sample=False))


def test_bad_input_is_one_sentence(vae, tmp_path):
    with pytest.raises(ValueError, match="multiple of 8"):
        vae.latent_side(60)
    with pytest.raises(ValueError, match="expected images of shape \\(B, 3, h, w\\)"):
        vae.encode(torch.zeros(1, 1, 64, 64))
    images = torch.zeros(1, 3, 64, 64)
    for bad, message in [
        (images.to(torch.uint8), "floating and in .*got 1 of torch.uint8: of 8 bits, divide by 127.5"),
        (images[:0], "one image at least, .*got 0 of torch.float32"),
        (images + 255, r"in \[-1, 1\], got values from 255 to 255: divide 8 bits"),
        (images - 2.1, "undo any other normalisation"),
        (images * math.nan, "got values from nan to nan"),
        (images - math.inf, "got values from -inf to -inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            vae.encode(bad)
    vae.encode(images - 1.2)  # an overshoot of a decoder
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_vae(tmp_path)
    for arguments, message in [
        ({"where": "middle"}, "middle"),
        ({"rank": 0}, "rank"),
        ({"layers": ("conv9",)}, "conv9"),
        ({"layers": "conv1"}, "expected layers as a list, got the text 'conv1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_adapters(copy.deepcopy(vae), **arguments)


def test_the_layers_of_the_adaptive_weight_run_where_their_names_say():
    vae = add_adapters(load_vae("emoji"), "both", rank=2)
    order = []
    for name, module in vae.autoencoder.decoder.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda module, *_: order.append(module.weight))
    vae.decode(torch.zeros(1, 16, 8, 8))
    assert adaptive_weight_layer(vae, "last") is order[-1]
    names = {id(p): name for name, p in vae.autoencoder.decoder.named_parameters()}
    upsampling = [p for p in order if "upsamplers" in names[id(p)]]
    assert adaptive_weight_layer(vae) is upsampling[0]
    assert adaptive_weight_layer(add_adapters(load_vae("emoji"), "encoder", rank=2)) is None
    middle = add_adapters(load_vae("emoji"), "decoder", rank=2, layers=("mid_block.resnets.0.conv1",))
    assert adaptive_weight_layer(middle) is not None
    flux = add_adapters(load_vae("emoji"), "decoder", rank=2, layers=("conv1", "conv2"))
    assert adaptive_weight_layer(flux) is adaptive_weight_layer(flux, "last")
    with pytest.raises(ValueError, match="expected an adaptive layer of first_upsample or last, got 'first'"):
        adaptive_weight_layer(flux, "first")


def test_latents_are_shifted_and_then_scaled_and_back(images):
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.25,
        shift_factor=3.0,
    ).eval()
    vae = ContinuousVAE(network)
    z = network.encode(images).latent_dist.mean
    latents = vae.encode(images, sample=False)
    torch.testing.assert_close(latents, (z - 3) * 0.25)
    torch.testing.assert_close(vae.decode(latents), network.decode(latents * 4 + 3).sample)
    torch.testing.assert_close(vae(images, sample=False), network.decode(z).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapter_starts_with_a_spread_of_one_over_its_rank_and_a_scale_of_one(vae, rank):
    torch.manual_seed(0)
    adapted = add_adapters(copy.deepcopy(vae), "both", rank=rank)
    down, up = ([p for n, p in adapted.named_parameters() if f"lora_{side}" in n] for side in "AB")
    assert torch.cat([p.flatten() for p in down]).std().item() * rank == pytest.approx(1, abs=0.02)
    assert not any(p.any() for p in up)
    scales = [layer.scaling["default"] for layer in adapted.modules() if hasattr(layer, "scaling")]
    assert scales == [1.0] * len(down)
