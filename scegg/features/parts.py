"""A feature file is written in parts, so that an interrupted run keeps what it has made.

A part is a small HDF5 file of PART consecutive images beside the output. It gets its name only
when it is whole. The ranks of a `torchrun` make different parts. In the end the parts are joined
into one feature file; their compressed chunks are copied as they are.
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

from scegg.features.feature_file import FILTERS, GZIP_SHARE, MAPS, create_maps, pack_map
from util import UserError, atomic_path, remove_partials, require_space

PART = 256  # images
MAPS_VERIFIED = 64  # maps that are read again when all parts are joined
ADVICE = "free some disk space and run again; the finished parts stay, and it goes on with them"


# ---------------------------------------------------------------- writing HDF5


class PatientFile(io.FileIO):
    """The file below an HDF5 file that is being written; it keeps the first error for later.

    HDF5 crashes the interpreter when it cannot write while it closes. So this file swallows every
    write after an error, HDF5 closes in peace, and `new_hdf5` raises the error afterwards.
    """

    error = None

    def write(self, data):
        view = memoryview(data).cast("B")
        try:
            while len(view) and self.error is None:
                view = view[super().write(view) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size=None):
        # it only frees space; and if not, the next write fails as well
        with contextlib.suppress(OSError):
            super().truncate(size)


@contextlib.contextmanager
def new_hdf5(path: Path):
    """Open a new HDF5 file for a block; yield it, and a function that checks it.

    The function raises an OSError if anything could not be written so far; so does the end.
    """
    with PatientFile(path, "w+") as disk:

        def check():
            if disk.error is not None:
                raise disk.error

        with h5py.File(disk, "w") as file:
            yield file, check
        check()


class MapWriter:
    """Writes feature maps, row after row, and compresses them by gzip in the pool's threads.

    Chunks go to the file directly, without HDF5's cache, which would copy them. Only lzf is left
    to HDF5.
    """

    def __init__(self, target: h5py.Dataset, compression: str | None, pool: ThreadPoolExecutor):
        self.target = target
        self.compression = compression
        self.pool = pool
        self.row = 0
        self.pending = deque()  # rows and their chunks to come, in order

    def write(self, maps: np.ndarray):
        """Append maps (B, D, h, w) float32."""
        if self.compression == "lzf":
            self.target[self.row : self.row + len(maps)] = maps
        else:
            for row, image_map in enumerate(np.ascontiguousarray(maps), start=self.row):
                chunk = self.pool.submit(pack_map, image_map, self.compression)
                self.pending.append((row, chunk))
            self.drain(keep=2 * len(maps))
        self.row += len(maps)

    def drain(self, keep: int):
        """Store chunks, in order, until at most `keep` of them wait."""
        while len(self.pending) > keep:
            row, chunk = self.pending.popleft()
            self.target.id.write_direct_chunk((row, 0, 0, 0), chunk.result())


# ---------------------------------------------------------------- the parts of one output


class Parts:
    """The parts of one feature file, made from `images` with `settings`.

    settings: everything but the compression that changes a number or a byte of the maps.
    The folder is named after the settings, and a part after its images (path, size, time). So a
    part that was made otherwise is never taken, and a replaced image costs its own part alone.
    """

    def __init__(self, output: Path, images: list[Path], compression: str | None, settings: dict):
        self.output = Path(output)
        self.count = len(images)
        self.compression = compression
        key = short_hash([settings, len(images), FILTERS[compression], PART])
        self.folder = self.output.with_name(f"{self.output.name}.parts-{key}")

        self.starts = list(range(0, self.count, PART))
        self.paths = {}
        for start in self.starts:
            key = short_hash([image_identity(images[row]) for row in self.rows(start)])
            self.paths[start] = self.folder / f"{start:08d}-{key}.hdf5"

    def rows(self, start: int) -> range:
        """The images of the part that begins at image `start`."""
        return range(start, min(start + PART, self.count))

    def missing(self, rank: int, ranks: int) -> list[int]:
        """First images of the parts that rank `rank` of `ranks` still has to make."""
        return [start for start in self.starts[rank::ranks] if not self.paths[start].is_file()]

    def make(self, start: int, batches):
        """Write the part that begins at image `start` from batches of maps (B, D, h, w).

        Raises UserError where the disk is full, and for another number of maps than of images.
        """
        count = len(self.rows(start))
        with (
            atomic_path(self.paths[start], ADVICE) as temporary,
            new_hdf5(temporary) as (file, check),
            ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
        ):
            writer = None
            for maps in batches:
                if writer is None:
                    target = create_maps(file, (count, *maps.shape[1:]), self.compression)
                    writer = MapWriter(target, self.compression, pool)
                writer.write(maps)
                check()
            writer.drain(keep=0)

            if writer.row != count:
                raise UserError(
                    f"{writer.row} of {count} maps were made for {self.paths[start]}; run again"
                )

    def prepare(self, map_shape: tuple[int, int, int]):
        """Clean up after earlier runs and check that there is room; before the first image.

        Only the process that holds the output's lock may call it. map_shape: (D, h, w).
        Raises UserError if the parts and the output will not fit: in the end both are on the disk.
        """
        remove_partials(self.output.parent, self.output.name)
        remove_partials(self.folder)
        self.require_room(map_shape)
        self.report_other_folders()

    def require_room(self, map_shape: tuple[int, int, int]):
        """Raises UserError if the parts to come and the output will not fit on the disk."""
        done = [start for start in self.starts if self.paths[start].is_file()]
        images_done = sum(len(self.rows(start)) for start in done)
        if done:
            image_bytes = sum(self.paths[start].stat().st_size for start in done) / images_done
        else:
            share = 1 if self.compression is None else GZIP_SHARE
            image_bytes = 4 * math.prod(map_shape) * share

        what = f"{self.output} and the parts it is joined from"
        if self.compression and not done:
            what += ", by an estimate of what compression leaves,"
        needed = image_bytes * (2 * self.count - images_done)
        require_space(self.output.parent, needed, what)

    def report_other_folders(self):
        """Print which folders of parts runs with other settings have left."""
        pattern = f"{glob.escape(self.output.name)}.parts-*"
        for folder in sorted(self.output.parent.glob(pattern)):
            if folder == self.folder:
                continue
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(
                f"{folder} ({size / 1e9:.2f} GB) was left by a run with other settings or "
                "versions: give those to go on with it, or delete it"
            )

    def remove_if_empty(self):
        """Leave no empty folder behind a run that failed before its first part."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def join(self, annotate):
        """Join all parts under the output's name, then remove them; annotate(file) adds the rest.

        Raises UserError if a part is missing or damaged, and if the disk is full.
        """
        lacking = [start for start in self.starts if not self.paths[start].is_file()]
        if lacking:
            raise UserError(
                f"{len(lacking)} of {len(self.starts)} parts are not in {self.folder}: "
                "do all ranks share that folder?"
            )

        with atomic_path(self.output, ADVICE) as temporary:
            with new_hdf5(temporary) as (file, check):
                annotate(file)
                self.copy_chunks(file, check)
            self.verify(temporary)
        shutil.rmtree(self.folder)

    def copy_chunks(self, file: h5py.File, check):
        """Copy the chunks of all parts into a new dataset of maps; check() after each part."""
        target = None
        for start in self.starts:
            with open_part(self.paths[start]) as maps:
                if target is None:
                    target = create_maps(file, (self.count, *maps.shape[1:]), self.compression)
                for row in self.rows(start):
                    mask, chunk = maps.id.read_direct_chunk((row - start, 0, 0, 0))
                    target.id.write_direct_chunk((row, 0, 0, 0), chunk, mask)
            check()

    def verify(self, path: Path):
        """Read the joined file again: are all maps there, and some of them as they were made?

        Raises UserError if not, or if one of these maps is not finite.
        """
        try:
            with h5py.File(path) as file:
                maps = file[MAPS]
                chunks = maps.id.get_num_chunks()
                if chunks != self.count:
                    raise UserError(f"{chunks} of {self.count} maps are in {path}: run again")

                for row in sorted(set(map(round, np.linspace(0, self.count - 1, MAPS_VERIFIED)))):
                    self.verify_map(maps, row, path)
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read again ({error}): is its disk sound? Run again"
            ) from None

    def verify_map(self, maps: h5py.Dataset, row: int, path: Path):
        """Raises UserError unless a map of the joined file is finite and its part's own."""
        start = row // PART * PART
        with open_part(self.paths[start]) as part:
            made = part.id.read_direct_chunk((row - start, 0, 0, 0))
        joined = maps.id.read_direct_chunk((row, 0, 0, 0))
        if joined != made or not np.isfinite(maps[row]).all():
            raise UserError(
                f"image {row} was not joined as it was made: is the disk of {path.parent} sound? "
                "Run again"
            )


@contextlib.contextmanager
def open_part(path: Path):
    """Yield the maps (n, D, h, w) of a part. Raises UserError for a part that is damaged."""
    try:
        with h5py.File(path) as file:
            yield file[MAPS]
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from None


def short_hash(content) -> str:
    """12 hex digits of a JSON value."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def image_identity(path: Path) -> tuple[str, int, int]:
    """Path, size and time of an image: one of them changes when it is replaced."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns
