"""Files in torch's download cache: a damaged one is named, and its remedy is true."""

import pytest
import torch
from torchvision import models

from scegg.features.backbones import build_backbone, read_state
from util import UserError

NAME = models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The place of ResNet-18's weights in an empty cache, without a network."""

    def offline(*args, **kwargs):
        raise AssertionError("it was downloaded")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / NAME


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of some weights of ResNet-18."""
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(models.resnet18(weights=None).state_dict(), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"<!DOCTYPE html><html><body>Sign in to the network</body></html>",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: bytes(len(whole)),
        lambda whole: b"\x80\x02]q\x00.",
    ],
)
def test_a_damaged_file_is_named(cached, whole, damage):
    cached.write_bytes(damage(whole))
    with pytest.raises(UserError, match="cannot be loaded .*: delete it") as caught:
        build_backbone("resnet18", None, 64)
    assert str(cached) in str(caught.value) and "\n" not in str(caught.value)
    assert cached.exists()  # nothing is deleted unasked


def test_a_whole_file_is_read_and_another_one_is_said(cached, whole, monkeypatch, capsys):
    cached.write_bytes(whole)
    _, provenance = build_backbone("resnet18", None, 64)
    assert provenance["weights"] == "ResNet18_Weights.IMAGENET1K_V1"
    said = capsys.readouterr().out
    assert f"{cached} is not the file that torchvision publishes" in said

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # inside a tensor: torch reads it without a word
    cached.write_bytes(flipped)
    build_backbone("resnet18", None, 64)
    assert "is not the file" in capsys.readouterr().out

    monkeypatch.setattr("scegg.features.weights.sha256", lambda path: NAME[9:17] + "0" * 56)
    build_backbone("resnet18", None, 64)
    assert not capsys.readouterr().out


def test_a_files_name_may_be_of_any_bytes(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w\udce9.pth")
    assert read_state(tmp_path / "w\udce9.pth")[1] == "w?.pth"  # HDF5 takes UTF-8 alone


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04"])
def test_damaged_weights_of_ones_own(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="w.pth is not a state dict that can be loaded safely: ."):
        read_state(tmp_path / "w.pth")
