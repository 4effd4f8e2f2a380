"""A dataset from a folder of pictures and a table: what is made, and what is refused."""

import os

import numpy as np
import pytest
from PIL import Image

import preprocessing
import results
import train_joint
from helpers import ROOT, SMALL_RUN, flags
from scegg import doctor
from scegg.datasets import make
from scegg.datasets.layouts import LAYOUTS, find_layout
from scegg.datasets.semantics import read_semantics
from scegg.datasets.xlsa17 import read_attribute_names, read_dataset
from scegg.features.reader import open_features
from util import UserError

CLASSES = ["bird", "cat", "dog", "fish", "horse"]
FORMATS = ("jpg", "PNG", "gif")


@pytest.fixture(autouse=True)
def same_layouts():
    before = dict(LAYOUTS)
    yield
    LAYOUTS.clear()
    LAYOUTS.update(before)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Pictures of five classes in three formats, a table and a list, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 80, (40, 50, 3)) + 30 * label
            path = tmp_path / "pets" / name / f"{number}.{FORMATS[number % 3]}"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no picture")

    lines = [
        f"{name},{label % 2},{label / 5 + 0.2},{label > 2:d}" for label, name in enumerate(CLASSES)
    ]
    table = "\n".join(["class,furry,has_size::big,wet", *reversed(lines), "cow,1,1,1"])
    (tmp_path / "pets.csv").write_text(table)
    (tmp_path / "seen.txt").write_text("\n".join(CLASSES[:4]) + "\n")
    return tmp_path


def made(*more, semantics="pets.csv"):
    make.main(
        ["--name", "PETS", "--images", "pets", "--semantics", semantics, "--seen", "seen.txt"]
        + list(more)
    )


def test_from_pictures_to_a_table_without_a_line_of_code(own, capsys):
    made()
    said = capsys.readouterr().out
    assert "1 files that are no pictures are left out" in said
    assert "1 classes without pictures are left out" in said
    assert "next: python preprocessing.py --dataset PETS\n" in said

    dataset = ["--dataset", "PETS"]
    backbone = ["--backbone", "efficientnet_lite2", "--img_size", "64"]
    preprocessing.main([*dataset, *backbone, "-n", "0"])
    config = ["--config", str(ROOT / "wandb_config/cub_gzsl.yaml"), "--wandb", "disabled"]
    train_joint.main([*dataset, *backbone, *config, *flags(**SMALL_RUN | {"nepoch": 1})])
    assert "a dataset of your own" in capsys.readouterr().out
    results.main([])
    assert "PETS acc" in capsys.readouterr().out

    doctor.main([])
    said = capsys.readouterr().out.split("\nPETS\n")[1]
    assert "30 of 30 images are there" in said
    assert "next: python train_joint.py --dataset PETS --config wandb_config/cub_gzsl.yaml" in said


def test_what_is_made(own):
    made()
    find_layout("PETS", own / "data")
    split, names, tails = read_dataset(own / "data", "PETS")
    assert names == CLASSES and len(tails) == 30
    assert all((own / "data/PETS" / tail).is_file() for tail in tails)
    assert list(split.unseen) == [4] and list(split.seen) == [0, 1, 2, 3]
    assert len(split.test_seen) == 4 and len(split.trainval) == 20
    assert set(split.train) | set(split.val) == set(split.trainval)
    np.testing.assert_allclose(split.original_att[3], [1, 0.8, 1], rtol=1e-6)
    assert read_attribute_names(own / "data", "PETS", 3) == ["furry", "has_size::big", "wet"]

    made("--seed", "1")  # made anew
    again = read_dataset(own / "data", "PETS")[0]
    assert again.fingerprint != split.fingerprint
    made("--seed", "1", "--images", "data/PETS/images")  # the link itself
    assert read_dataset(own / "data", "PETS")[0].fingerprint == again.fingerprint
    assert all((own / "data/PETS" / tail).is_file() for tail in tails)


def test_vectors_that_were_changed_since_are_refused(own):
    made()
    argv = ["--dataset", "PETS", "--backbone", "efficientnet_lite2"]
    preprocessing.main([*argv, "--img_size", "64", "-n", "0"])
    (own / "pets.csv").write_text((own / "pets.csv").read_text().replace("cat,1", "cat,0.5"))
    made()
    argv += ["--config", str(ROOT / "wandb_config/cub_gzsl.yaml")]
    with pytest.raises(UserError, match="other class attributes than .*att_splits.mat holds"):
        train_joint.main([*argv, *flags(**SMALL_RUN | {"img_size": 64})])


def test_a_name_over_two_lines_is_one(tmp_path):
    table = 'class,"furry\n(yes/no)",wet\ncat,1,0\ndog,0,1\n'
    (tmp_path / "t.csv").write_text(table)
    assert read_semantics(tmp_path / "t.csv", ["cat", "dog"])[1] == ["furry (yes/no)", "wet"]


def test_vectors_without_words(own, capsys):
    np.save(own / "clip.npy", np.random.default_rng(1).standard_normal((5, 8)))
    made(semantics="clip.npy")
    own_flags = ["--dataset", "PETS", "--backbone", "efficientnet_lite2", "--img_size", "64"]
    options = preprocessing.parse_arguments([*own_flags, "--output", "maps.hdf5"])
    plain = preprocessing.read_annotations(options)
    said = capsys.readouterr().out
    assert "no words name the 8 numbers" in said and "tf_vaegan.yaml" in said
    assert plain.w2v.shape == (8, 300)
    assert len(np.unique(plain.w2v[:, 0])) == 8
    assert "clip.npy: its first row is bird's, its last row horse's" in said

    np.save(own / "other.npy", np.random.default_rng(2).standard_normal((5, 4)))
    preprocessing.main([*own_flags, "-n", "0", "--semantics", "other.npy"])
    other = open_features(own / "data/PETS/feature_map_efficientnet_lite2_other_PETS.hdf5")
    assert other.split.att.shape == (5, 4) and other.w2v.shape == (4, 300)
    assert other.split.fingerprint.startswith(plain.split.fingerprint + "+")
    assert other.provenance["semantics"] == "other.npy"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda own: (own / "seen.txt").write_text("cow\ncat\n"), "cow is no class"),
        (lambda own: (own / "seen.txt").write_text("cat\n"), "names 1 of 5 classes"),
        (lambda own: (own / "seen.txt").unlink(), "--seen seen.txt could not be read"),
        (lambda own: (own / "seen.txt").write_bytes(b"k\xe4fer"), "seen.txt is no UTF-8"),
        (lambda own: (own / "pets.csv").write_bytes(b"k\xe4fer,1\n"), "pets.csv is no UTF-8"),
        (lambda own: (own / "pets.csv").write_text("cat;1;2\n"), "commas must divide each line"),
        (lambda own: (own / "pets/cat/0.jpg").rename("pets/cat/0\\.jpg"), "without a backslash"),
        (lambda own: os.rename("pets/cat/0.jpg", b"pets/cat/k\xe4fer.jpg"), "must be UTF-8"),
        (lambda own: (own / "pets/emu").mkdir(), "emu holds no picture"),
        (lambda own: (own / "pets.csv").write_text("cat,1,2\n"), "no line for 4 of 5 classes"),
        (lambda own: (own / "pets.csv").write_text("cat,1,2\ncat,1,2\n"), "line 2: .*twice"),
        (lambda own: (own / "pets.csv").write_text("cat,1,2\ndog,1\n"), "line 2: expected"),
        (lambda own: (own / "pets.csv").unlink(), "pets.csv is missing"),
        (lambda own: (own / "data/PETS/x").mkdir(parents=True), "was not written by this command"),
    ],
)
def test_mistakes_are_one_line(own, change, message):
    change(own)
    with pytest.raises(UserError, match=message) as caught:
        made()
    assert "\n" not in str(caught.value)
    assert not (own / "data/xlsa17").exists()


def test_only_files_are_pictures_and_blanks_around_names_do_not_count(own, capsys):
    (own / "pets/cat/inner.jpg").mkdir()
    (own / "pets/cat/gone.jpg").symlink_to("nowhere")
    (own / "pets.csv").write_text((own / "pets.csv").read_text().replace(",", " , "))
    made()
    assert "3 files that are no pictures" in capsys.readouterr().out
    find_layout("PETS", own / "data")
    assert len(read_dataset(own / "data", "PETS")[2]) == 6 * len(CLASSES)


def test_tables_as_spreadsheets_and_other_systems_write_them(tmp_path):
    (tmp_path / "t.csv").write_text("class,furry,,\n,,,\ncaf\u00e9,1,,\ndog,2,,\n,,,\n")
    (tmp_path / "seen.txt").write_text("caf\u00e9\ndog\n")
    classes = ["cafe\u0301", "dog", "emu"]  # macOS's spelling of the folder
    table, names = read_semantics(tmp_path / "t.csv", classes[:2])
    assert table.tolist() == [[1], [2]] and names == ["furry"]
    assert make.read_seen(tmp_path / "seen.txt", classes).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "table, message",
    [
        (np.ones((4, 3)), "has 4 rows, but there are 5 classes"),
        (np.ones(5), "is no table"),
        (np.full((5, 2), np.nan), "NaN"),
        (np.array([["a"] * 2] * 5), "is no table"),
    ],
)
def test_wrong_tables(tmp_path, table, message):
    np.save(tmp_path / "t.npy", table)
    with pytest.raises(UserError, match=message):
        read_semantics(tmp_path / "t.npy", CLASSES)


def test_a_table_of_another_kind(tmp_path):
    (tmp_path / "t.txt").write_text("cat 1 2")
    with pytest.raises(UserError, match="must be a .csv or .npy file"):
        read_semantics(tmp_path / "t.txt", CLASSES)


def test_a_description_may_name_other_class_vectors(own, capsys):
    made()
    np.save(own / "data/PETS/v.npy", np.random.default_rng(3).standard_normal((5, 6)))
    description = own / "data/PETS/layout.yaml"
    text = description.read_text().replace("units: fraction", "units: percent")
    description.write_text(text)
    options = preprocessing.parse_arguments(["-d", "PETS", "--output", "maps.hdf5"])
    assert preprocessing.read_annotations(options).split.semantics is None
    assert "up to 1, but the description of PETS says units: percent" in capsys.readouterr().out

    description.write_text(text + "semantics: v.npy\n")
    LAYOUTS.pop("PETS")
    split = preprocessing.read_annotations(options).split
    assert split.semantics == "v.npy" and split.att.shape == (5, 6)
