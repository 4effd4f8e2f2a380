"""Damaged and impossible feature files and .mat files: a right result, or one line; no hang."""

import contextlib
import io
import shutil

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import EDITS, cases, damages, edits_of, in_a_child, right_or_refused
from helpers import feature_arrays
from scegg.datasets import toy
from scegg.datasets.splits import check_split
from scegg.datasets.xlsa17 import read_dataset
from scegg.features.reader import open_features
from util import UserError

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------- feature files


def write_hdf5(path, arrays, **attributes):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            is_maps = name == "feature_map" and np.ndim(array) == 4 and array.size
            chunks = {"chunks": (1, *array.shape[1:]), "compression": "gzip"} if is_maps else {}
            file.create_dataset(name, data=array, **chunks)
        file.attrs.update({"backbone": "resnet101", "img_size": 448} | attributes)


def read_features(path):
    features = open_features(path, "resnet101", 448)
    return features, features.read(np.arange(len(features.split.labels)))


def are_features(result):
    features, maps = result
    is_whole = check_split(features.split, "file") and len(maps) == len(features.split.labels)
    return is_whole and torch.isfinite(maps).all()


@cases(50)
@given(damage=damages())
def test_damaged_feature_files(folder, damage):
    path = folder / "whole.hdf5"
    damaged = folder / "damaged.hdf5"
    if not path.exists():
        arrays = feature_arrays(per_class=6, D=8)
        write_hdf5(path, arrays | {"allclasses_names": [b"bird"] * 9})
    damaged.write_bytes(damage(path.read_bytes()))

    def read():
        right_or_refused(lambda: read_features(damaged), are_features)

    status, text = in_a_child(read)
    assert status == 0, text


ATTRIBUTES = [
    {},
    {"backbone": 7},
    {"img_size": [448, 448]},
    {"dataset": np.ones(3)},
    {"split_fingerprint": b"\xff"},
    {"backbone": h5py.Empty("f")},
    {"note": "\u2028"},
]


@cases(60)
@given(
    changes=edits_of([*feature_arrays(per_class=4), "train_loc", "allclasses_names"]),
    attribute=st.sampled_from(ATTRIBUTES),
)
def test_impossible_feature_files(folder, changes, attribute):
    arrays = feature_arrays(per_class=4, D=8)
    for name, edit in changes.items():
        # an edit may make no array of this one
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            arrays[name] = EDITS[edit](arrays.get(name, np.arange(9)))
    write_hdf5(folder / "f.hdf5", arrays, **attribute)
    right_or_refused(lambda: read_features(folder / "f.hdf5"), are_features)


# ---------------------------------------------------------------- .mat files

MATS = ("res101.mat", "att_splits.mat")
MAT_ARRAYS = [
    "labels",
    "image_files",
    "trainval_loc",
    "train_loc",
    "test_seen_loc",
    "test_unseen_loc",
    "att",
    "original_att",
    "allclasses_names",
]


@pytest.fixture(scope="module")
def data_root(folder):
    toy.render(folder / "data", classes=5, unseen=1, images_per_class=5)
    shutil.copytree(folder / "data/xlsa17/data/TOY", folder / "mats")
    return folder / "data"


def read_arrays(path):
    """The arrays of a .mat file."""
    return {key: value for key, value in scipy.io.loadmat(path).items() if key[0] != "_"}


def is_dataset(result):
    split, names, tails = result
    is_named = len(names) == len(split.att) and len(tails) == len(split.labels)
    return check_split(split, "mat") and is_named


@cases(60)
@given(name=st.sampled_from(MATS), damage=damages(), compressed=st.booleans())
def test_damaged_mat_files(folder, data_root, name, damage, compressed):
    shutil.copytree(folder / "mats", data_root / "xlsa17/data/TOY", dirs_exist_ok=True)
    whole = io.BytesIO()
    scipy.io.savemat(whole, read_arrays(folder / "mats" / name), do_compression=compressed)
    (data_root / "xlsa17/data/TOY" / name).write_bytes(damage(whole.getvalue()))
    right_or_refused(lambda: read_dataset(data_root, "TOY"), is_dataset)


@cases(50)
@given(changes=edits_of(MAT_ARRAYS))
def test_impossible_mat_files(folder, data_root, changes):
    for name in MATS:
        arrays = read_arrays(folder / "mats" / name)
        for key, edit in changes.items():
            with contextlib.suppress(TypeError, ValueError, OverflowError, KeyError):
                arrays[key] = EDITS[edit](arrays[key])
        scipy.io.savemat(data_root / "xlsa17/data/TOY" / name, arrays)
    right_or_refused(lambda: read_dataset(data_root, "TOY"), is_dataset)


@pytest.mark.parametrize(
    "key, edit, message",
    [
        # a class of no image
        (
            "labels",
            lambda a: np.where(a == a[0], a[-1], a),
            "test_seen_loc|share|both seen and unseen|runs? from",
        ),
        ("test_unseen_loc", lambda a: a[:0], "test_unseen_loc is empty"),
        (
            "trainval_loc",
            lambda a: a[5:],
            "test_seen_loc holds 1 classes without a trainval image",
        ),
        ("test_seen_loc", lambda a: np.vstack([a, a[:1]]), "names an image twice"),
        (
            "test_unseen_loc",
            lambda a: np.vstack([a, [[1]]]),
            "share 1 images|both seen and unseen",
        ),
        (
            "allclasses_names",
            lambda a: np.vstack([a[:1], a[:-1]]),
            "allclasses_names has .* twice",
        ),
    ],
)
def test_splits_that_cannot_be(folder, data_root, key, edit, message):
    shutil.copytree(folder / "mats", data_root / "xlsa17/data/TOY", dirs_exist_ok=True)
    for name in MATS:
        arrays = read_arrays(folder / "mats" / name)
        if key in arrays:
            is_texts = arrays[key].dtype.kind == "O"
            arrays[key] = edit(arrays[key] if is_texts else arrays[key].astype(int))
        scipy.io.savemat(data_root / "xlsa17/data/TOY" / name, arrays)

    try:
        read_dataset(data_root, "TOY")
    except UserError:
        with pytest.raises(UserError, match=message):
            read_dataset(data_root, "TOY")
    else:
        assert key == "labels"  # two classes become one: unusual, and possible
