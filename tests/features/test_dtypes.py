"""Maps of two bytes: rounded as torch rounds, half the size, read as float32 from any writer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import preprocessing
from helpers import feature_arrays
from scegg.datasets import toy
from scegg.features import parts as parts_module
from scegg.features.feature_file import create_maps, dtype_of, read_maps
from scegg.features.parts import MapWriter, Parts
from scegg.features.reader import open_features
from util import UserError

SHAPE = (6, 16, 3, 3)


def some_maps(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def rounded(maps, dtype):
    """Rounded by torch, which does it its own way."""
    return torch.from_numpy(maps).to(getattr(torch, dtype)).float().numpy()


def write(path, maps, compression, dtype):
    with h5py.File(path, "w") as file, ThreadPoolExecutor(1) as pool:
        writer = MapWriter(create_maps(file, maps.shape, compression, dtype), compression, pool)
        writer.write(maps)
        writer.drain(keep=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_maps_come_back_rounded_to_their_type(tmp_path, dtype, compression):
    maps = some_maps()
    write(tmp_path / "maps.hdf5", maps, compression, dtype)
    read = np.empty(SHAPE, np.float32)
    with h5py.File(tmp_path / "maps.hdf5") as file:
        stored = file["feature_map"]
        assert dtype_of(stored) == dtype and stored.dtype.kind == "f"
        read_maps(stored, np.arange(len(maps)), read)
        if compression is None:
            assert stored.id.get_storage_size() == maps.size * (4 if dtype == "float32" else 2)
        np.testing.assert_array_equal(stored[()].astype(np.float32), rounded(maps, dtype))
    np.testing.assert_array_equal(read, rounded(maps, dtype))


def test_a_number_beyond_float16_is_refused(tmp_path):
    maps = some_maps()
    maps[3, 2, 1, 0] = 70000
    with pytest.raises(UserError, match="holds 70000, .*--dtype bfloat16 or float32"):
        write(tmp_path / "maps.hdf5", maps, "gzip", "float16")
    write(tmp_path / "maps.hdf5", maps, "gzip", "bfloat16")


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"chunks": (1, 16, 3, 3)},
        {"chunks": (4, 8, 2, 3), "compression": "gzip", "shuffle": True},
    ],
)
@pytest.mark.parametrize("dtype", ["f2", "<f8", ">f4"])
def test_other_writers_floats_are_read_in_any_layout(tmp_path, layout, dtype):
    maps = some_maps().astype(dtype)
    with h5py.File(tmp_path / "maps.hdf5", "w") as file:
        file.create_dataset("feature_map", data=maps, **layout)
    read = np.empty((3, *SHAPE[1:]), np.float32)
    with h5py.File(tmp_path / "maps.hdf5") as file:
        read_maps(file["feature_map"], np.array([5, 0, 3]), read)
    np.testing.assert_array_equal(read, maps[[5, 0, 3]].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parts_are_gone_on_with_and_joined(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(parts_module, "PART", 4)
    images, maps = [Path(__file__)] * 6, some_maps()
    first = Parts(tmp_path / "maps.hdf5", images, "gzip", {"dtype": dtype})
    first.make(0, [maps[:4]])

    again = Parts(tmp_path / "maps.hdf5", images, "gzip", {"dtype": dtype})
    assert again.missing(0, 1) == [4]
    assert Parts(tmp_path / "maps.hdf5", images, "gzip", {}).missing(0, 1) == [0, 4]
    again.make(4, [maps[4:]])
    again.join(lambda file: None)
    with h5py.File(tmp_path / "maps.hdf5") as file:
        np.testing.assert_array_equal(
            file["feature_map"][()].astype(np.float32), rounded(maps, dtype)
        )


def test_half_the_room_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(parts_module, "require_space", lambda _, size, what: asked.append(size))
    for settings in ({}, {"dtype": "bfloat16"}):
        Parts(tmp_path / "maps.hdf5", [Path(__file__)] * 6, None, settings).require_room((8, 2, 2))
    assert asked[0] == 2 * asked[1] == 2 * 6 * 8 * 2 * 2 * 4


def test_preprocessing_and_the_reader(tmp_path):
    """TOY in bfloat16: the maps of float32, rounded; checked and normalised like any others."""
    toy.render(tmp_path, classes=5, unseen=1, images_per_class=5)
    flags = ["-d", "TOY", "--backbone", "efficientnet_lite2", "--img_size", "64", "-n", "0"]
    flags += ["--data_root", str(tmp_path)]
    for dtype in ("float32", "bfloat16"):
        preprocessing.main([*flags, "--dtype", dtype, "--output", str(tmp_path / f"{dtype}.hdf5")])

    full, half = (open_features(tmp_path / f"{name}.hdf5") for name in ("float32", "bfloat16"))
    assert "dtype" not in full.provenance and half.provenance["dtype"] == "bfloat16"
    indices = np.arange(25)
    expected = rounded(full.raw(indices).numpy(), "bfloat16")
    np.testing.assert_array_equal(half.raw(indices).numpy(), expected)
    assert torch.allclose(half.read(indices).norm(dim=2), torch.ones(25, 4))


def test_a_file_of_bfloat16_with_nan_is_refused(tmp_path):
    arrays = feature_arrays()
    maps = arrays.pop("feature_map")
    maps[7, 0, 0, 0] = np.nan
    with h5py.File(tmp_path / "f.hdf5", "w") as file, ThreadPoolExecutor(1) as pool:
        writer = MapWriter(create_maps(file, maps.shape, None, "bfloat16"), None, pool)
        writer.write(maps)
        writer.drain(keep=0)
        for name, array in arrays.items():
            file[name] = array
    features = open_features(tmp_path / "f.hdf5", "resnet101", 448)
    with pytest.raises(UserError, match="image 7 holds NaN or infinity"):
        features.read(np.arange(10))
