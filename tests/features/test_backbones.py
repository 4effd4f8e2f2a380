"""Backbones: their last map, folding, and weights that cannot be used."""

import os
import pickle

import pytest
import torch
from torch import nn
from torchvision import models

from scegg.features.backbones import build_backbone, fold, last_map_node
from util import UserError


@pytest.mark.parametrize(
    "name, channels, side",
    [
        ("resnet18", 512, 2),
        ("vgg11", 512, 4),
        ("densenet121", 1024, 2),
        ("mobilenet_v3_small", 576, 2),
        ("convnext_tiny", 768, 2),
        ("squeezenet1_1", 512, 3),
    ],
)
def test_last_map_of_torchvision_networks(name, channels, side, tmp_path):
    torch.manual_seed(0)
    network = models.get_model(name, weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")

    backbone, provenance = build_backbone(name, tmp_path / "w.pth", 64)
    out = backbone(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, channels, side, side)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert provenance["weights"] == "w.pth"


def random_weights(name, path):
    """Weights of a torchvision network whose normalisations all do something."""
    options = {"init_weights": True} if name == "googlenet" else {}
    network = models.get_model(name, weights=None, **options)
    with torch.no_grad():
        for norm in modules_of(network, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    torch.save(network.state_dict(), path)
    return path


def modules_of(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite2",
        "resnet18",
        "densenet121",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "googlenet",
        "vgg11_bn",
        "convnext_tiny",
        "shufflenet_v2_x0_5",
    ],
)
def test_folding_changes_maps_by_rounding_alone(name, tmp_path):
    torch.manual_seed(0)
    is_offline = name == "efficientnet_lite2"
    weights = None if is_offline else random_weights(name, tmp_path / "w.pth")
    backbone, _ = build_backbone(name, weights, 64)
    images = torch.randn(2, 3, 64, 64)
    plain = backbone(images)
    norms = len(modules_of(backbone, nn.BatchNorm2d))

    folded = fold(backbone)(images)
    assert (folded - plain).norm() <= 1e-5 * plain.norm()
    left = len(modules_of(backbone, nn.BatchNorm2d))
    assert left < norms or name == "convnext_tiny"  # which has none
    assert not modules_of(backbone, nn.ZeroPad2d)  # nor a padding of its own
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_resnet_map_is_what_its_pool_sees(tmp_path):
    network = models.resnet18(weights=None).eval()
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    seen = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))

    images = torch.randn(1, 3, 96, 96)
    network(images)
    backbone, _ = build_backbone("resnet18", tmp_path / "w.pth", 96)
    torch.testing.assert_close(backbone(images), seen[0])


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet102", "neither efficientnet_lite2 nor"),
        ("vit_b_16", "--img_size 100 is no multiple of 16"),
    ],
)
def test_unusable_backbones(name, message, tmp_path):
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        build_backbone(name, tmp_path / "w.pth", 100)


def test_a_map_that_is_not_the_last_layers_is_refused():
    """The last node of a ViT with a map embeds its patches: tokens come after it."""
    network = models.VisionTransformer(32, 16, 1, 2, 8, 8).eval()
    with pytest.raises(UserError, match="has no last feature map"):
        last_map_node("a_vit", network, 32)


def test_an_image_too_small_for_a_map_is_refused(tmp_path):
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="at --img_size 32 its last map has a single position"):
        build_backbone("resnet18", tmp_path / "w.pth", 32)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_unusable_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save(Hostile(), tmp_path / "evil2.pth")

    for weights, message in (
        ("none.pth", "no such file"),
        ("text.pth", "cannot? ?be loaded|can be loaded safely"),
        ("evil.pth", "can be loaded safely"),
        ("evil2.pth", "can be loaded safely"),
        ("r18.pth", "do not fit the backbone"),
    ):
        with pytest.raises(UserError, match=message):
            build_backbone("resnet50", tmp_path / weights, 64)
    assert not (tmp_path / "it_ran").exists()


FIRST = "conv1.weight"


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 1, 0, torch.qint8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: dict(enumerate(state.values())), "does not hold a state dict"),
        (lambda state: state | {FIRST: state[FIRST].to_sparse()}, "do not fit the backbone"),
        (
            lambda state: (
                state | {FIRST: torch.quantize_per_tensor(state[FIRST], 1, 0, torch.qint8)}
            ),
            "do not fit the backbone",
        ),
    ],
    ids=["numbers for names", "sparse", "quantized"],
)
def test_tensors_that_no_network_takes(tmp_path, change, message):
    torch.save(change(dict(models.resnet18(weights=None).state_dict())), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        build_backbone("resnet18", tmp_path / "w.pth", 64)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    message = "could not be downloaded .*--weights FILE, or use --backbone efficientnet_lite2"
    with pytest.raises(UserError, match=message):
        build_backbone("resnet101", None, 64)
