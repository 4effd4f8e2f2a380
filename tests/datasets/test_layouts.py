"""Descriptions of datasets: the shipped ones, wrong ones, and one of a user's own."""

import numpy as np
import pytest

from helpers import ROOT
from scegg.datasets import layouts
from scegg.datasets.layouts import LAYOUTS, Counts, add_own_layouts, find_layout, read_layout
from scegg.datasets.splits import Split
from scegg.datasets.xlsa17 import image_folder, places_of_images
from util import UserError

MINE = "name: MINE\nimages: images\nanchor: images\n"


@pytest.fixture(autouse=True)
def same_layouts(monkeypatch):
    """What a test makes known is forgotten after it."""
    monkeypatch.setattr(layouts, "LAYOUTS", LAYOUTS)
    before = dict(LAYOUTS)
    yield
    LAYOUTS.clear()
    LAYOUTS.update(before)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_shipped_descriptions():
    assert list(LAYOUTS) == ["CUB", "SUN", "AWA2", "TOY", "APY", "AWA1", "FLO"]
    assert [name for name, layout in LAYOUTS.items() if layout.paper] == ["CUB", "SUN", "AWA2"]
    assert LAYOUTS["CUB"].published == Counts(11788, 200, 150, 312, 7057, 1764, 2967)
    assert LAYOUTS["SUN"].published == Counts(14340, 717, 645, 102, 10320, 2580, 1440)
    assert LAYOUTS["AWA2"].published == Counts(37322, 50, 40, 85, 23527, 5882, 7913)
    assert LAYOUTS["CUB"].attribute_files[0] == "attributes.txt"
    assert LAYOUTS["TOY"].published is None
    assert not layouts.WRONG


def test_what_was_not_checked_says_so():
    for name in ("AWA1", "APY", "FLO"):
        assert not LAYOUTS[name].checked and LAYOUTS[name].release is None
        text = (ROOT / f"wandb_config/datasets/{name.lower()}.yaml").read_text()
        assert "not checked" in text


@pytest.mark.parametrize(
    "text, message",
    [
        (MINE + "imges: x\n", "unknown key imges; did you mean images"),
        ("name: MINE\nanchor: images\n", "lacks the key images"),
        (MINE + "units: cm\n", "units must be one of percent, fraction, vector, not 'cm'"),
        (MINE.replace("MINE", "../x"), "name must be a word of letters"),
        (MINE.replace("images: images", "images: /etc"), "images must be a path inside"),
        (MINE + "semantics: ../../secret.csv\n", "semantics must be a path inside"),
        (MINE + "also_at: images2\n", "also_at must be a list of paths"),
        (MINE + "attribute_files: [1]\n", "attribute_files must be a list of paths"),
        (MINE + "published: 7\n", "published must be numbers for images, classes"),
        (MINE + "release: 123456789012\n", "release must be a text"),
        (MINE + "paper: maybe\n", "paper must be true or false"),
        (MINE + "name: TWICE\n", "the key name stands twice"),
        ("- a list\n", "expected lines of the form `key: value`"),
        (MINE + "units: [\n", "is not YAML"),
    ],
)
def test_a_wrong_description_is_one_line_that_names_the_key(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_layout(write(tmp_path / "mine.yaml", text))
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_published_numbers_must_agree(tmp_path):
    numbers = dict(zip(Counts._fields, (10, 3, 2, 5, 4, 2, 3), strict=True))
    text = MINE + f"published: {numbers}\n"
    with pytest.raises(UserError, match="published: images must be the sum .*9, not '10'"):
        read_layout(write(tmp_path / "mine.yaml", text))
    with pytest.raises(UserError, match="published: seen must be a whole number above 0"):
        read_layout(write(tmp_path / "mine.yaml", text.replace("'seen': 2", "'seen': 2.5")))


def test_a_dataset_of_ones_own_is_found(tmp_path):
    with pytest.raises(UserError, match="--dataset MINE: there is no such dataset; known are CUB"):
        find_layout("MINE", tmp_path)
    with pytest.raises(UserError, match="no such dataset"):
        find_layout("../MINE", tmp_path)

    other = write(tmp_path / "other.yaml", MINE.replace("images: images", "images: photos"))
    assert find_layout("MINE", tmp_path, other).images == "photos"
    with pytest.raises(UserError, match="describes MINE: give --dataset MINE"):
        find_layout("CUB", tmp_path, other)

    del LAYOUTS["MINE"]
    write(tmp_path / "MINE/layout.yaml", MINE)
    assert find_layout("MINE", tmp_path).images == "images"

    write(tmp_path / "COPY/layout.yaml", MINE)
    with pytest.raises(UserError, match="COPY/layout.yaml says name: MINE: make it COPY"):
        find_layout("COPY", tmp_path)


def test_all_own_datasets_become_known_but_a_wrong_one(tmp_path, capsys):
    write(tmp_path / "MINE/layout.yaml", MINE)
    write(tmp_path / "BAD/layout.yaml", "name: BAD\n")
    add_own_layouts(tmp_path)
    assert "MINE" in LAYOUTS and "BAD" not in LAYOUTS
    assert "lacks the key images" in capsys.readouterr().err


def test_usual_variants_of_the_folders_are_read(tmp_path):
    tails = ["CUB_200_2011/images/001.A/x.jpg"]
    assert image_folder(tmp_path, "CUB") == tmp_path / "CUB/CUB_200_2011/images"
    assert places_of_images(tmp_path, "CUB", tails) == tails

    (tmp_path / "CUB/CUB_200_2011/CUB_200_2011/images").mkdir(parents=True)
    nested = ["CUB_200_2011/CUB_200_2011/images/001.A/x.jpg"]
    assert places_of_images(tmp_path, "CUB", tails) == nested
    (tmp_path / "AWA2/JPEGImages").mkdir(parents=True)
    tails = ["Animals_with_Attributes2/JPEGImages/ox/ox_1.jpg"]
    assert places_of_images(tmp_path, "AWA2", tails) == ["JPEGImages/ox/ox_1.jpg"]


def test_other_class_vectors_show_in_the_fingerprint():
    labels = np.repeat(np.arange(3), 4)
    parts = np.array([0, 1, 2, 4, 5, 6]), np.array([3, 7]), np.arange(8, 12)
    att = np.eye(3, 5, dtype=np.float32)
    split = Split(labels, *parts, att, att)
    vectors = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)

    other = split.with_semantics(vectors, "clip.npy")
    assert other.att.shape == (3, 7)
    np.testing.assert_allclose(np.linalg.norm(other.att, axis=1), 1, rtol=1e-6)
    assert other.fingerprint_of_images == split.fingerprint
    first, _, second = other.fingerprint.partition("+")
    assert first == split.fingerprint and len(second) == 6
    assert split.with_semantics(vectors * 2, "clip.npy").fingerprint != other.fingerprint
    assert "class vectors of clip.npy" in other.describe("CUB")
    assert not other.is_published("CUB")
    with pytest.raises(UserError, match="the numbers of class 1 are all 0"):
        split.with_semantics(np.diag([1.0, 0, 1]), "zero.npy")
