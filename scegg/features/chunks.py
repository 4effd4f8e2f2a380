"""Maps that lie in an HDF5 file in chunks of any shape, unpacked in threads.

Our own chunks hold one map each. Those that h5py chooses hold some channels of a few positions of
hundreds of images. HDF5 itself would unpack them in one thread, with a slower zlib than ISA-L, and
copy narrow ones number by number.
"""

import itertools
import math
import operator
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import h5py
import numpy as np
from isal import isal_zlib

from scegg.features.disk import SourceFile
from scegg.speed.threads import granted_cores

SOME = np.ones(64, np.float32)
NOTED_AT_ONCE = 1 << 16  # places of chunks: what HDF5 tells of one takes much memory
LOAD = 1 << 20  # bytes of unpacked chunks that a thread is given at once, at least one column
HELD = 1 << 28  # bytes of chunks that are held unpacked, at least one column


def bfloat16_type() -> h5py.h5t.TypeID:
    """HDF5's description of a bfloat16: the upper half of a float32. numpy has no such type."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    kind.set_precision(16)
    kind.set_size(2)
    kind.lock()  # it lives as long as HDF5 does
    return kind


BFLOAT16 = bfloat16_type()


def is_bfloat16(dataset: h5py.Dataset) -> bool:
    """Whether a dataset holds bfloat16."""
    return dataset.id.get_type() == BFLOAT16


def widened(stored: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 (uint16) as float32; floats of any other type as they are."""
    if stored.dtype != np.uint16:
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


class Target(NamedTuple):
    """Where maps go: array (n, c, h, w) float32, for n images and c channels from these on."""

    array: np.ndarray
    image: int
    channel: int = 0


def images_in_chunk(dataset: h5py.Dataset) -> int:
    """How many images share a chunk of a dataset of maps (N, D, h, w)."""
    return min(dataset.chunks[0], len(dataset)) if dataset.chunks else 1


def read_chunks(dataset: h5py.Dataset, targets: Iterable[Target], stored: "Stored | None" = None):
    """Fill the targets from a chunked dataset of maps (N, D, h, w) of any floats.

    stored: gives the chunks as they are stored; an `Index` does so faster, if many are read.
    A chunk is unpacked once for each target that it overlaps. Memory is bounded by `HELD`, or by a
    column: all chunks of the same images and channels. Raises ValueError, or an error of h5py or
    ISA-L, over damaged bytes.
    """
    packing = Packing.of(dataset)
    if packing is None:
        for target in targets:
            read_by_hdf5(dataset, target)
        return

    stored = stored or Stored(dataset)
    pieces = ((target, column) for target in targets for column in columns(dataset, target))
    column_bytes = packing.size * math.prod(packing.grid)
    # no more wait than keep the threads busy: fresh memory is slow
    most = max(1, min(4 * granted_cores(), HELD // max(LOAD, column_bytes)))
    with ThreadPoolExecutor(granted_cores()) as pool:
        waiting = deque()
        while load := [
            (target, column, stored.of_column(column))
            for target, column in itertools.islice(pieces, max(1, LOAD // column_bytes))
        ]:
            waiting.append(pool.submit(unpack_columns, packing, load))
            if len(waiting) >= most:
                waiting.popleft().result()
        for result in waiting:
            result.result()


def read_by_hdf5(dataset: h5py.Dataset, target: Target):
    """Fill a target, as HDF5 itself does."""
    images, channels = target.array.shape[:2]
    of_images = slice(target.image, target.image + images)
    of_channels = slice(target.channel, target.channel + channels)
    dataset.read_direct(target.array, (of_images, of_channels))


def columns(dataset: h5py.Dataset, target: Target) -> Iterator[list[tuple[int, ...]]]:
    """The columns of chunks that overlap the target: the first index of each of their chunks."""
    high, wide, *_ = dataset.chunks
    images, channels = target.array.shape[:2]
    positions = [
        range(0, side, of_chunk)
        for side, of_chunk in zip(dataset.shape[2:], dataset.chunks[2:], strict=True)
    ]
    for image in range(target.image // high * high, target.image + images, high):
        for channel in range(target.channel // wide * wide, target.channel + channels, wide):
            yield list(itertools.product([image], [channel], *positions))


def place(chunk: np.ndarray, corner: tuple[int, ...], target: Target):
    """Copy what a chunk with this corner has of the target; both have as many axes."""
    of_chunk, of_target = [], []
    starts = (target.image, target.channel, *(0 for _ in corner[2:]))
    axes = zip(corner, chunk.shape, starts, target.array.shape, strict=True)
    for at, size, start, length in axes:
        first = max(at, start)
        end = max(first, min(at + size, start + length))
        of_chunk.append(slice(first - at, end - at))
        of_target.append(slice(first - start, end - start))

    with np.errstate(over="ignore"):  # it becomes infinity, which is refused where it is used
        target.array[tuple(of_target)] = chunk[tuple(of_chunk)]


# ---------------------------------------------------------------- unpacking


class Packing(NamedTuple):
    """How the chunks of a dataset are packed.

    filters: HDF5's, in the order of writing. shape and dtype of a chunk, uint16 for bfloat16; grid:
    chunks of a column, down and across.
    """

    filters: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    grid: tuple[int, int]

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> "Packing | None":
        """That of a dataset; None if only HDF5 can undo it."""
        properties = dataset.id.get_create_plist()
        filters = tuple(properties.get_filter(at)[0] for at in range(properties.get_nfilters()))
        dtype = np.dtype(np.uint16) if is_bfloat16(dataset) else dataset.dtype
        # numpy has no type for some of HDF5's floats; h5py then converts them
        is_known = is_bfloat16(dataset) or h5py.h5t.py_create(dtype) == dataset.id.get_type()
        if not is_known or not set(filters) <= set(UNDO):
            return None
        sides = zip(dataset.shape[2:], dataset.chunks[2:], strict=True)
        grid = tuple(-(-side // of_chunk) for side, of_chunk in sides)
        return cls(filters, dataset.chunks, dtype, grid)

    @property
    def size(self) -> int:
        """Bytes of an unpacked chunk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tiles(self, target: Target) -> bool:
        """Whether the chunks of a column end where the target's maps end."""
        return target.array.shape[2:] == tuple(map(operator.mul, self.grid, self.shape[2:]))

    def unpack(self, content: bytes, left_out: int) -> np.ndarray:
        """The numbers of a stored chunk. left_out: a bit for each filter that was not used.

        It takes no more memory than a chunk has, whatever the bytes promise.
        Raises ValueError or isal_zlib.error for other contents.
        """
        for position in reversed(range(len(self.filters))):
            if not left_out >> position & 1:
                content = UNDO[self.filters[position]](content, self)
        if len(content) != self.size:
            raise ValueError("its maps do not end where they should")
        return widened(np.frombuffer(content, self.dtype).reshape(self.shape))

    def unpack_column(self, stored: list[tuple[int, bytes]], count: int) -> np.ndarray:
        """The numbers of `count` stored chunks, (count, n, c, p, q); see `unpack`."""
        if len(stored) == count:
            return np.stack([self.unpack(content, left_out) for left_out, content in stored])
        ((_, whole),) = stored  # chunks that lie side by side, without filters
        return np.frombuffer(whole, self.dtype).reshape(count, *self.shape)


def unpack_gzip(content: bytes, packing: Packing) -> bytes:
    """What zlib has packed; one byte more than a chunk at most."""
    stream = isal_zlib.decompressobj()
    content = stream.decompress(content, packing.size + 1)
    # on Intel's processors ISA-L leaves the vector registers half used, and copying numbers then
    # takes 20 times as long, until such an addition has cleared them
    np.add(SOME, SOME)
    if not stream.eof:
        raise ValueError("its maps do not end where they should")
    return content


def unshuffle(content: bytes, packing: Packing) -> bytes:
    """The numbers whose first bytes were stored together, then their second bytes, and so on."""
    if len(content) != packing.size:
        raise ValueError("its maps do not end where they should")
    planes = np.frombuffer(content, np.uint8).reshape(packing.dtype.itemsize, -1)
    return planes.T.tobytes()


UNDO = {h5py.h5z.FILTER_DEFLATE: unpack_gzip, h5py.h5z.FILTER_SHUFFLE: unshuffle}


class Stored:
    """The chunks of a dataset as they are stored, each asked for by itself."""

    def __init__(self, dataset: h5py.Dataset):
        self.dataset = dataset

    def of_column(self, corners: list[tuple[int, ...]]) -> list[tuple[int, bytes]]:
        """Of each chunk a bit for each filter that was left out, and its bytes.

        Chunks without filters may come in one piece.
        Raises ValueError for a chunk that was never written.
        """
        return [self.chunk(corner) for corner in corners]

    def chunk(self, corner: tuple[int, ...]) -> tuple[int, bytes]:
        """That of one chunk."""
        try:
            return self.dataset.id.read_direct_chunk(corner)
        except (OSError, RuntimeError):
            # asked only now: HDF5 looks through all chunks for the answer
            if self.dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
                raise never_written(corner) from None
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
        sides = zip(dataset.shape, dataset.chunks, strict=True)
        # offset (-1: never written), bytes, filters that were left out
        self.places = np.full((*(-(-side // of_chunk) for side, of_chunk in sides), 3), -1)
        self.heard = []  # of the chunks whose places are still to be noted
        dataset.id.chunk_iter(self.hear)
        self.note()

    def hear(self, info):
        """HDF5 tells of one chunk."""
        self.heard.append(info)
        if len(self.heard) == NOTED_AT_ONCE:
            self.note()

    def note(self):
        """Note the places of the chunks that were told of."""
        if self.heard:
            corners, masks, offsets, sizes = zip(*self.heard, strict=True)
            at = np.array(corners) // self.dataset.chunks
            self.places[tuple(at.T)] = np.column_stack([offsets, sizes, masks])
            self.heard.clear()

    def of_column(self, corners: list[tuple[int, ...]]) -> list[tuple[int, bytes]]:
        image, channel = map(operator.floordiv, corners[0], self.dataset.chunks[:2])
        offsets, sizes, masks = self.places[image, channel].reshape(-1, 3).T
        if offsets.min() < 0:
            raise never_written(corners[0])

        ends = offsets + sizes
        if np.array_equal(offsets[1:], ends[:-1]):  # side by side
            whole = memoryview(self.disk.read_at(int(sizes.sum()), int(offsets[0])))
            if not self.has_filters:
                return [(0, whole)]
            starts, stops = ((at - offsets[0]).tolist() for at in (offsets, ends))
            contents = [whole[start:stop] for start, stop in zip(starts, stops, strict=True)]
        else:
            contents = map(self.disk.read_at, sizes.tolist(), offsets.tolist())
        return list(zip(masks.tolist(), contents, strict=True))


def stored_chunks(dataset: h5py.Dataset, disk: SourceFile) -> Stored:
    """What gives all chunks of a dataset fastest; disk: the file that it is in."""
    if not hasattr(os, "pread") or Packing.of(dataset) is None:  # Windows; HDF5 reads by itself
        return Stored(dataset)

    index, first = Index(dataset, disk), (0, 0, 0, 0)
    offset, size, _ = index.places[first].tolist()
    # HDF5's versions differ in where they count from in a file that something stands before
    is_right = offset >= 0 and disk.read_at(size, offset) == dataset.id.read_direct_chunk(first)[1]
    return index if is_right else Stored(dataset)


def never_written(corner: tuple[int, ...]) -> ValueError:
    """The error of a chunk that is not there; its map would be one of zeros."""
    return ValueError(f"the map of image {corner[0]} was never written")


def unpack_columns(packing: Packing, load: list):
    """Unpack columns, each given with its target, its corners and stored chunks, to their place."""
    for target, corners, stored in load:
        column = packing.unpack_column(stored, len(corners))
        if len(corners) > 1 and packing.tiles(target):
            place_column(packing, column, corners[0], target)
            continue
        for corner, chunk in zip(corners, column, strict=True):
            place(chunk, corner, target)


def place_column(packing: Packing, column: np.ndarray, corner: tuple[int, ...], target: Target):
    """Copy a column's chunks (k, n, c, p, q), which tile the map, row after row of the target.

    Chunk by chunk, narrow ones would be spread over as many lines of a core's cache as they have
    numbers.
    """
    n, c, p, q = packing.shape
    down, across = packing.grid
    with np.errstate(over="ignore"):  # it becomes infinity, which is refused where it is used
        column = column.astype(np.float32, copy=False)  # all at once it is faster
    by_row = column.reshape(down, across, n, c, p, q).transpose(2, 3, 0, 4, 1, 5)

    rows = target.array.reshape(*target.array.shape[:2], down, p, across, q)  # a view
    place(by_row, (*corner[:2], 0, 0, 0, 0), target._replace(array=rows))
