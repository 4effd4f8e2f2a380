"""Where feature maps are kept for training, and how batches of them are read ahead.

They may be in the GPU's memory, in RAM, in a flat file, or only in the feature file.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scegg.features.reader import READ_AT_ONCE, Features
from scegg.features.sampler import BalancedSampler
from scegg.processes import locked
from scegg.speed.threads import cgroup_folders
from util import (
    UserError,
    atomic_path,
    free_space,
    remove_partials,
    require_space,
    unreadable,
)

# ---------------------------------------------------------------- the choice


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where feature maps are kept for training.

    name: device, ram, disk (a flat file) or none (the feature file). dtype: of a device's copy.
    """

    name: str
    dtype: torch.dtype = torch.float32

    def __str__(self):
        places = {
            "device": f"on the device as {str(self.dtype).removeprefix('torch.')}",
            "ram": "in RAM",
            "disk": "in a cache beside the feature file",
            "none": "in the feature file, read batch by batch",
        }
        return places[self.name]


IN_FEATURE_FILE = Storage("none")


def choose_storage(
    size: int, device: torch.device, folder: Path, compressed: bool, cache: str = "auto"
) -> Storage:
    """Where to keep `size` bytes of float32 maps.

    folder: where a flat file would go. compressed: whether the feature file is.
    cache: the name of a storage, or auto. Auto takes the first that holds the maps:

    - the device, if half of its free memory is enough, with float16 if float32 is too much;
    - RAM, if half of what is free is enough;
    - a flat file, if the disk has room for it;
    - the feature file.

    A CPU computes slowly enough to read uncompressed maps from the feature file meanwhile; the
    system's own cache of that file then is the copy in RAM.
    Raises UserError for a storage asked for by name that does not hold the maps.
    """
    room = Room.of(size, device, folder)
    on_device = Storage("device", torch.float32 if size < room.device else torch.float16)
    fits = {
        "device": size * on_device.dtype.itemsize / 4 < room.device,
        "ram": size < 0.5 * room.ram,
        "disk": size < room.disk,
        "none": True,
    }
    if cache == "auto" and device.type == "cpu" and not compressed:
        return IN_FEATURE_FILE
    if cache == "auto":
        name = next(name for name in fits if fits[name])
    else:
        # by name, RAM may be filled; where the system does not tell what is free, it is believed
        is_refused = size > room.ram if cache == "ram" else not fits[cache]
        if is_refused:
            raise no_room(cache, size, room, device, folder)
        name = cache
    return on_device if name == "device" else Storage(name)


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes that maps may take on the device, in RAM (NaN where unknown) and on the disk."""

    device: float
    ram: float
    disk: float

    @classmethod
    def of(cls, size: int, device: torch.device, folder: Path) -> "Room":
        """The room for `size` bytes of maps. A flat file that is there already needs none."""
        on_device = 0.5 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0
        on_disk = 0.95 * free_space(folder) if os.access(folder, os.W_OK) else 0.0
        with contextlib.suppress(OSError):  # somebody removes caches meanwhile
            if any(file.stat().st_size == size for file in folder.glob("*.cache")):
                on_disk = math.inf
        return cls(on_device, available_ram(), on_disk)


def no_room(cache: str, size: int, room: Room, device: torch.device, folder: Path) -> UserError:
    """What a user is told who asked for a storage that does not hold the maps."""
    if cache == "device" and device.type != "cuda":
        return UserError("--cache device: this run has no GPU; leave the flag out")
    there = getattr(room, cache)
    return UserError(
        f"--cache {cache}: {size / 1e9:.2f} GB of feature maps do not fit into the "
        f"{there / 1e9:.2f} GB there ({device}, {folder}): make room, or leave the flag out"
    )


def available_ram() -> float:
    """Bytes of RAM that can be taken without swapping, NaN where the system does not tell.

    The limit of a container or of a cluster's job counts.
    """
    known = [left for group in cgroup_folders("memory") for left in left_in(group)]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                known.append(int(line.split()[1]) * 1024.0)

    return min(known, default=math.nan)


def left_in(group: Path) -> Iterator[float]:
    """Bytes that a control group leaves to this process; nothing where it has no limit.

    What the system cannot drop counts as taken: version 2 calls it anon, version 1 total_rss.
    """
    for limit, name in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
        # without a limit, version 2 says "max", and version 1 a number above all memory
        with contextlib.suppress(OSError, ValueError, KeyError):
            lines = (group / "memory.stat").read_text().splitlines()
            taken = dict(line.split() for line in lines)[name]
            yield float(int((group / limit).read_text()) - int(taken))


# ---------------------------------------------------------------- a flat file


class FlatCache:
    """Normalised maps (n, R, D) float32 in one flat file beside the feature file.

    It is read by offset and not mapped: then its pages do not count as this process's memory.
    Its name says what it was made from, so a changed feature file or split gets a new one.
    pinned: whether a GPU fetches what is read. progress(n) is told of images read.
    """

    def __init__(self, features: Features, indices: np.ndarray, progress, pinned: bool = False):
        D, h, w = features.shape
        self.shape = (h * w, D)
        self.image_bytes = features.size(1)
        self.size = features.size(len(indices))
        self.path = cache_path(features, indices)

        if not self.is_whole():
            lock = self.path.with_name(f".{self.path.name}.lock")
            with locked(lock, f"writing {self.path}", wait=True) as is_held:
                if not self.is_whole():  # whoever held the lock may have written it
                    if is_held:  # else another process may be writing its own
                        remove_partials(self.path.parent, self.path.name)
                    self.write(features, indices, progress)
        self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (it stays open)
        self.pinned = pinned
        self.readers = ThreadPoolExecutor(max_workers=4)
        self.place = threading.Lock()  # where the system has no reading by offset

    def is_whole(self) -> bool:
        """Whether the file is there, with all its maps."""
        return self.path.is_file() and self.path.stat().st_size == self.size

    def write(self, features: Features, indices: np.ndarray, progress):
        """Make the file."""
        require_space(self.path.parent, self.size, f"the cache {self.path.name}")
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            for maps in read_pieces(features, indices):
                file.write(maps.numpy().data)
                progress(len(maps))

    def take(self, positions: Tensor) -> Tensor:
        """Maps (B, R, D) of `positions` (B,), read by several threads.

        Raises UserError for a file that is too short, and for a disk that fails.
        """
        maps = torch.empty(len(positions), *self.shape, pin_memory=self.pinned)

        def read(row, position):
            buffer = maps[row].numpy().data.cast("B")
            return self.read_at(position * self.image_bytes, buffer)

        try:
            counts = list(self.readers.map(read, range(len(maps)), positions.tolist()))
        except OSError as error:
            raise unreadable(self.path, error) from None
        if any(count != self.image_bytes for count in counts):
            raise UserError(f"{self.path} could not be read in full: delete it and run again")
        return maps

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from an offset of the file; returns the bytes that were there."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [buffer], offset)
        with self.place:  # Windows
            self.file.seek(offset)
            return self.file.readinto(buffer)


def cache_path(features: Features, indices: np.ndarray) -> Path:
    """The path of the flat file for some images of a feature file."""
    facts = repr((*features.disk.stamp, features.split.fingerprint))
    key = hashlib.sha256(facts.encode() + indices.tobytes()).hexdigest()[:12]
    return features.path.with_name(f"{features.path.name}.{key}.cache")


def read_pieces(features: Features, indices: np.ndarray) -> Iterator[Tensor]:
    """Yield the normalised maps (n, R, D) of the images `indices`, a few at a time."""
    for start in range(0, len(indices), READ_AT_ONCE):
        yield features.read(indices[start : start + READ_AT_ONCE])


# ---------------------------------------------------------------- batches


def tell_nobody(images: int):
    """The progress that nobody is told of."""


class FeatureMaps:
    """The normalised maps of some images in a storage, handed out in batches on the device.

    indices: (n,), the images in the file; a position is an index into this vector.
    progress(n) is told of images read.
    """

    def __init__(
        self,
        features: Features,
        indices: np.ndarray,
        device: torch.device,
        storage: Storage = IN_FEATURE_FILE,
        progress=tell_nobody,
    ):
        self.features = features
        self.indices = indices
        self.device = device
        self.storage = storage
        if storage.name == "disk":
            self.cache = FlatCache(features, indices, progress, pinned=device.type == "cuda")
        elif storage.name in ("device", "ram"):
            self.kept = self.read_all(progress)

    def read_all(self, progress) -> Tensor:
        """All maps (n, R, D), on the device or in RAM."""
        D, h, w = self.features.shape
        where = self.device if self.storage.name == "device" else "cpu"
        kept = torch.empty(len(self.indices), h * w, D, dtype=self.storage.dtype, device=where)
        row = 0
        for maps in read_pieces(self.features, self.indices):
            kept[row : row + len(maps)] = maps
            row += len(maps)
            progress(len(maps))
        return kept

    def __len__(self):
        return len(self.indices)

    def fetch(self, positions: Tensor) -> Tensor | None:
        """What a disk has to be waited for, to have the maps of `positions` (B,)."""
        if self.storage.name == "disk":
            return self.cache.take(positions)
        if self.storage.name == "none":
            return self.features.raw(self.indices[positions.numpy()])
        return None

    def take(self, positions: Tensor, fetched: Tensor | None) -> Tensor:
        """Maps (B, R, D) of `positions`, with what `fetch` gave for them.

        They are on the device if they are kept there, else in host memory it can fetch from.
        """
        if self.storage.name == "device":
            return self.kept[positions.to(self.device, non_blocking=True)].float()
        if self.storage.name == "ram":
            maps = self.kept[positions]
        elif self.storage.name == "disk":
            maps = fetched
        else:
            maps = self.features.normalized(fetched, self.indices[positions.numpy()])

        if self.device.type == "cuda" and not maps.is_pinned():
            return maps.pin_memory()
        return maps

    def fetch_and_take(self, positions: Tensor) -> Tensor:
        """Both steps, one after the other."""
        return self.take(positions, self.fetch(positions))

    def stream(self, table: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (positions, maps) on the device for each row of positions, one row read ahead.

        Beside a GPU, both steps are done ahead. A CPU computes with all its cores: only the
        waiting for a disk is done ahead.
        """
        on_gpu = self.device.type == "cuda"
        ahead = self.fetch_and_take if on_gpu else self.fetch

        with ThreadPoolExecutor(max_workers=1) as reader:
            table = list(table)
            next_row = reader.submit(ahead, table[0]) if table else None
            for row, positions in enumerate(table):
                maps = next_row.result()
                if row + 1 < len(table):
                    next_row = reader.submit(ahead, table[row + 1])
                if not on_gpu:
                    maps = self.take(positions, maps)
                yield (
                    positions.to(self.device, non_blocking=True),
                    maps.to(self.device, non_blocking=True),
                )

    def batches(
        self, sampler: BalancedSampler, count: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` class-balanced batches (positions (B,), maps (B, R, D)) on the device.

        The first `skip` of them are drawn, but left out.
        """
        return self.stream(sampler.draw(count)[skip:])

    def in_order(self) -> Iterator[Tensor]:
        """Yield all maps, in order, in batches on the device."""
        for _, maps in self.stream(torch.arange(len(self)).split(READ_AT_ONCE)):
            yield maps
