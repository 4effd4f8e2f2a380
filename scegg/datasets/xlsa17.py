"""The users' datasets as they lie on disk: folders, xlsa17's .mat files, splits, image paths, attribute names.

section 2. Everything a stranger's file can get wrong is checked here, once, for .mat and HDF5 files alike.
"""
import collections
import dataclasses
import hashlib
import re
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.io

from util import UserError, outlives


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dataset lies under the data root, and the facts its published split is checked against.

    anchor: the folder an image path's tail begins with. published: (images, classes, seen, attributes, trainval,
    test seen, test unseen), None for TOY; release: the fingerprint of the release of that split most people have; scegg: the
    paper's own CZSL acc, U, S, H in %.
    """
    anchor: str
    images: str
    attribute_files: tuple[str, ...]
    published: tuple[int, ...] | None = None
    release: str | None = None
    scegg: tuple[float, ...] | None = None


LAYOUTS = {
    "CUB": Layout("CUB_200_2011", "CUB_200_2011/images",
                  ("attributes.txt", "CUB_200_2011/attributes.txt", "CUB_200_2011/attributes/attributes.txt"),
                  (11788, 200, 150, 312, 7057, 1764, 2967), "62d41356ed4d", (75.1, 64.1, 73.6, 68.5)),
    "SUN": Layout("images", "images",
                  ("attributes.mat", "SUNAttributeDB/attributes.mat", "SUN_attributes.mat"),
                  (14340, 717, 645, 102, 10320, 2580, 1440), "e90b2456563a", (69.2, 45.1, 43.6, 44.3)),
    "AWA2": Layout("Animals_with_Attributes2", "Animals_with_Attributes2/JPEGImages",
                   ("Animals_with_Attributes2/predicates.txt", "predicates.txt", "AWA2_predicates.txt"),
                   (37322, 50, 40, 85, 23527, 5882, 7913), "dca72b876c46", (78.2, 60.9, 89.3, 72.4)),
    "TOY": Layout("images", "images", ("attributes.txt",)),
}
PATIENCE = 120  # seconds that reading a .mat file may take
LOCATIONS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")


def feature_file(dataset: str, backbone: str) -> Path:
    """Where preprocessing puts, and training looks for, the feature maps: data/<DS>/feature_map_<backbone>_<DS>.hdf5."""
    name = {"resnet101": "ResNet_101"}.get(backbone, backbone)  # the published code's file name
    return Path("data") / dataset / f"feature_map_{name}_{dataset}.hdf5"


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

    def facts(self) -> tuple[int, ...]:
        """The row of section 2's table."""
        return (len(self.labels), len(self.att), len(self.seen), self.att.shape[1],
                len(self.trainval), len(self.test_seen), len(self.test_unseen))

    def is_published(self, dataset: str) -> bool:
        """Whether this has the numbers of the paper's full dataset."""
        return self.facts() == LAYOUTS[dataset].published

    def describe(self, dataset: str) -> str:
        """One line: fingerprint, which split it is, and its numbers."""
        N, C, seen, K, trainval, test_seen, test_unseen = self.facts()
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


def read_mat(path: Path, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays `keys` of a .mat file, and those of `optional` that it has. Raises UserError if it is missing, unreadable or lacks one."""
    if not path.is_file():
        raise UserError(f"{path} is missing: unpack xlsa17.zip so that it lies there (data root / xlsa17/data/...)")
    read = lambda: scipy.io.loadmat(path, variable_names=keys + optional)
    if not outlives(read, PATIENCE):  # scipy's C code can crash over damaged bytes
        raise UserError(f"{path} is damaged, scipy crashed or hung over it: download it again")
    try:
        content = read()
    except Exception as error:  # scipy raises many kinds over a damaged file
        raise UserError(f"{path} is not a readable .mat file ({error}): download it again") from None
    lacking = [key for key in keys if key not in content]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: it is not xlsa17's file")
    return content


def index_vector(array: np.ndarray, what: str) -> np.ndarray:
    """A .mat column of 1-based whole numbers as a 0-based int64 vector."""
    flat = np.asarray(array).ravel()
    if flat.dtype.kind not in "uif" or not np.isfinite(flat).all() or (flat.dtype.kind == "f" and not np.array_equal(flat, np.round(flat))):
        raise UserError(f"{what} does not hold whole numbers")
    if flat.size and not 0 <= flat.min() <= flat.max() < 2**31:
        raise UserError(f"{what} runs from {flat.min()} to {flat.max()}: these are no indices")
    return flat.astype(np.int64) - 1


def class_table(array, what: str) -> np.ndarray:
    """A .mat table attributes x classes as (C, K) float32."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif" or array.ndim != 2:
        raise UserError(f"{what} is not a table of numbers (attributes x classes)")
    with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused
        return array.T.astype(np.float32)


def cell_texts(cells: np.ndarray, what: str) -> list[str]:
    """The strings of a .mat cell column."""
    texts = [np.asarray(cell).ravel() for cell in np.asarray(cells).ravel()]
    if not all(text.size == 1 and isinstance(text[0], str) and text[0] for text in texts):
        raise UserError(f"{what} is not a column of texts, or has an empty one")
    return [str(text[0]) for text in texts]


def read_split(data_root: Path, dataset: str, labels: np.ndarray) -> tuple[Split, list[str]]:
    """The split and class names of att_splits.mat, given the images' 0-based labels."""
    path = data_root / "xlsa17" / "data" / dataset / "att_splits.mat"
    mat = read_mat(path, LOCATIONS + ("att", "original_att", "allclasses_names"), optional=("train_loc", "val_loc"))
    trainval, test_seen, test_unseen = (index_vector(mat[key], f"{path}: {key}") for key in LOCATIONS)
    # the trap of section 2: in the common release these two reach into test_seen
    train, val = (np.intersect1d(index_vector(mat[key], f"{path}: {key}"), trainval) if key in mat else None
                  for key in ("train_loc", "val_loc"))
    split = check_split(Split(labels, trainval, test_seen, test_unseen, class_table(mat["att"], f"{path}: att"),
                              class_table(mat["original_att"], f"{path}: original_att"), train, val), path)
    class_names = cell_texts(mat["allclasses_names"], f"{path}: allclasses_names")
    if len(class_names) != len(split.att):
        raise UserError(f"{path}: {len(class_names)} class names for {len(split.att)} classes")
    twice = sorted(name for name, count in collections.Counter(class_names).items() if count > 1)
    if twice:
        raise UserError(f"{path}: allclasses_names has {twice[0]!r} twice: two classes cannot be one")
    return split, class_names


def read_dataset(data_root: Path, dataset: str) -> tuple[Split, list[str], list[str]]:
    """A dataset as xlsa17 describes it: split, class names (C), image paths relative to data root / dataset (N).

    Raises UserError for a missing folder or file (saying what goes where) and for contents that cannot be true.
    """
    layout = LAYOUTS[dataset]
    for folder, content in ((data_root / dataset / layout.images, f"the {dataset} images"),
                            (data_root / "xlsa17" / "data" / dataset, "res101.mat and att_splits.mat of xlsa17")):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: put {content} there, or name another --data_root"
                            + (" (python -m scegg.datasets.toy renders it)" if dataset == "TOY" else ""))
    path = data_root / "xlsa17" / "data" / dataset / "res101.mat"
    mat = read_mat(path, ("image_files", "labels"))
    tails = [image_tail(text, layout.anchor, path) for text in cell_texts(mat["image_files"], f"{path}: image_files")]
    labels = index_vector(mat["labels"], f"{path}: labels")
    if len(tails) != len(labels):
        raise UserError(f"{path}: {len(tails)} image files but {len(labels)} labels")
    split, class_names = read_split(data_root, dataset, labels)
    return split, class_names, tails


def image_tail(text: str, anchor: str, where) -> str:
    """The part of an image path of the authors' machine from its last folder `anchor` on, e.g. images/a/abbey/x.jpg."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    if anchor not in parts[:-1] or ".." in parts:
        raise UserError(f"{where}: the image path {text!r} has no folder {anchor}")
    return "/".join(parts[len(parts) - 1 - parts[::-1].index(anchor):])


def read_attribute_names(data_root: Path, dataset: str, count: int) -> list[str] | None:
    """The K attribute names of a dataset, None where it has no file of them. Raises UserError if they are not `count`."""
    for name in LAYOUTS[dataset].attribute_files:
        path = data_root / dataset / name
        if not path.is_file():
            continue
        if path.suffix == ".mat":
            names = cell_texts(read_mat(path, ("attributes",))["attributes"], f"{path}: attributes")
        else:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            names = [re.sub(r"^\s*\d+\s+", "", line).strip() for line in lines if line.strip()]
        if len(names) != count:
            raise UserError(f"{path} names {len(names)} attributes, but the class attributes are {count}")
        return names
    return None
