"""Maps that lie in an HDF5 file in chunks of any shape, unpacked in threads.

Our own chunks hold one map each. Those that h5py chooses hold some channels of a few positions of
hundreds of images. HDF5 itself would unpack them in one thread, with a slower zlib than ISA-L, and
copy narrow ones number by number.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import h5py
import numpy as np
from isal import isal_zlib

from scegg.speed.threads import granted_cores

LOAD = 1 << 20  # bytes of unpacked chunks that a thread is given at once, at least one column
HELD = 1 << 28  # bytes of chunks that are held unpacked, at least one column
STRIP = 1 << 18  # bytes of maps that are joined at once, so that they stay in a core's cache


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


def read_chunks(dataset: h5py.Dataset, targets: Iterable[Target]):
    """Fill the targets from a chunked dataset of maps (N, D, h, w) of any floats.

    A chunk is unpacked once for each target that it overlaps. Memory is bounded by `HELD`, or by a
    column: all chunks of the same images and channels. Raises ValueError, or an error of h5py or
    ISA-L, over damaged bytes.
    """
    packing = Packing.of(dataset)
    pieces = ((target, column) for target in targets for column in columns(dataset, target))
    if packing is None:
        for target, column in pieces:
            for corner in column:
                chunk = zip(corner, dataset.chunks, strict=True)
                place(dataset[tuple(slice(at, at + size) for at, size in chunk)], corner, target)
        return

    column_bytes = packing.size * math.prod(packing.grid)
    with ThreadPoolExecutor(granted_cores()) as pool:
        waiting = deque()
        while load := [
            (target, column[0], [stored_chunk(dataset, corner) for corner in column])
            for target, column in itertools.islice(pieces, max(1, LOAD // column_bytes))
        ]:
            waiting.append(pool.submit(unpack_columns, packing, load))
            if len(waiting) >= max(1, HELD // max(LOAD, column_bytes)):
                waiting.popleft().result()
        for result in waiting:
            result.result()


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
    """Copy what a chunk with this corner has of the target."""
    of_chunk, of_target = [], []
    starts = (target.image, target.channel, 0, 0)
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


def unpack_gzip(content: bytes, packing: Packing) -> bytes:
    """What zlib has packed; one byte more than a chunk at most."""
    stream = isal_zlib.decompressobj()
    content = stream.decompress(content, packing.size + 1)
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


def stored_chunk(dataset: h5py.Dataset, corner: tuple[int, ...]) -> tuple[int, bytes]:
    """A bit for each filter that was left out, and the bytes of a chunk as they are stored.

    Raises ValueError for a chunk that was never written.
    """
    try:
        return dataset.id.read_direct_chunk(corner)
    except (OSError, RuntimeError):
        # asked only now: HDF5 looks through all chunks for the answer
        if dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
            raise ValueError(f"the map of image {corner[0]} was never written") from None
        raise


def unpack_columns(packing: Packing, load: list):
    """Unpack columns, each given with its target, first corner and stored chunks, to their place.

    Number by number, a narrow chunk is spread over as many lines of a core's cache as it has
    numbers. So chunks are joined first, a strip of images at a time.
    """
    for target, corner, stored in load:
        chunks = [packing.unpack(content, left_out) for left_out, content in stored]
        if len(chunks) == 1:
            place(chunks[0], corner, target)
            continue

        height = packing.shape[0]
        images = max(1, STRIP * height // (packing.size * len(chunks)))
        for first in range(0, height, images):
            strip = joined(packing.grid, [chunk[first : first + images] for chunk in chunks])
            place(strip, (corner[0] + first, *corner[1:]), target)


def joined(grid: tuple[int, int], chunks: list[np.ndarray]) -> np.ndarray:
    """Maps (n, c, h, w) of a column's chunks (n, c, p, q), row after row of the grid."""
    n, c, p, q = chunks[0].shape
    down, across = grid
    by_place = np.stack(chunks).reshape(down, across, n, c, p, q)
    return by_place.transpose(2, 3, 0, 4, 1, 5).reshape(n, c, down * p, across * q)
