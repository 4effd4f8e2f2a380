"""Token maps: the library's own tokens, other sizes, fine-tuned weights, what is refused."""

import argparse
import http.server
import sys
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from torchvision import models

import preprocessing
import train_joint
from helpers import SMALL_RUN, flags, read_summary
from scegg.datasets import toy
from scegg.features.backbones import build_backbone, fold, pixel_statistics
from scegg.features.feature_file import feature_file
from scegg.features.images import PixelNormalization
from scegg.features.tokens import cache_alone_if_offline
from scegg.features.weights import why_unreachable
from util import UserError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def save(network, path, prefix=""):
    """The network's weights, all of them random; what is 0 or 1 in a new network as well."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    state = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save(state, path)
    return path


# ---------------------------------------------------------------- torchvision


def small_vit(name, weights=None, image_size=224):
    """A torchvision ViT with patches of 32 px, but of one layer and eight channels."""
    return models.VisionTransformer(image_size, 32, 1, 2, 8, 8, num_classes=5)


def test_the_tokens_of_a_torchvision_vit(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(models, "get_model", small_vit)
    network = small_vit("vit_b_32", image_size=64).eval()
    images, seen = torch.randn(2, 3, 64, 64), []
    weights = save(network, tmp_path / "w.pth")
    network.encoder.ln.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(images)

    backbone, provenance = build_backbone("vit_b_32", weights, 64)
    maps = fold(backbone)(images)
    assert maps.shape == (2, 8, 2, 2) and set(provenance) == {
        "backbone",
        "weights",
        "weights_sha256",
    }
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), seen[0][:, 1:], **CLOSE)

    backbone, _ = build_backbone("vit_b_32", weights, 96)  # the embedding is interpolated
    assert backbone(torch.randn(1, 3, 96, 96)).shape == (1, 8, 3, 3)


def test_a_torchvision_swin_after_its_norm(tmp_path):
    torch.manual_seed(0)
    network = models.swin_t().eval()
    backbone, _ = build_backbone("swin_t", save(network, tmp_path / "w.pth"), 64)
    images = torch.randn(1, 3, 64, 64)
    last = network.norm(network.features(images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(images), last, **CLOSE)


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize(
    "name, img_size, prefix, shape",
    [
        ("vit_tiny_patch16_224", 96, 1, (192, 6, 6)),
        ("vit_small_patch14_reg4_dinov2", 56, 5, (384, 4, 4)),
        ("eva02_tiny_patch14_224", 56, 1, (192, 4, 4)),
        ("swin_tiny_patch4_window7_224", 96, None, (768, 3, 3)),
        ("convnext_atto", 96, None, (320, 3, 3)),
    ],
)
def test_the_tokens_of_timms_networks(timm, tmp_path, name, img_size, prefix, shape):
    torch.manual_seed(0)
    size = {} if name == "convnext_atto" else {"img_size": img_size}
    network = timm.create_model(name, num_classes=0, **size).eval()
    images = torch.randn(2, 3, img_size, img_size)

    weights = save(network, tmp_path / "w.pth")
    backbone, provenance = build_backbone(f"timm/{name}", weights, img_size)
    maps = fold(backbone)(images)
    assert maps.shape == (2, *shape)
    assert provenance["timm"] == timm.__version__ and provenance["batch_norm"] == "as it is"

    expected = network.forward_features(images)
    if prefix is not None:  # the position (1, 2) of the map is the token of that patch
        torch.testing.assert_close(maps[:, :, 1, 2], expected[:, prefix + shape[2] + 2], **CLOSE)
        expected = expected[:, prefix:].transpose(1, 2).reshape(maps.shape)
    elif expected.shape[-1] == shape[0]:
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(maps, expected, **CLOSE)


def test_fine_tuned_weights_of_another_size_in_their_wrappers(timm, tmp_path):
    """A classifier, a DataParallel and a checkpoint around the network; trained at 64 px."""
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    network = timm.create_model(name, num_classes=7, img_size=64).eval()
    plain = torch.load(save(network, tmp_path / "plain.pth"))
    state = {f"module.backbone.{key}": value for key, value in plain.items()}
    wrapped = {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(wrapped, tmp_path / "wrapped.pth")

    larger = timm.create_model(name, num_classes=7, img_size=64)
    larger.load_state_dict(plain)
    larger.set_input_size(img_size=96)  # timm's own way to another size
    images = torch.randn(1, 3, 96, 96)
    backbone, provenance = build_backbone(f"timm/{name}", tmp_path / "wrapped.pth", 96)
    expected = larger.eval().forward_features(images)[:, 1:].transpose(1, 2)
    torch.testing.assert_close(backbone(images).flatten(2), expected, **CLOSE)
    assert provenance["weights"] == "wrapped.pth"

    torch.save({"state_dict": {"norm.weight": torch.ones(192)}}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="do not fit the backbone"):
        build_backbone(f"timm/{name}", tmp_path / "part.pth", 96)


@pytest.mark.parametrize(
    "name, img_size, message",
    [
        ("timm/mixer_s32_224", 224, "not known to give a map"),
        ("timm/pit_ti_224", 224, "not known to give a map"),
        ("timm/vit_tiny_patch16_224", 100, "--img_size 100 is no multiple of 16"),
        ("timm/vit_tiny_patch16_224", 16, "a single position"),
        ("timm/vit_tiny_patch16_225", 64, "did you mean timm/vit_tiny_patch16_224"),
        ("timm/vit_tiny_patch16_224.mine", 64, "Invalid pretrained tag .*augreg_in21k"),
        ("timm/hf-hub:someone/vit", 64, "timm has no such network"),
        ("vit_b_16", 100, "--img_size 100 is no multiple of 16"),
    ],
)
def test_what_is_no_map_is_refused_before_any_download(timm, monkeypatch, name, img_size, message):
    def forbidden(*args, **kwargs):
        raise AssertionError("it was downloaded")

    monkeypatch.setattr("scegg.features.tokens.pretrained_state", forbidden)
    monkeypatch.setattr("scegg.features.tokens.download_state", forbidden)
    with pytest.raises(UserError, match=message):
        build_backbone(name, None, img_size)


def test_offline_the_file_to_fetch_is_named(timm, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create(name, **options)

    monkeypatch.setattr("scegg.features.tokens.why_unreachable", lambda url: None)
    monkeypatch.setattr(timm, "create_model", offline)
    url = "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k/resolve/main"
    message = f"could not be downloaded .*{url}/model.safetensors elsewhere.*--weights FILE"
    with pytest.raises(UserError, match=message):
        build_backbone("timm/vit_tiny_patch16_224.augreg_in21k", None, 32)


@pytest.fixture
def unreachable_hub(timm, tmp_path, monkeypatch):
    """The settings of the hub's client, whose host does not answer and whose cache is tmp_path."""
    from huggingface_hub import constants

    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return constants


def test_offline_the_hub_does_not_try_for_a_minute(unreachable_hub, capfd):
    began = time.monotonic()
    message = r"could not be downloaded \(.*refused\): download http://127.0.0.1:9/timm/convnext"
    with pytest.raises(UserError, match=message):
        build_backbone("timm/convnext_atto", None, 64)
    assert time.monotonic() - began < 10 and unreachable_hub.HF_HUB_OFFLINE is False
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"<html>no</html>"])
def test_a_damaged_file_in_the_hubs_cache_is_named(unreachable_hub, tmp_path, content):
    kept = tmp_path / "models--timm--convnext_atto.d2_in1k"
    for folder in ("refs", "blobs", "snapshots/1"):
        (kept / folder).mkdir(parents=True)
    (kept / "refs/main").write_text("1")
    (kept / "blobs/2").write_bytes(content)
    (kept / "snapshots/1/model.safetensors").symlink_to(kept / "blobs/2")

    message = r"convnext_atto.d2_in1k/blobs/2, .* cannot be loaded .*: delete it, and it is down"
    with pytest.raises(UserError, match=message):
        build_backbone("timm/convnext_atto", None, 64)


def test_a_users_own_choice_of_offline_stays(timm, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("scegg.features.tokens.why_unreachable", lambda url: "nothing is asked")
    with cache_alone_if_offline("http://127.0.0.1:9") as reason:
        assert reason is None and constants.HF_HUB_OFFLINE is False


def test_a_host_that_answers_is_there():
    answers = http.server.BaseHTTPRequestHandler  # 501 to everything
    with http.server.HTTPServer(("127.0.0.1", 0), answers) as host:
        threading.Thread(target=host.handle_request, daemon=True).start()
        assert why_unreachable(f"http://127.0.0.1:{host.server_port}") is None
    assert "refused" in why_unreachable(f"http://127.0.0.1:{host.server_port}")


def test_pretrained_weights_are_named_exactly(timm, monkeypatch):
    """timm's tag says what the weights were trained on."""
    create = timm.create_model

    def cached(name, pretrained=False, **options):
        return create(name, **options)

    monkeypatch.setattr("scegg.features.tokens.why_unreachable", lambda url: None)
    monkeypatch.setattr(timm, "create_model", cached)
    _, provenance = build_backbone("timm/vit_tiny_patch16_224", None, 32)
    assert provenance["weights"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_safetensors_are_read(timm, tmp_path):
    from safetensors.torch import save_file

    network = timm.create_model("convnext_atto", num_classes=3)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    backbone, _ = build_backbone("timm/convnext_atto", tmp_path / "w.safetensors", 64)
    torch.testing.assert_close(backbone.network.stem[0].weight, network.stem[0].weight)


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install -r requirements-timm.txt") as caught:
        build_backbone("timm/vit_tiny_patch16_224", None, 64)
    assert "\n" not in str(caught.value)


def test_the_networks_own_pixels(timm):
    own = PixelNormalization("timm/vit_base_patch16_clip_224.openai", "backbone")
    assert own.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert pixel_statistics("timm/convnext_atto", "backbone").name == "ImageNet"
    assert pixel_statistics("timm/vit_tiny_patch16_224", "imagenet").name == "ImageNet"


def test_a_vit_on_toy(timm, tmp_path, monkeypatch, capsys):
    """From pictures to a feature file under the name that training looks for, and to accuracies."""
    monkeypatch.chdir(tmp_path)
    toy.render(tmp_path / "data", classes=5, unseen=1, images_per_class=5)
    name = "timm/vit_tiny_patch16_224"
    network = timm.create_model(name.removeprefix("timm/"), num_classes=0)
    weights = str(save(network, tmp_path / "w.pth"))
    backbone = ["--backbone", name, "--img_size", "64"]
    preprocessing.main(["-d", "TOY", *backbone, "--weights", weights, "-n", "0"])
    assert "--normalization backbone gives it those" in capsys.readouterr().out

    path = feature_file("TOY", name)
    assert path.name == "feature_map_timm_vit_tiny_patch16_224_TOY.hdf5"
    with h5py.File(path) as file:
        assert file["feature_map"].shape == (25, 192, 4, 4)
        assert file.attrs["backbone"] == name and file.attrs["weights"] == "w.pth"
        assert np.ptp(file["feature_map"][()], axis=(2, 3)).min() > 0

    train_joint.main([*backbone, "--wandb", "disabled", *flags(**SMALL_RUN | {"nepoch": 1})])
    assert read_summary(next((tmp_path / "runs").iterdir()))["backbone"] == name
