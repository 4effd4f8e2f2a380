"""The HDF5 feature file, said once."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from isal import isal_zlib

from scegg.datasets.splits import Split

REQUIRED = ("feature_map", "labels", "trainval_loc", "test_seen_loc", "test_unseen_loc", "att", "original_att", "w2v_att")
# what h5py and ISA-L raise over damaged bytes
DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, AttributeError, IndexError, isal_zlib.error)
TEXTS = ("allclasses_names", "attribute_names", "image_files")
GZIP_LEVEL = 1  # ISA-L's: nearly as small as zlib's level 4 in a tenth of the time
GZIP_SHARE = 0.35  # of the uncompressed size: an estimate, until there are parts to tell
FILTERS = {None: {}, "gzip": {"compression": "gzip", "compression_opts": GZIP_LEVEL}, "lzf": {"compression": "lzf"}}


def feature_file(dataset: str, backbone: str) -> Path:
    """Where preprocessing puts, and training looks for, the feature maps: data/<DS>/feature_map_<backbone>_<DS>.hdf5."""
    name = {"resnet101": "ResNet_101"}.get(backbone, backbone)  # the published code's file name
    return Path("data") / dataset / f"feature_map_{name}_{dataset}.hdf5"


def create_maps(file: h5py.File, shape: tuple[int, int, int, int], compression: str | None) -> h5py.Dataset:
    """The empty dataset feature_map (n, D, h, w) float32, one chunk an image."""
    return file.create_dataset("feature_map", shape, "f4", chunks=(1, *shape[1:]), **FILTERS[compression])


def read_maps(dataset: h5py.Dataset, indices: np.ndarray, maps: np.ndarray):
    """The rows `indices` of a dataset (N, D, h, w) into maps (n, D, h, w) float32. Raises what DAMAGE lists over damaged bytes."""
    if gzip_chunks(dataset):
        return unpack_chunks(dataset, indices, maps)
    for row, index in enumerate(indices):
        dataset.read_direct(maps[row], np.s_[int(index)])


def gzip_chunks(dataset: h5py.Dataset) -> bool:
    """Whether each row of a dataset (N, D, h, w) is one chunk of little-endian float32 under gzip alone, as ours are."""
    filters = dataset.id.get_create_plist()
    return (dataset.chunks == (1, *dataset.shape[1:]) and dataset.dtype == np.dtype("<f4") and filters.get_nfilters() == 1
            and filters.get_filter(0)[0] == h5py.h5z.FILTER_DEFLATE)


def unpack_chunks(dataset: h5py.Dataset, indices: np.ndarray, maps: np.ndarray):
    """`read_maps` where `gzip_chunks` is true: ISA-L unpacks in threads, HDF5's own zlib would in one, and takes longer for each."""
    def unpack(row, filters_left_out, chunk):
        if not filters_left_out:  # HDF5 leaves gzip out where it gains nothing
            stream = isal_zlib.decompressobj()
            chunk = stream.decompress(chunk, maps[row].nbytes + 1)  # no more, whatever the chunk promises
            if not stream.eof:
                raise ValueError(f"the map of image {indices[row]} does not end where it should")
        maps[row] = np.frombuffer(chunk, "<f4").reshape(maps.shape[1:])

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        made = [pool.submit(unpack, row, *dataset.id.read_direct_chunk((int(index), 0, 0, 0))) for row, index in enumerate(indices)]
        for unpacked in made:
            unpacked.result()


def write_annotations(file: h5py.File, split: Split, w2v: np.ndarray, class_names: list[str],
                      attribute_names: list[str] | None, tails: list[str], provenance: dict):
    """Everything but the maps: section 3's datasets, names and paths beside them, provenance as attributes."""
    arrays = {"labels": split.labels, "trainval_loc": split.trainval, "test_seen_loc": split.test_seen,
              "test_unseen_loc": split.test_unseen, "att": split.att, "original_att": split.original_att,
              "w2v_att": w2v, "train_loc": split.train, "val_loc": split.val}
    texts = {"allclasses_names": class_names, "attribute_names": attribute_names, "image_files": tails}
    for name, array in arrays.items():
        if array is not None:
            file.create_dataset(name, data=array)
    for name, lines in texts.items():
        if lines is not None:
            file.create_dataset(name, data=lines, dtype=h5py.string_dtype())
    for name, value in provenance.items():
        file.attrs[name] = value
