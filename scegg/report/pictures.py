"""Picture files through a run's own backbone, as preprocessing sends a dataset's through it."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from scegg.config import Config
from scegg.datasets.make import SUFFIXES, is_shown
from scegg.features.backbones import build_backbone, fold
from scegg.features.extract import Backbone
from scegg.features.images import (
    MEGAPIXELS,
    PixelNormalization,
    Unreadable,
    collate,
    image_transform,
    read_image,
)
from scegg.speed.threads import granted_cores
from util import UserError

AT_ONCE = {"cpu": 4, "cuda": 64}  # pictures in a batch, as in preprocessing
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_backbone(
    config: Config, provenance: dict, source: Path, weights: Path | None, device: torch.device
) -> Backbone:
    """The network that the run's features were made with: (B, 3, S, S) uint8 -> maps (B, D, h, w).

    provenance: how they were made, as the file `source` says it. weights: the state dict, if it is
    not the pretrained one. Raises UserError for weights that the features were not made with.
    """
    try:
        network, made_with = build_backbone(config.backbone, weights, config.img_size)
    except UserError as error:  # of a download, say, where the run had a file of its own
        wanted = provenance.get("weights", "not named")
        raise UserError(f"{error} (the weights of {source}: {wanted})") from None
    sha256 = made_with["weights_sha256"]
    if provenance.get("weights_sha256", sha256) != sha256:
        raise UserError(
            f"{source} was made with the weights {provenance.get('weights')}, not "
            f"{made_with['weights']}: give that file as --weights"
        )

    pixels = PixelNormalization(config.backbone, provenance.get("normalization", "backbone"))
    precision = PRECISIONS.get(provenance.get("precision"), torch.float32)
    return Backbone(pixels, fold(network), device, precision, AT_ONCE[device.type])


def read_crop(path: Path, img_size: int, megapixels: int = MEGAPIXELS) -> Tensor:
    """The crop of a picture that the backbone sees, (3, S, S) uint8.

    Raises UserError if the picture cannot be read, or has more megapixels.
    """
    return read_image(path, image_transform(img_size), megapixels)


def picture_files(places: list[Path], tell: Callable[[str], None]) -> Iterator[Path]:
    """The files named, and every picture in the folders named, by name; no hidden ones.

    Only the names in one folder are held in memory. tell(line) is told of a folder that cannot be
    listed.
    """

    def tell_of_folder(error: OSError):
        tell(f"{error.filename} could not be listed ({error.strerror})")

    for place in places:
        if not place.is_dir():
            yield place
            continue
        for folder, folders, names in os.walk(place, onerror=tell_of_folder):
            folders[:] = sorted(name for name in folders if is_shown(Path(name)))
            for name in sorted(names):
                if is_shown(Path(name)) and Path(name).suffix.lower() in SUFFIXES:
                    yield Path(folder, name)


def read_batches(
    paths: Iterator[Path],
    read: Callable[[Path], Tensor],
    at_once: int,
    tell: Callable[[str], None],
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of the pictures that can be read: their paths and crops (B, 3, S, S) uint8.

    read: gives the crop of a picture, or raises UserError. tell(line) is told of each of those.
    """

    def try_to_read(path: Path) -> Tensor | Unreadable:
        try:
            return read(path)
        except UserError as error:
            return Unreadable(error)

    with ThreadPoolExecutor(granted_cores()) as threads:
        while some := list(islice(paths, at_once)):
            readable = []
            for path, crop in zip(some, threads.map(try_to_read, some), strict=True):
                if isinstance(crop, Unreadable):
                    tell(crop)
                else:
                    readable.append((path, crop))
            if readable:
                names, crops = zip(*readable, strict=True)
                yield list(names), collate(crops)
