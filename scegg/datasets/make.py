"""Make a dataset of a folder of pictures and a table of class vectors, as xlsa17 describes one.

    python -m scegg.datasets.make --name PETS --images my_pets --semantics pets.csv --seen seen.txt

my_pets has a folder of pictures for each class. pets.csv has a line for each class: its name, then
its numbers. seen.txt names the seen classes, one a line; all others are unseen.
"""

import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

from scegg.datasets.layouts import FOLDER, NAME, OWN
from scegg.datasets.semantics import composed, read_semantics
from scegg.datasets.splits import hold_out
from util import (
    FlagParser,
    UserError,
    atomic_path,
    exit_on_user_error,
    make_folder,
    remedy,
    text_encoding,
    write_text,
)

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp"),
    *(".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"),
}
IMAGES = "images"  # the folder of the pictures, and the anchor of their paths
VAL_SHARE = 0.25  # of the seen classes are val classes, for protocol: validated


class Pictures(NamedTuple):
    """The pictures of a folder: class names (C); of each picture its path in it, and its class."""

    classes: list[str]
    files: list[str]
    labels: np.ndarray


def find_pictures(folder: Path) -> Pictures:
    """The pictures in the class folders of a folder, in alphabetical order.

    Raises UserError for a folder without such, and for a class without a picture.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder")
    classes = sorted(path.name for path in folder.iterdir() if is_shown(path) and path.is_dir())
    if not classes:
        raise UserError(f"--images {folder} has no folders: put the pictures of each class in one")
    if IMAGES in classes:
        raise UserError(f"--images {folder}: a class may not be called {IMAGES}")

    files, labels, others = [], [], 0
    for label, name in enumerate(classes):
        inside = sorted(path for path in (folder / name).iterdir() if is_shown(path))
        pictures = [path.name for path in inside if is_picture(path)]
        if not pictures:
            raise UserError(f"{folder / name} holds no picture ({', '.join(sorted(SUFFIXES))})")
        others += len(inside) - len(pictures)
        files += [f"{name}/{file}" for file in pictures]
        labels += [label] * len(pictures)
    if others:
        print(f"{folder}: {others} files that are no pictures are left out (so are inner folders)")
    check_names(folder, files)
    return Pictures(classes, files, np.array(labels))


def is_shown(path: Path) -> bool:
    """Whether a file or folder is not hidden."""
    return not path.name.startswith(".")


def is_picture(path: Path) -> bool:
    """Whether a file has a picture's ending; folders and links to nothing are no files."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def check_names(folder: Path, files: list[str]):
    """Raises UserError for a path that a .mat file cannot hold, or that is read as another one."""
    for file in files:
        is_utf8 = not any("\ud800" <= letter <= "\udfff" for letter in file)
        if not is_utf8 or "\\" in file:
            raise UserError(
                f"{folder / file}: names must be UTF-8, without a backslash: give it another name"
            )


def read_seen(path: Path, classes: list[str]) -> np.ndarray:
    """Which classes are seen (C,). Raises UserError for a missing file and an unknown class."""
    try:
        lines = path.read_text(encoding=text_encoding(path)).splitlines()
    except OSError as error:
        reason = f"{error.strerror}): {remedy(error)}"
        raise UserError(f"--seen {path} could not be read ({reason}") from None
    except UnicodeError as error:
        raise UserError(f"--seen {path} is no UTF-8 ({error}): save it as UTF-8") from None
    seen = {composed(line.strip()) for line in lines if line.strip()}

    classes = [composed(name) for name in classes]
    unknown = sorted(seen - set(classes))
    if unknown:
        raise UserError(f"--seen {path}: {unknown[0]} is no class, there is no folder of its name")
    if not 2 <= len(seen) < len(classes):
        raise UserError(
            f"--seen {path} names {len(seen)} of {len(classes)} classes: "
            "2 or more must be seen, and 1 or more unseen"
        )
    return np.array([name in seen for name in classes])


def split_arrays(pictures: Pictures, seen: np.ndarray, share: float, seed: int) -> dict:
    """The parts of the split as xlsa17 has them: columns that count from 1.

    Raises UserError for a seen class of a single picture.
    """
    counts = np.bincount(pictures.labels)
    few = np.flatnonzero(seen & (counts < 2))
    if len(few):
        raise UserError(
            f"the seen class {pictures.classes[few[0]]} has one picture: it needs 2 or more, to "
            "train and to test"
        )

    rng = np.random.default_rng(seed)
    classes = np.flatnonzero(seen)
    val = rng.permutation(classes)[: max(1, round(VAL_SHARE * len(classes)))]
    everything = np.arange(len(pictures.labels))
    test_seen = hold_out(everything, pictures.labels, classes, share, rng)
    trainval = np.setdiff1d(everything[seen[pictures.labels]], test_seen)
    in_val = np.isin(pictures.labels[trainval], val)
    parts = {
        "trainval_loc": trainval,
        "test_seen_loc": test_seen,
        "test_unseen_loc": everything[~seen[pictures.labels]],
        "train_loc": trainval[~in_val],
        "val_loc": trainval[in_val],
    }
    return {name: part[:, None] + 1.0 for name, part in parts.items()}


def class_arrays(vectors: np.ndarray, classes: list[str], path: Path) -> dict:
    """xlsa17's tables (K, C): as given, and with columns of length 1; and the classes' names."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"{path}: the numbers of {classes[np.argmin(lengths)]} are all 0")
    return {
        "original_att": vectors.astype(np.float64).T,
        "att": (vectors / lengths).T,
        "allclasses_names": cells(classes),
    }


def cells(texts: list[str]) -> np.ndarray:
    """A .mat cell column."""
    column = np.empty((len(texts), 1), object)
    column[:, 0] = texts
    return column


def make(options):
    """Write the dataset below `options.out`. Raises UserError for all that cannot be.

    <out>/<name>/images                      a link to the pictures
    <out>/<name>/attributes.txt              the names of the columns, if the table has any
    <out>/<name>/layout.yaml                 the description
    <out>/xlsa17/data/<name>/*.mat           labels, split and class vectors
    """
    folder, mats = options.out / options.name, options.out / "xlsa17/data" / options.name
    if folder.exists() and not (folder / OWN).is_file() and not only_images(folder):
        raise UserError(f"{folder} was not written by this command (it has no {OWN}): move it away")

    pictures = find_pictures(options.images)
    vectors, names = read_semantics(options.semantics, pictures.classes)
    if options.semantics.suffix == ".npy":
        first, last = pictures.classes[0], pictures.classes[-1]
        print(f"{options.semantics}: its first row is {first}'s, its last row {last}'s")
    seen = read_seen(options.seen, pictures.classes)
    paths = [f"/{options.name}/{IMAGES}/{file}" for file in pictures.files]
    labels = pictures.labels[:, None] + 1.0
    split = split_arrays(pictures, seen, options.test_share, options.seed)
    split |= class_arrays(vectors, pictures.classes, options.semantics)

    make_folder(folder)
    make_folder(mats)
    link(folder / IMAGES, options.images)
    (folder / "attributes.txt").unlink(missing_ok=True)
    if names:
        lines = [f"{number} {name}\n" for number, name in enumerate(names, start=1)]
        write_text(folder / "attributes.txt", "".join(lines))
    save_mat(mats / "res101.mat", {"image_files": cells(paths), "labels": labels})
    save_mat(mats / "att_splits.mat", split)
    write_text(folder / OWN, description(options.name, vectors, bool(names)))
    report(options, pictures, seen)


def only_images(folder: Path) -> bool:
    """Whether the user has put nothing but the pictures into the dataset's folder."""
    return [path.name for path in folder.iterdir()] == [IMAGES]


def link(place: Path, images: Path):
    """Have the pictures at their place, without a copy. Raises UserError where that cannot be."""
    pictures = images.resolve()
    if place.exists() and place.resolve() == pictures:
        return
    if place.is_symlink():
        place.unlink()
    if place.exists():
        raise UserError(f"{place} is there already: give it as --images, or move it away")
    try:
        place.symlink_to(pictures, target_is_directory=True)
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{place} could not be made a link ({error}): move the pictures there, and give it as "
            "--images"
        ) from None


def save_mat(path: Path, arrays: dict):
    """Write a .mat file; it appears whole."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        scipy.io.savemat(file, arrays, do_compression=True)


def description(name: str, vectors: np.ndarray, named: bool) -> str:
    """The dataset's YAML."""
    units = "vector"
    if named:
        units = "percent" if vectors.max() > 1 else "fraction"
    lines = [
        "# written by python -m scegg.datasets.make",
        f"name: {name}",
        f"images: {IMAGES}",
        f"anchor: {IMAGES}",
        "attribute_files: [attributes.txt]",
        f"units: {units}",
    ]
    return "\n".join(lines) + "\n"


def report(options, pictures: Pictures, seen: np.ndarray):
    """Say what was made, and what to run next."""
    flags = f"--dataset {options.name}"
    if options.out != Path("data"):
        flags += f" --data_root {shlex.quote(str(options.out))}"
    print(
        f"{options.out / options.name}: {len(pictures.files)} pictures of {len(seen)} classes "
        f"({seen.sum()} seen)\nnext: python preprocessing.py {flags}\n"
        f"then: python train_joint.py {flags} --config wandb_config/cub_gzsl.yaml"
    )


def parse_arguments(argv=None):
    """The flags. Raises UserError for wrong ones."""
    parser = FlagParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--name", default="OWN", help="of the dataset, as --dataset takes it (default: OWN)")
    add("--images", type=Path, required=True, help="folder of class folders of pictures")
    add("--semantics", type=Path, required=True, help="class vectors, .csv or .npy")
    add("--seen", type=Path, required=True, help="text file of the seen classes, one a line")
    add("--out", type=Path, default=Path("data"), help="the data root (default: data)")
    add("--test_share", type=float, default=0.2, help="of a seen class's pictures, to test on")
    add("--seed", type=int, default=0, help="of the choice of test pictures and val classes")
    options = parser.parse_args(argv)

    is_taken = (FOLDER / f"{options.name.lower()}.yaml").exists()
    if not NAME.fullmatch(options.name) or is_taken or options.name in ("xlsa17", "w2v"):
        raise UserError(f"--name {options.name}: take another, a word of letters, digits and _")
    if not 0 < options.test_share < 1:
        raise UserError(f"--test_share {options.test_share}: must be between 0 and 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must not be negative")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    try:
        make(options)
    except BrokenPipeError:  # the reader's, not the disk's
        raise
    except OSError as error:  # a full or read-only disk
        raise UserError(
            f"{error.filename or options.out} could not be read or written "
            f"({error.strerror or error}): name another --out, or free some disk space"
        ) from error


if __name__ == "__main__":
    exit_on_user_error(main)
