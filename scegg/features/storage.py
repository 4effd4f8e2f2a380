"""Where feature maps are kept for training: the GPU's memory, RAM, a flat file, or the feature file itself; read ahead in batches."""
import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scegg.features.reader import READ_AT_ONCE, Features
from scegg.features.sampler import BalancedSampler
from util import UserError, atomic_path, locked, remove_partials, require_space


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where feature maps are kept for training: name device, ram, disk or none; dtype of a copy on the device."""
    name: str
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return {"device": f"on the device as {str(self.dtype).removeprefix('torch.')}", "ram": "in RAM",
                "disk": "in a cache beside the feature file", "none": "in the feature file, read batch by batch"}[self.name]


def choose_storage(size: int, device: torch.device, folder: Path, compressed: bool, cache: str = "auto") -> Storage:
    """Where `size` bytes of float32 maps go. compressed: whether the feature file's are; cache: auto, or a place's name.

    auto takes the first that holds: the device if half its free memory is enough (as float16 if float32 is too much), RAM if
    half of what is free is enough, a flat file in `folder` if the disk has room for it, else nowhere. A CPU is slow enough
    to read uncompressed maps from the file while it computes: the system's own cache of the file then is the copy in RAM.
    Raises UserError for a place asked for by name that does not hold the maps.
    """
    on_device = 0.5 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0
    on_disk = 0.95 * shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0.0
    if any(file.stat().st_size == size for file in folder.glob("*.cache")):  # it is there already: no room is needed
        on_disk = math.inf
    in_ram = available_ram()
    kept = Storage("device", torch.float32 if size < on_device else torch.float16)
    fits = {"device": size * kept.dtype.itemsize / 4 < on_device, "ram": size < 0.5 * in_ram, "disk": size < on_disk,
            "none": True}
    if cache == "ram" and size > in_ram or cache in ("device", "disk") and not fits[cache]:
        room = {"device": on_device, "disk": on_disk, "ram": in_ram}[cache]
        if cache == "device" and device.type != "cuda":
            raise UserError("--cache device: this run has no GPU; leave the flag out")
        raise UserError(f"--cache {cache}: {size / 1e9:.2f} GB of feature maps do not fit into the {room / 1e9:.2f} GB there ({device}, "
                        f"{folder}): make room, or leave the flag out")
    if cache == "auto" and device.type == "cpu" and not compressed:
        return Storage("none")
    name = next(name for name in fits if fits[name]) if cache == "auto" else cache
    return kept if name == "device" else Storage(name)


def available_ram() -> float:
    """Bytes of RAM that can be taken without swapping, a container's limit heeded; NaN where the system does not tell."""
    free = math.nan
    with contextlib.suppress(OSError):
        free = next((int(line.split()[1]) * 1024.0 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")), math.nan)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        taken = int((group / "memory.stat").read_text().split()[1])  # "anon": all but what the system can drop
        free = min(free, int((group / "memory.max").read_text()) - taken)
    return free


class FlatCache:
    """Normalised maps (n, R, D) of some images as one flat float32 file beside the feature file, read by offset.

    Plain reads and not a memory map: the pages stay the system's, they do not count as this process's memory.
    The file's name carries what it was made from, so that a changed feature file or split gets a new one.
    pinned: whether a GPU fetches what is read.
    """

    def __init__(self, features: Features, indices: np.ndarray, progress, pinned: bool = False):
        D, h, w = features.shape
        self.shape = (h * w, D)
        self.image_bytes = features.size(1)
        stat = features.path.stat()
        made_from = repr((stat.st_size, stat.st_mtime_ns, features.split.fingerprint)).encode() + indices.tobytes()
        self.path = features.path.with_name(f"{features.path.name}.{hashlib.sha256(made_from).hexdigest()[:12]}.cache")
        self.size = features.size(len(indices))
        if not self.is_whole():
            with locked(self.path.with_name(f".{self.path.name}.lock"), f"writing {self.path}", wait=True):
                if not self.is_whole():  # whoever held the lock may have written it
                    self.write(features, indices, progress)
        self.file = open(self.path, "rb", buffering=0)
        self.pinned = pinned
        self.readers = ThreadPoolExecutor(max_workers=4)

    def is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    def write(self, features: Features, indices: np.ndarray, progress):
        """Make the file; the lock is held."""
        remove_partials(self.path.parent, self.path.name)
        require_space(self.path.parent, self.size, f"the cache {self.path.name}")
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            for maps in read_pieces(features, indices):
                file.write(maps.numpy().data)
                progress(len(maps))

    def take(self, positions: Tensor) -> Tensor:
        """Maps (B, R, D), read by several threads."""
        maps = torch.empty(len(positions), *self.shape, pin_memory=self.pinned)
        read = lambda row, position: os.preadv(self.file.fileno(), [maps[row].numpy().data.cast("B")], position * self.image_bytes)
        if any(count != self.image_bytes for count in self.readers.map(read, range(len(maps)), positions.tolist())):
            raise UserError(f"{self.path} could not be read in full: delete it and run again")
        return maps


def read_pieces(features: Features, indices: np.ndarray):
    """Normalised maps (n, R, D) of the images `indices`, a few at a time."""
    for start in range(0, len(indices), READ_AT_ONCE):
        yield features.read(indices[start:start + READ_AT_ONCE])


class FeatureMaps:
    """The normalised maps of some images, kept at a place and handed out in batches on the device.

    features: the file; indices (n,): its images, in the order that positions count; progress(n) is told of images read.
    """

    def __init__(self, features: Features, indices: np.ndarray, device: torch.device, storage: Storage = Storage("none"),
                 progress=lambda images: None):
        self.features, self.indices, self.device, self.storage = features, indices, device, storage
        if storage.name == "disk":
            self.cache = FlatCache(features, indices, progress, pinned=device.type == "cuda")
        elif storage.name in ("device", "ram"):
            D, h, w = features.shape
            self.store = torch.empty(len(indices), h * w, D, dtype=storage.dtype, device=device if storage.name == "device" else "cpu")
            row = 0
            for maps in read_pieces(features, indices):
                self.store[row:row + len(maps)] = maps
                row += len(maps)
                progress(len(maps))

    def __len__(self):
        return len(self.indices)

    def fetch(self, positions: Tensor) -> Tensor | None:
        """What has to be waited for to have the maps of `positions` (B,): bytes from a disk."""
        if self.storage.name == "disk":
            return self.cache.take(positions)
        return self.features.raw(self.indices[positions.numpy()]) if self.storage.name == "none" else None

    def take(self, positions: Tensor, fetched: Tensor | None) -> Tensor:
        """Maps (B, R, D) of `positions`: on the device if they are kept there, else in host memory it can fetch from."""
        if self.storage.name == "device":
            return self.store[positions.to(self.device, non_blocking=True)].float()
        if self.storage.name == "ram":
            maps = self.store[positions]
        else:
            maps = fetched if self.storage.name == "disk" else self.features.normalized(fetched, self.indices[positions.numpy()])
        return maps.pin_memory() if self.device.type == "cuda" and not maps.is_pinned() else maps

    def stream(self, table) -> "Iterator[tuple[Tensor, Tensor]]":
        """Yield (positions, maps) on the device for each row of positions; the next row is fetched meanwhile.

        Beside a GPU everything is done ahead; a CPU, all of whose cores are computing, only waits for disks ahead.
        """
        ahead, now = self.fetch, self.take
        if self.device.type == "cuda":
            ahead, now = lambda positions: self.take(positions, self.fetch(positions)), lambda positions, maps: maps
        with ThreadPoolExecutor(max_workers=1) as reader:
            table = list(table)
            fetched = reader.submit(ahead, table[0]) if table else None
            for row, positions in enumerate(table):
                here = fetched.result()
                if row + 1 < len(table):
                    fetched = reader.submit(ahead, table[row + 1])
                maps = now(positions, here)
                yield positions.to(self.device, non_blocking=True), maps.to(self.device, non_blocking=True)

    def batches(self, sampler: BalancedSampler, count: int, skip: int = 0):
        """`count` class-balanced batches (positions (B,), maps (B, R, D)) on the device, less the first `skip` of them."""
        return self.stream(sampler.draw(count)[skip:])

    def in_order(self):
        """All maps, in order, in batches on the device."""
        for _, maps in self.stream(torch.arange(len(self)).split(READ_AT_ONCE)):
            yield maps
