"""The frozen-feature discriminator: shapes, what is trained, what a generator step leaves behind."""

import logging

import pytest
import timm
import torch
from torch import nn

from codalib.models import adversary
from codalib.models import discriminator as module
from codalib.models.losses import discriminator_hinge, generator_hinge
from codalib.pretrained import networks as features
from codalib.pretrained import registry


@pytest.fixture(scope="module")
def effnet():
    return features.EfficientNetLite0()


@pytest.fixture
def discriminator(effnet):
    torch.manual_seed(0)
    return module.FrozenFeatureDiscriminator(effnet)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """DINO's code with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODALIB_WEIGHTS", str(folder))
        torch.manual_seed(0)
        state = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0).state_dict()
        torch.save(state, folder / "dino_deitsmall16_pretrain.pth")
        return adversary.build_discriminator("dino")


@pytest.fixture
def images():
    return torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_logits_of_every_token(discriminator, images):
    logits = discriminator(images)
    assert logits.shape == (3, 24 * 24 + 12 * 12 + 6 * 6 + 3 * 3 + 2 * 2)
    assert discriminator.name == "discriminator_effnet"


def test_dino_logits_and_readouts(dino, images):
    dino.eval()
    assert dino.name == "discriminator_dino"
    assert dino(images[:1]).shape == (1, 5 * 196)
    tokens = dino.backbone.tokens(features.to_side(images[:1], 224))
    readouts = dino.readouts(images[:1], None)
    torch.testing.assert_close(readouts[2][0, :, 7], tokens[2][0, 8] + tokens[2][0, 0])  # patch 7 + CLS


def test_only_heads_are_trained_and_saved(discriminator, effnet, images):
    trained = [name for name, parameter in discriminator.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("heads.") for name in trained)
    state = discriminator.state_dict()
    assert all(name.startswith("heads.") for name in state)
    other = module.FrozenFeatureDiscriminator(effnet)
    other.load_state_dict(state)
    assert torch.equal(discriminator.eval()(images), other.eval()(images))


def test_a_generator_step_leaves_nothing_on_the_discriminator(discriminator, images):
    generator = nn.Conv2d(3, 3, 1)
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    modes = [layer.training for layer in discriminator.modules()]
    with adversary.frozen(discriminator) as frozen:
        assert frozen is discriminator
        assert frozen.training
        loss = generator_hinge(frozen(generator(images)))
    loss.backward()
    assert generator.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert [layer.training for layer in discriminator.modules()] == modes
    for name, value in discriminator.state_dict().items():
        assert torch.equal(value, before[name]), name
    # And the discriminator's own step still trains every head, and neither the backbone nor the generator.
    generator.zero_grad()
    discriminator_hinge(*adversary.real_and_fake(discriminator, images, generator(images))).backward()
    assert generator.weight.grad is None
    for name, parameter in discriminator.named_parameters():
        assert (parameter.grad is not None) == name.startswith("heads."), name


def test_frozen_restores_after_an_error(discriminator):
    def fail_while_frozen():
        with adversary.frozen(discriminator):
            assert not any(parameter.requires_grad for parameter in discriminator.parameters())
            raise ZeroDivisionError

    before = [parameter.requires_grad for parameter in discriminator.parameters()]
    with pytest.raises(ZeroDivisionError):
        fail_while_frozen()
    assert [parameter.requires_grad for parameter in discriminator.parameters()] == before
    assert discriminator.heads.training


def test_heads_learn_to_tell_two_kinds_of_images_apart(discriminator):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(discriminator.heads.parameters(), lr=2e-3, betas=(0.5, 0.9))
    losses = []
    for _ in range(12):
        smooth = nn.functional.interpolate(torch.rand(6, 3, 4, 4) * 2 - 1, size=(40, 40), mode="bilinear")
        noisy = smooth + 0.1 * torch.randn_like(smooth)
        loss = discriminator_hinge(*adversary.real_and_fake(discriminator, smooth, noisy))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with adversary.frozen(discriminator) as judge, torch.no_grad():  # as the generator's step sees it
        assert judge(smooth).mean() > judge(noisy).mean() + 0.2


def test_heads_wrap_around_and_are_spectrally_normal():
    torch.manual_seed(0)
    head = module.Head(8).train()
    tokens = torch.randn(4, 8, 12)
    for _ in range(20):  # power iterations
        head(tokens)
    matrix = head.mix[0].weight.flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=0.05)
    head.eval()
    torch.testing.assert_close(head(tokens.roll(5, dims=-1)), head(tokens).roll(5, dims=-1))
    head.mix[1].weight.data.zero_()  # a residual block that adds nothing leaves the projection / sqrt 2
    head.mix[1].bias.data.zero_()
    torch.testing.assert_close(head(tokens), head.logit(head.project(tokens) / 2**0.5).squeeze(1))


def test_to_side_follows_the_released_rule():
    same = torch.rand(1, 3, 8, 8)
    assert features.to_side(same, 8) is same
    small = torch.rand(1, 3, 4, 12)
    expected = nn.functional.interpolate(small, size=(8, 8), mode="bicubic")
    torch.testing.assert_close(features.to_side(small, 8), expected)
    large = torch.rand(1, 3, 16, 20)
    by_area = nn.functional.interpolate(large, size=(8, 8), mode="area")
    torch.testing.assert_close(features.to_side(large, 8, crop=False), by_area)
    generator = torch.Generator().manual_seed(0)
    windows = large.unfold(2, 8, 1).unfold(3, 8, 1)  # (1, 3, 9, 13, 8, 8)
    cropped = 0
    for _ in range(200):
        out = features.to_side(large, 8, generator=generator)
        if torch.equal(out, by_area):
            continue
        assert (windows == out[:, :, None, None]).all(dim=(-1, -2)).all(dim=1).any()
        cropped += 1
    assert 70 < cropped < 130
    first, again = (features.to_side(large, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_errors(discriminator):
    with pytest.raises(ValueError, match="at least 33"):
        discriminator(torch.zeros(2, 3, 32, 32))
    with pytest.raises(TypeError, match="expected a backbone DinoViTS16"):
        module.FrozenFeatureDiscriminator(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="expected the discriminator dino"):
        adversary.build_discriminator("stylegan")


def test_building_by_name(monkeypatch, tmp_path, effnet):
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(module, "EfficientNetLite0", type(effnet))
    assert adversary.build_discriminator("auto").name == "discriminator_effnet"
    with pytest.raises(registry.MissingWeights):
        adversary.build_discriminator("dino")
    monkeypatch.setattr(module, "EfficientNetLite0", None)
    assert adversary.build_discriminator("effnet", weight=0) is None
    assert adversary.build_discriminator(None) is None


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_in_a_process_group(process_group, effnet, images, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        plain = module.FrozenFeatureDiscriminator(effnet)
    assert "each process's own" in caplog.text
    wrapped = nn.parallel.DistributedDataParallel(plain)
    with adversary.frozen(wrapped) as frozen:
        assert frozen is plain
        frozen(images.requires_grad_()).mean().backward()
    wrapped(images.detach()).mean().backward()
    assert all(parameter.grad is not None for parameter in plain.heads.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layers = module.FrozenFeatureDiscriminator(effnet).heads.modules()
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in layers) == 2 * len(effnet.channels)
