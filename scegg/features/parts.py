"""A feature file is written in parts, so that an interrupted run keeps what it has made.

A part is a small HDF5 file of PART consecutive images beside the output. It gets its name only
when it is whole. The ranks of a `torchrun` make different parts. In the end the parts are joined
into one feature file; their compressed chunks are copied as they are.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from scegg.features.chunks import widened
from scegg.features.disk import SourceFile, new_hdf5, open_hdf5
from scegg.features.feature_file import (
    FILTERS,
    GZIP_SHARE,
    MAPS,
    as_stored,
    create_maps,
    dtype_of,
    pack_map,
)
from scegg.speed.threads import granted_cores
from util import (
    UserError,
    atomic_path,
    make_durable,
    make_folder,
    remove_partials,
    require_file_size,
    require_space,
    unreadable,
    unwritable,
)

PART = 256  # images
TAIL = 4096  # bytes of an image in which copies of another picture differ
SEEN_AFTER = 60  # seconds until every machine sees a new file in a shared folder
MAPS_VERIFIED = 64  # maps that are read again when all parts are joined
THEN = " and run again; the finished parts stay, and it goes on with them"  # behind a remedy


# ---------------------------------------------------------------- writing maps


class MapWriter:
    """Writes feature maps, row after row, and compresses them by gzip in the pool's threads.

    Chunks go to the file directly, without HDF5's cache, which would copy them. Only lzf is left
    to HDF5.
    """

    def __init__(self, target: h5py.Dataset, compression: str | None, pool: ThreadPoolExecutor):
        self.target = target
        self.dtype = dtype_of(target)
        self.compression = compression
        self.pool = pool
        self.row = 0
        self.pending = deque()  # rows and their chunks to come, in order

    def write(self, maps: np.ndarray):
        """Append maps (B, D, h, w) float32."""
        if self.compression == "lzf":
            rounded = widened(as_stored(maps, self.dtype))  # HDF5's own rounding is another
            self.target[self.row : self.row + len(maps)] = rounded
        else:
            for row, image_map in enumerate(np.ascontiguousarray(maps), start=self.row):
                chunk = self.pool.submit(pack_map, image_map, self.compression, self.dtype)
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

    settings: everything but the compression that changes a number or a byte of the maps; `dtype`
    is missing for float32.
    The folder is named after the settings, and a part after its images (path, size, time). So a
    part that was made otherwise is never taken, and a replaced image costs its own part alone.
    """

    def __init__(self, output: Path, images: list[Path], compression: str | None, settings: dict):
        self.output = Path(output)
        self.images = images
        self.count = len(images)
        self.compression = compression
        self.settings = settings
        self.dtype = settings.get("dtype", "float32")
        key = short_hash([settings, len(images), FILTERS[compression], PART])
        self.folder = self.output.with_name(f"{self.output.name}.parts-{key}")

        self.starts = list(range(0, self.count, PART))
        self.paths = {}
        for start in self.starts:
            key = short_hash([image_identity(images[row]) for row in self.rows(start)])
            self.paths[start] = self.folder / f"{start:08d}-{key}.hdf5"

    # ---- what the ranks must agree on

    def agree(self, ranks):
        """Take the parts' names from the first rank of `Ranks`.

        Raises UserError where its settings or images differ from ours.
        """
        if ranks.count > 1:
            self.adopt(ranks.first("parts", self.facts()))

    def require_shared(self, ranks):
        """Raises UserError unless all ranks see one folder of parts, which the first one makes."""
        if ranks.count == 1:
            return

        mark = self.folder / ranks.first("mark", f".shared.partial-{secrets.token_hex(4)}")
        try:
            if ranks.rank == 0:
                make_folder(self.folder)
                mark.touch()
            ranks.wait("the mark")

            if not soon(lambda: mark.name in self.names()):
                raise UserError(
                    f"{self.folder} is not the first rank's folder of that name: "
                    "--output must lie in a folder that all ranks share"
                )
            ranks.wait("the first image")
        finally:
            if ranks.rank == 0:
                mark.unlink(missing_ok=True)

    def names(self) -> set[str]:
        """The files in the folder of the parts. Another machine's may come seconds late."""
        with contextlib.suppress(FileNotFoundError):
            return set(os.listdir(self.folder))
        return set()

    def facts(self) -> dict:
        """What must be equal on every rank (JSON), and the parts' names, which are the first's."""
        return {
            "settings": self.settings | {"compression": self.compression, "images": self.count},
            "copies": [
                short_hash([copy_identity(self.images[row]) for row in self.rows(start)])
                for start in self.starts
            ],
            "names": [self.paths[start].name for start in self.starts],
        }

    def adopt(self, facts: dict):
        """Give the parts the names of another rank, whose images may be copies of ours.

        Raises UserError where its settings or images differ from ours.
        """
        ours = self.facts()
        own, first = ours["settings"], facts["settings"]
        differing = [
            f"{name} is {own.get(name)} here and {first.get(name)} there"
            for name in {**own, **first}  # some are said only where they are not the usual ones
            if own.get(name) != first.get(name)
        ]
        if differing:
            raise UserError(
                f"this rank's job is not the first rank's: {'; '.join(differing)}: start all ranks "
                "with the same flags, libraries and kind of device"
            )

        for start, here, there in zip(self.starts, ours["copies"], facts["copies"], strict=True):
            if here != there:
                rows = self.rows(start)
                raise UserError(
                    f"this rank's images {rows[0]} to {rows[-1]} (from {self.images[rows[0]]} on) "
                    "are not the first rank's: copy them anew"
                )
        self.paths = {
            start: self.folder / name
            for start, name in zip(self.starts, facts["names"], strict=True)
        }

    # ---- making them

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
            atomic_path(self.paths[start], THEN) as temporary,
            new_hdf5(temporary) as (file, check),
            ThreadPoolExecutor(max_workers=granted_cores()) as pool,
        ):
            writer = None
            for maps in batches:
                if writer is None:
                    target = create_maps(
                        file, (count, *maps.shape[1:]), self.compression, self.dtype
                    )
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

    def try_disk(self):
        """Have the disk make a tiny part and do all that a real one takes; before the first image.

        That is to make, write and sync a file, to rename it over another one, and to read it.
        Raises UserError for what it cannot do.
        """
        name = f".try.partial-{socket.gethostname()}-{os.getpid()}"  # `remove_partials` knows it
        made, renamed = self.folder / name, self.folder / f"{name}-renamed"
        make_folder(self.folder)
        try:
            renamed.touch()
            with new_hdf5(made) as (file, _):
                create_maps(file, (1, 1, 1, 1), self.compression, self.dtype)[0] = 1
            make_durable(made)
            os.replace(made, renamed)
            with opened(renamed, "cannot be read again", "is its disk sound? Run again") as maps:
                maps[0]
        except OSError as error:
            raise unwritable(self.folder, error) from error
        finally:
            for path in (made, renamed):
                with contextlib.suppress(OSError):
                    path.unlink()

    def require_room(self, map_shape: tuple[int, int, int]):
        """Raises UserError if the parts to come and the output will not fit on the disk."""
        done = [start for start in self.starts if self.paths[start].is_file()]
        images_done = sum(len(self.rows(start)) for start in done)
        if done:
            image_bytes = sum(self.paths[start].stat().st_size for start in done) / images_done
        else:
            share = 1 if self.compression is None else GZIP_SHARE
            image_bytes = (4 if self.dtype == "float32" else 2) * math.prod(map_shape) * share

        if self.compression is None:
            require_file_size(self.output.parent, image_bytes * self.count, str(self.output))
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
            size = 0
            with contextlib.suppress(OSError):  # not ours, or being removed
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
        wanted = {path.name for path in self.paths.values()}
        if not soon(lambda: wanted <= self.names()):
            raise UserError(
                f"{len(wanted - self.names())} of {len(wanted)} parts are no longer in "
                f"{self.folder}: run again, the others stay"
            )

        with atomic_path(self.output, THEN) as temporary:
            with new_hdf5(temporary) as (file, check):
                annotate(file)
                self.copy_chunks(file, check)
            self.verify(temporary)

        try:
            shutil.rmtree(self.folder)
        except OSError as error:  # the output is whole all the same
            print(f"{self.folder} could not be removed ({error.strerror}): delete it")

    def copy_chunks(self, file: h5py.File, check):
        """Copy the chunks of all parts into a new dataset of maps; check() after each part."""
        target = None
        for start in self.starts:
            chunks = chunks_of_part(self.paths[start], len(self.rows(start)))
            for row, (shape, mask, chunk) in enumerate(chunks, start):
                if target is None:
                    target = create_maps(file, (self.count, *shape), self.compression, self.dtype)
                target.id.write_direct_chunk((row, 0, 0, 0), chunk, mask)
            check()

    def verify(self, path: Path):
        """Read the joined file again: are all maps there, and some of them as they were made?

        Raises UserError if not, or if one of these maps is not finite.
        """
        with opened(path, "cannot be read again", "is its disk sound? Run again") as maps:
            chunks = maps.id.get_num_chunks()
            if chunks != self.count:
                raise UserError(f"{chunks} of {self.count} maps are in {path}: run again")

            for row in sorted(set(map(round, np.linspace(0, self.count - 1, MAPS_VERIFIED)))):
                self.verify_map(maps, row, path)

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


def open_part(path: Path):
    """`opened` for a part."""
    return opened(path, "is damaged", "delete it and run again")


def chunks_of_part(path: Path, count: int) -> Iterator[tuple[tuple[int, int, int], int, bytes]]:
    """Yield the `count` chunks of a part: the map's shape (D, h, w), filters left out, bytes."""
    with open_part(path) as maps:
        for row in range(count):
            mask, chunk = maps.id.read_direct_chunk((row, 0, 0, 0))
            yield maps.shape[1:], mask, chunk


@contextlib.contextmanager
def opened(path: Path, problem: str, remedy: str):
    """Yield the maps (n, D, h, w) of a file of ours. Nothing but reading may be done in the block.

    Raises UserError for a disk that fails, and for damaged bytes: then problem and remedy tell.
    """
    try:
        disk = SourceFile(path)
    except OSError as error:
        raise unreadable(path, error) from None
    with disk, disk.reading(problem, remedy), open_hdf5(disk) as file:
        yield file[MAPS]


def soon(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds by now, or in a while: what others write may be seen late."""
    deadline = time.monotonic() + SEEN_AFTER
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def short_hash(content) -> str:
    """12 hex digits of a JSON value."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def image_identity(path: Path) -> tuple[str, int, int]:
    """Path, size and time of an image: one of them changes when it is replaced."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def copy_identity(path: Path) -> tuple[str, str, int, int]:
    """What copies of an image share, wherever they lie: folder, name, size, the end's checksum."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        end = file.read()
    return path.parent.name, path.name, size, zlib.crc32(end)
