"""Where each dataset lies below the data root, and the numbers of its published split.

A dataset is a small YAML file: in `wandb_config/datasets/`, as `<data root>/<dataset>/layout.yaml`,
or named by `--layout`. Its keys are the fields of `Layout`.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from scegg.config import CONFIG_FOLDER, read_yaml, unknown_name
from util import UserError

FOLDER = CONFIG_FOLDER / "datasets"
OWN = "layout.yaml"  # in a dataset's own folder
USUAL_ORDER = ("CUB", "SUN", "AWA2", "TOY")  # of columns and lists; others follow by name
NAME = re.compile(r"[A-Za-z0-9_]{1,40}")


class Counts(NamedTuple):
    """The numbers of a dataset and its split.

    classes: seen and unseen ones. trainval, test_seen, test_unseen: the images in each part.
    """

    images: int
    classes: int
    seen: int
    attributes: int
    trainval: int
    test_seen: int
    test_unseen: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a dataset lies below `<data root>/<name>`, and what its split holds.

    images: the folder of the pictures, as the image paths have it. also_at: other places of it.
    anchor: the folder with which the usable end of an image path begins, see `xlsa17.image_tail`.
    attribute_files: where the attribute names may be; the first that exists is read.
    semantics: a file of class vectors in the place of the attributes, see `semantics.py`.
    units: of `original_att`: percent, fraction (0 to 1), or vector: numbers that no word names.
    published: the numbers of the full split, None where nobody has published any.
    checked: whether these were compared with the files. paper: whether the paper uses the dataset.
    release: the fingerprint of the release of that split which most people have.
    made_by: the command that makes the dataset, None for one that has to be downloaded.
    """

    name: str
    images: str
    anchor: str
    also_at: tuple[str, ...] = ()
    attribute_files: tuple[str, ...] = ()
    semantics: str | None = None
    units: str = "vector"
    published: Counts | None = None
    checked: bool = True
    paper: bool = False
    release: str | None = None
    made_by: str | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Layout))
REQUIRED = ("name", "images", "anchor")
UNITS = ("percent", "fraction", "vector")


# ---------------------------------------------------------------- a description


def read_layout(path: Path) -> Layout:
    """A dataset's description. Raises UserError that names the key which is wrong."""
    values = read_yaml(path, "dataset")
    where = f"dataset {path}"
    for key in values:
        if key not in FIELDS:
            raise unknown_name(str(key), where, FIELDS)
    lacking = [key for key in REQUIRED if key not in values]
    if lacking:
        raise UserError(f"{where} lacks the key {lacking[0]}")
    return Layout(**{key: checked_value(key, value, where) for key, value in values.items()})


def checked_value(key: str, value, where: str):
    """The value of a key as `Layout` holds it. Raises UserError for one that cannot be."""
    if key in ("checked", "paper"):
        require(isinstance(value, bool), where, key, "true or false", value)
    elif key == "units":
        require(value in UNITS, where, key, f"one of {', '.join(UNITS)}", value)
    elif key == "name":
        is_name = isinstance(value, str) and NAME.fullmatch(value)
        require(is_name, where, key, "a word of letters, digits and _", value)
    elif key == "published":
        return checked_counts(value, where)
    elif key in ("also_at", "attribute_files"):
        is_list = isinstance(value, list) and all(map(is_place, value))
        require(is_list, where, key, "a list of paths inside the dataset's folder", value)
        return tuple(value)
    elif key in ("release", "made_by"):
        is_text = isinstance(value, str) and value.isprintable()
        require(is_text, where, key, "a text (in quotes, if it looks like a number)", value)
    else:
        require(is_place(value), where, key, "a path inside the dataset's folder", value)
    return value


def is_place(value) -> bool:
    """Whether a value is a relative path that stays inside its folder."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in value


def checked_counts(value, where: str) -> Counts:
    """The key `published`. Raises UserError for numbers that are missing or contradict."""
    is_counts = isinstance(value, dict) and set(value) == set(Counts._fields)
    names = ", ".join(Counts._fields)
    require(is_counts, where, "published", f"numbers for {names}", value)
    for name, number in value.items():
        is_number = type(number) is int and number > 0
        require(is_number, where, f"published: {name}", "a whole number above 0", number)

    counts = Counts(**value)
    parts = counts.trainval + counts.test_seen + counts.test_unseen
    fits = parts == counts.images
    require(fits, where, "published: images", f"the sum of the three parts, {parts}", counts.images)
    return counts


def require(condition, where: str, key: str, expected: str, value):
    """Raises UserError that names the key, unless the condition holds."""
    if not condition:
        raise UserError(f"{where}: {key} must be {expected}, not {str(value)[:80]!r}")


# ---------------------------------------------------------------- all of them


def shipped_layouts() -> tuple[dict[str, Layout], dict[str, UserError]]:
    """The descriptions in FOLDER by dataset, and what is wrong with others, by file name."""
    found, wrong = {}, {}
    for path in sorted(FOLDER.glob("*.yaml")):
        try:
            layout = read_layout(path)
            found[layout.name] = layout
        except UserError as error:  # told when that dataset is asked for
            wrong[path.stem.lower()] = error
    usual = {name: found.pop(name) for name in USUAL_ORDER if name in found}
    return usual | found, wrong


LAYOUTS, WRONG = shipped_layouts()


def find_layout(dataset: str, data_root: Path, file: Path | None = None) -> Layout:
    """The description of a dataset; from now on LAYOUTS has it. file: what --layout names.

    Raises UserError for a dataset without one, and for a wrong one.
    """
    own = data_root / dataset / OWN
    if file is not None:
        layout = read_layout(file)
        if layout.name != dataset:
            raise UserError(
                f"--layout {file} describes {layout.name}: give --dataset {layout.name}"
            )
        LAYOUTS[dataset] = layout
    elif dataset not in LAYOUTS and NAME.fullmatch(dataset) and own.is_file():
        layout = read_layout(own)
        if layout.name != dataset:
            raise UserError(f"{own} says name: {layout.name}: make it {dataset}")
        LAYOUTS[dataset] = layout

    if dataset not in LAYOUTS:
        if dataset.lower() in WRONG:
            raise WRONG[dataset.lower()]
        raise UserError(
            f"--dataset {dataset}: there is no such dataset; known are {', '.join(LAYOUTS)}, what "
            f"{own} describes, or what --layout FILE describes"
        )
    return LAYOUTS[dataset]


def add_own_layouts(data_root: Path):
    """Have LAYOUTS know the datasets that lie below a data root with their description."""
    for path in sorted(data_root.glob(f"*/{OWN}")):
        try:
            layout = read_layout(path)
            LAYOUTS.setdefault(layout.name, layout)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)


def require_known(dataset, where: str = ""):
    """Raises UserError for a dataset of a run that no description here names."""
    if dataset not in list(LAYOUTS):  # a list: what a file holds may have no hash
        raise UserError(
            f"{where}there is no dataset {dataset}; if it is one of your own, put its description "
            f"into data/{dataset}/{OWN}"
        )


def add_layout_flag(parser: argparse.ArgumentParser):
    """--layout, for commands that take --dataset."""
    parser.add_argument(
        "--layout",
        type=Path,
        default=None,
        help=f"description of the dataset (default: wandb_config/datasets/, then its own {OWN})",
    )
