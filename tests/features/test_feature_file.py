"""The format of the feature file: gzip chunks, whole and damaged."""

import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import preprocessing
from helpers import feature_arrays, write_features
from scegg.features.chunks import Packing
from scegg.features.feature_file import make_provenance
from scegg.features.parts import Parts
from scegg.features.reader import open_features
from scegg.run.identity import identity_of_data
from util import UserError


def gzip_features(path, chunk=None, mask=0):
    """The small feature file with its maps as gzip chunks; returns the maps.

    chunk, with its filter mask, takes the place of image 3's.
    """
    arrays = feature_arrays()
    maps = arrays.pop("feature_map")
    write_features(path, arrays)
    with h5py.File(path, "a") as file:
        chunks = (1, *maps.shape[1:])
        target = file.create_dataset("feature_map", data=maps, chunks=chunks, compression="gzip")
        if chunk is not None:
            target.id.write_direct_chunk((3, 0, 0, 0), chunk, mask)
    return maps


def test_gzip_chunks_are_read_as_hdf5_reads_them(tmp_path):
    path = tmp_path / "f.hdf5"
    maps = gzip_features(path)
    features = open_features(path)
    with h5py.File(path) as file:
        assert Packing.of(file["feature_map"])
    assert np.array_equal(features.raw(np.arange(len(maps))[::-1]), maps[::-1])

    # a chunk that HDF5 left as it was, since gzip gained nothing
    gzip_features(path, maps[5].tobytes(), mask=1)
    assert np.array_equal(open_features(path).raw(np.array([3, 4])), maps[[5, 4]])


@pytest.mark.parametrize(
    "chunk",
    [
        b"no gzip at all",
        zlib.compress(b"too short"),
        zlib.compress(bytes(10**7)),
        zlib.compress(bytes(4096))[:9],
    ],
)
def test_damaged_gzip_chunks_and_bombs_are_refused(tmp_path, chunk):
    gzip_features(tmp_path / "f.hdf5", chunk)
    with pytest.raises(UserError, match="damaged"):
        open_features(tmp_path / "f.hdf5").raw(np.array([2, 3]))


def test_a_compiled_backbone_is_in_the_provenance(tmp_path):
    """Its maps round in another way; a file that does not say it was made without."""

    def made_with(*flags):
        options = preprocessing.parse_arguments(["--dataset", "CUB", *flags])
        split = SimpleNamespace(fingerprint="f626f7f0210f")  # of feature_arrays
        return make_provenance(options, {}, split, "ImageNet", torch.device("cpu"))

    plain, compiled = made_with(), made_with("--compile")
    assert compiled == {**plain, "compile": True}
    parts = [Parts(tmp_path / "f.hdf5", [Path(__file__)], None, made) for made in (plain, compiled)]
    assert parts[0].folder != parts[1].folder

    files = [
        open_features(write_features(tmp_path / f"{name}.hdf5", feature_arrays(), **made))
        for name, made in (("plain", plain), ("compiled", compiled))
    ]
    assert "compile" not in files[0].provenance and files[1].provenance["compile"] is True
    first, second = map(identity_of_data, files)
    assert first["features"] != second["features"]
