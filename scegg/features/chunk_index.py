"""Where the chunks of a dataset of maps (N, D, h, w) lie in its file, and their bytes.

Chunks stand in a grid with an axis for images, one for channels, and two for positions.
"""

import itertools
import math
import operator
import os
from array import array

import h5py
import numpy as np

from scegg.features.disk import SourceFile

MOST = 1 << 25  # chunks whose places are held, in 16 bytes each
LARGEST = 1 << 30  # bytes of such a chunk
NEAR = 1 << 12  # bytes between two chunks that are read with them
NOTED_AT_ONCE = 1 << 16  # numbers that HDF5 tells of chunks
PLACE = np.dtype([("offset", np.int64), ("size", np.uint32), ("left_out", np.uint32)])


def grid_of(dataset: h5py.Dataset) -> tuple[int, ...]:
    """How many chunks a dataset has along each axis."""
    return tuple(
        -(-side // of_chunk) for side, of_chunk in zip(dataset.shape, dataset.chunks, strict=True)
    )


def chunk_size(dataset: h5py.Dataset) -> int:
    """Bytes of a chunk without filters."""
    return math.prod(dataset.chunks) * dataset.id.get_type().get_size()


def images_in_chunk(dataset: h5py.Dataset) -> int:
    """How many images share a chunk of a dataset of maps (N, D, h, w)."""
    return min(dataset.chunks[0], len(dataset)) if dataset.chunks else 1


# ---------------------------------------------------------------- chunks that were never written


def never_written(image: int) -> ValueError:
    """The error of a chunk that is not there; its map would be one of zeros."""
    return ValueError(f"the map of image {image} was never written")


def unwritten_images(dataset: h5py.Dataset) -> np.ndarray:
    """Whether some of an image's map was never written, of all images: (N,) bool.

    Only where HDF5 counts fewer chunks than there must be, each is looked at.
    """
    if not dataset.chunks:  # HDF5 takes the room for all maps at once
        return np.full(len(dataset), dataset.id.get_storage_size() == 0)

    rows, *others = grid_of(dataset)
    if dataset.id.get_num_chunks() == rows * math.prod(others):
        return np.zeros(len(dataset), bool)

    written, high = np.zeros(rows, int), dataset.chunks[0]

    def count(chunk):
        written[chunk.chunk_offset[0] // high] += 1

    dataset.id.chunk_iter(count)
    return np.repeat(written < math.prod(others), high)[: len(dataset)]


# ---------------------------------------------------------------- the bytes of chunks


class Stored:
    """The chunks of a dataset as they are stored, each asked for by itself."""

    def __init__(self, dataset: h5py.Dataset):
        self.dataset, self.grid = dataset, grid_of(dataset)

    def of(self, row: int, columns: range) -> tuple[list[bytes], list[int]]:
        """The bytes of all chunks of a row of images in some columns of channels.

        Beside them, of each chunk a bit for each filter that was left out. Of chunks without
        filters, several may come in one piece.
        Raises ValueError for a chunk that was never written.
        """
        places = itertools.product([row], columns, *map(range, self.grid[2:]))
        corners = (tuple(map(operator.mul, place, self.dataset.chunks)) for place in places)
        left_out, contents = zip(*map(self.chunk, corners), strict=True)
        return list(contents), list(left_out)

    def chunk(self, corner: tuple[int, ...]) -> tuple[int, bytes]:
        """The filters that were left out and the bytes of the chunk that begins at a corner."""
        try:
            return self.dataset.id.read_direct_chunk(corner)
        except (OSError, RuntimeError):
            # asked only now: HDF5 looks through all chunks for the answer
            if self.dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
                raise never_written(corner[0]) from None
            raise


class Index(Stored):
    """The same, but all places in the file are asked for once: HDF5 takes longer to find a small
    chunk than the disk to read it. What lies side by side is read at once.

    disk: the file that the dataset is in.
    """

    def __init__(self, dataset: h5py.Dataset, disk: SourceFile):
        super().__init__(dataset)
        self.disk = disk
        self.has_filters = dataset.id.get_create_plist().get_nfilters() > 0
        self.size = chunk_size(dataset)
        self.places = np.zeros(self.grid, PLACE)
        self.places["offset"] = -1  # never written
        self.heard = array("q")  # of the chunks whose places are still to be noted
        dataset.id.chunk_iter(self.hear)
        self.note()

    def hear(self, chunk):
        """HDF5 tells of one chunk."""
        corner, left_out, offset, size = chunk
        self.heard.extend((*corner, offset, size, left_out))
        if len(self.heard) >= NOTED_AT_ONCE:
            self.note()

    def note(self):
        """Note the places of the chunks that were told of."""
        numbers = np.array(self.heard).reshape(-1, 7)
        at = tuple((numbers[:, :4] // self.dataset.chunks).T)
        offsets, sizes, left_out = numbers[:, 4:].T
        self.places["offset"][at] = offsets
        self.places["size"][at] = np.minimum(sizes, np.iinfo(np.uint32).max)
        self.places["left_out"][at] = left_out
        self.heard = array("q")

    def of(self, row: int, columns: range) -> tuple[list[bytes], list[int]]:
        places = self.places[row, columns.start : columns.stop].ravel()
        offsets, sizes = places["offset"], places["size"].astype(np.int64)
        if offsets.min() < 0:
            raise never_written(row * self.dataset.chunks[0])
        least, most = (0, 2 * self.size + 4096) if self.has_filters else (self.size, self.size)
        if sizes.min() < least or sizes.max() > most:  # no filter makes it so much more
            raise ValueError("its maps do not end where they should")
        if not self.has_filters:
            offsets, sizes = side_by_side(offsets, sizes)
        return self.read(offsets, sizes), places["left_out"].tolist()

    def read(self, offsets: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        """So many bytes from each of these offsets on; what lies near each other is read at once.

        Raises ValueError behind the file's end.
        """
        order = np.argsort(offsets)
        ends = np.maximum.accumulate((offsets + sizes)[order])
        is_first = np.append(True, offsets[order][1:] - ends[:-1] > NEAR)
        starts, stops = offsets[order][is_first], ends[np.append(is_first[1:], True)]
        stretches = [
            memoryview(self.disk.read_at(stop - start, start))
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        ]

        stretch_of = np.empty_like(order)
        stretch_of[order] = is_first.cumsum() - 1
        begins = offsets - starts[stretch_of]
        places = zip(stretch_of.tolist(), begins.tolist(), (begins + sizes).tolist(), strict=True)
        return [stretches[stretch][begin:end] for stretch, begin, end in places]


def side_by_side(offsets: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of the stretches of a file in which each piece begins where one ends."""
    follows = offsets[1:] == offsets[:-1] + sizes[:-1]
    firsts = np.flatnonzero(np.concatenate([[True], ~follows]))
    return offsets[firsts], np.add.reduceat(sizes, firsts)


def stored_chunks(dataset: h5py.Dataset, disk: SourceFile, is_whole: bool) -> Stored:
    """What gives all chunks of a dataset fastest.

    disk: the file that it is in. is_whole: whether all were written; else a shape may be a promise.
    """
    is_held = math.prod(grid_of(dataset)) <= MOST and chunk_size(dataset) <= LARGEST
    if not hasattr(os, "pread") or not is_held or not is_whole:  # Windows has no pread
        return Stored(dataset)

    index, first = Index(dataset, disk), (0, 0, 0, 0)
    offset, size, _ = index.places[first].item()
    # HDF5's versions differ in where they count from in a file that something stands before
    is_right = offset >= 0 and disk.read_at(size, offset) == dataset.id.read_direct_chunk(first)[1]
    return index if is_right else Stored(dataset)
