"""Images a second of preprocessing.py, beside its backbone alone."""

import dataclasses
import itertools
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from benchmarks.files import images_at_once
from benchmarks.machine import Timer
from scegg.datasets.xlsa17 import read_dataset
from scegg.features.backbones import build_backbone, fold
from scegg.features.extract import DECODED_AT_ONCE, Backbone, default_workers, extract
from scegg.features.images import Images, PixelNormalization, collate, image_transform
from scegg.features.parts import Parts
from util import UserError

IMAGES = 512


def preprocessing_run(options, device: torch.device, folder: Path) -> dict:
    """Time CUB's first photographs on their way to a file, and parts of that way.

    The backbone is timed on decoded images, as preprocessing.py runs it (`bare`: batch
    normalisation and padding folded) and as its package gives it (`packaged`). Returns the record.
    """
    tails = read_dataset(options.preprocess, "CUB")[2][: options.images]
    photographs = [options.preprocess / "CUB" / tail for tail in tails]
    choice = BackboneChoice(options.backbone, options.weights)
    bench = PreprocessingBench(photographs, choice, device, folder)
    packaged, weights = choice.make(device, bench.at_once, folded=False)

    calls = {
        "packaged_backbone": partial(bench.forward, packaged),
        "bare_backbone": partial(bench.forward, bench.bare),
        "decoding_in_one_process": bench.decode,
        "uncompressed": partial(bench.whole, None),
        "gzip": partial(bench.whole, "gzip"),
    }
    names = ", ".join(calls)
    calls = {name: call for name, call in calls.items() if options.stages in name}
    if not calls:
        raise UserError(f"--stages {options.stages}: there are {names}")

    seconds = Timer(device).medians(list(calls.values()), 3, at_most=300)
    speeds = {name: len(photographs) / s for name, s in zip(calls, seconds, strict=True)}

    record = {
        "stage": "preprocessing, images/s",
        "backbone": options.backbone,
        "weights": weights,
    }
    record |= speeds
    if options.stages:
        return record | {"rate": list(speeds.values())[-1]}

    for name in ("uncompressed", "gzip"):
        for backbone in ("bare", "packaged"):
            record[f"{name}_of_{backbone}"] = speeds[name] / speeds[f"{backbone}_backbone"]
    return record


@dataclasses.dataclass(frozen=True)
class BackboneChoice:
    """A network by its name, with the weights of a local state dict or the pretrained ones."""

    name: str
    weights: Path | None
    img_size: int = 448
    precision: torch.dtype = torch.float32

    def make(self, device: torch.device, at_once: int, folded: bool) -> tuple[Backbone, str]:
        """The backbone, its normalisations folded or not, and where its weights are from."""
        network, provenance = build_backbone(self.name, self.weights, self.img_size)
        if folded:
            network = fold(network)
        pixels = PixelNormalization(self.name)
        backbone = Backbone(pixels, network, device, self.precision, at_once)
        return backbone, provenance["weights"]


class PreprocessingBench:
    """Photographs, decoded images, and the backbone as preprocessing.py runs it."""

    def __init__(
        self, photographs: list[Path], choice: BackboneChoice, device: torch.device, folder: Path
    ):
        self.folder = folder
        self.at_once = images_at_once(device)
        self.loading = Namespace(batch_size=self.at_once, num_workers=default_workers(device))
        self.numbers = itertools.count()
        self.bare, _ = choice.make(device, self.at_once, folded=True)

        transform = image_transform(choice.img_size)
        self.photographs = Images(photographs, transform, self.loading.num_workers)
        self.indices = torch.arange(len(photographs))
        self.decoded = [self.load(piece) for piece in self.indices.split(self.at_once)]
        if device.type == "cuda":  # as the loader hands them over
            self.decoded = [batch.pin_memory() for batch in self.decoded]

    def load(self, indices: torch.Tensor) -> torch.Tensor:
        """A batch of decoded images."""
        return collate(self.photographs.__getitems__(indices))

    def forward(self, backbone: Backbone):
        """All decoded images through a backbone."""
        with torch.inference_mode():
            for batch in self.decoded:
                maps = backbone(batch)
            maps.cpu()

    def decode(self):
        """Decode all photographs in this process."""
        for piece in self.indices.split(self.at_once * DECODED_AT_ONCE):
            self.load(piece)

    def whole(self, compression: str | None):
        """From photographs to a file, as preprocessing.py goes."""
        # a file of its own each time: preprocessing.py has none to remove
        path = self.folder / f"{next(self.numbers)}.hdf5"
        parts = Parts(path, self.photographs.paths, compression, {})
        extract(self.bare, self.photographs, parts, self.loading)
        parts.join(lambda file: None)
