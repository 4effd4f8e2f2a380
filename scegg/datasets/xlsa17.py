"""xlsa17's .mat files, image paths and attribute names."""

import collections
import re
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.io

from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.splits import LOCATIONS, Split, check_split
from util import UserError, survives

PATIENCE = 120  # seconds that reading a .mat file may take


def read_mat(path: Path, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays `keys` of a .mat file, and those of `optional` that it has. Raises UserError if it is missing, unreadable or lacks one."""
    if not path.is_file():
        raise UserError(f"{path} is missing: unpack xlsa17.zip so that it lies there (data root / xlsa17/data/...)")
    read = lambda: scipy.io.loadmat(path, variable_names=keys + optional)
    if not survives(read, PATIENCE):  # scipy's C code can crash over damaged bytes
        raise UserError(f"{path} is damaged, scipy crashed or hung over it: download it again")
    try:
        content = read()
    except Exception as error:  # scipy raises many kinds over a damaged file
        raise UserError(f"{path} is not a readable .mat file ({error}): download it again") from None
    lacking = [key for key in keys if key not in content]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: it is not xlsa17's file")
    return content


def index_vector(array: np.ndarray, what: str) -> np.ndarray:
    """A .mat column of 1-based whole numbers as a 0-based int64 vector."""
    flat = np.asarray(array).ravel()
    if flat.dtype.kind not in "uif" or not np.isfinite(flat).all() or (flat.dtype.kind == "f" and not np.array_equal(flat, np.round(flat))):
        raise UserError(f"{what} does not hold whole numbers")
    if flat.size and not 0 <= flat.min() <= flat.max() < 2**31:
        raise UserError(f"{what} runs from {flat.min()} to {flat.max()}: these are no indices")
    return flat.astype(np.int64) - 1


def class_table(array, what: str) -> np.ndarray:
    """A .mat table attributes x classes as (C, K) float32."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif" or array.ndim != 2:
        raise UserError(f"{what} is not a table of numbers (attributes x classes)")
    with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused
        return array.T.astype(np.float32)


def cell_texts(cells: np.ndarray, what: str) -> list[str]:
    """The strings of a .mat cell column."""
    texts = [np.asarray(cell).ravel() for cell in np.asarray(cells).ravel()]
    if not all(text.size == 1 and isinstance(text[0], str) and text[0] for text in texts):
        raise UserError(f"{what} is not a column of texts, or has an empty one")
    return [str(text[0]) for text in texts]


def read_split(data_root: Path, dataset: str, labels: np.ndarray) -> tuple[Split, list[str]]:
    """The split and class names of att_splits.mat, given the images' 0-based labels."""
    path = data_root / "xlsa17" / "data" / dataset / "att_splits.mat"
    mat = read_mat(path, LOCATIONS + ("att", "original_att", "allclasses_names"), optional=("train_loc", "val_loc"))
    trainval, test_seen, test_unseen = (index_vector(mat[key], f"{path}: {key}") for key in LOCATIONS)
    # the trap of section 2: in the common release these two reach into test_seen
    train, val = (np.intersect1d(index_vector(mat[key], f"{path}: {key}"), trainval) if key in mat else None
                  for key in ("train_loc", "val_loc"))
    split = check_split(Split(labels, trainval, test_seen, test_unseen, class_table(mat["att"], f"{path}: att"),
                              class_table(mat["original_att"], f"{path}: original_att"), train, val), path)
    class_names = cell_texts(mat["allclasses_names"], f"{path}: allclasses_names")
    if len(class_names) != len(split.att):
        raise UserError(f"{path}: {len(class_names)} class names for {len(split.att)} classes")
    twice = sorted(name for name, count in collections.Counter(class_names).items() if count > 1)
    if twice:
        raise UserError(f"{path}: allclasses_names has {twice[0]!r} twice: two classes cannot be one")
    return split, class_names


def read_dataset(data_root: Path, dataset: str) -> tuple[Split, list[str], list[str]]:
    """A dataset as xlsa17 describes it: split, class names (C), image paths relative to data root / dataset (N).

    Raises UserError for a missing folder or file (saying what goes where) and for contents that cannot be true.
    """
    layout = LAYOUTS[dataset]
    for folder, content in ((data_root / dataset / layout.images, f"the {dataset} images"),
                            (data_root / "xlsa17" / "data" / dataset, "res101.mat and att_splits.mat of xlsa17")):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: put {content} there, or name another --data_root"
                            + (" (python -m scegg.datasets.toy renders it)" if dataset == "TOY" else ""))
    path = data_root / "xlsa17" / "data" / dataset / "res101.mat"
    mat = read_mat(path, ("image_files", "labels"))
    tails = [image_tail(text, layout.anchor, path) for text in cell_texts(mat["image_files"], f"{path}: image_files")]
    labels = index_vector(mat["labels"], f"{path}: labels")
    if len(tails) != len(labels):
        raise UserError(f"{path}: {len(tails)} image files but {len(labels)} labels")
    split, class_names = read_split(data_root, dataset, labels)
    return split, class_names, tails


def image_tail(text: str, anchor: str, where) -> str:
    """The part of an image path of the authors' machine from its last folder `anchor` on, e.g. images/a/abbey/x.jpg."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    if anchor not in parts[:-1] or ".." in parts:
        raise UserError(f"{where}: the image path {text!r} has no folder {anchor}")
    return "/".join(parts[len(parts) - 1 - parts[::-1].index(anchor):])


def read_attribute_names(data_root: Path, dataset: str, count: int) -> list[str] | None:
    """The K attribute names of a dataset, None where it has no file of them. Raises UserError if they are not `count`."""
    for name in LAYOUTS[dataset].attribute_files:
        path = data_root / dataset / name
        if not path.is_file():
            continue
        if path.suffix == ".mat":
            names = cell_texts(read_mat(path, ("attributes",))["attributes"], f"{path}: attributes")
        else:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            names = [re.sub(r"^\s*\d+\s+", "", line).strip() for line in lines if line.strip()]
        if len(names) != count:
            raise UserError(f"{path} names {len(names)} attributes, but the class attributes are {count}")
        return names
    return None
