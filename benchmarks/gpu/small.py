"""The sizes of a rehearsal without a GPU: everything runs, in seconds."""

import dataclasses

from benchmarks.flop import SIZES, Size
from scegg.config import Config, default_config, read_config
from scegg.datasets.layouts import LAYOUTS, Counts

SHAPE = (2048, 14, 14)  # of a map of ResNet-101 at 448 px
SMALL_SHAPE = (24, 3, 3)
SMALL_COUNTS = Counts(
    images=81, classes=9, seen=6, attributes=11, trainval=42, test_seen=12, test_unseen=27
)
SMALL_SIZE = Size(B=6, K=11, C=9, Cs=6, D=24, side=3, d_v=300, trainval=42, test=39)
SMALL_CHANGES = {
    "batch_size": 6,
    "scen_iterations": 6,
    "distill_iterations": 6,
    "distill_hidden": 16,
    "nepoch": 3,
    "ngh": 32,
    "ndh": 32,
    "syn_num": 5,
    "classifier_epochs": 2,
}


def config_of(dataset: str, small: bool, **changes) -> Config:
    """The dataset's own settings, with a few changes."""
    config = read_config(default_config(dataset), {})
    return dataclasses.replace(config, **(SMALL_CHANGES if small else {}), **changes)


def size_of(dataset: str, small: bool) -> Size:
    """The dimensions of its training."""
    return SMALL_SIZE if small else SIZES[dataset]


def counts_of(dataset: str, small: bool) -> Counts:
    """The numbers of its published split."""
    return SMALL_COUNTS if small else LAYOUTS[dataset].published


def shape_of(small: bool) -> tuple[int, int, int]:
    """(D, h, w) of a feature map."""
    return SMALL_SHAPE if small else SHAPE
