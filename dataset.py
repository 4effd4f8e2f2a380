"""HDF5 feature file -> checked splits, normalised feature maps, class-balanced batches.

A feature map leaves here as SCEN reads it: (R, D), positions first, L2-normalised over channels. It is normalised once,
when it is read, not in every step.
"""
import dataclasses
import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from util import UserError, atomic_path, locked, outlives, remove_partials, require_space
from xlsa17 import Split, check_split

REQUIRED = ("feature_map", "labels", "trainval_loc", "test_seen_loc", "test_unseen_loc", "att", "original_att", "w2v_att")
# what h5py raises over damaged bytes
DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, AttributeError, IndexError)
TEXTS = ("allclasses_names", "attribute_names", "image_files")
PATIENCE = 120  # seconds that opening a file may take
LARGEST = 1 << 28  # elements of an array that is read in one piece: a few hostile bytes can promise any number
READ_AT_ONCE = 16  # images: what they need while they are normalised adds to the peak of memory


def normalize_positions(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, R, D), each position's channels scaled to unit length (section 4)."""
    return divide_positions(maps, position_norms(maps))


def position_norms(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, R), the length of each position's channels; not finite where a channel is not."""
    return torch.linalg.vector_norm(maps.flatten(2), dim=1).clamp_min(1e-12)


def divide_positions(maps: Tensor, norms: Tensor) -> Tensor:
    """(B, D, h, w) over (B, R) -> (B, R, D): the division is the pass that turns the layout."""
    B, D, h, w = maps.shape
    return torch.div(maps.flatten(2).transpose(1, 2), norms[:, :, None], out=maps.new_empty(B, h * w, D))


@dataclasses.dataclass(frozen=True)
class Features:
    """A checked feature file: everything but the maps, which stay on disk. w2v (K, d_v); shape (D, h, w) of a map;
    image_files (N), where the file says them."""
    path: Path
    split: Split
    w2v: np.ndarray
    shape: tuple[int, int, int]
    compressed: bool
    class_names: list[str]
    attribute_names: list[str]
    image_files: list[str] | None
    provenance: dict

    def raw(self, indices: np.ndarray) -> Tensor:
        """The maps (n, D, h, w) of the images `indices`, as they stand in the file. Raises UserError for damaged data."""
        maps = torch.empty(len(indices), *self.shape)
        try:
            with h5py.File(self.path, "r") as file:
                for row, index in enumerate(indices):
                    file["feature_map"].read_direct(maps[row].numpy(), np.s_[int(index)])
        except DAMAGE as error:
            raise UserError(f"{self.path} is damaged ({error}): run preprocessing.py again") from None
        return maps

    def check_finite(self, values: Tensor, indices: np.ndarray):
        """Raises UserError if a row of values (n, m), one an image, holds NaN or infinity."""
        if not torch.isfinite(values).all():
            bad = (~torch.isfinite(values).all(dim=1)).nonzero()[0].item()
            raise UserError(f"{self.path}: the feature map of image {indices[bad]} holds NaN or infinity: "
                            "run preprocessing.py again")

    def normalized(self, maps: Tensor, indices: np.ndarray) -> Tensor:
        """(n, R, D) of the maps (n, D, h, w) of the images `indices`. Raises UserError for NaN and infinity."""
        norms = position_norms(maps)
        self.check_finite(norms, indices)
        return divide_positions(maps, norms)

    def read(self, indices: np.ndarray) -> Tensor:
        """Normalised maps (n, R, D) of the images `indices`. Raises UserError for NaN, infinity and damaged data."""
        return self.normalized(self.raw(indices), indices)

    def pooled(self, indices: np.ndarray) -> Tensor:
        """The backbone's own visual features (n, D) of the images `indices`: their maps' means over positions."""
        means = torch.cat([self.raw(piece).mean(dim=(2, 3)) for piece in np.array_split(indices, -(-len(indices) // READ_AT_ONCE) or 1)])
        self.check_finite(means, indices)
        return means


def open_features(path: Path, backbone: str | None = None, img_size: int | None = None, dataset: str | None = None) -> Features:
    """Open and check a feature file (section 3), ours or the published code's.

    Raises UserError for a missing, truncated or foreign file, contents that cannot be true, and features of another
    backbone, image size or dataset than asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with preprocessing.py, or name it with --features")
    wanted = {"backbone": backbone, "img_size": img_size, "dataset": dataset}

    def probe():
        """What HDF5 itself reads, the whole index of the maps among it: over damaged bytes it may crash, or go round in circles."""
        with h5py.File(path, "r") as file:
            check_features(path, file, wanted)
            maps = file["feature_map"]
            return maps.chunks and maps.id.get_num_chunks(), maps[0], maps[-1]

    if not outlives(probe, PATIENCE):
        raise UserError(f"{path} is damaged, HDF5 crashed or hung over it: run preprocessing.py again")
    try:
        with h5py.File(path, "r") as file:
            return check_features(path, file, wanted)
    except DAMAGE as error:
        raise UserError(f"{path} is not a complete HDF5 file ({error}): run preprocessing.py again") from None


def open_dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """The dataset `key`, which must lie in this file: links, external storage and virtual datasets could show any other file's bytes."""
    if not isinstance(file.get(key, getlink=True), h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
        raise UserError(f"{path}: {key} is a link or a group, expected a dataset in the file itself")
    dataset = file[key]
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: {key} is stored in other files; a feature file holds all of its data")
    if math.prod(dataset.shape[1:] if key == "feature_map" else dataset.shape or ()) > LARGEST:
        raise UserError(f"{path}: {key} is of shape {dataset.shape}, which cannot be true")
    return dataset


def check_features(path: Path, file: h5py.File, wanted: dict) -> Features:
    """The body of `open_features`, on an open file; wanted: what its provenance must say, None for whatever it says."""
    lacking = [key for key in REQUIRED if key not in file]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: it is not a feature file; make one with preprocessing.py")
    datasets = {key: open_dataset(path, file, key) for key in (*REQUIRED, "train_loc", "val_loc", *TEXTS) if key in file}
    # texts and numbers; whatever else an attribute can be is not ours
    provenance = {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()
                  if isinstance(value, (str, np.integer, np.floating))}
    for name, value in wanted.items():
        if value is not None and name in provenance and provenance[name] != value:
            remedy = f"use the script of {provenance[name]}" if name == "dataset" else f"give --{name} {provenance[name]}"
            raise UserError(f"{path} holds features of {name} {provenance[name]}, but the run asks for {value}: "
                            f"{remedy}, or --features another file")
    if "backbone" not in provenance:
        print(f"{path} does not say what made it: taken for {wanted['backbone']} features at {wanted['img_size']} px")

    def array(key, kinds, dimensions, what):
        dataset = datasets[key]
        if dataset.dtype.kind not in kinds or dataset.ndim != dimensions:
            raise UserError(f"{path}: {key} must be a {what}, it is {dataset.dtype} {dataset.shape}")
        return dataset[()]

    def indices(key):
        return array(key, "ui", 1, "vector of whole numbers").astype(np.int64)

    def table(key):
        with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused
            return array(key, "fui", 2, "table of numbers").astype(np.float32)

    def texts(key, count, fallback):
        if key not in datasets:
            return fallback and [f"{fallback} {index}" for index in range(count)]
        names = [text.decode(errors="replace") for text in array(key, "OS", 1, "list of texts") if isinstance(text, bytes)]
        if len(names) != count:
            raise UserError(f"{path}: {key} holds {len(names)} texts, expected {count}")
        return names

    att, w2v, maps = table("att"), table("w2v_att"), datasets["feature_map"]
    labels = indices("labels")
    if maps.ndim != 4 or maps.dtype.kind != "f" or len(maps) != len(labels) or 0 in maps.shape:
        raise UserError(f"{path}: feature_map is {maps.dtype} {maps.shape}, expected floats ({len(labels)}, D, h, w), "
                        "as many as labels")
    if len(w2v) != att.shape[1]:
        raise UserError(f"{path}: {len(w2v)} attribute word vectors (w2v_att {w2v.shape}), but K = {att.shape[1]} "
                        f"attributes (att {att.shape})")
    if not np.isfinite(w2v).all():
        raise UserError(f"{path}: w2v_att holds NaN or infinity")
    trainval = indices("trainval_loc")
    # other writers keep xlsa17's train_loc and val_loc, which reach into test_seen (section 2)
    optional = {name: np.intersect1d(indices(f"{name}_loc"), trainval) if f"{name}_loc" in datasets else None
                for name in ("train", "val")}
    split = check_split(Split(labels, trainval, indices("test_seen_loc"), indices("test_unseen_loc"),
                              att, table("original_att"), **optional), path)
    if provenance.get("split_fingerprint", split.fingerprint) != split.fingerprint:
        raise UserError(f"{path}: its labels and splits have the fingerprint {split.fingerprint}, but it was written with "
                        f"{provenance['split_fingerprint']}: it was changed afterwards; run preprocessing.py again")
    return Features(path, split, w2v, maps.shape[1:], maps.compression is not None,
                    texts("allclasses_names", len(att), "class"), texts("attribute_names", len(w2v), "attribute"),
                    texts("image_files", len(labels), None), provenance)


class BalancedSampler:
    """Class-balanced batches of positions in trainval (section 5).

    A batch holds min(Cs, B) distinct seen classes and max(B // Cs, 1) images of each, drawn with replacement; it need
    not hold B images (AWA2: 40), `batch_size` is what it does hold. labels (n,) of trainval.
    """

    def __init__(self, labels: Tensor, batch_size: int):
        order = labels.argsort(stable=True)
        _, counts = labels.unique(return_counts=True)
        self.order, self.counts = order, counts
        self.first = counts.cumsum(0) - counts  # where each class starts in `order`
        self.classes = min(len(counts), batch_size)
        self.images = max(batch_size // len(counts), 1)
        self.batch_size = self.classes * self.images

    def draw(self, batches: int) -> Tensor:
        """Positions (batches, batch_size), all drawn at once from torch's CPU generator."""
        classes = torch.rand(batches, len(self.counts)).argsort(dim=1)[:, :self.classes, None]
        uniform = torch.rand(batches, self.classes, self.images)
        # float32 rounding can carry uniform * count up to count itself
        within = torch.minimum((uniform * self.counts[classes]).long(), self.counts[classes] - 1)
        return self.order[self.first[classes] + within].flatten(1)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where feature maps are kept for training: name device, ram, disk or none; dtype of a copy on the device."""
    name: str
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return {"device": f"on the device as {str(self.dtype).removeprefix('torch.')}", "ram": "in RAM",
                "disk": "in a cache beside the feature file", "none": "in the feature file, read batch by batch"}[self.name]


def choose_place(size: int, device: torch.device, folder: Path, compressed: bool, cache: str = "auto") -> Place:
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
    kept = Place("device", torch.float32 if size < on_device else torch.float16)
    fits = {"device": size * kept.dtype.itemsize / 4 < on_device, "ram": size < 0.5 * in_ram, "disk": size < on_disk,
            "none": True}
    if cache == "ram" and size > in_ram or cache in ("device", "disk") and not fits[cache]:
        room = {"device": on_device, "disk": on_disk, "ram": in_ram}[cache]
        if cache == "device" and device.type != "cuda":
            raise UserError("--cache device: this run has no GPU; leave the flag out")
        raise UserError(f"--cache {cache}: {size / 1e9:.2f} GB of feature maps do not fit into the {room / 1e9:.2f} GB there ({device}, "
                        f"{folder}): make room, or leave the flag out")
    if cache == "auto" and device.type == "cpu" and not compressed:
        return Place("none")
    name = next(name for name in fits if fits[name]) if cache == "auto" else cache
    return kept if name == "device" else Place(name)


def available_ram() -> int:
    """Bytes of RAM that can be taken without swapping; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


class FlatCache:
    """Normalised maps (n, R, D) of some images as one flat float32 file beside the feature file, read by offset.

    Plain reads and not a memory map: the pages stay the system's, they do not count as this process's memory.
    The file's name carries what it was made from, so that a changed feature file or split gets a new one.
    """

    def __init__(self, features: Features, indices: np.ndarray, progress):
        D, h, w = features.shape
        self.shape = (h * w, D)
        self.image_bytes = 4 * D * h * w
        stat = features.path.stat()
        made_from = repr((stat.st_size, stat.st_mtime_ns, features.split.fingerprint)).encode() + indices.tobytes()
        self.path = features.path.with_name(f"{features.path.name}.{hashlib.sha256(made_from).hexdigest()[:12]}.cache")
        self.size = len(indices) * self.image_bytes
        if not self.is_whole():
            with locked(self.path.with_name(f".{self.path.name}.lock"), f"writing {self.path}", wait=True):
                if not self.is_whole():  # whoever held the lock may have written it
                    self.write(features, indices, progress)
        self.file = open(self.path, "rb", buffering=0)
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
        maps = torch.empty(len(positions), *self.shape)
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

    def __init__(self, features: Features, indices: np.ndarray, device: torch.device, place: Place = Place("none"),
                 progress=lambda images: None):
        self.features, self.indices, self.device, self.place = features, indices, device, place
        if place.name == "disk":
            self.cache = FlatCache(features, indices, progress)
        elif place.name in ("device", "ram"):
            D, h, w = features.shape
            self.store = torch.empty(len(indices), h * w, D, dtype=place.dtype, device=device if place.name == "device" else "cpu")
            row = 0
            for maps in read_pieces(features, indices):
                self.store[row:row + len(maps)] = maps
                row += len(maps)
                progress(len(maps))

    def __len__(self):
        return len(self.indices)

    def fetch(self, positions: Tensor) -> Tensor | None:
        """What has to be waited for to have the maps of `positions` (B,): bytes from a disk."""
        if self.place.name == "disk":
            return self.cache.take(positions)
        return self.features.raw(self.indices[positions.numpy()]) if self.place.name == "none" else None

    def take(self, positions: Tensor, fetched: Tensor | None) -> Tensor:
        """Maps (B, R, D) of `positions`: on the device if they are kept there, else in host memory it can fetch from."""
        if self.place.name == "device":
            return self.store[positions.to(self.device)].float()
        if self.place.name == "ram":
            maps = self.store[positions]
        else:
            maps = fetched if self.place.name == "disk" else self.features.normalized(fetched, self.indices[positions.numpy()])
        return maps.pin_memory() if self.device.type == "cuda" else maps

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
