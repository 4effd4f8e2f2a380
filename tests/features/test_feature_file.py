"""The format of the feature file: gzip chunks, whole and damaged."""

import zlib

import h5py
import numpy as np
import pytest

from helpers import feature_arrays, write_features
from scegg.features.chunks import Packing
from scegg.features.reader import open_features
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
