"""Feature files whose chunks hold many images: their maps, repacked once, image after image.

To read one image of such a file, all of its chunks are unpacked, and with them the other images of
these chunks. h5py chooses such chunks by itself: for CUB, 737 images share one.
"""

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

from scegg.features.chunk_index import images_in_chunk, stored_chunks, unwritten_images
from scegg.features.chunks import Target, read_chunks
from scegg.features.disk import SourceFile, new_hdf5, open_hdf5
from scegg.features.feature_file import MAPS, read_maps
from scegg.processes import locked
from util import UserError, atomic_path, free_space, remove_partials, unreadable, unwritable

AGAIN = "delete it and run again"
BLOCK = 1 << 24  # bytes of maps that are held at once, or a column of chunks if that is more


class Repacked(NamedTuple):
    """A repacked file, open, as the system and as HDF5 see it."""

    disk: SourceFile
    file: h5py.File

    def read(self, indices: np.ndarray, maps: np.ndarray):
        """Read the images `indices` into maps (n, D, h, w) float32.

        Raises UserError for damaged data, and for a disk that fails.
        """
        with self.disk.reading("is damaged", AGAIN):
            read_maps(self.file[MAPS], indices, maps)


def repacked(disk: SourceFile, maps: h5py.Dataset) -> Repacked:
    """An open file with the same maps (N, D, h, w) in float32, uncompressed, image after image.

    disk: the file that `maps` are in; by now another may have its name. The repacked file lies
    beside it and stays, for later runs. Where there is no room for it, it lies in the system's
    temporary folder for as long as it is open.
    Raises UserError if there is no room either, and an error of h5py or ISA-L over damaged bytes.
    """
    size = 4 * maps.size
    target = repacked_path(disk.path, disk.stamp)
    if not target.is_file() and not has_room(target.parent, size):
        return repacked_for_now(disk, maps, size)

    lock = target.with_name(f".{target.name}.lock")
    if not target.is_file():
        with locked(lock, f"writing {target}", wait=True) as is_held:
            if not target.is_file():  # whoever held the lock may have written it
                if is_held:  # else another process may be writing its own
                    remove_partials(target.parent, target.name)
                tell(disk.path, maps, target, size)
                with atomic_path(target) as temporary:
                    write(temporary, disk, maps)
    return open_repacked(target, maps)


def repacked_path(path: Path, stamp: tuple[int, int]) -> Path:
    """The repacked file of a feature file; it has another name once that has changed."""
    key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]
    return path.with_name(f"{path.name}.{key}.repacked")


def repacked_for_now(disk: SourceFile, maps: h5py.Dataset, size: int) -> Repacked:
    """`repacked` in the temporary folder. The file has no name there once it is open."""
    path, folder = disk.path, Path(tempfile.gettempdir())
    if not has_room(folder, size):
        raise UserError(
            f"{images_in_chunk(maps)} images share each chunk of {path}, so its maps must be "
            f"repacked, which takes {size / 1e9:.2f} GB; neither {path.parent} nor {folder} has "
            "room: free some disk space, or let TMPDIR name a folder with room"
        )

    tell(path, maps, folder, size)
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    try:
        write(Path(name), disk, maps)
        return open_repacked(Path(name), maps)
    except OSError as error:
        raise unwritable(Path(name), error, ", or let TMPDIR name another folder") from None
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            os.unlink(name)


def has_room(folder: Path, size: int) -> bool:
    """Whether a file of so many bytes can be made in a folder."""
    return os.access(folder, os.W_OK) and size < 0.95 * free_space(folder)


def tell(path: Path, maps: h5py.Dataset, target: Path, size: int):
    """Say what is being done, and why."""
    print(
        f"{images_in_chunk(maps)} images share each chunk of {path}: "
        f"its maps are repacked to {target}, {size / 1e9:.2f} GB",
        flush=True,
    )


def open_repacked(target: Path, maps: h5py.Dataset) -> Repacked:
    """The repacked file, open.

    Raises UserError if it does not hold such maps, and if the disk does not give it.
    """
    try:
        disk = SourceFile(target)
    except OSError as error:
        raise unreadable(target, error) from None

    with disk.reading("is damaged", AGAIN):
        file = open_hdf5(disk)
        if file[MAPS].shape != maps.shape or file[MAPS].dtype != np.float32:
            raise ValueError("it holds other maps")
        return Repacked(disk, file)


def write(path: Path, source: SourceFile, maps: h5py.Dataset):
    """Make the file: every chunk of `maps` is unpacked once. Raises OSError for a full disk.

    source: the file that `maps` are in.
    """
    is_whole = not reading(unwritten_images, maps).any()
    stored = reading(stored_chunks, maps, source, is_whole)
    with (
        new_hdf5(path) as (file, check),
        tqdm(total=len(maps), desc="repacking", unit="image", disable=None) as bar,
    ):
        target = file.create_dataset(MAPS, maps.shape, "f4")
        memory = np.empty(0, np.float32)  # of all blocks; the first is the largest
        for images, channels in blocks(maps):
            shape = (len(images), len(channels), *maps.shape[2:])
            memory = memory if memory.size else np.empty(math.prod(shape), np.float32)
            block = memory[: math.prod(shape)].reshape(shape)
            reading(read_chunks, maps, [Target(block, images.start, channels.start)], stored)
            target[images.start : images.stop, channels.start : channels.stop] = block
            check()
            if channels.stop == maps.shape[1]:
                bar.update(len(images))


def reading(action: Callable, *arguments):
    """What reads the old file; its damaged bytes are a ValueError: an OSError is the new file's."""
    try:
        return action(*arguments)
    except OSError as error:
        raise ValueError(str(error)) from error


def blocks(maps: h5py.Dataset) -> Iterator[tuple[range, range]]:
    """Images and channels of each block: whole chunks, as many as `BLOCK` bytes take."""
    N, D, h, w = maps.shape
    high, wide = images_in_chunk(maps), min(maps.chunks[1], D)
    columns = max(1, BLOCK // (4 * high * wide * h * w))
    # all channels of several rows of chunks, or some channels of one row
    high *= max(1, columns * wide // D)
    wide *= columns

    for image in range(0, N, high):
        for channel in range(0, D, wide):
            yield range(image, min(image + high, N)), range(channel, min(channel + wide, D))
