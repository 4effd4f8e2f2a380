"""What is installed, what lies on the disk, and what to run next.

    python -m scegg.doctor --data_root data

The exit status is 0 when the installation is sound, and 1 when something in it is broken. Nothing
is changed, and no question goes over the network.
"""

import datetime
import importlib
import importlib.metadata
import netrc
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

try:
    from util import FlagParser, UserError, exit_on_user_error
except ModuleNotFoundError as error:
    sys.exit(f"BROKEN: {error.name} is not installed: pip install -r requirements.txt")

HERE = Path(__file__).resolve().parents[1]
BROKEN = "BROKEN"
OLDEST, NEWEST = (3, 11), (3, 14)  # versions of Python
IMPORTED = ("torch", "torchvision", "scipy.io", "h5py", "PIL.Image", "yaml", "wandb")


# --- The machine -----------------------------------------------------------------------------
#
# What a broken installation may lack is imported inside the functions that need it.


def installation() -> list[str]:
    """Lines on Python and on every package of requirements.txt; a broken one begins with BROKEN."""
    lines, as_pinned = [python_line()], []
    for name, pinned in pins((HERE / "requirements.txt").read_text()):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{BROKEN}: {name} is not installed: pip install -r requirements.txt")
            continue
        if found.split("+")[0] == pinned:
            as_pinned.append(f"{name} {found}")
        else:
            lines.append(f"{name} {found}; requirements.txt pins {pinned}")

    return [*lines, f"as pinned: {', '.join(as_pinned)}", timm_line(), *failed_imports()]


def timm_line() -> str:
    """One line on timm, which is optional."""
    try:
        return f"timm {importlib.metadata.version('timm')}: --backbone timm/<name> works"
    except importlib.metadata.PackageNotFoundError:
        return "timm is not installed; --backbone timm/<name> needs requirements-timm.txt"


def pins(requirements: str) -> list[tuple[str, str]]:
    """(package, version) of each pin that holds for this Python."""
    pattern = r"^([\w.-]+)==([^\s;]+)(?:; python_version (<|>=) \"(\d+)\.(\d+)\")?$"
    found = []
    for name, version, side, major, minor in re.findall(pattern, requirements, re.MULTILINE):
        is_older = bool(side) and sys.version_info[:2] < (int(major), int(minor))
        if not side or is_older == (side == "<"):
            found.append((name, version))
    return found


def python_line() -> str:
    """One line on Python's version."""
    found = f"Python {sys.version.split()[0]}"
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return found
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"{BROKEN}: Python {oldest} to {newest} is needed; this is {found}"


def failed_imports() -> list[str]:
    """Lines on packages that are installed but cannot be imported.

    Such a package was built for another system, or a library that it needs is missing.
    """
    lines = []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            lines.append(f"{BROKEN}: import {name} fails ({UserError(error)})")
    return lines


def devices() -> list[str]:
    """Lines on the CUDA devices and their memory."""
    import torch

    if not torch.cuda.is_available():
        return [
            f"no CUDA device that torch {torch.__version__} can use: "
            f"everything runs on the CPU ({os.cpu_count()} cores)"
        ]

    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info(index))
        name = torch.cuda.get_device_name(index)
        lines.append(f"cuda:{index} {name}, {free:.1f} of {total:.1f} GB free")
    return lines


def wandb_state() -> str:
    """One line on whether W&B would log online, from the environment and ~/.netrc alone."""
    from scegg.run.wandb_mirror import MODES

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = server.split("//")[-1].split("/")[0]
    try:
        key = os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        key = None

    if key:
        line = f"W&B has a key for {host}"
    else:
        line = f"W&B has no key for {host}: runs are logged offline (`wandb login` changes that)"

    mode = os.environ.get("WANDB_MODE")
    if mode:
        line += f"; WANDB_MODE={mode}"
        if mode not in MODES:
            line += f", which is none of {', '.join(MODES)}"
    return line


# --- The datasets --------------------------------------------------------------------------------


class DatasetState(NamedTuple):
    """What is known of a dataset's images, attributes and word vectors."""

    lines: list[str]
    fingerprint: str | None  # of its split, if that can be read
    is_ready: bool  # preprocessing can start


def dataset_state(data_root: Path, dataset: str) -> DatasetState:
    """Look at the data of a dataset."""
    from scegg.datasets.layouts import LAYOUTS
    from scegg.datasets.xlsa17 import places_of_images, read_attribute_names, read_dataset

    folder = data_root / dataset
    try:
        split, _, tails = read_dataset(data_root, dataset)
        places = places_of_images(data_root, dataset, tails)
        missing = [place for place in places if not (folder / place).is_file()]
        names = read_attribute_names(data_root, dataset, split.att.shape[1])
    except UserError as error:
        return DatasetState([str(error), *mending_lines(data_root, dataset)], None, False)

    images = f"{len(tails) - len(missing)} of {len(tails)} images are there"
    if missing:
        images += f", the first one missing is {missing[0]}: unpack the dataset again"
        images += "".join(f"; {command}" for command in unpacking(folder))
    lines = [split.describe(dataset), images]
    if names is None and LAYOUTS[dataset].attribute_files:
        expected = " or ".join(LAYOUTS[dataset].attribute_files)
        lines.append(f"no attribute names: expected {expected} in {folder}")
    lines.append(word_vectors_line(data_root, dataset))
    return DatasetState(lines, split.fingerprint, not missing)


def mending_lines(data_root: Path, dataset: str) -> list[str]:
    """The commands that bring a dataset's pictures from somewhere near to their place."""
    from scegg.datasets.layouts import LAYOUTS
    from scegg.datasets.xlsa17 import image_folder

    if image_folder(data_root, dataset).is_dir():
        return []
    place = data_root / dataset / LAYOUTS[dataset].images
    found = misplaced(data_root / dataset, place.name)
    if found is None:
        return [f"unpack it: {command}" for command in unpacking(data_root / dataset)]
    names = (shlex.quote(str(path)) for path in (place.parent, found, place))
    return ["its pictures lie in another place: mkdir -p {} && mv {} {}".format(*names)]


def misplaced(folder: Path, name: str) -> Path | None:
    """A folder of that name, in whatever case, up to four levels below; it holds something."""
    for depth in range(1, 5):
        for path in sorted(folder.glob("/".join("*" * depth))):
            if path.name.lower() == name.lower() and path.is_dir() and any(path.iterdir()):
                return path
    return None


def unpacking(folder: Path) -> list[str]:
    """The commands that unpack the archives in a dataset's folder."""
    commands = {".zip": "unzip -q {0} -d {1}", ".tgz": "tar -xzf {0} -C {1}"}
    commands |= {".gz": commands[".tgz"], ".tar": "tar -xf {0} -C {1}"}
    archives = [path for path in sorted(folder.glob("*")) if path.suffix in commands]
    return [
        commands[path.suffix].format(shlex.quote(str(path)), shlex.quote(str(folder)))
        for path in archives
    ]


def word_vectors_line(data_root: Path, dataset: str) -> str:
    """One line on the word vectors that were made for a dataset."""
    names = [f"{dataset}_attribute{suffix}" for suffix in (".pkl", ".npy")]
    found = [name for name in names if (data_root / "w2v" / name).is_file()]
    if found:
        return f"word vectors: {', '.join(found)}"
    return "word vectors: none of its own, so a model in w2v/, or Gaussian ones (a trial only)"


def feature_line(path: Path):
    """One line on a feature file, and its Features if they can be trained on, else None."""
    from scegg.features.reader import open_features

    status = path.stat()
    made = datetime.datetime.fromtimestamp(status.st_mtime).strftime("%Y-%m-%d %H:%M")
    try:
        features = open_features(path)
    except UserError as error:
        return str(error), None

    provenance, split = features.provenance, features.split
    backbone = provenance.get("backbone", "an unnamed backbone")
    img_size = provenance.get("img_size", "an unknown size of")
    shape = "x".join(map(str, features.shape))
    compression = "compressed" if features.compressed else "not compressed"
    line = (
        f"{path}: {backbone} at {img_size} px, {len(split.labels)} maps {shape}, {compression}, "
        f"{status.st_size / 1e9:.2f} GB, split {split.fingerprint}, of {made}"
    )
    return line, features


def next_command(data_root: Path, dataset: str, is_ready: bool, usable: list) -> str:
    """What to run next for a dataset. usable: the Features that can be trained on."""
    from scegg.config import default_config
    from scegg.features.feature_file import feature_file

    is_toy = dataset == "TOY"
    root = ""
    if data_root != Path("data"):
        root = f" --data_root {shlex.quote(str(data_root))}"

    if usable:
        train = f"python {training_script(dataset)}{root}"
        if not default_config(dataset).is_file():
            train += " --config wandb_config/cub_gzsl.yaml"
        own = feature_file(dataset, "efficientnet_lite2" if is_toy else "resnet101")
        if own in [features.path for features in usable]:
            return train
        return train + flags_of(usable[0])

    if is_ready:
        flags = " --compression"
        if is_toy:
            flags = " --backbone efficientnet_lite2 --img_size 224 --normalization backbone"
        return f"python preprocessing.py --dataset {dataset}{root}{flags}"

    if is_toy:
        return f"python -m scegg.datasets.toy{root}"
    again = f"python -m scegg.doctor{root}"
    return f"put {dataset} below {data_root} (docs/data.md says how), then {again}"


def training_script(dataset: str) -> str:
    """The script that trains on a dataset."""
    if dataset == "TOY":
        return "train_joint.py"
    own = f"train_joint_{dataset}.py"
    return own if (HERE / own).is_file() else f"train_joint.py --dataset {dataset}"


def flags_of(features) -> str:
    """The flags that name a feature file and what it was made with."""
    flags = f" --features {shlex.quote(str(features.path))}"
    for key in ("backbone", "img_size"):
        if key in features.provenance:
            flags += f" --{key} {features.provenance[key]}"
    return flags


def dataset_report(data_root: Path, dataset: str) -> list[str]:
    """All lines on a dataset, the last one says what to run next."""
    from scegg.features.feature_file import feature_file

    state = dataset_state(data_root, dataset)
    lines, usable = list(state.lines), []
    for path in sorted(feature_file(dataset, "resnet101").parent.glob("[!.]*.hdf5")):
        line, features = feature_line(path)
        lines.append(line)
        if features and state.fingerprint in (None, features.split.fingerprint_of_images):
            usable.append(features)

    return [*lines, f"next: {next_command(data_root, dataset, state.is_ready, usable)}"]


# --- What was not finished -----------------------------------------------------------------------


def unfinished(runs: Path) -> list[str]:
    """Lines on parts of preprocessing and on runs that wait to go on."""
    parts = sorted(path for path in Path("data").glob("*/*.parts-*") if path.is_dir())
    lines = [parts_line(folder) for folder in parts]

    for checkpoint in sorted(runs.glob("*/checkpoint.pt")):
        run = checkpoint.parent
        if not (run / "summary.json").exists():
            script = training_script(run.name.split("-")[0])
            lines.append(
                f"{run}: a run that was not finished; "
                f"python {script} --resume {run} goes on with it"
            )
    return lines


def parts_line(folder: Path) -> str:
    """One line on a folder of preprocessing's parts."""
    files = [path for path in folder.glob("*.hdf5") if not path.name.startswith(".")]
    size = sum(path.stat().st_size for path in files) / 1e9
    return (
        f"{folder}: {len(files)} parts of preprocessing, {size:.2f} GB; "
        "the command that made them goes on with them"
    )


def print_section(title: str, lines: list[str]):
    """Print indented lines below a title."""
    print(title, *lines, sep="\n  ")


def main(argv=None):
    parser = FlagParser("Check the installation, the data and what is unfinished.")
    parser.add_argument(
        "--data_root",
        type=Path,
        default=Path("data"),
        help="folder of CUB/, SUN/, AWA2/, TOY/, xlsa17/, w2v/",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    options = parser.parse_args(argv)

    lines = installation()
    print_section("installation", lines)
    if any(line.startswith(BROKEN) for line in lines):
        sys.exit(1)

    free = shutil.disk_usage(".").free / 1e9
    print_section("", [*devices(), wandb_state(), f"{free:.1f} GB of disk are free here"])

    from scegg.datasets.layouts import LAYOUTS, WRONG, add_own_layouts

    add_own_layouts(options.data_root)
    for error in WRONG.values():
        print_section("\na description of a dataset", [f"left out: {error}"])
    for dataset, layout in LAYOUTS.items():
        is_usual = layout.paper or dataset == "TOY"
        if not is_usual and not (options.data_root / dataset).is_dir():
            continue
        print_section(f"\n{dataset}", dataset_report(options.data_root, dataset))
    print_section("\nunfinished", unfinished(options.runs) or ["nothing"])


if __name__ == "__main__":
    exit_on_user_error(main)
