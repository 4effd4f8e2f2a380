"""Labels, splits and class attributes of a dataset, checked."""

import dataclasses
import hashlib

import numpy as np

from scegg.datasets.layouts import LAYOUTS
from util import UserError

LOCATIONS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")


@dataclasses.dataclass(frozen=True)
class Split:
    """Labels, splits and class attributes of a dataset; all indices 0-based.

    labels (N,), trainval / test_seen / test_unseen index vectors, att and original_att (C, K) float32, train and val
    index vectors inside trainval (train_loc and val_loc intersected with it; None where a file has none).
    """
    labels: np.ndarray
    trainval: np.ndarray
    test_seen: np.ndarray
    test_unseen: np.ndarray
    att: np.ndarray
    original_att: np.ndarray
    train: np.ndarray | None = None
    val: np.ndarray | None = None

    @property
    def seen(self) -> np.ndarray:
        """Labels of the seen classes (Cs,), ascending."""
        return np.unique(self.labels[self.trainval])

    @property
    def unseen(self) -> np.ndarray:
        """Labels of the unseen classes (Cu,), ascending."""
        return np.unique(self.labels[self.test_unseen])

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with any image's label or place among trainval, test seen and test unseen."""
        digest = hashlib.sha256()
        for part in (self.labels, *map(np.sort, (self.trainval, self.test_seen, self.test_unseen))):
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    def counts(self) -> tuple[int, ...]:
        """The row of section 2's table."""
        return (len(self.labels), len(self.att), len(self.seen), self.att.shape[1],
                len(self.trainval), len(self.test_seen), len(self.test_unseen))

    def is_published(self, dataset: str) -> bool:
        """Whether this has the numbers of the paper's full dataset."""
        return self.counts() == LAYOUTS[dataset].published

    def describe(self, dataset: str) -> str:
        """One line: fingerprint, which split it is, and its numbers."""
        N, C, seen, K, trainval, test_seen, test_unseen = self.counts()
        published = LAYOUTS[dataset].published
        release = "the common release" if self.fingerprint == LAYOUTS[dataset].release else "NOT the common release"
        kind = (f"the full proposed split, {release}" if self.is_published(dataset)
                else f"NOT the full {dataset} of the paper" if published else "embedded dataset")
        return (f"split {self.fingerprint} ({kind}): {N} images, {C} classes ({seen} seen, {len(self.unseen)} unseen), "
                f"{K} attributes, trainval {trainval}, test seen {test_seen}, test unseen {test_unseen}")


def check_split(split: Split, where) -> Split:
    """The split itself if it can be true; raises UserError saying what contradicts what, in file `where`."""
    def require(condition, problem):
        if not condition:
            raise UserError(f"{where}: {problem}")

    N, C = len(split.labels), len(split.att)
    require(N > 0, "holds no images")
    require(split.att.ndim == 2 and split.att.size, f"att is of shape {split.att.shape}, expected classes x attributes")
    require(split.original_att.shape == split.att.shape,
            f"original_att {split.original_att.shape} and att {split.att.shape} differ in shape")
    require(np.isfinite(split.att).all() and np.isfinite(split.original_att).all(), "class attributes hold NaN or infinity")
    require(split.att.any(axis=1).all(), "a class has no attribute at all")
    low, high = split.labels.min(), split.labels.max()
    require(low >= 0 and high < C, f"labels run from {low} to {high}, but there are {C} classes: expected 0 to {C - 1} "
            "(off by one? HDF5 labels are 0-based, .mat labels 1-based)")
    parts = dict(zip(LOCATIONS, (split.trainval, split.test_seen, split.test_unseen)))
    for name, loc in parts.items():
        require(len(loc) > 0, f"{name} is empty")
        require(loc.min() >= 0 and loc.max() < N, f"{name} runs from {loc.min()} to {loc.max()}, but there are {N} "
                f"images: expected 0 to {N - 1} (off by one? HDF5 locations are 0-based, .mat locations 1-based)")
        require(len(np.unique(loc)) == len(loc), f"{name} names an image twice")
    for first, second in (("trainval_loc", "test_seen_loc"), ("trainval_loc", "test_unseen_loc"),
                          ("test_seen_loc", "test_unseen_loc")):
        shared = len(np.intersect1d(parts[first], parts[second]))
        require(shared == 0, f"{first} and {second} share {shared} images: training would see test images")
    both = np.intersect1d(split.seen, split.unseen)
    require(len(both) == 0, f"{len(both)} classes are both seen and unseen, the first is {both[:1]}")
    stray = np.setdiff1d(split.labels[split.test_seen], split.seen)
    require(len(stray) == 0, f"test_seen_loc holds {len(stray)} classes without a trainval image, the first is {stray[:1]}")
    return split


def validation_split(split: Split, share: float, seed: int, source) -> Split:
    """A split inside trainval: its val classes are the unseen ones, and `share` of the other classes' images test the seen.

    Labels and attributes are those of trainval's classes alone, numbered anew: the unseen classes do not occur in it, not
    as columns either. source names the file in errors. Raises UserError without val classes, or if they are also trained on.
    """
    if split.train is None or split.val is None:
        raise UserError(f"{source} has no train_loc and val_loc: protocol validated needs xlsa17's; preprocess again, or use paper")
    labels = np.searchsorted(split.seen, split.labels)
    held_out_classes, train_classes = np.unique(labels[split.val]), np.unique(labels[split.train])
    if not len(held_out_classes) or not len(train_classes) or np.intersect1d(held_out_classes, train_classes).size:
        raise UserError(f"{source}: train_loc and val_loc do not divide trainval's classes: protocol validated needs xlsa17's proposed split")
    rng = np.random.default_rng(seed)
    held_out = []
    for label in train_classes:
        images = split.train[labels[split.train] == label]
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        held_out.append(rng.permutation(images)[:count])
    held_out = np.sort(np.concatenate(held_out))
    if not len(held_out):
        raise UserError(f"{source} has a single image of every class to train on: protocol validated can hold none out; use paper")
    return dataclasses.replace(split, labels=labels, trainval=np.setdiff1d(split.train, held_out), test_seen=held_out,
                               test_unseen=split.val, att=split.att[split.seen], original_att=split.original_att[split.seen],
                               train=None, val=None)
