"""xlsa17's description of a dataset: its .mat files, image paths and attribute names.

docs/method.md, section 2. Files come from strangers, so their contents are checked here.
"""

import collections
import re
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.io

from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.mat73 import is_mat73, read_mat73
from scegg.datasets.splits import LOCATIONS, Split, check_split
from scegg.processes import require_survivable
from util import UserError, is_of_disk, text_encoding, unreadable

SPLIT_KEYS = (*LOCATIONS, "att", "original_att", "allclasses_names")  # of att_splits.mat
VALIDATION_KEYS = ("train_loc", "val_loc")  # it may lack these
PATIENCE = 120  # seconds that reading a .mat file may take
PADDING = " \t\0\x1a"  # of a line of a text; the last ended files of DOS


def read_dataset(data_root: Path, dataset: str) -> tuple[Split, list[str], list[str]]:
    """A dataset as xlsa17 describes it: split, class names (C), image paths (N).

    The image paths are relative to `<data_root>/<dataset>`.
    Raises UserError for a missing folder or file, and for contents that cannot be true.
    """
    layout = LAYOUTS[dataset]
    check_folders(data_root, dataset)

    path = data_root / "xlsa17" / "data" / dataset / "res101.mat"
    mat = read_mat(path, ("image_files", "labels"))
    files = cell_texts(mat["image_files"], f"{path}: image_files")
    tails = [image_tail(text, layout.anchor, path) for text in files]
    labels = index_vector(mat["labels"], f"{path}: labels")
    if len(tails) != len(labels):
        raise UserError(f"{path}: {len(tails)} image files but {len(labels)} labels")

    split, class_names = read_split(data_root, dataset, labels)
    return split, class_names, tails


def check_folders(data_root: Path, dataset: str):
    """Raises UserError that says what to put where, if a folder of the dataset is missing."""
    layout = LAYOUTS[dataset]
    hint = f" ({layout.made_by} renders it)" if layout.made_by else ""
    contents = {
        image_folder(data_root, dataset): f"the {dataset} images",
        data_root / "xlsa17" / "data" / dataset: "res101.mat and att_splits.mat of xlsa17",
    }
    for folder, content in contents.items():
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing: put {content} there, or name another --data_root{hint}"
            )


def image_folder(data_root: Path, dataset: str) -> Path:
    """Where a dataset's pictures lie: its usual folder, or another one that its layout names."""
    layout = LAYOUTS[dataset]
    folders = [data_root / dataset / place for place in (layout.images, *layout.also_at)]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def places_of_images(data_root: Path, dataset: str, tails: list[str]) -> list[str]:
    """Image paths as they lie on this disk, below `<data_root>/<dataset>`."""
    usual = LAYOUTS[dataset].images + "/"
    here = image_folder(data_root, dataset).relative_to(data_root / dataset).as_posix() + "/"
    return [here + tail[len(usual) :] if tail.startswith(usual) else tail for tail in tails]


def read_split(data_root: Path, dataset: str, labels: np.ndarray) -> tuple[Split, list[str]]:
    """The split and the class names (C) of att_splits.mat.

    labels: (N,), 0-based. Raises UserError for a file that is missing or cannot be true.
    """
    path = split_file(data_root, dataset)
    return split_of(read_mat(path, SPLIT_KEYS, VALIDATION_KEYS), labels, path)


def split_file(data_root: Path, dataset: str) -> Path:
    """Where att_splits.mat lies."""
    return data_root / "xlsa17" / "data" / dataset / "att_splits.mat"


def split_of(mat: dict, labels: np.ndarray, path: Path) -> tuple[Split, list[str]]:
    """The same of the file's arrays. Raises UserError for what cannot be true."""
    trainval, test_seen, test_unseen = (
        index_vector(mat[key], f"{path}: {key}") for key in LOCATIONS
    )
    split = Split(
        labels=labels,
        trainval=trainval,
        test_seen=test_seen,
        test_unseen=test_unseen,
        train=images_inside(trainval, mat, "train_loc", path),
        val=images_inside(trainval, mat, "val_loc", path),
        att=class_table(mat["att"], f"{path}: att"),
        original_att=class_table(mat["original_att"], f"{path}: original_att"),
    )
    check_split(split, path)

    class_names = cell_texts(mat["allclasses_names"], f"{path}: allclasses_names")
    check_class_names(class_names, len(split.att), path)
    return split, class_names


def images_inside(trainval: np.ndarray, mat: dict, key: str, path: Path) -> np.ndarray | None:
    """The images of a .mat file's vector `key` that lie inside trainval, None without the vector.

    In the common release, train_loc and val_loc reach into the test images.
    """
    if key not in mat:
        return None
    return np.intersect1d(index_vector(mat[key], f"{path}: {key}"), trainval)


def check_class_names(class_names: list[str], classes: int, path: Path):
    """Raises UserError unless every class has a name of its own."""
    if len(class_names) != classes:
        raise UserError(f"{path}: {len(class_names)} class names for {classes} classes")
    counts = collections.Counter(class_names)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise UserError(
            f"{path}: allclasses_names has {repeated[0]!r} twice: two classes cannot be one"
        )


def read_mat(
    path: Path, keys: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The arrays `keys` of a .mat file, and those of `optional` that it has.

    Raises UserError for a file that is missing, unreadable, or lacks one of `keys`.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: unpack xlsa17.zip so that it lies there "
            "(data root / xlsa17/data/...)"
        )

    def load():
        if is_mat73(path):
            return read_mat73(path, keys + optional)
        return scipy.io.loadmat(path, variable_names=keys + optional)

    # scipy's and HDF5's C code can crash over damaged bytes
    require_survivable(load, path, PATIENCE, "its reader", "download it again")
    try:
        content = load()
    except UserError:
        raise
    except Exception as error:  # scipy and h5py raise many kinds over a damaged file
        if is_of_disk(error):
            raise unreadable(path, error) from None
        raise UserError(
            f"{path} is not a readable .mat file ({error}): download it again"
        ) from None

    lacking = [key for key in keys if key not in content]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: it is not xlsa17's file")
    return content


def index_vector(array: np.ndarray, what: str) -> np.ndarray:
    """A .mat column of 1-based whole numbers as a 0-based int64 vector.

    what: the file and the array's name. Raises UserError for anything else than indices.
    """
    flat = np.asarray(array).ravel()
    if not holds_whole_numbers(flat):
        raise UserError(f"{what} does not hold whole numbers")
    if flat.size and not 0 <= flat.min() <= flat.max() < 2**31:
        raise UserError(f"{what} runs from {flat.min()} to {flat.max()}: these are no indices")
    return flat.astype(np.int64) - 1


def holds_whole_numbers(array: np.ndarray) -> bool:
    """Whether every number of an array is whole, whatever its type."""
    if array.dtype.kind not in "uif" or not np.isfinite(array).all():
        return False
    return array.dtype.kind != "f" or np.array_equal(array, np.round(array))


def class_table(array, what: str) -> np.ndarray:
    """A .mat table, attributes x classes, as (C, K) float32. Raises UserError for another thing."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif" or array.ndim != 2:
        raise UserError(f"{what} is not a table of numbers (attributes x classes)")
    with np.errstate(over="ignore"):  # too large a number becomes infinity, which is refused later
        return array.T.astype(np.float32)


def cell_texts(cells: np.ndarray, what: str) -> list[str]:
    """The texts of a .mat cell column, or of rows of characters, which blanks pad to one length.

    The end of a line that a text was read with is left out.
    Raises UserError for other cells and for an empty text.
    """
    texts = [np.asarray(cell).ravel() for cell in np.asarray(cells).ravel()]
    if not all(text.size == 1 and isinstance(text[0], str) for text in texts):
        raise UserError(f"{what} is not a column of texts")
    texts = [text[0].rstrip(" \t\r\n\0") for text in texts]
    if not all(texts):
        raise UserError(f"{what} is not a column of texts: it has an empty one")
    return texts


def image_tail(text: str, anchor: str, where) -> str:
    """The end of an image path, from its last folder `anchor` on: images/a/abbey/x.jpg.

    The paths in the file are those of its authors' machine.
    Raises UserError for a path without that folder, and for one that could lead out of it.
    """
    parts = PurePosixPath(text.replace("\\", "/")).parts
    if anchor not in parts[:-1] or ".." in parts:
        raise UserError(
            f"{where}: the image path {text!r} has no folder {anchor}, which the key `anchor` of "
            "the dataset's description names"
        )
    last = len(parts) - 1 - parts[::-1].index(anchor)
    return "/".join(parts[last:])


def read_attribute_names(data_root: Path, dataset: str, count: int) -> list[str] | None:
    """The attribute names of a dataset (K), None where it has no file of them.

    Raises UserError if they are not `count`.
    """
    candidates = [data_root / dataset / name for name in LAYOUTS[dataset].attribute_files]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return None

    if path.suffix == ".mat":
        mat = read_mat(path, ("attributes",))
        names = cell_texts(mat["attributes"], f"{path}: attributes")
    else:
        lines = path.read_text(text_encoding(path), errors="replace").split("\n")
        lines = [line.strip(PADDING) for line in lines]
        names = [re.sub(r"^\d+\s+", "", line) for line in lines if line]

    if len(names) != count:
        raise UserError(
            f"{path} names {len(names)} attributes, but the class attributes are {count}"
        )
    return names
