"""A dataset's labels, split and class attributes, checked (docs/method.md, section 2).

The checks are the same for a .mat file and for a feature file.
"""

import dataclasses
import hashlib

import numpy as np

from scegg.datasets.layouts import LAYOUTS, Counts
from util import UserError

LOCATIONS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")  # xlsa17's names of the parts


@dataclasses.dataclass(frozen=True)
class Split:
    """Labels, parts and class attributes of a dataset. All indices count from 0.

    labels: (N,), a class for each image.
    trainval, test_seen, test_unseen: images of each part, index vectors without a common image.
    att, original_att: (C, K) float32, the class attributes, normalised and as they were collected.
    train, val: images inside trainval, for validation. None where the file has none.
    semantics: the file of class vectors that stand in the place of the dataset's attributes.
    """

    labels: np.ndarray
    trainval: np.ndarray
    test_seen: np.ndarray
    test_unseen: np.ndarray
    att: np.ndarray
    original_att: np.ndarray
    train: np.ndarray | None = None
    val: np.ndarray | None = None
    semantics: str | None = None

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
        """12 hex digits that change when an image gets another label or another part.

        Where other class vectors stand in the attributes' place, + and 6 digits of theirs follow.
        """
        if self.semantics is None:
            return self.fingerprint_of_images
        vectors = np.ascontiguousarray(self.original_att, "<f4").tobytes()
        return f"{self.fingerprint_of_images}+{hashlib.sha256(vectors).hexdigest()[:6]}"

    @property
    def fingerprint_of_images(self) -> str:
        """The fingerprint without the class vectors."""
        parts = (self.trainval, self.test_seen, self.test_unseen)
        digest = hashlib.sha256()
        for vector in (self.labels, *map(np.sort, parts)):
            digest.update(len(vector).to_bytes(8, "little") + vector.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    def counts(self) -> Counts:
        """The numbers of this split, to compare with those of the published one."""
        return Counts(
            images=len(self.labels),
            classes=len(self.att),
            seen=len(self.seen),
            attributes=self.att.shape[1],
            trainval=len(self.trainval),
            test_seen=len(self.test_seen),
            test_unseen=len(self.test_unseen),
        )

    def is_published(self, dataset: str) -> bool:
        """Whether this split has the numbers of the full dataset, with its own attributes."""
        return self.semantics is None and self.counts() == LAYOUTS[dataset].published

    def with_semantics(self, vectors: np.ndarray, source: str) -> "Split":
        """The split with class vectors (C, K) in the attributes' place. source: their file's name.

        Raises UserError for a class whose numbers are all 0.
        """
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        require(lengths.all(), source, f"the numbers of class {np.argmin(lengths)} are all 0")
        att = (vectors / lengths).astype(np.float32)
        return dataclasses.replace(self, att=att, original_att=vectors, semantics=source)

    def describe(self, dataset: str) -> str:
        """One line: the fingerprint, which split it is, and its numbers."""
        counts = self.counts()
        return (
            f"split {self.fingerprint} ({self.kind(dataset)}): {counts.images} images, "
            f"{counts.classes} classes ({counts.seen} seen, {len(self.unseen)} unseen), "
            f"{counts.attributes} attributes, trainval {counts.trainval}, "
            f"test seen {counts.test_seen}, test unseen {counts.test_unseen}"
        )

    def kind(self, dataset: str) -> str:
        """Whether this is the paper's split and its common release, in words."""
        layout = LAYOUTS[dataset]
        if self.semantics is not None:
            return f"class vectors of {self.semantics} in the attributes' place"
        if layout.published is None:
            return "built-in dataset" if layout.made_by else "a dataset of your own"
        if not self.is_published(dataset):
            return f"NOT the full {dataset}" + (" of the paper" if layout.paper else "")
        if not layout.checked:
            return "the published numbers, which were not checked against the files"
        if layout.release is None:
            return "the numbers of its description"
        if self.fingerprint == layout.release:
            return "the full proposed split, the common release"
        return "the full proposed split, NOT the common release"


def check_split(split: Split, where) -> Split:
    """The split itself, if it can be true.

    where: the file it comes from. Raises UserError that says what contradicts what.
    """
    require(len(split.labels) > 0, where, "holds no images")
    check_class_attributes(split, where)
    check_labels(split, where)
    check_parts(split, where)
    check_seen_and_unseen(split, where)
    return split


def require(condition, where, problem: str):
    """Raises UserError that names the file and the problem, unless the condition holds."""
    if not condition:
        raise UserError(f"{where}: {problem}")


def check_class_attributes(split: Split, where):
    """Raises UserError unless both tables are of one shape, finite, and have no empty class."""
    att, original_att = split.att, split.original_att
    is_table = att.ndim == 2 and att.size
    require(is_table, where, f"att is of shape {att.shape}, expected classes x attributes")
    require(
        original_att.shape == att.shape,
        where,
        f"original_att {original_att.shape} and att {att.shape} differ in shape",
    )

    is_finite = np.isfinite(att).all() and np.isfinite(original_att).all()
    require(is_finite, where, "class attributes hold NaN or infinity")
    require(att.any(axis=1).all(), where, "a class has no attribute at all")


def check_labels(split: Split, where):
    """Raises UserError unless every label is the number of a class."""
    classes = len(split.att)
    low, high = split.labels.min(), split.labels.max()
    require(
        low >= 0 and high < classes,
        where,
        f"labels run from {low} to {high}, but there are {classes} classes: expected 0 to "
        f"{classes - 1} (off by one? HDF5 labels are 0-based, .mat labels 1-based)",
    )


def check_parts(split: Split, where):
    """Raises UserError unless each part names images that exist, once, and in no other part."""
    images = len(split.labels)
    vectors = (split.trainval, split.test_seen, split.test_unseen)
    parts = dict(zip(LOCATIONS, vectors, strict=True))

    for name, loc in parts.items():
        require(len(loc) > 0, where, f"{name} is empty")
        require(
            loc.min() >= 0 and loc.max() < images,
            where,
            f"{name} runs from {loc.min()} to {loc.max()}, but there are {images} images: "
            f"expected 0 to {images - 1} (off by one? HDF5 locations are 0-based, "
            ".mat locations 1-based)",
        )
        require(len(np.unique(loc)) == len(loc), where, f"{name} names an image twice")

    for first, second in (
        ("trainval_loc", "test_seen_loc"),
        ("trainval_loc", "test_unseen_loc"),
        ("test_seen_loc", "test_unseen_loc"),
    ):
        shared = len(np.intersect1d(parts[first], parts[second]))
        problem = f"{first} and {second} share {shared} images: training would see test images"
        require(shared == 0, where, problem)


def check_seen_and_unseen(split: Split, where):
    """Raises UserError for a class that is seen and unseen, or tested as seen but not trained."""
    both = np.intersect1d(split.seen, split.unseen)
    problem = f"{len(both)} classes are both seen and unseen, the first is {both[:1]}"
    require(len(both) == 0, where, problem)

    stray = np.setdiff1d(split.labels[split.test_seen], split.seen)
    require(
        len(stray) == 0,
        where,
        f"test_seen_loc holds {len(stray)} classes without a trainval image, "
        f"the first is {stray[:1]}",
    )


def validation_split(split: Split, share: float, seed: int, source) -> Split:
    """A split inside trainval, to choose epochs on (docs/method.md, section 9).

    Its unseen classes are the val classes. Its test_seen part is a random `share` of the train
    classes' images. Labels and attributes are those of trainval's classes alone, numbered anew:
    the real unseen classes do not occur in it, not even as columns.

    source: the file, for errors. Raises UserError where train and val are missing, share a class,
    or leave no image to hold out.
    """
    if split.train is None or split.val is None:
        raise UserError(
            f"{source} has no train_loc and val_loc: protocol validated needs xlsa17's; "
            "preprocess again, or use paper"
        )
    labels = np.full(len(split.labels), -1)  # of test images nothing is known here
    labels[split.trainval] = np.searchsorted(split.seen, split.labels[split.trainval])
    val_classes = np.unique(labels[split.val])
    train_classes = np.unique(labels[split.train])
    shared = np.intersect1d(val_classes, train_classes)
    if not len(val_classes) or not len(train_classes) or shared.size:
        raise UserError(
            f"{source}: train_loc and val_loc do not divide trainval's classes: "
            "protocol validated needs xlsa17's proposed split"
        )

    held_out = hold_out(split.train, labels, train_classes, share, np.random.default_rng(seed))
    if not len(held_out):
        raise UserError(
            f"{source} has a single image of every class to train on: "
            "protocol validated can hold none out; use paper"
        )
    return Split(
        labels=labels,
        trainval=np.setdiff1d(split.train, held_out),
        test_seen=held_out,
        test_unseen=split.val,
        att=split.att[split.seen],
        original_att=split.original_att[split.seen],
    )


def hold_out(images, labels, classes, share: float, rng: np.random.Generator) -> np.ndarray:
    """A random `share` of each class's images, ascending: at least one, and never all of them."""
    held_out = []
    for label in classes:
        of_class = images[labels[images] == label]
        count = min(max(round(share * len(of_class)), 1), len(of_class) - 1)
        held_out.append(rng.permutation(of_class)[:count])
    return np.sort(np.concatenate(held_out))
