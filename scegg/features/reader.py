"""A feature file, checked, and its maps as SCEN reads them: (R, D), one unit vector a position.

Maps are normalised when they are read, so once, and not in every training step.
"""

import dataclasses
import functools
import math
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from scegg.datasets.splits import Split, check_split
from scegg.features.checked_datasets import CheckedDatasets
from scegg.features.chunk_index import (
    Stored,
    images_in_chunk,
    never_written,
    stored_chunks,
    unwritten_images,
)
from scegg.features.disk import SourceFile, open_hdf5
from scegg.features.feature_file import (
    ATTRIBUTE_NAMES,
    CLASS_NAMES,
    IMAGE_FILES,
    MAPS,
    OPTIONAL_SPLIT_DATASETS,
    SPLIT_DATASETS,
    WORD_VECTORS,
    read_maps,
    read_provenance,
)
from scegg.features.repack import Repacked, repacked
from scegg.processes import require_survivable
from util import UserError, is_missing, unreadable

PATIENCE = 120  # seconds that opening a file may take
READ_AT_ONCE = 16  # images: their memory while they are normalised adds to the peak
AGAIN = "run preprocessing.py again"


# ---------------------------------------------------------------- normalisation


def normalize_positions(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, R, D), each position's channels scaled to unit length.

    docs/method.md, section 4.
    """
    return divide_positions(maps, position_norms(maps))


def position_norms(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, R), the length of each position's channels; not finite if one is not."""
    return torch.linalg.vector_norm(maps.flatten(2), dim=1).clamp_min(1e-12)


def divide_positions(maps: Tensor, norms: Tensor) -> Tensor:
    """(B, D, h, w) over (B, R) -> (B, R, D). The same pass over memory turns the layout."""
    B, D, h, w = maps.shape
    positions_first = maps.flatten(2).transpose(1, 2)
    return torch.div(positions_first, norms[:, :, None], out=maps.new_empty(B, h * w, D))


# ---------------------------------------------------------------- an open feature file


@dataclasses.dataclass(frozen=True)
class Features:
    """A checked feature file: everything but the maps, which stay on the disk.

    It stays open: a new file under its name changes nothing for whoever has read this one.
    file, disk: as HDF5 and as the system see it. w2v: (K, d), word vectors of the attributes.
    shape: (D, h, w) of a map. images_in_chunk: how many share one. image_files: (N), None where
    the file does not say them.
    """

    path: Path
    file: h5py.File
    disk: SourceFile
    split: Split
    w2v: np.ndarray
    shape: tuple[int, int, int]
    compressed: bool
    images_in_chunk: int
    class_names: list[str]
    attribute_names: list[str]
    image_files: list[str] | None
    provenance: dict

    def size(self, images: int) -> int:
        """Bytes of so many maps in float32."""
        return 4 * images * math.prod(self.shape)

    @property
    def is_repacked(self) -> bool:
        """Whether maps are read from a repacked file, which is made before the first of them."""
        return self.images_in_chunk > 1

    @functools.cached_property
    def repacked(self) -> Repacked:
        """The repacked file, open."""
        return repacked(self.disk, self.file[MAPS])

    @functools.cached_property
    def stored(self) -> Stored | None:
        """The chunks of the maps as they are stored; None where the maps are in one piece."""
        maps, is_whole = self.file[MAPS], not self.unwritten.any()
        return stored_chunks(maps, self.disk, is_whole) if maps.chunks else None

    @functools.cached_property
    def unwritten(self) -> np.ndarray:
        """Whether some of an image's map was never written, of all images: (N,) bool."""
        return unwritten_images(self.file[MAPS])

    def raw(self, indices: np.ndarray) -> Tensor:
        """The maps (n, D, h, w) of the images `indices`, as they stand in the file.

        Raises UserError for damaged data, for a map that was never written, for a file that was
        written to since it was opened, and for a disk that fails.
        """
        maps = np.empty((len(indices), *self.shape), np.float32)
        with self.disk.reading("is damaged", AGAIN):
            lacking = indices[self.unwritten[indices]]
            if len(lacking):
                raise never_written(lacking[0])
            if self.is_repacked:
                self.repacked.read(indices, maps)
            else:
                read_maps(self.file[MAPS], indices, maps, self.stored)
        return torch.from_numpy(maps)

    def check_finite(self, values: Tensor, indices: np.ndarray):
        """Raises UserError if a row of values (n, m), one an image, holds NaN or infinity."""
        if torch.isfinite(values).all():
            return
        is_bad = ~torch.isfinite(values).all(dim=1)
        image = indices[is_bad.nonzero()[0].item()]
        raise UserError(
            f"{self.path}: the feature map of image {image} holds NaN or infinity: "
            "run preprocessing.py again"
        )

    def normalized(self, maps: Tensor, indices: np.ndarray) -> Tensor:
        """(n, R, D) of the maps (n, D, h, w) of the images `indices`.

        Raises UserError for NaN and infinity.
        """
        norms = position_norms(maps)
        self.check_finite(norms, indices)
        return divide_positions(maps, norms)

    def read(self, indices: np.ndarray) -> Tensor:
        """Normalised maps (n, R, D) of the images `indices`.

        Raises UserError for NaN, infinity and damaged data.
        """
        return self.normalized(self.raw(indices), indices)

    def pooled(self, indices: np.ndarray) -> Tensor:
        """The backbone's own visual features (n, D): the maps' means over positions."""
        pieces = np.array_split(indices, -(-len(indices) // READ_AT_ONCE) or 1)
        means = torch.cat([self.raw(piece).mean(dim=(2, 3)) for piece in pieces])
        self.check_finite(means, indices)
        return means


def open_features(
    path: Path,
    backbone: str | None = None,
    img_size: int | None = None,
    dataset: str | None = None,
) -> Features:
    """Open and check a feature file, ours or the published code's (docs/method.md, section 3).

    Raises UserError for a missing, truncated or foreign file, and for contents that cannot be true.
    So it does for features of another backbone, image size or dataset than asked for.
    """
    path = Path(path)
    try:
        if is_missing(path):
            raise UserError(
                f"{path} is missing: make it with preprocessing.py, or name it with --features"
            )
        disk = SourceFile(path)
    except OSError as error:
        raise unreadable(path, error) from None

    wanted = {"backbone": backbone, "img_size": img_size, "dataset": dataset}
    try_in_a_child(disk, wanted)
    with disk.reading("is not a complete HDF5 file", AGAIN):
        return check_features(path, open_hdf5(disk), disk, wanted)


def try_in_a_child(disk: SourceFile, wanted: dict):
    """Raises UserError if HDF5 crashes over the bytes of a feature file, or does not end.

    wanted: as `check_features` takes it.
    """

    def probe():
        """Let HDF5 read all that it will, the index of the maps among it."""
        with open_hdf5(disk) as file:
            check_features(disk.path, file, disk, wanted)
            maps = file[MAPS]
            ends = maps[0, 0, 0, 0], maps[-1, -1, -1, -1]  # with the chunks that they are in
            return maps.chunks and maps.id.chunk_iter(lambda chunk: None), ends

    require_survivable(probe, disk.path, PATIENCE, "HDF5", AGAIN)


# ---------------------------------------------------------------- its checks


def check_features(path: Path, file: h5py.File, disk: SourceFile, wanted: dict) -> Features:
    """The body of `open_features`, on an open file.

    wanted: what its provenance must say, None for anything.
    """
    datasets = CheckedDatasets(path, file)
    provenance = read_provenance(file)
    check_provenance(path, provenance, wanted)

    att = datasets.table(SPLIT_DATASETS["att"])
    w2v = datasets.table(WORD_VECTORS)
    labels = datasets.indices(SPLIT_DATASETS["labels"])
    check_shapes(path, datasets[MAPS], labels, w2v, att)

    split = read_split_datasets(datasets, labels, att)
    split = dataclasses.replace(split, semantics=provenance.get("semantics"))
    check_split(split, path)
    written_with = provenance.get("split_fingerprint", split.fingerprint)
    if written_with != split.fingerprint:
        raise UserError(
            f"{path}: its labels and splits have the fingerprint {split.fingerprint}, but it was "
            f"written with {written_with}: it was changed afterwards; run preprocessing.py again"
        )

    class_names = datasets.texts(CLASS_NAMES, len(att))
    attribute_names = datasets.texts(ATTRIBUTE_NAMES, len(w2v))
    image_files = datasets.texts(IMAGE_FILES, len(labels))
    return Features(
        path=path,
        file=file,
        disk=disk,
        split=split,
        w2v=w2v,
        shape=datasets[MAPS].shape[1:],
        compressed=datasets[MAPS].compression is not None,
        images_in_chunk=images_in_chunk(datasets[MAPS]),
        class_names=class_names or numbered("class", len(att)),
        attribute_names=attribute_names or numbered("attribute", len(w2v)),
        image_files=image_files,
        provenance=provenance,
    )


def check_provenance(path: Path, provenance: dict, wanted: dict):
    """Raises UserError if the file holds features of something else than wanted.

    A file that says nothing, as the published code's, is taken for what is wanted.
    """
    for name, value in wanted.items():
        if value is None or provenance.get(name, value) == value:
            continue
        remedy = f"give --{name} {provenance[name]}"
        if name == "dataset":
            remedy = f"use train_joint.py --dataset {provenance[name]}"
        raise UserError(
            f"{path} holds features of {name} {provenance[name]}, but the run asks for {value}: "
            f"{remedy}, or --features another file"
        )

    if "backbone" not in provenance:
        print(
            f"{path} does not say what made it: "
            f"taken for {wanted['backbone']} features at {wanted['img_size']} px"
        )


def check_shapes(
    path: Path, maps: h5py.Dataset, labels: np.ndarray, w2v: np.ndarray, att: np.ndarray
):
    """Raises UserError unless maps, labels, word vectors and attributes fit together."""
    is_maps = maps.ndim == 4 and maps.dtype.kind == "f"
    if not is_maps or len(maps) != len(labels) or 0 in maps.shape:
        raise UserError(
            f"{path}: {MAPS} is {maps.dtype} {maps.shape}, "
            f"expected floats ({len(labels)}, D, h, w), as many as labels"
        )

    if len(w2v) != att.shape[1]:
        raise UserError(
            f"{path}: {len(w2v)} attribute word vectors ({WORD_VECTORS} {w2v.shape}), "
            f"but K = {att.shape[1]} attributes (att {att.shape})"
        )
    if not np.isfinite(w2v).all():
        raise UserError(f"{path}: {WORD_VECTORS} holds NaN or infinity")


def read_split_datasets(datasets: CheckedDatasets, labels: np.ndarray, att: np.ndarray) -> Split:
    """The file's split, not yet checked.

    Other writers keep xlsa17's train_loc and val_loc, which reach into the test images: what lies
    outside trainval is left out.
    """
    trainval = datasets.indices(SPLIT_DATASETS["trainval"])
    inside = dict.fromkeys(OPTIONAL_SPLIT_DATASETS)
    for field, key in OPTIONAL_SPLIT_DATASETS.items():
        if key in datasets:
            inside[field] = np.intersect1d(datasets.indices(key), trainval)

    return Split(
        labels=labels,
        trainval=trainval,
        test_seen=datasets.indices(SPLIT_DATASETS["test_seen"]),
        test_unseen=datasets.indices(SPLIT_DATASETS["test_unseen"]),
        att=att,
        original_att=datasets.table(SPLIT_DATASETS["original_att"]),
        **inside,
    )


def numbered(kind: str, count: int) -> list[str]:
    """Names for what the file has no names for: class 0, class 1 and so on."""
    return [f"{kind} {index}" for index in range(count)]
