"""Maps that lie in an HDF5 file in chunks of any shape, unpacked in threads.

Our own chunks hold one map each. Those that h5py chooses hold some channels of a few positions of
hundreds of images. HDF5 itself would unpack them in one thread, with a slower zlib than ISA-L, and
copy narrow ones number by number.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import h5py
import numpy as np
from isal import isal_zlib

from scegg.features.chunk_index import Stored, grid_of
from scegg.speed.threads import granted_cores

SOME = np.ones(64, np.float32)
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


class Slab(NamedTuple):
    """Chunks that overlap a target: those of a row of images, in some columns of channels."""

    target: Target
    row: int
    columns: range


def read_chunks(dataset: h5py.Dataset, targets: Iterable[Target], stored: Stored | None = None):
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
    pieces = (slab for target in targets for slab in slabs(packing, target))
    at_once = max(1, LOAD // (packing.column_size * packing.grid[1]))
    # no more wait than keep the threads busy: fresh memory is slow
    most = max(1, min(4 * granted_cores(), HELD // max(LOAD, packing.column_size)))
    with ThreadPoolExecutor(granted_cores()) as pool:
        waiting = deque()
        while load := [
            (slab, *stored.of(slab.row, slab.columns)) for slab in itertools.islice(pieces, at_once)
        ]:
            waiting.append(pool.submit(unpack_slabs, packing, load))
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


def slabs(packing: "Packing", target: Target) -> Iterator[Slab]:
    """The chunks that overlap the target, as many in a slab as `LOAD` takes."""
    high, wide, *_ = packing.shape
    images, channels = target.array.shape[:2]
    rows = range(target.image // high, -(-(target.image + images) // high))
    columns = range(target.channel // wide, -(-(target.channel + channels) // wide))

    at_once = max(1, LOAD // packing.column_size)
    for row in rows:
        for first in range(0, len(columns), at_once):
            yield Slab(target, row, columns[first : first + at_once])


# ---------------------------------------------------------------- unpacking


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the chunks of a dataset are packed.

    filters: HDF5's, in the order of writing. shape and dtype of a chunk, uint16 for bfloat16; grid:
    how many chunks there are along each axis.
    """

    filters: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    grid: tuple[int, ...]

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
        return cls(filters, dataset.chunks, dtype, grid_of(dataset))

    @functools.cached_property
    def size(self) -> int:
        """Bytes of an unpacked chunk."""
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def steps(self) -> list[tuple[int, Callable]]:
        """The bit of each filter, and what undoes it; the last of writing first."""
        return [(1 << at, UNDO[number]) for at, number in enumerate(self.filters)][::-1]

    @property
    def column_size(self) -> int:
        """Bytes of all unpacked chunks of the same images and channels."""
        return self.size * math.prod(self.grid[2:])

    def unpack(self, contents: list[bytes], left_out: list[int]) -> np.ndarray:
        """The numbers (k, n, c, p, q) of k chunks, from what `Stored.of` gives of them."""
        if self.filters:
            contents = list(map(self.unpack_chunk, contents, left_out))
            # on Intel's processors ISA-L leaves the vector registers half used, and copying numbers
            # then takes 20 times as long, until such an addition has cleared them
            np.add(SOME, SOME)
        content = contents[0] if len(contents) == 1 else b"".join(contents)
        if len(content) != self.size * len(left_out):
            raise ValueError("its maps do not end where they should")
        return widened(np.frombuffer(content, self.dtype).reshape(len(left_out), *self.shape))

    def unpack_chunk(self, content: bytes, left_out: int) -> bytes:
        """The bytes of a chunk's numbers. left_out: a bit for each filter that was not used.

        It takes no more memory than a chunk has, whatever the bytes promise.
        Raises ValueError or isal_zlib.error for other contents.
        """
        for bit, undo in self.steps:
            if not left_out & bit:
                content = undo(content, self)
        if len(content) != self.size:
            raise ValueError("its maps do not end where they should")
        return content


def unpack_gzip(content: bytes, packing: Packing) -> bytes:
    """What zlib has packed; one byte more than a chunk at most."""
    stream = isal_zlib.decompressobj()
    content = stream.decompress(content, packing.size + 1)
    if not stream.eof:
        raise ValueError("its maps do not end where they should")
    return content


def unpack_lzf(content: bytes, packing: Packing) -> bytes:
    """What h5py's own lzf has packed. HDF5 would call the same function, chunk by chunk."""
    unpacked = ctypes.create_string_buffer(packing.size)
    if LZF(bytes(content), len(content), unpacked, packing.size) != packing.size:
        raise ValueError("its maps do not end where they should")
    return unpacked


def unshuffle(content: bytes, packing: Packing) -> bytes:
    """The numbers whose first bytes were stored together, then their second bytes, and so on."""
    if len(content) != packing.size:
        raise ValueError("its maps do not end where they should")
    planes = np.frombuffer(content, np.uint8).reshape(packing.dtype.itemsize, -1)
    return planes.T.tobytes()


UNDO = {h5py.h5z.FILTER_DEFLATE: unpack_gzip, h5py.h5z.FILTER_SHUFFLE: unshuffle}
with contextlib.suppress(OSError, AttributeError):  # then HDF5 itself unpacks lzf
    LZF = ctypes.CDLL(h5py.h5z.__file__).lzf_decompress
    LZF.argtypes = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_uint)
    UNDO[h5py.h5z.FILTER_LZF] = unpack_lzf


def unpack_slabs(packing: Packing, load: list):
    """Unpack slabs, each given with what `Stored.of` gives of its chunks, to their place."""
    for slab, contents, left_out in load:
        place(packing, packing.unpack(contents, left_out), slab)


def place(packing: Packing, chunks: np.ndarray, slab: Slab):
    """Copy what the chunks (k, n, c, p, q) of a slab have of its target.

    Row after row of the target: chunk by chunk, narrow ones would be spread over as many lines of a
    core's cache as they have numbers.
    """
    n, c, p, q = packing.shape
    down, across = packing.grid[2:]
    with np.errstate(over="ignore"):  # it becomes infinity, which is refused where it is used
        chunks = chunks.astype(np.float32, copy=False)  # all at once it is faster
    in_columns = chunks.reshape(-1, down, across, n, c, p, q)
    turned = in_columns.transpose(3, 0, 4, 1, 5, 2, 6)

    target, count = slab.target, len(slab.columns)
    images, of_images = overlap(slab.row * n, n, target.image, len(target.array))
    channels, of_channels = overlap(
        slab.columns.start * c, count * c, target.channel, target.array.shape[1]
    )
    part = target.array[of_images, of_channels]
    whole = (n, count * c, down * p, across * q)
    if part.shape == whole:
        copy_turned(turned, part.reshape(turned.shape))  # a view
        return

    padded = np.empty(whole, np.float32)
    copy_turned(turned, padded.reshape(turned.shape))
    part[...] = padded[images, channels, : part.shape[2], : part.shape[3]]


def copy_turned(turned: np.ndarray, place: np.ndarray):
    """Copy numbers to their place, (..., across, q). numpy is slow where its innermost is short."""
    *_, across, q = place.shape
    if q >= across:
        place[...] = turned
        return
    for column in range(q):
        place[..., column] = turned[..., column]


def overlap(first: int, count: int, target: int, length: int) -> tuple[slice, slice]:
    """Where `count` things from `first` on overlap a target of this place and length.

    It is counted from the first of the things, and from the target's own.
    """
    start, end = max(first, target), min(first + count, target + length)
    return slice(start - first, end - first), slice(start - target, end - target)
