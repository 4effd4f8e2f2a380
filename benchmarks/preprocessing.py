"""Images a second of preprocessing.py, beside its backbone alone."""

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

IMAGES = 512


def preprocessing_run(options, device: torch.device, folder: Path) -> dict:
    """Time CUB's first photographs on their way to a file, and parts of that way.

    The backbone is timed on decoded images, as preprocessing.py runs it (`bare`: batch
    normalisation and padding folded) and as its package gives it (`packaged`). Returns the record.
    """
    bench = PreprocessingBench(options, device, folder)
    calls = {
        "packaged_backbone": partial(bench.forward, bench.packaged),
        "bare_backbone": partial(bench.forward, bench.bare),
        "decoding_in_one_process": bench.decode,
        "uncompressed": partial(bench.whole, None),
        "gzip": partial(bench.whole, "gzip"),
    }
    seconds = Timer(device).medians(list(calls.values()), 3, at_most=300)
    speeds = {name: IMAGES / s for name, s in zip(calls, seconds, strict=True)}

    record = {
        "stage": "preprocessing, images/s",
        "backbone": options.backbone,
        "weights": bench.provenance["weights"],
    }
    record |= speeds
    for name in ("uncompressed", "gzip"):
        for backbone in ("bare", "packaged"):
            record[f"{name}_of_{backbone}"] = speeds[name] / speeds[f"{backbone}_backbone"]
    return record


class PreprocessingBench:
    """The photographs, decoded images, and the backbone in both forms."""

    def __init__(self, options, device: torch.device, folder: Path):
        self.folder = folder
        self.at_once = images_at_once(device)
        self.loading = Namespace(batch_size=self.at_once, num_workers=default_workers(device))
        self.numbers = itertools.count()

        self.packaged = self.make_backbone(options, device, folded=False)
        self.bare = self.make_backbone(options, device, folded=True)

        tails = read_dataset(options.preprocess, "CUB")[2][:IMAGES]
        paths = [options.preprocess / "CUB" / tail for tail in tails]
        self.photographs = Images(paths, image_transform(448), self.loading.num_workers)
        self.decoded = [self.load(piece) for piece in torch.arange(IMAGES).split(self.at_once)]
        if device.type == "cuda":  # as the loader hands them over
            self.decoded = [batch.pin_memory() for batch in self.decoded]

    def make_backbone(self, options, device: torch.device, folded: bool) -> Backbone:
        """The backbone that the options ask for."""
        network, self.provenance = build_backbone(options.backbone, options.weights, 448)
        if folded:
            network = fold(network)
        return Backbone(
            PixelNormalization(options.backbone), network, device, torch.float32, self.at_once
        )

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
        for piece in torch.arange(IMAGES).split(self.at_once * DECODED_AT_ONCE):
            self.load(piece)

    def whole(self, compression: str | None):
        """From photographs to a file, as preprocessing.py goes."""
        # a file of its own each time: preprocessing.py has none to remove
        path = self.folder / f"{next(self.numbers)}.hdf5"
        parts = Parts(path, self.photographs.paths, compression, {})
        extract(self.bare, self.photographs, parts, self.loading)
        parts.join(lambda file: None)
