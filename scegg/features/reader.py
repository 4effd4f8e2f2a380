"""HDF5 feature file -> checked splits, normalised feature maps, class-balanced batches of their positions.

A feature map leaves here as SCEN reads it: (R, D), positions first, L2-normalised over channels. It is normalised once,
when it is read, not in every step.
"""
import dataclasses
import math
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from scegg.datasets.splits import Split, check_split
from scegg.features.feature_file import DAMAGE, REQUIRED, TEXTS, read_maps
from util import UserError, survives

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

    def size(self, images: int) -> int:
        """Bytes of so many maps in float32."""
        return 4 * images * math.prod(self.shape)

    def raw(self, indices: np.ndarray) -> Tensor:
        """The maps (n, D, h, w) of the images `indices`, as they stand in the file. Raises UserError for damaged data."""
        maps = np.empty((len(indices), *self.shape), np.float32)
        try:
            with h5py.File(self.path, "r") as file:
                read_maps(file["feature_map"], indices, maps)
        except DAMAGE as error:
            raise UserError(f"{self.path} is damaged ({error}): run preprocessing.py again") from None
        return torch.from_numpy(maps)

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

    if not survives(probe, PATIENCE):
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
