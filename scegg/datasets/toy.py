"""Render TOY: cartoon birds whose parts are drawn from the attributes of their class.

A zero-shot dataset that needs no download. It lies on disk as CUB does (see `render`). The birds
themselves are drawn by toy_birds.py.

    python -m scegg.datasets.toy --data_root data
"""

import json
import os
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import scipy.io
from tqdm import tqdm

from scegg.datasets.toy_birds import ATTRIBUTES, GROUPS, draw_image
from scegg.speed.threads import granted_cores
from util import FlagParser, UserError, exit_on_user_error, make_folder

VERSION = 1  # raise it when pictures or files change: `render` then replaces older ones

# How hard the classes are to tell apart.
PURITY = 65, 100  # %, range of a class's main value in a group: lower makes its birds differ more
MIN_DIFFERENT = 5  # groups in which two classes differ at least: lower lets classes be closer

FIRST_NAMES = (
    "Amber Ash Bramble Clover Copper Coral Dusk Ember "
    "Fern Hazel Ivory Juniper Maple Misty Russet Willow"
)
LAST_NAMES = (
    "Bulbul Bunting Dipper Finch Grosbeak Lark Linnet Oriole "
    "Pipit Plover Robin Swallow Thrush Tit Vireo Wren"
)


# --- Classes -------------------------------------------------------------------------------------


def draw_signatures(rng: np.random.Generator, classes: int, unseen: int) -> np.ndarray:
    """Draw what the classes look like, the seen ones first.

    Returns percentages (classes, len(ATTRIBUTES)), which sum to 100 in every group. The main value
    of an unseen class in a group is that of some seen class: only the combination is new.
    """
    seen, groups = classes - unseen, np.arange(len(GROUPS))
    mains = np.empty((0, len(groups)), int)

    while len(mains) < seen:
        # A shuffled deck for each group: every value is the main one of equally many seen classes.
        decks = [rng.permutation(np.arange(seen) % len(values)) for values in GROUPS.values()]
        rows = np.stack(decks, axis=1)
        mains = np.array([row for i, row in enumerate(rows) if is_new(row, rows[:i])])

    while len(mains) < classes:
        row = mains[rng.integers(seen, size=len(groups)), groups]
        if is_new(row, mains):
            mains = np.vstack([mains, row])

    return np.array([draw_percentages(rng, row) for row in mains])


def is_new(row: np.ndarray, rows: np.ndarray) -> bool:
    """Whether main values (groups,) differ in enough groups from each of the others (n, groups)."""
    return bool(((rows != row).sum(axis=1) >= MIN_DIFFERENT).all())


def draw_percentages(rng: np.random.Generator, mains: np.ndarray) -> np.ndarray:
    """A class's percentages (len(ATTRIBUTES),) from its main value in each group (groups,)."""
    groups = zip(mains, GROUPS.values(), strict=True)
    return np.concatenate([spread(rng, main, len(values)) for main, values in groups])


def spread(rng: np.random.Generator, main: int, values: int) -> np.ndarray:
    """One group's percentages (values,): most on the main value, the rest on one or two others."""
    percent = np.zeros(values)
    percent[main] = rng.integers(PURITY[0], PURITY[1] + 1)
    others = rng.permutation(np.delete(np.arange(values), main))[: rng.integers(1, 3)]
    percent[others[0]] = rng.integers(100 - percent[main] + 1)
    percent[others[-1]] += 100 - percent.sum()
    return percent


def draw_names(rng: np.random.Generator, classes: int) -> list[str]:
    """The folders of the classes, `003.Ash_Finch`, in the order of their labels.

    As in CUB, kin are neighbours among the folders, and labels do not follow the folders' order.
    """
    names = [f"{first}_{last}" for last in LAST_NAMES.split() for first in FIRST_NAMES.split()]
    chosen = np.sort(rng.choice(len(names), classes, replace=False))
    folders = [f"{i:03d}.{names[place]}" for i, place in enumerate(chosen, start=1)]
    return rng.permutation(folders).tolist()


# --- Splits --------------------------------------------------------------------------------------


def draw_splits(
    rng: np.random.Generator, labels: np.ndarray, seen: np.ndarray
) -> dict[str, np.ndarray]:
    """Split the images of 1-based `labels` (N,), given the labels `seen`.

    Returns 1-based positions (M, 1). trainval has 80 % of each seen class's images, and test_seen
    the rest. A quarter of the seen classes is val.
    """
    in_test = np.zeros(len(labels), bool)
    for label in seen:
        images = np.flatnonzero(labels == label)
        in_test[rng.permutation(images)[: max(1, round(0.2 * len(images)))]] = True

    is_seen = np.isin(labels, seen)
    is_val = np.isin(labels, rng.permutation(seen)[: max(1, len(seen) // 4)])
    splits = {
        "trainval_loc": is_seen & ~in_test,
        "train_loc": is_seen & ~in_test & ~is_val,
        "val_loc": ~in_test & is_val,
        "test_seen_loc": in_test,
        "test_unseen_loc": ~is_seen,
    }
    return {name: np.flatnonzero(chosen)[:, None] + 1 for name, chosen in splits.items()}


# --- The dataset ---------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """All that is drawn before the pictures, in the order of the labels (C classes, N images)."""

    names: list[str]  # folders of the classes
    percents: np.ndarray  # (C, len(ATTRIBUTES))
    labels: np.ndarray  # (N,) from 1
    splits: dict[str, np.ndarray]


def draw_dataset(seed: int, classes: int, images_per_class: int, unseen: int) -> Dataset:
    """Draw classes and splits; unseen classes lie anywhere among the labels."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(classes)
    percents = draw_signatures(rng, classes, unseen)[order]
    seen = np.flatnonzero(order < classes - unseen) + 1

    names = draw_names(rng, classes)
    labels = np.repeat(np.arange(1, classes + 1), images_per_class)
    return Dataset(names, percents, labels, draw_splits(rng, labels, seen))


def mat_files(dataset: Dataset, images_per_class: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of both .mat files; att_splits.mat comes last."""
    paths = []
    for name in dataset.names:
        for number in range(1, images_per_class + 1):
            paths.append(f"/toy/TOY/images/{name}/{image_name(name, number)}")

    att = dataset.percents.T  # (K, C)
    images = {
        "image_files": np.array(paths, dtype=object)[:, None],
        "labels": dataset.labels[:, None].astype(np.uint8),
    }
    classes = {
        "att": att / np.linalg.norm(att, axis=0),
        "original_att": att,
        "allclasses_names": np.array(dataset.names, dtype=object)[:, None],
    }
    return {"res101.mat": images, "att_splits.mat": classes | dataset.splits}


def image_name(class_folder: str, number: int) -> str:
    """`Ash_Finch_0001.jpg` for image 1 of the class folder `003.Ash_Finch`."""
    return f"{class_folder[4:]}_{number:04d}.jpg"


def render_class(seed: int, count: int, label: int, percent: np.ndarray, folder: Path):
    """Write `count` images of a class.

    Each image draws from its own generator, so that workers may come in any order.
    """
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        image = draw_image(percent, np.random.default_rng([seed, label, number]))
        image.save(folder / image_name(folder.name, number), quality=90)


def render_images(dataset: Dataset, seed: int, images_per_class: int, folder: Path):
    """Write all images below `folder`, a process a core.

    Raises UserError if one of them is killed.
    """
    classes = len(dataset.names)
    folders = [folder / name for name in dataset.names]
    render_one = partial(render_class, seed, images_per_class)
    with worker_pool() as pool:
        jobs = pool.map(render_one, range(classes), dataset.percents, folders)
        try:
            for _ in tqdm(jobs, total=classes, desc="TOY", unit="class", disable=None):
                pass
        except BrokenProcessPool:
            raise UserError("a process that drew images was killed: is memory short?") from None


def worker_pool() -> Executor:
    """A process for each core; threads where the system has no locks that processes share."""
    try:
        return ProcessPoolExecutor(granted_cores())
    except (OSError, NotImplementedError):  # a container without /dev/shm
        return ThreadPoolExecutor(granted_cores())


def check_arguments(seed: int, classes: int, images_per_class: int, unseen: int):
    """Raises UserError for a dataset that cannot be."""
    if seed < 0:
        raise UserError(f"seed must not be negative, not {seed}")
    if unseen < 1 or classes - unseen < 4 or classes > 250:
        raise UserError(
            "4 or more classes must be seen, 1 or more unseen, 250 at most: "
            f"not {unseen} of {classes}"
        )
    if not 5 <= images_per_class <= 9999:
        raise UserError(f"images_per_class must be 5 to 9999, not {images_per_class}")


def is_complete(folder: Path, mats: Path, note: str, images: int) -> bool:
    """Whether TOY is there, of the same arguments and with all of its images."""
    places = (folder, mats / "res101.mat", mats / "att_splits.mat")
    if not all(place.exists() for place in places):
        return False
    same = (folder / "toy.json").read_text() == note
    return same and len(list(folder.glob("images/*/*.jpg"))) == images


def render(
    data_root: Path,
    seed: int = 0,
    classes: int = 50,
    images_per_class: int = 40,
    unseen: int = 10,
):
    """Render TOY as a user's dataset lies on disk.

    data_root/TOY/images/<NNN.Class_Name>/*.jpg   images_per_class of each class, RGB, 224 x 224 px
    data_root/TOY/attributes.txt                  a line an attribute, `1 has_bill_shape::dagger`
    data_root/TOY/toy.json                        what was asked for
    data_root/xlsa17/data/TOY/res101.mat          image_files (N, 1) and labels (N, 1) from 1; no
                                                  features: the baseline pools the feature maps
    data_root/xlsa17/data/TOY/att_splits.mat      the splits (M, 1) from 1; original_att (K, C) in
                                                  percent; att (K, C) with columns of length 1;
                                                  allclasses_names (C, 1)

    The same arguments give the same pictures and arrays. A complete TOY of the same arguments is
    kept, and any other one replaced. att_splits.mat appears last, when all else is in place.
    Raises UserError for impossible arguments and for a TOY folder that is not ours.
    """
    check_arguments(seed, classes, images_per_class, unseen)
    start, data_root = time.time(), Path(data_root)
    folder, mats = data_root / "TOY", data_root / "xlsa17/data/TOY"
    asked = {
        "version": VERSION,
        "seed": seed,
        "classes": classes,
        "images_per_class": images_per_class,
        "unseen": unseen,
    }
    note = json.dumps(asked) + "\n"

    if folder.exists() and not (folder / "toy.json").exists():
        raise UserError(f"{folder} was not written by toy.py (it has no toy.json): move it away")
    if is_complete(folder, mats, note, classes * images_per_class):
        print(f"{folder} is already there, of the same seed and sizes")
        return

    dataset = draw_dataset(seed, classes, images_per_class, unseen)
    make_folder(mats)
    # Two drafts, each on the disk of what it replaces, so that files move into place whole.
    draft = partial(TemporaryDirectory, prefix="TOY.partial-")
    with draft(dir=data_root) as work, draft(dir=mats.parent) as new_mats:
        new = Path(work, "TOY")
        render_images(dataset, seed, images_per_class, new / "images")
        write_texts(new, note)
        for name, arrays in mat_files(dataset, images_per_class).items():
            scipy.io.savemat(Path(new_mats, name), arrays)
        replace(folder, mats, new, Path(new_mats), old=Path(work, "old"))

    images, seconds = len(dataset.labels), time.time() - start
    print(f"{folder}: {images} images of {classes} classes ({unseen} unseen) in {seconds:.0f} s")


def write_texts(folder: Path, note: str):
    """Write attributes.txt and toy.json."""
    lines = [f"{i} {name}\n" for i, name in enumerate(ATTRIBUTES, start=1)]
    (folder / "attributes.txt").write_text("".join(lines))
    (folder / "toy.json").write_text(note)


def replace(folder: Path, mats: Path, new: Path, new_mats: Path, old: Path):
    """Move the new dataset into its place, and the old images to `old`."""
    # From here to the last line nothing looks complete.
    (mats / "att_splits.mat").unlink(missing_ok=True)
    (mats / "res101.mat").unlink(missing_ok=True)
    if folder.exists():
        folder.rename(old)

    new.rename(folder)
    os.replace(new_mats / "res101.mat", mats / "res101.mat")
    os.replace(new_mats / "att_splits.mat", mats / "att_splits.mat")


def main(argv=None):
    parser = FlagParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_root", type=Path, default=Path("data"), help="folder of the datasets")
    add("--seed", type=int, default=0)
    add("--classes", type=int, default=50, help="seen and unseen ones together")
    add("--unseen", type=int, default=10, help="how many of the classes are unseen")
    add("--images_per_class", type=int, default=40)
    options = parser.parse_args(argv)

    try:
        render(**vars(options))
    except OSError as error:  # a full or read-only disk
        raise UserError(
            f"TOY could not be written below {options.data_root} ({error.strerror or error}): "
            "free some disk space or name another --data_root"
        ) from error


if __name__ == "__main__":
    exit_on_user_error(main)
