"""TOY: reproducible, laid out as CUB, honest in its splits, drawn where its attributes say."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from scegg.datasets import toy, toy_birds
from util import UserError, exit_on_user_error

SIZES = {"classes": 8, "images_per_class": 6, "unseen": 3}
SMALLER = {"classes": 5, "images_per_class": 5, "unseen": 1}
SPLITS = "trainval_loc", "train_loc", "val_loc", "test_seen_loc", "test_unseen_loc"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    toy.render(root, **SIZES)
    return root


def mats(root: Path) -> dict[str, np.ndarray]:
    folder = root / "xlsa17/data/TOY"
    images = scipy.io.loadmat(folder / "res101.mat")
    both = images | scipy.io.loadmat(folder / "att_splits.mat")
    return {key: value for key, value in both.items() if not key.startswith("__")}


def files(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.glob("TOY/**/*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_same_seed_same_dataset_whatever_the_workers(root, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "granted_cores", lambda: 1)
    toy.render(tmp_path, **SIZES)
    assert files(tmp_path) == files(root)
    first, again = mats(root), mats(tmp_path)
    keys = {"image_files", "labels", "att", "original_att", "allclasses_names", *SPLITS}
    assert first.keys() == again.keys() == keys
    for key, value in first.items():
        assert value.dtype == again[key].dtype and (value == again[key]).all(), key


def test_another_seed_replaces_the_dataset(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    toy.render(tmp_path, seed=1, **SIZES)
    assert not set(files(tmp_path).values()) >= set(files(root).values())
    assert (mats(tmp_path)["original_att"] != mats(root)["original_att"]).any()
    assert len(list(tmp_path.glob("TOY/images/*/*.jpg"))) == 48
    assert {path.name for path in tmp_path.iterdir()} == {"TOY", "xlsa17"}


def test_a_complete_dataset_is_kept_a_damaged_one_repaired(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    toy.render(tmp_path, **SIZES)
    assert "already there" in capsys.readouterr().out
    next(tmp_path.glob("TOY/images/*/*.jpg")).unlink()
    toy.render(tmp_path, **SIZES)
    assert files(tmp_path) == files(root)


def test_files_lie_as_in_cub(root):
    arrays = mats(root)
    names = [str(cell[0][0]) for cell in arrays["allclasses_names"]]
    assert sorted(names) == sorted(path.name for path in (root / "TOY/images").iterdir())
    assert [name[:4] for name in sorted(names)] == [f"{i:03d}." for i in range(1, 9)]
    assert arrays["image_files"].shape == arrays["labels"].shape == (48, 1)
    assert arrays["labels"].dtype == np.uint8

    for cell, label in zip(arrays["image_files"][:, 0], arrays["labels"][:, 0], strict=True):
        path = str(cell[0])
        assert path.startswith(f"/toy/TOY/images/{names[label - 1]}/")
        with Image.open(root / path.removeprefix("/toy/")) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (224, 224))

    lines = (root / "TOY/attributes.txt").read_text().splitlines()
    assert lines == [f"{i + 1} {name}" for i, name in enumerate(toy_birds.ATTRIBUTES)]
    assert len(set(toy_birds.ATTRIBUTES)) == len(lines) == len(arrays["att"])


def test_splits(root):
    arrays = mats(root)
    labels = arrays["labels"].ravel()
    trainval, train, val, test_seen, test_unseen = (arrays[name].ravel() for name in SPLITS)
    assert all(arrays[name].shape[1] == 1 for name in SPLITS)
    assert sorted([*trainval, *test_seen, *test_unseen]) == list(range(1, 49))
    assert sorted([*train, *val]) == sorted(trainval)
    classes = {name: set(labels[arrays[name].ravel() - 1]) for name in SPLITS}
    assert len(classes["test_unseen_loc"]) == 3 and len(test_unseen) == 18
    assert classes["trainval_loc"] == classes["test_seen_loc"] and len(classes["trainval_loc"]) == 5
    assert not classes["trainval_loc"] & classes["test_unseen_loc"]
    assert classes["val_loc"] and not classes["train_loc"] & classes["val_loc"]


def test_default_sizes_split_as_documented():
    labels = np.repeat(np.arange(1, 51), 40)
    splits = toy.draw_splits(np.random.default_rng(0), labels, np.arange(11, 51))
    assert [len(splits[name]) for name in SPLITS] == [1280, 960, 320, 320, 400]


def test_class_attributes(root):
    arrays = mats(root)
    assert arrays["att"].shape == arrays["original_att"].shape == (len(toy_birds.ATTRIBUTES), 8)
    np.testing.assert_allclose(np.linalg.norm(arrays["att"], axis=0), 1)
    lengths = np.linalg.norm(arrays["original_att"], axis=0)
    np.testing.assert_allclose(arrays["att"] * lengths, arrays["original_att"])


@pytest.mark.parametrize("classes, unseen", [(50, 10), (8, 3), (5, 1), (120, 30)])
def test_signatures(classes, unseen):
    percents = toy.draw_signatures(np.random.default_rng(3), classes, unseen)
    assert percents.min() >= 0
    ends = np.cumsum([len(values) for values in toy_birds.GROUPS.values()])[:-1]
    groups = np.split(percents, ends, axis=1)
    mains = np.stack([group.argmax(axis=1) for group in groups], axis=1)
    for group, main in zip(groups, mains.T, strict=True):
        assert (group.sum(axis=1) == 100).all()
        assert (group.max(axis=1) >= toy.PURITY[0]).all()
        # nothing in an unseen class is new but the combination
        assert set(main[-unseen:]) <= set(main[:-unseen])
    different = (mains[:, None] != mains[None]).sum(axis=2) + 99 * np.eye(classes)
    assert different.min() >= toy.MIN_DIFFERENT


def test_unseen_classes_lie_anywhere_among_the_labels(root):
    arrays = mats(root)
    unseen = np.unique(arrays["labels"][arrays["test_unseen_loc"].ravel() - 1])
    assert set(unseen) not in ({1, 2, 3}, {6, 7, 8})


PLAIN = {group: values[0] for group, values in toy_birds.GROUPS.items()}


def drawn(**changes: str) -> np.ndarray:
    pose = toy_birds.Pose(x=215, y=230, length=170)
    bird = toy_birds.draw_bird({**PLAIN, **changes}, pose, np.random.default_rng(0))
    return np.asarray(bird, dtype=int)


def test_each_attribute_shows_at_its_part():
    """Changing one part's colour changes that part's pixels and no other part's."""
    before = drawn()
    changed = {
        group: (drawn(**{group: values[1]}) != before).any(axis=2)
        for group, values in toy_birds.GROUPS.items()
        if group.endswith("_color")
    }
    parts = sum(area.astype(int) for area in changed.values())
    assert parts.max() <= 2  # parts meet only at their outlines
    assert (parts > 1).mean() < 0.001

    x = {group: np.nonzero(area)[1].mean() for group, area in changed.items()}
    y = {group: np.nonzero(area)[0].mean() for group, area in changed.items()}
    from_left = [x[f"{part}_color"] for part in ("tail", "wing", "breast", "crown", "bill")]
    from_top = [y[f"{part}_color"] for part in ("crown", "eye", "wing", "breast", "leg")]
    assert from_left == sorted(from_left) and len(set(from_left)) == 5
    assert from_top == sorted(from_top) and len(set(from_top)) == 5


@pytest.mark.parametrize("group", [group for group in toy_birds.GROUPS if group != "size"])
def test_every_value_looks_different(group):
    pictures = [drawn(**{group: value}).tobytes() for value in toy_birds.GROUPS[group]]
    assert len(set(pictures)) == len(pictures)


def test_interrupted_render_leaves_nothing_that_looks_complete(root, tmp_path, monkeypatch):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    # interrupted while rendering: the old dataset is untouched
    with monkeypatch.context() as patch:
        patch.setattr(toy.scipy.io, "savemat", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy.render(tmp_path, **SMALLER)
    assert files(tmp_path) == files(root)

    # interrupted while replacing: no splits
    with monkeypatch.context() as patch:
        patch.setattr(toy.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy.render(tmp_path, **SMALLER)
    assert not list(tmp_path.glob("xlsa17/data/TOY/*"))
    assert {path.name for path in tmp_path.iterdir()} == {"TOY", "xlsa17"}

    toy.render(tmp_path, **SIZES)
    assert files(tmp_path) == files(root)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "TOY").mkdir()
    (tmp_path / "TOY/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not written by toy.py"):
        toy.render(tmp_path, **SIZES)
    assert (tmp_path / "TOY/thesis.txt").exists()


IMPOSSIBLE = [{"unseen": 8}, {"unseen": 0}, {"images_per_class": 4}, {"classes": 251}, {"seed": -1}]


@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_bad_arguments(wrong, tmp_path):
    with pytest.raises(UserError):
        toy.render(tmp_path, **{**SIZES, **wrong})
    assert not list(tmp_path.iterdir())


def test_command_line_reports_bad_arguments_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--classes", "5", "--unseen", "9"])
    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(toy.main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
