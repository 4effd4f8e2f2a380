"""Images to HDF5: what is in the file, and what a user's mistakes are told."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

import preprocessing
from forks import Fork
from helpers import ROOT, run_script
from scegg.datasets import toy
from scegg.features import parts
from scegg.features.backbones import build_backbone
from scegg.features.reader import open_features
from scegg.processes import locked
from util import UserError

OFFLINE = ["--dataset", "TOY", "--backbone", "efficientnet_lite2"]
OFFLINE += ["--img_size", "64", "--num_workers", "0"]


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


# ---------------------------------------------------------------- what is in the file


def test_the_file_is_complete_and_says_where_it_comes_from(toy_root, plain):
    attributes_of_toy = len(toy.ATTRIBUTES)
    with h5py.File(plain) as file:
        maps = file["feature_map"]
        assert maps.shape == (35, 1280, 2, 2) and maps.dtype == np.float32
        assert maps.chunks == (1, 1280, 2, 2) and maps.compression is None
        assert file["att"].shape == file["original_att"].shape == (7, attributes_of_toy)
        assert file["w2v_att"].shape == (attributes_of_toy, 300)

        keys = ("trainval_loc", "test_seen_loc", "test_unseen_loc")
        locations = np.concatenate([file[key][()] for key in keys])
        assert sorted(locations) == list(range(35))
        optional = {"train_loc", "val_loc", "allclasses_names", "attribute_names", "image_files"}
        assert optional <= set(file)
        attributes = dict(file.attrs)

    assert attributes["backbone"] == "efficientnet_lite2"
    assert (attributes["img_size"], attributes["w2v"]) == (64, "gaussian")
    assert len(attributes["weights_sha256"]) == 64
    assert "torch" in json.loads(attributes["versions"])
    features = open_features(plain, "efficientnet_lite2", 64)
    assert attributes["split_fingerprint"] == features.split.fingerprint
    assert features.attribute_names == toy.ATTRIBUTES


def test_maps_are_the_backbones_in_the_order_of_the_mat_file(toy_root, plain):
    backbone, _ = build_backbone("efficientnet_lite2", None, 64)
    transform = transforms.Compose(
        [
            transforms.Resize(64),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with h5py.File(plain) as file:
        for index in (0, 17, 34):
            path = toy_root / "TOY" / file["image_files"][index].decode()
            class_name = file["allclasses_names"][file["labels"][index]].decode()
            assert path.parent.name == class_name

            expected = backbone(transform(Image.open(path).convert("RGB"))[None])[0]
            np.testing.assert_allclose(file["feature_map"][index], expected, rtol=1e-4, atol=1e-4)


def test_compression_batch_size_and_workers_change_no_number(toy_root, plain, tmp_path):
    with h5py.File(plain) as file:
        expected = file["feature_map"][()]

    with h5py.File(run(toy_root, tmp_path / "c.hdf5", "--compression")) as file:
        assert file["feature_map"].compression == "gzip"
        np.testing.assert_array_equal(file["feature_map"][()], expected)
    assert (tmp_path / "c.hdf5").stat().st_size < plain.stat().st_size

    with h5py.File(run(toy_root, tmp_path / "b.hdf5", "-b", "3", "-n", "2")) as file:
        np.testing.assert_allclose(file["feature_map"][()], expected, rtol=1e-4, atol=1e-4)


def test_lzf_and_bfloat16(toy_root, plain, tmp_path):
    with h5py.File(plain) as file:
        expected = file["feature_map"][()]

    with h5py.File(run(toy_root, tmp_path / "lzf.hdf5", "-c", "lzf")) as file:
        assert file["feature_map"].compression == "lzf"
        np.testing.assert_array_equal(file["feature_map"][()], expected)

    output = run(toy_root, tmp_path / "bf16.hdf5", "--precision", "bfloat16")
    with h5py.File(output) as file:
        assert file.attrs["precision"] == "bfloat16"
        half = file["feature_map"][()]
    assert half.dtype == np.float32
    assert 0 < np.abs(half - expected).mean() < 0.1 * np.abs(expected).mean()


def test_every_colour_mode_becomes_rgb(own_toy, tmp_path):
    paths = sorted(own_toy.glob("TOY/images/*/*.jpg"))[:5]
    for path, mode in zip(paths, ("L", "CMYK", "P", "RGBA", "1"), strict=True):
        image = Image.open(path).convert(mode)
        image.save(path, format="JPEG" if mode in ("L", "CMYK") else "PNG")
    run(own_toy, tmp_path / "modes.hdf5")


# ---------------------------------------------------------------- mistakes


def test_missing_things_say_what_goes_where(own_toy, tmp_path):
    output = tmp_path / "x.hdf5"
    images = sorted(own_toy.glob("TOY/images/*/*.jpg"))
    for path in images[:4]:
        path.unlink()
    with pytest.raises(UserError, match="4 of 35 images are missing .*first images/"):
        run(own_toy, output)

    (own_toy / "xlsa17/data/TOY/res101.mat").unlink()
    with pytest.raises(UserError, match="res101.mat is missing: unpack xlsa17.zip"):
        run(own_toy, output)
    shutil.rmtree(own_toy / "xlsa17")
    with pytest.raises(UserError, match="put res101.mat and att_splits.mat of xlsa17 there"):
        run(own_toy, output)
    shutil.rmtree(own_toy / "TOY")
    with pytest.raises(UserError, match="put the TOY images there"):
        run(own_toy, output)
    with pytest.raises(UserError, match="CUB_200_2011/images is missing"):
        preprocessing.main(["-d", "CUB", "--data_root", str(own_toy)])
    assert not list(tmp_path.glob("*.hdf5"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_corrupt_image_is_named_and_nothing_half_written_is_left(own_toy, tmp_path, workers):
    victim = sorted(own_toy.glob("TOY/images/*/*.jpg"))[20]
    victim.write_bytes(victim.read_bytes()[:900])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"{victim.name} is not a readable image") as caught:
        run(own_toy, tmp_path / "out" / "x.hdf5", "-n", workers)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_mat_files(own_toy, tmp_path):
    path = own_toy / "xlsa17/data/TOY/att_splits.mat"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        message = "att_splits.mat (is not a readable .mat file|lacks)"
        with pytest.raises(UserError, match=message):
            run(own_toy, tmp_path / "x.hdf5")


def test_mistakes_exit_with_status_2_and_one_line(tmp_path, monkeypatch):
    """One of them as it is started by hand."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, ROOT / "preprocessing.py", "-d", "CUB", "--data_root", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    ends = [(done.returncode, done.stderr)]
    for argv in (["-g", "cuda:77"], ["-g", "quantum"], ["-b", "0"]):
        ends.append(run_script("preprocessing.py", "-d", "TOY", *argv))

    for status, said in ends:
        assert status == 2
        assert said.startswith("error: ") and said.count("\n") == 1, said


# ---------------------------------------------------------------- parts, in processes of their own


def preprocess(argv):
    """The command with small parts."""
    parts.PART = 4
    preprocessing.main(argv)


def preprocess_until_killed(argv):
    """It, killed in the middle of the fourth part."""
    makes = iter(range(3))
    make = parts.Parts.make

    def make_or_die(self, start, batches):
        if next(makes, None) is None:
            batches = map(die, batches)
        make(self, start, batches)

    parts.Parts.make = make_or_die
    preprocess(argv)


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def start(folder, root, *more, log="log", environment=(), action=preprocess):
    """It in a process of its own."""
    folder.mkdir(exist_ok=True)
    argv = [*OFFLINE, "--data_root", str(root), "--output", str(folder / "maps.hdf5"), *more]
    log = folder.with_name(f"{folder.name}-{log}.txt")
    return Fork(action, argv, log=log, environment=environment)


def test_killed_in_the_middle_it_goes_on_where_it_was(toy_root, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, toy_root).wait() == 0

    assert start(killed, toy_root, action=preprocess_until_killed).wait() == -signal.SIGKILL
    assert not (killed / "maps.hdf5").exists()
    assert len(list(killed.glob("*.parts-*/0*.hdf5"))) == 3
    assert list(killed.glob("*.parts-*/.*partial*"))

    status, output = start(killed, toy_root).finish()
    assert status == 0
    assert "12 of 35 images are done already" in output
    assert [path.name for path in killed.iterdir()] == ["maps.hdf5"]
    assert (whole / "maps.hdf5").read_bytes() == (killed / "maps.hdf5").read_bytes()


def start_ranks(count, folder, root):
    """What `torchrun` starts, on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        start(folder, root, "-c", log=rank, environment=address | {"RANK": str(rank)})
        for rank in range(count)
    ]


@pytest.mark.long
def test_all_ranks_are_refused_while_another_job_makes_the_file(toy_root, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with locked(folder / ".maps.hdf5.lock", "making maps.hdf5"):
        first, second = [rank.finish() for rank in start_ranks(2, folder, toy_root)]
    assert not list(folder.iterdir())
    assert first[0] == second[0] == 2
    assert "another process is making" in first[1]
    assert "another rank ended before its work was done" in second[1]


def test_ranks_share_the_work_and_the_file_is_the_same(toy_root, tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    assert start(one, toy_root, "-c").wait() == 0

    ends = [rank.finish() for rank in start_ranks(3, three, toy_root)]
    statuses, outputs = zip(*ends, strict=True)
    assert statuses == (0, 0, 0), outputs
    assert all("another rank's" in output for output in outputs)
    assert sum("wrote" in output for output in outputs) == 1
    assert (one / "maps.hdf5").read_bytes() == (three / "maps.hdf5").read_bytes()


def test_a_replaced_image_costs_its_part_alone(own_toy, tmp_path, monkeypatch):
    monkeypatch.setattr("scegg.features.parts.PART", 4)
    output = tmp_path / "x.hdf5"
    victim = sorted(own_toy.glob("TOY/images/*/*.jpg"))[20]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:900])
    with pytest.raises(UserError, match="not a readable image"):
        run(own_toy, output)
    made = sorted(path.name[:8] for path in tmp_path.glob("x.hdf5.parts-*/*.hdf5"))
    assert made == [f"{start:08d}" for start in (0, 4, 8)]  # the victim is image 15

    victim.write_bytes(whole)
    assert run(own_toy, output).exists()
    assert not list(tmp_path.glob("*.parts-*"))
