"""The format of an HDF5 feature file, said once (docs/method.md, section 3).

    feature_map                               (N, D, h, w) floats, one chunk an image
    labels                                    (N,) classes, from 0
    trainval_loc, test_seen_loc, test_unseen_loc    images of each part, from 0
    att, original_att                         (C, K) class attributes
    w2v_att                                   (K, d) word vectors of the attributes
    train_loc, val_loc                        images inside trainval, for validation; optional
    allclasses_names, attribute_names, image_files  texts (C), (K), (N); optional

`make_provenance` lists the attributes of the file; one more is w2v, the word vectors' source, and
another semantics, the file of class vectors in the attributes' place; optional.
The maps are compressed by gzip or lzf, or not at all. `parts.py` writes files and `reader.py`
reads them with the functions here.
"""

import json
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import PIL
import torch
import torchvision
from isal import isal_zlib

from scegg.datasets.splits import Split
from scegg.features.chunk_index import Stored
from scegg.features.chunks import (
    BFLOAT16,
    Target,
    is_bfloat16,
    read_chunks,
)
from util import UserError

MAPS = "feature_map"
WORD_VECTORS = "w2v_att"
# field of Split -> dataset
SPLIT_DATASETS = {
    "labels": "labels",
    "trainval": "trainval_loc",
    "test_seen": "test_seen_loc",
    "test_unseen": "test_unseen_loc",
    "att": "att",
    "original_att": "original_att",
}
OPTIONAL_SPLIT_DATASETS = {"train": "train_loc", "val": "val_loc"}
CLASS_NAMES, ATTRIBUTE_NAMES, IMAGE_FILES = "allclasses_names", "attribute_names", "image_files"

REQUIRED = (MAPS, *SPLIT_DATASETS.values(), WORD_VECTORS)
OPTIONAL = (*OPTIONAL_SPLIT_DATASETS.values(), CLASS_NAMES, ATTRIBUTE_NAMES, IMAGE_FILES)

GZIP_LEVEL = 1  # ISA-L's: nearly as small as zlib's level 4 in a tenth of the time
GZIP_SHARE = 0.35  # of the uncompressed size: an estimate, until there are parts to tell
FILTERS = {
    None: {},
    "gzip": {"compression": "gzip", "compression_opts": GZIP_LEVEL},
    "lzf": {"compression": "lzf"},
}
# types that maps may be stored in, as HDF5 knows them
DTYPES = {"float32": "f4", "float16": "f2", "bfloat16": h5py.Datatype(BFLOAT16)}


def feature_file(dataset: str, backbone: str) -> Path:
    """Where preprocessing puts a feature file, and training looks for it.

    The path is data/<DS>/feature_map_<backbone>_<DS>.hdf5.
    """
    name = "ResNet_101" if backbone == "resnet101" else backbone  # the published code's file name
    name = name.replace("/", "_")  # timm/<name>
    return Path("data") / dataset / f"feature_map_{name}_{dataset}.hdf5"


# ---------------------------------------------------------------- all but the maps


class Annotations(NamedTuple):
    """Everything in a feature file but the maps and their provenance.

    w2v: (K, d), word vectors from w2v_source. class_names (C), attribute_names (K; None where
    nobody says them) and image_files (N), relative to the dataset's folder.
    """

    split: Split
    w2v: np.ndarray
    w2v_source: str
    class_names: list[str]
    attribute_names: list[str] | None
    image_files: list[str]


def make_provenance(
    options, weights: dict[str, str], split: Split, pixels: str, device: torch.device
) -> dict:
    """What the maps depend on, in the words of the file.

    options: dataset, img_size, normalization, precision, dtype and compile. weights: backbone,
    weights and weights_sha256, as `build_backbone` gives them, and what its builder knows better.
    pixels: the name of the pixel statistics.
    """
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "h5py": h5py.__version__,
        "pillow": PIL.__version__,
    }
    size = options.img_size
    # said only where they are not the usual ones: parts of older versions are still gone on with
    unusual = {} if options.dtype == "float32" else {"dtype": options.dtype}
    if options.compile:
        unusual["compile"] = True

    return {
        **unusual,
        "batch_norm": "folded",
        **weights,
        "dataset": options.dataset,
        "img_size": size,
        "transform": f"Resize({size}) CenterCrop({size}) ToTensor Normalize({pixels})",
        "normalization": options.normalization,
        "precision": options.precision,
        "split_fingerprint": split.fingerprint,
        "device": device.type,
        "versions": json.dumps(versions),
    }


def write_annotations(file: h5py.File, annotations: Annotations, provenance: dict):
    """Write everything but the maps.

    The provenance and w2v, the source of the word vectors, become attributes of the file.
    """
    split = annotations.split
    for field, name in SPLIT_DATASETS.items():
        file.create_dataset(name, data=getattr(split, field))
    file.create_dataset(WORD_VECTORS, data=annotations.w2v)
    for field, name in OPTIONAL_SPLIT_DATASETS.items():
        if getattr(split, field) is not None:
            file.create_dataset(name, data=getattr(split, field))

    texts = {
        CLASS_NAMES: annotations.class_names,
        ATTRIBUTE_NAMES: annotations.attribute_names,
        IMAGE_FILES: annotations.image_files,
    }
    for name, lines in texts.items():
        if lines is not None:
            file.create_dataset(name, data=lines, dtype=h5py.string_dtype())

    for name, value in provenance.items():
        file.attrs[name] = value
    file.attrs["w2v"] = annotations.w2v_source
    if split.semantics is not None:
        file.attrs["semantics"] = split.semantics


def read_provenance(file: h5py.File) -> dict:
    """The attributes of a file that are texts, numbers or truths; no others are ours."""
    provenance = {}
    for name, value in file.attrs.items():
        if isinstance(value, (str, np.bool_, np.integer, np.floating)):
            provenance[name] = value.item() if isinstance(value, np.generic) else value
    return provenance


# ---------------------------------------------------------------- the maps


def create_maps(
    file: h5py.File,
    shape: tuple[int, int, int, int],
    compression: str | None,
    dtype: str = "float32",
) -> h5py.Dataset:
    """The empty dataset of maps (n, D, h, w), one chunk an image. dtype: a key of DTYPES."""
    chunks = (1, *shape[1:])
    return file.create_dataset(MAPS, shape, DTYPES[dtype], chunks=chunks, **FILTERS[compression])


def dtype_of(dataset: h5py.Dataset) -> str:
    """The type of a dataset of maps, by its name."""
    return "bfloat16" if is_bfloat16(dataset) else dataset.dtype.name


def as_stored(maps: np.ndarray, dtype: str) -> np.ndarray:
    """Maps float32 rounded to a type of DTYPES; bfloat16 as its bits, in uint16.

    Raises UserError for a number that is too large for float16.
    """
    if dtype == "float32":
        return maps
    if dtype == "bfloat16":  # the upper half of the bits, rounded to the nearest, ties to even
        bits = maps.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)

    with np.errstate(over="ignore"):
        stored = maps.astype(np.float16)
    if not np.isfinite(stored).all():
        raise UserError(
            f"a map holds {np.abs(maps).max():g}, and float16 ends at 65504: use --dtype bfloat16 "
            "or float32"
        )
    return stored


def pack_map(image_map: np.ndarray, compression: str | None, dtype: str = "float32"):
    """The bytes of a map (D, h, w) float32 in its chunk: packed by gzip, or as they are.

    The bytes are those of HDF5's own gzip filter. ISA-L makes them much faster than that filter's
    zlib, and it releases Python's lock.
    """
    image_map = as_stored(image_map, dtype)
    if compression == "gzip":
        return isal_zlib.compress(image_map.data, GZIP_LEVEL)
    return image_map


def read_maps(
    dataset: h5py.Dataset, indices: np.ndarray, maps: np.ndarray, stored: Stored | None = None
):
    """Read the rows `indices` of a dataset (N, D, h, w) into maps (n, D, h, w) float32.

    stored: see `read_chunks`. Raises one of `disk.DAMAGE` over damaged bytes.
    """
    # each map is one stretch of the file: HDF5 itself is fast, but for its gzip
    in_stretches = dataset.chunks in (None, (1, *dataset.shape[1:]))
    is_float32 = dataset.dtype == np.float32 and not is_bfloat16(dataset)
    if in_stretches and dataset.compression != "gzip" and is_float32:
        for row, index in enumerate(indices):
            dataset.read_direct(maps[row], np.s_[int(index)])
    elif dataset.chunks:
        targets = (Target(maps[row : row + 1], int(i)) for row, i in enumerate(indices))
        read_chunks(dataset, targets, stored)
    else:  # HDF5 itself is slow to convert numbers
        own = np.empty(dataset.shape[1:], dataset.dtype)
        for row, index in enumerate(indices):
            dataset.read_direct(own, np.s_[int(index)])
            # what is too large becomes infinity, which is refused where it is used
            with np.errstate(over="ignore"):
                maps[row] = own
