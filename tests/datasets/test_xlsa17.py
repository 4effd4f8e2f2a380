"""xlsa17's files: the official splits, image paths and class attributes."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.xlsa17 import cell_texts, class_table, image_tail, read_dataset, read_split
from util import UserError


@pytest.mark.parametrize(
    "folder, dataset, overlap",
    [
        ("CUB", "CUB", True),
        ("SUN", "SUN", True),
        ("AWA2", "AWA2", True),
        ("AWA2_other_release", "AWA2", False),
    ],
)
def test_official_splits(real_data, tmp_path, folder, dataset, overlap):
    """The published numbers, and the trap: train_loc and val_loc are kept inside trainval."""
    source = real_data / "xlsa17_full" / folder / "att_splits.mat"
    (tmp_path / "xlsa17" / "data").mkdir(parents=True)
    (tmp_path / "xlsa17" / "data" / dataset).symlink_to(source.parent)
    with np.load(real_data / "xlsa17_full" / dataset / "images.npz") as images:
        labels = images["labels"].astype(np.int64)
        names = images["class_names"]
        files = list(images["image_files"])

    anchor = LAYOUTS[dataset].anchor
    tails = [image_tail("/some/where/" + path, anchor, source) for path in files]
    assert tails == [path.replace("//", "/") for path in files]

    split, class_names = read_split(tmp_path, dataset, labels)
    assert split.counts() == LAYOUTS[dataset].published and split.is_published(dataset)
    # the two releases of AWA2 share their test images, and so the fingerprint
    assert split.fingerprint == LAYOUTS[dataset].release
    assert "the common release" in split.describe(dataset)
    assert underscored(class_names) == underscored(names)

    raw = scipy.io.loadmat(source)
    reaches_out = np.intersect1d(raw["train_loc"], raw["test_seen_loc"]).size > 0
    assert reaches_out == overlap
    assert np.isin(split.train, split.trainval).all()
    assert np.isin(split.val, split.trainval).all()
    assert len(split.train) + len(split.val) == len(split.trainval)


def underscored(names):
    return [name.replace("/", "_") for name in names]


def test_cub50(real_data):
    split, class_names, tails = read_dataset(real_data, "CUB")
    assert split.counts() == (2889, 50, 40, 312, 1837, 460, 592)
    assert not split.is_published("CUB")
    assert all((real_data / "CUB" / tail).is_file() for tail in tails[::100])

    folders = [tails[image].split("/")[-2] for image in range(0, 2889, 100)]
    assert folders == [class_names[label] for label in split.labels[::100]]


@pytest.mark.parametrize(
    "text, anchor, tail",
    [
        (
            "/BS/x/CUB_200_2011/CUB_200_2011/images/1.A/b.jpg",
            "CUB_200_2011",
            "CUB_200_2011/images/1.A/b.jpg",
        ),
        ("/BS/SUN/images/a/abbey/s.jpg", "images", "images/a/abbey/s.jpg"),
        (
            "/x/Animals_with_Attributes2//JPEGImages/antelope/a_1.jpg",
            "Animals_with_Attributes2",
            "Animals_with_Attributes2/JPEGImages/antelope/a_1.jpg",
        ),
    ],
)
def test_image_tails(text, anchor, tail):
    assert image_tail(text, anchor, "res101.mat") == tail


def test_texts_that_kept_the_end_of_their_line():
    cells = np.array([["a.jpg\r\n"], ["b.jpg  "], ["c d.jpg\t"]], object)
    assert cell_texts(cells, "image_files") == ["a.jpg", "b.jpg", "c d.jpg"]


@pytest.mark.parametrize("text", ["/x/photos/a.jpg", "/x/images/../../etc/passwd", "images"])
def test_strange_image_paths_are_refused(text):
    with pytest.raises(UserError, match="has no folder images"):
        image_tail(text, "images", "res101.mat")


@pytest.mark.parametrize(
    "value",
    [
        "text",
        scipy.sparse.eye(3).tocsc(),
        np.ones((3, 3)) * 1j,
        np.array([["a"], ["b"]], dtype=object),
    ],
)
def test_class_attributes_of_a_wrong_kind(value):
    with pytest.raises(UserError, match="att is not a table of numbers"):
        class_table(value, "att_splits.mat: att")
