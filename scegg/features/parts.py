"""The HDF5 feature file, written part by part: whatever kills preprocessing, finished parts stay and are not made again.

Every part is a small HDF5 file of PART consecutive images beside the output, under its own name only once it is whole. Ranks of a
`torchrun` make different parts; in the end they are joined, chunk by chunk as the bytes are, into the file of section 3.
"""
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from isal import isal_zlib

from scegg.features.feature_file import FILTERS, GZIP_LEVEL, GZIP_SHARE, create_maps
from util import UserError, atomic_path, remove_partials, require_space

PART = 256  # images
SAMPLE = 64  # images that are read again when all are joined
KEPT = "free some disk space and run again; the finished parts stay, and it goes on with them"




class PatientFile(io.FileIO):
    """The file under an HDF5 file that is written. Its first error is kept, and every write from then on swallowed.

    HDF5 crashes the interpreter when it cannot write while it closes; so it is let close in peace, and told afterwards.
    """
    error = None

    def write(self, data):
        view = memoryview(data).cast("B")
        try:
            while len(view) and self.error is None:
                view = view[super().write(view):]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size=None):
        with contextlib.suppress(OSError):  # it frees space, or the write that follows tells
            super().truncate(size)


@contextlib.contextmanager
def new_hdf5(path: Path):
    """A new HDF5 file, open for a block, and a function that raises the OSError if anything could not be written; so does the end."""
    with PatientFile(path, "w+") as disk:
        def check():
            if disk.error is not None:
                raise disk.error

        with h5py.File(disk, "w") as file:
            yield file, check
        check()


class MapWriter:
    """Writes feature maps, row after row; gzip runs in threads.

    Chunks are stored as they are, without HDF5's cache, which copies; gzip's in the format of HDF5's own filter, but made by ISA-L,
    which is much faster than that filter's zlib and releases Python's lock. Only lzf is left to HDF5.
    """

    def __init__(self, target: h5py.Dataset, compression: str | None, pool: ThreadPoolExecutor):
        self.target, self.compression, self.pool = target, compression, pool
        self.row, self.pending = 0, deque()

    def write(self, maps: np.ndarray):
        """Append maps (B, D, h, w) float32."""
        if self.compression == "lzf":
            self.target[self.row:self.row + len(maps)] = maps
        else:
            for offset, image_map in enumerate(np.ascontiguousarray(maps)):
                self.pending.append((self.row + offset, self.pool.submit(self.chunk, image_map)))
            self.drain(keep=2 * len(maps))
        self.row += len(maps)

    def chunk(self, image_map: np.ndarray):
        """The bytes of a map's chunk."""
        return isal_zlib.compress(image_map.data, GZIP_LEVEL) if self.compression == "gzip" else image_map

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
        self.folder = self.output.with_name(f"{self.output.name}.parts-{short_hash([settings, len(images), FILTERS[compression], PART])}")
        self.starts = list(range(0, self.count, PART))
        self.paths = {start: self.folder / f"{start:08d}-{short_hash([stamp(images[row]) for row in self.rows(start)])}.hdf5"
                      for start in self.starts}

    def rows(self, start: int) -> range:
        """The images of the part that begins at `start`."""
        return range(start, min(start + PART, self.count))

    def missing(self, rank: int, ranks: int) -> list[int]:
        """First images of the parts that `rank` of `ranks` has to make and has not made yet."""
        return [start for start in self.starts[rank::ranks] if not self.paths[start].is_file()]

    def make(self, start: int, batches):
        """Write the part that begins at image `start` from its batches of maps (B, D, h, w)."""
        with atomic_path(self.paths[start], KEPT) as temporary, new_hdf5(temporary) as (file, check), \
                ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            writer = None
            for maps in batches:
                if writer is None:
                    target = create_maps(file, (len(self.rows(start)), *maps.shape[1:]), self.compression)
                    writer = MapWriter(target, self.compression, pool)
                writer.write(maps)
                check()
            writer.drain(keep=0)
            if writer.row != len(self.rows(start)):
                raise UserError(f"{writer.row} of {len(self.rows(start))} maps were made for {self.paths[start]}; run again")

    def prepare(self, map_shape: tuple[int, int, int]):
        """Before the first image, by the one process that holds the output's lock: is there room, and what is left of earlier runs?

        map_shape (D, h, w). Raises UserError if parts and output, which are both on the disk in the end, will not fit.
        """
        remove_partials(self.output.parent, self.output.name)
        remove_partials(self.folder)
        done = [start for start in self.starts if self.paths[start].is_file()]
        images_done = sum(len(self.rows(start)) for start in done)
        an_image = 4 * math.prod(map_shape) * (1 if self.compression is None else GZIP_SHARE)
        if done:
            an_image = sum(self.paths[start].stat().st_size for start in done) / images_done
        require_space(self.output.parent, an_image * (2 * self.count - images_done), f"{self.output} and the parts it is joined from"
                      + (", by an estimate of what compression leaves," if self.compression and not done else ""))
        for folder in sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.parts-*")):
            if folder != self.folder:
                size = sum(file.stat().st_size for file in folder.iterdir())
                print(f"{folder} ({size / 1e9:.2f} GB) was left by a run with other settings or versions: give those to go on with it, or delete it")

    def remove_if_empty(self):
        """Leave no empty folder behind a run that failed before its first part."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def join(self, annotate):
        """All parts as one file under the output's name, annotate(file) adding the rest; then the parts are removed."""
        lacking = [start for start in self.starts if not self.paths[start].is_file()]
        if lacking:
            raise UserError(f"{len(lacking)} of {len(self.starts)} parts are not in {self.folder}: do all ranks share that folder?")
        with atomic_path(self.output, KEPT) as temporary:
            with new_hdf5(temporary) as (file, check):
                annotate(file)
                target = None
                for start in self.starts:
                    with open_part(self.paths[start]) as maps:
                        if target is None:
                            target = create_maps(file, (self.count, *maps.shape[1:]), self.compression)
                        for row in self.rows(start):
                            mask, chunk = maps.id.read_direct_chunk((row - start, 0, 0, 0))
                            target.id.write_direct_chunk((row, 0, 0, 0), chunk, mask)
                    check()
            self.verify(temporary)
        shutil.rmtree(self.folder)

    def verify(self, path: Path):
        """Raises UserError unless the joined file, read anew, holds every row, and the sampled ones are finite and their parts' own."""
        try:
            with h5py.File(path) as file:
                maps = file["feature_map"]
                if maps.id.get_num_chunks() != self.count:
                    raise UserError(f"{maps.id.get_num_chunks()} of {self.count} maps are in {path}: run again")
                for row in sorted({round(row) for row in np.linspace(0, self.count - 1, SAMPLE)}):
                    start = row // PART * PART
                    with open_part(self.paths[start]) as part:
                        made = part.id.read_direct_chunk((row - start, 0, 0, 0))
                    if maps.id.read_direct_chunk((row, 0, 0, 0)) != made or not np.isfinite(maps[row]).all():
                        raise UserError(f"image {row} was not joined as it was made: is the disk of {path.parent} sound? Run again")
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read again ({error}): is its disk sound? Run again") from None


def short_hash(content) -> str:
    """12 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def stamp(path: Path) -> tuple[str, int, int]:
    """What tells whether an image is still the one that was read."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def open_part(path: Path):
    """The maps of a part, (n, D, h, w); raises UserError for one that is not whole (a disk's or a copy's fault)."""
    try:
        with h5py.File(path) as file:
            yield file["feature_map"]
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from None
