"""Read a .mat file that MATLAB saved as v7.3: HDF5, read as scipy reads the older ones.

MATLAB stores arrays with their axes in reverse order, texts as numbers of UTF-16, and a cell as
references to datasets elsewhere in the file.
"""

import math
from pathlib import Path

import h5py
import numpy as np

from util import UserError

# elements of an array: a few hostile bytes can promise any number
LARGEST = 1 << 24
LONGEST_TEXT = 10_000  # characters
# MATLAB's names of the kinds of numbers; a file of another writer may name none
NUMBERS = ("", "double", "single", "logical")
NUMBERS += ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def is_mat73(path: Path) -> bool:
    """Whether a .mat file says or shows that it is one of v7.3."""
    with open(path, "rb") as file:
        return file.read(10) == b"MATLAB 7.3" or h5py.is_hdf5(path)


def read_mat73(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays among `keys` that the file has, as scipy.io.loadmat gives them.

    Raises UserError for data outside the file and for sizes that cannot be true, and whatever h5py
    raises over damaged bytes.
    """
    with h5py.File(path, "r", locking=False) as file:  # reading needs no lock
        return {key: read_array(file, key, f"{path}: {key}") for key in keys if key in file}


def read_array(file: h5py.File, key: str, what: str) -> np.ndarray:
    """A variable of the file: an array of numbers, rows of characters, or a cell of these."""
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise UserError(f"{what} is a link, expected an array in the file itself")
    dataset = checked(file[key], LARGEST, what)
    kind = matlab_class(dataset)

    if is_empty(dataset):
        return np.zeros((0, 0))
    if kind == "char":
        return text_rows(dataset, what)
    if h5py.check_ref_dtype(dataset.dtype) is h5py.Reference:
        references = dataset[()].T.ravel()
        texts = (cell_element(file, reference, what) for reference in references)
        return np.fromiter(texts, object, len(references))
    if kind not in NUMBERS:
        raise UserError(f"{what} is of MATLAB's class {kind}, expected numbers, texts or a cell")
    return dataset[()].T


def cell_element(file: h5py.File, reference: h5py.Reference, what: str) -> np.ndarray:
    """What a reference of a cell leads to, rows of characters; anything else as an empty array."""
    if not reference:
        raise UserError(f"{what} has an element that refers to nothing")
    dataset = checked(file[reference], LONGEST_TEXT, f"{what}, an element of it,")
    if is_empty(dataset) or matlab_class(dataset) not in ("char", ""):
        return np.zeros(0)
    return text_rows(dataset, what)


def checked(item, largest: int, what: str) -> h5py.Dataset:
    """The dataset itself. Raises UserError if its data lie elsewhere or are too many."""
    if not isinstance(item, h5py.Dataset):
        raise UserError(f"{what} is a structure or a sparse array, expected a plain one")
    if item.external or item.is_virtual:
        raise UserError(f"{what} is stored in other files, expected an array in the file itself")
    if math.prod(item.shape or ()) > largest:
        raise UserError(f"{what} is of shape {item.shape}, which cannot be true")
    return item


def text_rows(dataset: h5py.Dataset, what: str) -> np.ndarray:
    """The texts of rows of characters. Raises UserError for other contents."""
    if dataset.dtype.kind != "u" or dataset.dtype.itemsize != 2 or dataset.ndim != 2:
        raise UserError(f"{what} does not hold texts as MATLAB writes them")
    rows = np.ascontiguousarray(dataset[()].T, "<u2")
    return np.array([row.tobytes().decode("utf-16-le", errors="replace") for row in rows])


def matlab_class(dataset: h5py.Dataset) -> str:
    """MATLAB's name for the kind of an array, "" where the file has none."""
    name = dataset.attrs.get("MATLAB_class", b"")
    return name.decode("ascii", errors="replace") if isinstance(name, bytes) else str(name)


def is_empty(dataset: h5py.Dataset) -> bool:
    """Whether the array is empty: then the dataset holds its shape."""
    return bool(dataset.attrs.get("MATLAB_empty", 0))
