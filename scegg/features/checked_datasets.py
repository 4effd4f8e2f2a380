"""The datasets of a feature file, each checked before it is read."""

import math
from pathlib import Path

import h5py
import numpy as np

from scegg.features.feature_file import MAPS, OPTIONAL, REQUIRED
from util import UserError

# elements of an array that is read in one piece: a few hostile bytes can promise any number
LARGEST = 1 << 28


class CheckedDatasets:
    """The datasets of a feature file; each is checked before it is read.

    Raises UserError for a file that lacks one, and for a dataset of another kind than expected.
    """

    def __init__(self, path: Path, file: h5py.File):
        lacking = [key for key in REQUIRED if key not in file]
        if lacking:
            raise UserError(
                f"{path} lacks {', '.join(lacking)}: it is not a feature file; "
                "make one with preprocessing.py"
            )
        self.path = path
        self.datasets = {
            key: open_dataset(path, file, key) for key in (*REQUIRED, *OPTIONAL) if key in file
        }

    def __getitem__(self, key: str) -> h5py.Dataset:
        return self.datasets[key]

    def __contains__(self, key: str) -> bool:
        return key in self.datasets

    def array(self, key: str, kinds: str, dimensions: int, what: str) -> np.ndarray:
        """A dataset's contents; kinds: of numpy's types. what: says this in the error.

        A vector may stand in a single row or column, as MATLAB has it.
        """
        dataset = self.datasets[key]
        is_line = dimensions == 1 and dataset.ndim == 2 and 1 in dataset.shape
        if dataset.dtype.kind not in kinds or not (dataset.ndim == dimensions or is_line):
            raise UserError(
                f"{self.path}: {key} must be a {what}, it is {dataset.dtype} {dataset.shape}"
            )
        return dataset[()].ravel() if is_line else dataset[()]

    def indices(self, key: str) -> np.ndarray:
        """A vector of whole numbers as int64."""
        return self.array(key, "ui", 1, "vector of whole numbers").astype(np.int64)

    def table(self, key: str) -> np.ndarray:
        """A table of numbers as float32."""
        # too large a number becomes infinity, which is refused later
        with np.errstate(over="ignore"):
            return self.array(key, "fui", 2, "table of numbers").astype(np.float32)

    def texts(self, key: str, count: int) -> list[str] | None:
        """A list of `count` texts, None where the file has no such dataset."""
        if key not in self.datasets:
            return None
        encoded = self.array(key, "OS", 1, "list of texts")
        texts = [text.decode(errors="replace") for text in encoded if isinstance(text, bytes)]
        if len(texts) != count:
            raise UserError(f"{self.path}: {key} holds {len(texts)} texts, expected {count}")
        return texts


def open_dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """The dataset `key`, whose data must lie in this file.

    A link, an external storage or a virtual dataset could show the bytes of any other file.
    Raises UserError for these, and for a size that cannot be true.
    """
    is_link = not isinstance(file.get(key, getlink=True), h5py.HardLink)
    if is_link or not isinstance(file[key], h5py.Dataset):
        raise UserError(
            f"{path}: {key} is a link or a group, expected a dataset in the file itself"
        )
    dataset = file[key]
    if dataset.external or dataset.is_virtual:
        raise UserError(
            f"{path}: {key} is stored in other files; a feature file holds all of its data"
        )

    require_filters(dataset, f"{path}: {key}")
    read_in_one_piece = dataset.shape[1:] if key == MAPS else dataset.shape or ()
    if math.prod(read_in_one_piece) > LARGEST:
        raise UserError(f"{path}: {key} is of shape {dataset.shape}, which cannot be true")
    return dataset


def require_filters(dataset: h5py.Dataset, what: str):
    """Raises UserError if HDF5 lacks a filter that the dataset is packed by, as Blosc or Zstd."""
    properties = dataset.id.get_create_plist()
    for at in range(properties.get_nfilters()):
        number, _, _, name = properties.get_filter(at)
        if not h5py.h5z.filter_avail(number):
            raise UserError(
                f"{what} is packed by a filter that HDF5 lacks here ({number} "
                f"{name.decode(errors='replace')}): pip install hdf5plugin, and let "
                "HDF5_PLUGIN_PATH name its folder (python -c 'import hdf5plugin; "
                "print(hdf5plugin.PLUGIN_PATH)')"
            )
