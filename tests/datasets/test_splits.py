"""Splits: their fingerprint, what cannot be true, and the one to validate on."""

import dataclasses

import numpy as np
import pytest

from helpers import feature_arrays, write_features
from scegg.datasets.splits import check_split, validation_split
from scegg.features.reader import open_features
from util import UserError


def test_fingerprint_follows_labels_and_splits(features):
    split = open_features(features).split
    same = dataclasses.replace(split, trainval=split.trainval[::-1].copy())
    moved = dataclasses.replace(
        split,
        trainval=split.trainval[1:],
        test_seen=np.append(split.test_seen, split.trainval[0]),
    )
    assert split.fingerprint == same.fingerprint != moved.fingerprint


def test_overlapping_split_check_names_the_file(features):
    split = open_features(features).split
    test_unseen = np.append(split.test_unseen, split.trainval[0])
    overlapping = dataclasses.replace(split, test_unseen=test_unseen)
    with pytest.raises(UserError, match="some.mat: trainval_loc and test_unseen_loc share"):
        check_split(overlapping, "some.mat")


# ---------------------------------------------------------------- the split to validate on


@pytest.fixture
def path(tmp_path):
    """A small feature file with xlsa17's train and val classes.

    As in its common release, these reach into the test images.
    """
    arrays = feature_arrays()
    seen_images = np.flatnonzero(~np.isin(arrays["labels"], (1, 4, 7)))
    is_val = np.isin(arrays["labels"][seen_images], (0, 5))
    locations = {"train_loc": seen_images[~is_val], "val_loc": seen_images[is_val]}
    return write_features(tmp_path / "f.hdf5", arrays | locations)


def test_the_validation_split_lies_inside_trainval_and_holds_classes_out(path):
    split = open_features(path).split
    inner = validation_split(split, 0.2, 3, path)

    parts = [inner.trainval, inner.test_seen, inner.test_unseen]
    assert sorted(np.concatenate(parts)) == sorted(split.trainval)
    assert np.array_equal(split.seen[inner.unseen], [0, 5])
    assert not np.intersect1d(inner.seen, inner.unseen).size
    assert np.array_equal(np.unique(inner.labels[inner.test_seen]), inner.seen)
    assert len(inner.att) == len(split.seen)
    assert np.array_equal(inner.att, split.att[split.seen])

    own_labels = split.seen[inner.labels[inner.trainval]]
    assert np.array_equal(own_labels, split.labels[inner.trainval])
    assert len(inner.test_seen) == 4 * round(0.2 * 9)


def test_the_seed_alone_decides_what_is_held_out(path):
    split = open_features(path).split
    first, again, other = (validation_split(split, 0.2, seed, path).test_seen for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_val_classes_is_told(tmp_path):
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    with pytest.raises(UserError, match="has no train_loc and val_loc"):
        validation_split(open_features(path).split, 0.2, 0, path)


def test_one_image_a_class_leaves_none_to_hold_out(path):
    split = open_features(path).split
    labels = split.labels[split.train]
    first = np.sort([split.train[labels == label][0] for label in np.unique(labels)])
    with pytest.raises(UserError, match="a single image of every class"):
        validation_split(dataclasses.replace(split, train=first), 0.2, 0, path)
