"""Reading a feature file: what a damaged or foreign one is told, and normalised maps."""

import contextlib
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from helpers import ROOT, feature_arrays, write_features
from scegg.features.reader import normalize_positions, open_features
from util import UserError


def without(name):
    """A change to the arrays of a good feature file: one is missing."""

    def change(arrays):
        del arrays[name]

    return change


def edited(name, edit):
    """A change to the arrays of a good feature file: one is another."""

    def change(arrays):
        arrays[name] = edit(arrays[name])

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (without("att"), "lacks att"),
        (without("feature_map"), "lacks feature_map"),
        (
            edited("labels", lambda a: a + 1),
            "labels run from 1 to 9, but there are 9 classes: .*off by one",
        ),
        (edited("labels", lambda a: a - 1), "labels run from -1"),
        (edited("labels", lambda a: a[:-1]), "as many as labels"),
        (
            edited("labels", lambda a: a.astype(float)),
            "labels must be a vector of whole numbers",
        ),
        (
            edited("test_unseen_loc", lambda a: a + 12),
            "test_unseen_loc and|share|both seen and unseen|without a trainval",
        ),
        (
            edited("trainval_loc", lambda a: np.append(a, 108)),
            "trainval_loc runs from 0 to 108, but there are 108 images",
        ),
        (edited("trainval_loc", lambda a: np.append(a, a[0])), "names an image twice"),
        (edited("trainval_loc", lambda a: a[:0]), "trainval_loc is empty"),
        (
            edited("test_seen_loc", lambda a: np.append(a, 0)),
            "trainval_loc and test_seen_loc share 1 images",
        ),
        (edited("w2v_att", lambda a: a[:-1]), "10 attribute word vectors .* K = 11"),
        (edited("original_att", lambda a: a[:, 1:]), "differ in shape"),
        (edited("att", lambda a: a * np.nan), "NaN or infinity"),
        (edited("w2v_att", lambda a: a / 0), "w2v_att holds NaN"),
        (edited("att", lambda a: a * 0), "no attribute at all"),
        (edited("feature_map", lambda a: a[..., 0]), "expected floats"),
        (edited("feature_map", lambda a: a.astype(int)), "expected floats"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_impossible_files_are_refused(tmp_path, change, message):
    arrays = feature_arrays()
    change(arrays)
    with pytest.raises(UserError, match=message):
        open_features(write_features(tmp_path / "f.hdf5", arrays))


def test_foreign_backbone_size_and_changed_split(features, tmp_path):
    assert open_features(features, "resnet101", 448)
    with pytest.raises(
        UserError, match="holds features of backbone resnet101, but the run asks for resnet50"
    ):
        open_features(features, "resnet50", 448)
    with pytest.raises(UserError, match="img_size 448, but the run asks for 224"):
        open_features(features, "resnet101", 224)

    path = tmp_path / "g.hdf5"
    write_features(path, feature_arrays(), split_fingerprint="0123456789ab")
    with pytest.raises(UserError, match="changed afterwards"):
        open_features(path)


def test_published_file_without_provenance_is_taken(tmp_path, capsys):
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        for name, array in feature_arrays().items():
            file[name] = array
    features = open_features(tmp_path / "p.hdf5", "resnet101", 448)
    assert features.shape == (24, 3, 3)
    assert "does not say what made it" in capsys.readouterr().out


def test_truncated_missing_and_foreign_files(features, tmp_path):
    whole = features.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "t.hdf5").write_bytes(whole[:keep])
        with pytest.raises(UserError, match="not a complete HDF5 file"):
            open_features(tmp_path / "t.hdf5")
    with pytest.raises(UserError, match="is missing: make it with preprocessing.py"):
        open_features(tmp_path / "none.hdf5")


def test_nan_in_a_map_is_found_when_it_is_read(tmp_path):
    arrays = feature_arrays()
    arrays["feature_map"][17, 3, 1, 1] = np.nan
    features = open_features(write_features(tmp_path / "f.hdf5", arrays))
    features.read(np.arange(17))
    with pytest.raises(UserError, match="feature map of image 17 holds NaN"):
        features.read(np.arange(10, 20))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_never_end_in_a_traceback(features, seed):
    rng, whole = np.random.default_rng(seed), features.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        features.write_bytes(damaged)
        with contextlib.suppress(UserError):
            data = open_features(features)
            data.read(np.arange(len(data.split.labels)))


@pytest.mark.parametrize("axis", [0, 1])
def test_another_writers_vectors_may_be_rows_and_columns(features, axis):
    expected = open_features(features).split
    with h5py.File(features, "r+") as file:
        for name in ("labels", "trainval_loc", "test_seen_loc", "test_unseen_loc"):
            vector = file[name][()]
            del file[name]
            file[name] = np.expand_dims(vector, axis)
    assert open_features(features).split.fingerprint == expected.fingerprint


def test_a_filter_that_is_not_installed_is_no_damage(tmp_path):
    arrays = feature_arrays()
    maps = arrays.pop("feature_map")
    path = write_features(tmp_path / "f.hdf5", arrays)
    packed = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    packed.set_chunk((1, *maps.shape[1:]))
    packed.set_filter(32003, h5py.h5z.FLAG_OPTIONAL)  # one of those that are installed apart
    with h5py.File(path, "a") as file:
        space = h5py.h5s.create_simple(maps.shape)
        h5py.h5d.create(file.id, b"feature_map", h5py.h5t.IEEE_F32LE, space, packed)
        file["feature_map"].id.write_direct_chunk((0, 0, 0, 0), bytes(9))

    with pytest.raises(UserError, match="feature_map is packed by a filter that HDF5 lacks here"):
        open_features(path)


def test_another_writers_train_loc_is_kept_inside_trainval(features):
    with h5py.File(features, "r+") as file:
        trainval, test_seen = file["trainval_loc"][()], file["test_seen_loc"][()]
        file["train_loc"] = np.concatenate([trainval[:5], test_seen])
    assert open_features(features).split.train.tolist() == trainval[:5].tolist()


def test_normalize_positions():
    raw = torch.rand(2, 5, 3, 4)
    maps = normalize_positions(raw)
    assert maps.shape == (2, 12, 5) and maps.is_contiguous()
    torch.testing.assert_close(maps.norm(dim=2), torch.ones(2, 12))
    torch.testing.assert_close(maps[1, 7], raw[1, :, 1, 3] / raw[1, :, 1, 3].norm())


LEAVE_A_FILE_OPEN = """
import ctypes, sys
from scegg.features.reader import open_features

features = open_features(sys.argv[1])
ctypes.pythonapi.Py_IncRef(ctypes.py_object(features.file.id))
"""


def test_a_file_that_is_never_closed_does_not_crash_the_end(features):
    command = [sys.executable, "-c", LEAVE_A_FILE_OPEN, str(features)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
