"""The HDF5 feature file, written part by part: whatever kills preprocessing, finished parts stay and are not made again.

Every part is a small HDF5 file of PART consecutive images beside the output, under its own name only once it is whole. Ranks of a
`torchrun` make different parts; in the end they are joined, chunk by chunk as the bytes are, into the file of SPEC section 3.
"""
import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from util import UserError, atomic_path
from xlsa17 import Split

PART = 256  # images
GZIP_LEVEL = 4
FILTERS = {None: {}, "gzip": {"compression": "gzip", "compression_opts": GZIP_LEVEL}, "lzf": {"compression": "lzf"}}


def create_maps(file: h5py.File, shape: tuple[int, int, int, int], compression: str | None) -> h5py.Dataset:
    """The empty dataset feature_map (n, D, h, w) float32, one chunk an image."""
    return file.create_dataset("feature_map", shape, "f4", chunks=(1, *shape[1:]), **FILTERS[compression])


class MapWriter:
    """Writes feature maps, row after row; gzip runs in threads beside the backbone.

    gzip chunks are compressed here and stored as they are, which is what HDF5's own filter would store: zlib releases
    Python's lock, HDF5's filter does not.
    """

    def __init__(self, target: h5py.Dataset, compression: str | None, pool: ThreadPoolExecutor):
        self.target, self.compression, self.pool = target, compression, pool
        self.row, self.pending = 0, deque()

    def write(self, maps: np.ndarray):
        """Append maps (B, D, h, w) float32."""
        if self.compression == "gzip":
            for offset, image_map in enumerate(np.ascontiguousarray(maps)):
                self.pending.append((self.row + offset, self.pool.submit(zlib.compress, image_map.data, GZIP_LEVEL)))
            self.drain(keep=2 * len(maps))
        else:
            self.target[self.row:self.row + len(maps)] = maps
        self.row += len(maps)

    def drain(self, keep: int):
        """Store finished chunks, in order, until at most `keep` wait."""
        while len(self.pending) > keep:
            row, chunk = self.pending.popleft()
            self.target.id.write_direct_chunk((row, 0, 0, 0), chunk.result())


class Parts:
    """The parts of one output, made from `images` with `settings` (anything else that changes a number or a byte).

    The folder is named after the settings and a part after its images (path, size, time), so that parts made with others
    are never taken for these, and an image that is replaced costs its part alone.
    """

    def __init__(self, output: Path, images: list[Path], compression: str | None, settings: dict):
        self.output, self.count, self.compression = Path(output), len(images), compression
        self.folder = self.output.with_name(f"{self.output.name}.parts-{short_hash([settings, len(images), compression, PART])}")
        self.starts = list(range(0, self.count, PART))
        self.paths = {start: self.folder / f"{start:08d}-{short_hash([stamp(images[row]) for row in self.rows(start)])}.hdf5"
                      for start in self.starts}

    def path(self, start: int) -> Path:
        return self.paths[start]

    def rows(self, start: int) -> range:
        return range(start, min(start + PART, self.count))

    def missing(self, rank: int, ranks: int) -> list[int]:
        """First images of the parts that `rank` of `ranks` has to make and has not made yet."""
        return [start for start in self.starts[rank::ranks] if not self.path(start).is_file()]

    def make(self, start: int, batches):
        """Write the part that begins at image `start` from its batches of maps (B, D, h, w)."""
        with atomic_path(self.path(start)) as temporary, h5py.File(temporary, "w") as file, \
                ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            writer = None
            for maps in batches:
                if writer is None:
                    target = create_maps(file, (len(self.rows(start)), *maps.shape[1:]), self.compression)
                    writer = MapWriter(target, self.compression, pool)
                writer.write(maps)
            writer.drain(keep=0)
            if writer.row != len(self.rows(start)):
                raise UserError(f"{writer.row} of {len(self.rows(start))} maps were made for {self.path(start)}; run again")

    def remove_if_empty(self):
        """Leave no empty folder behind a run that failed before its first part."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def join(self, annotate):
        """All parts as one file under the output's name, annotate(file) adding the rest; then the parts are removed."""
        lacking = [start for start in self.starts if not self.path(start).is_file()]
        if lacking:
            raise UserError(f"{len(lacking)} of {len(self.starts)} parts are not in {self.folder}: do all ranks share that folder?")
        with atomic_path(self.output) as temporary, h5py.File(temporary, "w") as file:
            annotate(file)
            target = None
            for start in self.starts:
                with open_part(self.path(start)) as part:
                    maps = part["feature_map"]
                    if target is None:
                        target = create_maps(file, (self.count, *maps.shape[1:]), self.compression)
                    for row in self.rows(start):
                        mask, chunk = maps.id.read_direct_chunk((row - start, 0, 0, 0))
                        target.id.write_direct_chunk((row, 0, 0, 0), chunk, mask)
        shutil.rmtree(self.folder)


def short_hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def stamp(path: Path) -> tuple[str, int, int]:
    """What tells whether an image is still the one that was read."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def open_part(path: Path) -> h5py.File:
    """Raises UserError for a part that is not whole (a disk's or a copy's fault: parts are renamed into place)."""
    try:
        return h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from None


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
