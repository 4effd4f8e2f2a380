"""Images to HDF5: what is in the file, and what a user's mistakes are told."""
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

import preprocessing
from helpers import ROOT
from scegg.datasets import toy
from scegg.features.backbones import build_backbone, fold
from scegg.features.images import Images, PixelNormalization, image_transform
from scegg.features.reader import open_features
from util import UserError, locked

OFFLINE = ["--dataset", "TOY", "--backbone", "efficientnet_lite2", "--img_size", "64", "--num_workers", "0"]


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    """A small TOY dataset: 7 classes of 5 images."""
    root = tmp_path_factory.mktemp("toy")
    toy.render(root, classes=7, unseen=2, images_per_class=5)
    return root


@pytest.fixture
def own_toy(toy_root, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(toy_root, tmp_path / "data")
    return tmp_path / "data"


def run(root, output, *more):
    preprocessing.main([*OFFLINE, "--data_root", str(root), "--output", str(output), *more])
    return output


@pytest.fixture(scope="module")
def plain(toy_root):
    return run(toy_root, toy_root / "plain.hdf5")


def test_the_file_is_complete_and_says_where_it_comes_from(toy_root, plain):
    with h5py.File(plain) as file:
        assert file["feature_map"].shape == (35, 1280, 2, 2) and file["feature_map"].dtype == np.float32
        assert file["feature_map"].chunks == (1, 1280, 2, 2) and file["feature_map"].compression is None
        assert file["att"].shape == file["original_att"].shape == (7, len(toy.ATTRIBUTES)) and file["w2v_att"].shape == (len(toy.ATTRIBUTES), 300)
        assert sorted(np.concatenate([file[key][()] for key in ("trainval_loc", "test_seen_loc", "test_unseen_loc")])) == list(range(35))
        assert {"train_loc", "val_loc", "allclasses_names", "attribute_names", "image_files"} <= set(file)
        attributes = dict(file.attrs)
    assert (attributes["backbone"], attributes["img_size"], attributes["w2v"]) == ("efficientnet_lite2", 64, "gaussian")
    assert len(attributes["weights_sha256"]) == 64 and "torch" in json.loads(attributes["versions"])
    features = open_features(plain, "efficientnet_lite2", 64)
    assert attributes["split_fingerprint"] == features.split.fingerprint
    assert features.attribute_names == toy.ATTRIBUTES


def test_maps_are_the_backbones_in_the_order_of_the_mat_file(toy_root, plain):
    backbone, _ = build_backbone("efficientnet_lite2", None, 64)
    transform = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor(),
                                    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    with h5py.File(plain) as file:
        for index in (0, 17, 34):
            path = toy_root / "TOY" / file["image_files"][index].decode()
            assert path.parent.name == file["allclasses_names"][file["labels"][index]].decode()
            expected = backbone(transform(Image.open(path).convert("RGB"))[None])[0]
            np.testing.assert_allclose(file["feature_map"][index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (448, 448), (448, 700), (31, 1500), (1500, 31), (641, 97), (1, 50), (2001, 1333)])
def test_resizing_and_cropping_are_torchvisions_bit_for_bit(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for side in (224, 448, 65):
        expected = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])(image)
        assert torch.equal(image_transform(side)(image), expected)


def test_pixels_are_torchvisions_bit_for_bit():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(image)
    pixels = transforms.PILToTensor()(image)[None]
    assert torch.equal(PixelNormalization("resnet101")(pixels)[0], expected)
    assert torch.equal(PixelNormalization("efficientnet_lite2")(pixels)[0], expected)
    own = transforms.Normalize([127 / 255] * 3, [128 / 255] * 3)(transforms.ToTensor()(image))
    assert torch.equal(PixelNormalization("efficientnet_lite2", "backbone")(pixels)[0], own)
    assert not torch.allclose(own, expected)


def test_compression_batch_size_and_workers_change_no_number(toy_root, plain, tmp_path):
    with h5py.File(plain) as file:
        expected = file["feature_map"][()]
    with h5py.File(run(toy_root, tmp_path / "c.hdf5", "--compression")) as file:
        assert file["feature_map"].compression == "gzip"
        np.testing.assert_array_equal(file["feature_map"][()], expected)
    assert (tmp_path / "c.hdf5").stat().st_size < plain.stat().st_size
    with h5py.File(run(toy_root, tmp_path / "b.hdf5", "-b", "3", "-n", "2")) as file:
        np.testing.assert_allclose(file["feature_map"][()], expected, rtol=1e-4, atol=1e-4)


def test_every_colour_mode_becomes_rgb(own_toy, tmp_path):
    for path, mode in zip(sorted(own_toy.glob("TOY/images/*/*.jpg")), ("L", "CMYK", "P", "RGBA", "1")):
        image = Image.open(path).convert(mode)
        image.save(path, format="JPEG" if mode in ("L", "CMYK") else "PNG")
    run(own_toy, tmp_path / "modes.hdf5")


@pytest.mark.parametrize("name, channels, side", [
    ("resnet18", 512, 2), ("vgg11", 512, 4), ("densenet121", 1024, 2), ("mobilenet_v3_small", 576, 2), ("convnext_tiny", 768, 2),
    ("squeezenet1_1", 512, 3)])
def test_last_map_of_torchvision_networks(name, channels, side, tmp_path):
    torch.manual_seed(0)
    network = models.get_model(name, weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone, provenance = build_backbone(name, tmp_path / "w.pth", 64)
    out = backbone(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, channels, side, side) and not any(p.requires_grad for p in backbone.parameters())
    assert provenance["weights"] == "w.pth"


@pytest.mark.parametrize("name", ["efficientnet_lite2", "resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "googlenet", "vgg11_bn",
                                  "convnext_tiny", "shufflenet_v2_x0_5"])
def test_folding_changes_maps_by_rounding_alone(name, tmp_path):
    torch.manual_seed(0)
    weights = None
    if name != "efficientnet_lite2":
        network = models.get_model(name, weights=None, **({"init_weights": True} if name == "googlenet" else {}))
        with torch.no_grad():
            for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
        weights = tmp_path / "w.pth"
        torch.save(network.state_dict(), weights)
    backbone, images = build_backbone(name, weights, 64)[0], torch.randn(2, 3, 64, 64)
    plain = backbone(images)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    folded = fold(backbone)(images)
    assert (folded - plain).norm() <= 1e-5 * plain.norm()
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    assert left < norms or name == "convnext_tiny"  # which has none
    assert not any(isinstance(module, torch.nn.ZeroPad2d) for module in backbone.modules())  # nor a padding of its own
    assert not any(module.training for module in backbone.modules()) and not any(p.requires_grad for p in backbone.parameters())


def test_resnet_map_is_what_its_pool_sees(tmp_path):
    network = models.resnet18(weights=None).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "w.pth")
    seen = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(1, 3, 96, 96)
    network(images)
    torch.testing.assert_close(build_backbone("resnet18", tmp_path / "w.pth", 96)[0](images), seen[0])


@pytest.mark.parametrize("name, message", [("resnet102", "neither efficientnet_lite2 nor"), ("vit_b_16", "no .*map|image size")])
def test_unusable_backbones(name, message, tmp_path):
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        build_backbone(name, tmp_path / "w.pth", 64)


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
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump(Hostile(), file)
    torch.save(Hostile(), tmp_path / "evil2.pth")
    for weights, message in (("none.pth", "no such file"), ("text.pth", "cannot? ?be loaded|can be loaded safely"),
                             ("evil.pth", "can be loaded safely"), ("evil2.pth", "can be loaded safely"),
                             ("r18.pth", "do not fit the backbone")):
        with pytest.raises(UserError, match=message):
            build_backbone("resnet50", tmp_path / weights, 64)
    assert not (tmp_path / "it_ran").exists()


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(UserError, match="could not be downloaded .*--weights FILE, or use --backbone efficientnet_lite2"):
        build_backbone("resnet101", None, 64)


def test_missing_things_say_what_goes_where(own_toy, tmp_path):
    images = sorted(own_toy.glob("TOY/images/*/*.jpg"))
    for path in images[:4]:
        path.unlink()
    with pytest.raises(UserError, match="4 of 35 images are missing .*first images/"):
        run(own_toy, tmp_path / "x.hdf5")
    (own_toy / "xlsa17/data/TOY/res101.mat").unlink()
    with pytest.raises(UserError, match="res101.mat is missing: unpack xlsa17.zip"):
        run(own_toy, tmp_path / "x.hdf5")
    shutil.rmtree(own_toy / "xlsa17")
    with pytest.raises(UserError, match="put res101.mat and att_splits.mat of xlsa17 there"):
        run(own_toy, tmp_path / "x.hdf5")
    shutil.rmtree(own_toy / "TOY")
    with pytest.raises(UserError, match="put the TOY images there"):
        run(own_toy, tmp_path / "x.hdf5")
    with pytest.raises(UserError, match="CUB_200_2011/images is missing"):
        preprocessing.main(["-d", "CUB", "--data_root", str(own_toy)])
    assert not list(tmp_path.glob("*.hdf5"))


def test_images_can_be_sent_to_a_decoding_process(own_toy):
    paths = sorted(own_toy.glob("TOY/images/*/*.jpg"))[:3]
    sent = pickle.loads(pickle.dumps(Images(paths, image_transform(32), workers=2)))
    for ours, theirs in zip(Images(paths, image_transform(32)).__getitems__([0, 1, 2]), sent.__getitems__([0, 1, 2]), strict=True):
        assert ours.shape == (3, 32, 32) and torch.equal(ours, theirs)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_corrupt_image_is_named_and_nothing_half_written_is_left(own_toy, tmp_path, workers):
    victim = sorted(own_toy.glob("TOY/images/*/*.jpg"))[20]
    victim.write_bytes(victim.read_bytes()[:900])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"{victim.name} is not a readable image") as caught:
        run(own_toy, tmp_path / "out" / "x.hdf5", "-n", workers)
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").iterdir())


def test_damaged_mat_files(own_toy, tmp_path):
    path = own_toy / "xlsa17/data/TOY/att_splits.mat"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="att_splits.mat (is not a readable .mat file|lacks)"):
            run(own_toy, tmp_path / "x.hdf5")


def test_mistakes_exit_with_status_2_and_one_line(tmp_path):
    for argv in (["-d", "CUB", "--data_root", "nowhere"], ["-d", "TOY", "-g", "cuda:77"], ["-d", "TOY", "-g", "quantum"],
                 ["-d", "TOY", "-b", "0"]):
        done = subprocess.run([sys.executable, ROOT / "preprocessing.py", *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def start(folder, root, *more, part=4, environment=()):
    """preprocessing.py in a process of its own, with small parts."""
    program = f"import preprocessing, util; from scegg.features import parts; parts.PART = {part}; util.exit_on_user_error(preprocessing.main)"
    return subprocess.Popen([sys.executable, "-c", program, *OFFLINE, "--data_root", root, "--output", folder / "maps.hdf5", *more],
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle_it_goes_on_where_it_was(toy_root, tmp_path):
    folders = tmp_path / "whole", tmp_path / "killed"
    assert start(folders[0], toy_root).wait() == 0
    process = start(folders[1], toy_root)
    deadline = time.time() + 60
    while len(list(folders[1].glob("*.parts-*/0*.hdf5"))) < 3 and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folders[1] / "maps.hdf5").exists()
    kept = {path: path.stat().st_mtime_ns for path in folders[1].glob("*.parts-*/0*.hdf5")}
    assert len(kept) >= 3
    process = start(folders[1], toy_root)
    output, _ = process.communicate()
    assert process.returncode == 0 and f"{4 * len(kept)} of 35 images are done already" in output
    assert [path.name for path in folders[1].iterdir()] == ["maps.hdf5"]
    assert (folders[0] / "maps.hdf5").read_bytes() == (folders[1] / "maps.hdf5").read_bytes()


def start_ranks(count, folder, root):
    """What `torchrun` starts, on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(folder, root, "-c", environment={"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            for rank in range(count)]


@pytest.mark.long
def test_all_ranks_are_refused_while_another_job_makes_the_file(toy_root, tmp_path):
    with locked(tmp_path / ".maps.hdf5.lock", "making maps.hdf5"):
        ranks = start_ranks(2, tmp_path, toy_root)
        said = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2] and not list(tmp_path.iterdir())
    assert "another process is making" in said[0] and "another rank ended before its work was done" in said[1]


def test_ranks_share_the_work_and_the_file_is_the_same(toy_root, tmp_path):
    assert start(tmp_path / "one", toy_root, "-c").wait() == 0
    ranks = start_ranks(3, tmp_path / "three", toy_root)
    outputs = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0]
    assert all("another rank's" in output for output in outputs) and sum("wrote" in output for output in outputs) == 1
    assert (tmp_path / "one" / "maps.hdf5").read_bytes() == (tmp_path / "three" / "maps.hdf5").read_bytes()


def test_a_replaced_image_costs_its_part_alone(own_toy, tmp_path, monkeypatch):
    monkeypatch.setattr("scegg.features.parts.PART", 4)
    victim = sorted(own_toy.glob("TOY/images/*/*.jpg"))[20]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:900])
    with pytest.raises(UserError, match="not a readable image"):
        run(own_toy, tmp_path / "x.hdf5")
    parts = sorted(path.name[:8] for path in tmp_path.glob("x.hdf5.parts-*/*.hdf5"))
    assert parts == [f"{start:08d}" for start in (0, 4, 8)]  # the victim is image 15
    victim.write_bytes(whole)
    assert run(own_toy, tmp_path / "x.hdf5").exists() and not list(tmp_path.glob("*.parts-*"))


def test_lzf_and_bfloat16(toy_root, plain, tmp_path):
    with h5py.File(plain) as file, h5py.File(run(toy_root, tmp_path / "lzf.hdf5", "-c", "lzf")) as lzf, \
            h5py.File(run(toy_root, tmp_path / "bf16.hdf5", "--precision", "bfloat16")) as bf16:
        expected = file["feature_map"][()]
        assert lzf["feature_map"].compression == "lzf" and bf16.attrs["precision"] == "bfloat16"
        np.testing.assert_array_equal(lzf["feature_map"][()], expected)
        half = bf16["feature_map"][()]
    assert half.dtype == np.float32 and 0 < np.abs(half - expected).mean() < 0.1 * np.abs(expected).mean()
