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

LOAD = 1 << 20  # bytes of unpacked chunks that a thread is given at once, at least one chunk


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

    A chunk is unpacked once for each target that it overlaps. Memory is bounded by the chunks that
    the threads hold. Raises ValueError, or an error of h5py or ISA-L, over damaged bytes.
    """
    packing = Packing.of(dataset)
    pieces = ((target, corner) for target in targets for corner in corners(dataset, target))
    if packing is None:
        for target, corner in pieces:
            chunk = tuple(
                slice(at, at + size) for at, size in zip(corner, dataset.chunks, strict=True)
            )
            place(dataset[chunk], corner, target)
        return

    threads = granted_cores()
    count = max(1, LOAD // packing.size)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        while load := [
            (*piece, stored_chunk(dataset, piece[1])) for piece in itertools.islice(pieces, count)
        ]:
            waiting.append(pool.submit(unpack_all, packing, load))
            if len(waiting) > 2 * threads:
                waiting.popleft().result()
        for result in waiting:
            result.result()


def corners(dataset: h5py.Dataset, target: Target) -> Iterator[tuple[int, ...]]:
    """The first index of every chunk that overlaps the target."""
    starts = (target.image, target.channel, 0, 0)
    return itertools.product(
        *(
            range(start // size * size, start + length, size)
            for start, length, size in zip(starts, target.array.shape, dataset.chunks, strict=True)
        )
    )


def place(chunk: np.ndarray, corner: tuple[int, ...], target: Target):
    """Copy what a chunk with this corner has of the target."""
    of_chunk, of_target = [], []
    starts = (target.image, target.channel, 0, 0)
    axes = zip(corner, chunk.shape, starts, target.array.shape, strict=True)
    for at, size, start, length in axes:
        first, end = max(at, start), min(at + size, start + length)
        of_chunk.append(slice(first - at, end - at))
        of_target.append(slice(first - start, end - start))

    with np.errstate(over="ignore"):  # it becomes infinity, which is refused where it is used
        target.array[tuple(of_target)] = chunk[tuple(of_chunk)]


# ---------------------------------------------------------------- unpacking


class Packing(NamedTuple):
    """How the chunks of a dataset are packed. filters: HDF5's, in the order of writing."""

    filters: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> "Packing | None":
        """That of a dataset; None if only HDF5 can undo it."""
        properties = dataset.id.get_create_plist()
        filters = tuple(properties.get_filter(at)[0] for at in range(properties.get_nfilters()))
        # numpy has no type for some of HDF5's floats; h5py then converts them
        is_numpys = h5py.h5t.py_create(dataset.dtype) == dataset.id.get_type()
        if not is_numpys or not set(filters) <= set(UNDO):
            return None
        return cls(filters, dataset.chunks, dataset.dtype)

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
        return np.frombuffer(content, self.dtype).reshape(self.shape)


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
    if dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
        raise ValueError(f"the map of image {corner[0]} was never written")
    return dataset.id.read_direct_chunk(corner)


def unpack_all(packing: Packing, load: list):
    """Unpack chunks, each given with its target and corner, to where they belong."""
    for target, corner, (left_out, content) in load:
        place(packing.unpack(content, left_out), corner, target)
