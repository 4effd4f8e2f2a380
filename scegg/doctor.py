"""What is installed, what lies on the disk, and what to run next.

    python -m scegg.doctor --data_root data

Exit status 0 when the installation is sound, 1 when something in it is broken. Nothing is changed, and the net is not asked.
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

try:
    from util import FlagParser, UserError, exit_on_user_error
except ModuleNotFoundError as error:
    sys.exit(f"BROKEN: {error.name} is not installed: pip install -r requirements.txt")

HERE = Path(__file__).resolve().parents[1]
BROKEN = "BROKEN"


def installation() -> list[str]:
    """Lines on Python and on every package of requirements.txt; a broken one begins with BROKEN."""
    version = sys.version_info[:2]
    lines = [("" if (3, 10) <= version <= (3, 12) else f"{BROKEN}: Python 3.10 to 3.12 is needed; this is ") + f"Python {sys.version.split()[0]}"]
    same = []
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)", (HERE / "requirements.txt").read_text(), re.MULTILINE):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{BROKEN}: {name} is not installed: pip install -r requirements.txt")
            continue
        if found.split("+")[0] == pinned:
            same.append(f"{name} {found}")
        else:
            lines.append(f"{name} {found}; requirements.txt pins {pinned}")
    return lines + [f"as pinned: {', '.join(same)}"] + importable()


def importable() -> list[str]:
    """Lines on what does not import although it is installed (a build for another system, a library that is missing)."""
    lines = []
    for name in ("torch", "torchvision", "scipy.io", "h5py", "PIL.Image", "yaml", "wandb"):
        try:
            importlib.import_module(name)
        except Exception as error:
            lines.append(f"{BROKEN}: import {name} fails ({UserError(error)})")
    return lines


def devices() -> list[str]:
    """Lines on the CUDA devices and their memory."""
    import torch
    if not torch.cuda.is_available():
        return [f"no CUDA device that torch {torch.__version__} can use: everything runs on the CPU ({os.cpu_count()} cores)"]
    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        lines.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    return lines


def wandb_state() -> str:
    """Whether runs would be logged online: from the environment and ~/.netrc alone, nobody is asked."""
    mode = os.environ.get("WANDB_MODE")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        key = os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        key = None
    state = f"has a key for {host}" if key else f"has no key for {host}: runs are logged offline (`wandb login` changes that)"
    from scegg.run.folder import MODES
    return f"W&B {state}" + (f"; WANDB_MODE={mode}" + ("" if mode in MODES else f", which is none of {', '.join(MODES)}") if mode else "")


def dataset_lines(data_root: Path, dataset: str) -> tuple[list[str], str | None, bool]:
    """Lines on the data of a dataset, its split's fingerprint if it can be read, and whether preprocessing can start."""
    from scegg.datasets.layouts import LAYOUTS
    from scegg.datasets.xlsa17 import read_attribute_names, read_dataset
    try:
        split, _, tails = read_dataset(data_root, dataset)
        missing = [tail for tail in tails if not (data_root / dataset / tail).is_file()]
        lines = [split.describe(dataset), f"{len(tails) - len(missing)} of {len(tails)} images are there"
                 + (f", the first one missing is {missing[0]}: unpack the dataset again" if missing else "")]
        names = read_attribute_names(data_root, dataset, split.att.shape[1])
    except UserError as error:
        return [str(error)], None, False
    if names is None:
        lines.append(f"no attribute names: expected {' or '.join(LAYOUTS[dataset].attribute_files)} in {data_root / dataset}")
    vectors = [path.name for suffix in (".pkl", ".npy") if (path := data_root / "w2v" / f"{dataset}_attribute{suffix}").is_file()]
    lines.append(f"word vectors: {', '.join(vectors) or 'none of its own, so a model in w2v/, or Gaussian ones (a trial only)'}")
    return lines, split.fingerprint, not missing


def feature_line(path: Path):
    """One line on a feature file, and its Features if it can be trained on."""
    from scegg.features.reader import open_features
    made = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    try:
        features = open_features(path)
    except UserError as error:
        return str(error), None
    of = features.provenance
    return (f"{path}: {of.get('backbone', 'an unnamed backbone')} at {of.get('img_size', 'an unknown size of')} px, {len(features.split.labels)} maps "
            f"{'x'.join(map(str, features.shape))}, {'compressed' if features.compressed else 'not compressed'}, "
            f"{path.stat().st_size / 1e9:.2f} GB, split {features.split.fingerprint}, of {made}"), features


def next_command(data_root: Path, dataset: str, ready: bool, usable: list) -> str:
    """What to run for a dataset; usable: the Features that can be trained on."""
    from scegg.features.feature_file import feature_file
    root = "" if data_root == Path("data") else f" --data_root {shlex.quote(str(data_root))}"
    backbone, rest = ("efficientnet_lite2", " --img_size 224 --normalization backbone") if dataset == "TOY" else ("resnet101", "")
    train = "python train_joint.py" if dataset == "TOY" else f"python train_joint_{dataset}.py"
    if feature_file(dataset, backbone) in [features.path for features in usable]:
        return train + root
    if usable:
        of = usable[0].provenance
        return (f"{train}{root} --features {shlex.quote(str(usable[0].path))}"
                + "".join(f" --{key} {of[key]}" for key in ("backbone", "img_size") if key in of))
    if ready:
        return f"python preprocessing.py --dataset {dataset}{root}" + (f" --backbone {backbone}{rest}" if rest else " --compression")
    return f"python -m scegg.datasets.toy{root}" if dataset == "TOY" else f"put {dataset} below {data_root} (README, Data layout), then python -m scegg.doctor{root}"


def unfinished(runs: Path) -> list[str]:
    """Lines on parts of preprocessing and on runs that wait to go on."""
    lines = []
    for folder in sorted(path for path in Path("data").glob("*/*.parts-*") if path.is_dir()):
        files = [file for file in folder.iterdir() if file.suffix == ".hdf5" and not file.name.startswith(".")]
        lines.append(f"{folder}: {len(files)} parts of preprocessing, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB; "
                     "the command that made them goes on with them")
    for checkpoint in sorted(runs.glob("*/checkpoint.pt")):
        if not (checkpoint.parent / "summary.json").exists():
            script = {"TOY": "train_joint.py"}.get(name := checkpoint.parent.name.split("-")[0], f"train_joint_{name}.py")
            lines.append(f"{checkpoint.parent}: a run that was not finished; python {script} --resume {checkpoint.parent} goes on with it")
    return lines


def main(argv=None):
    parser = FlagParser("Check the installation, the data and what is unfinished.")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of CUB/, SUN/, AWA2/, TOY/, xlsa17/, w2v/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    options = parser.parse_args(argv)
    lines = installation()
    print("installation", *lines, sep="\n  ")
    if any(line.startswith(BROKEN) for line in lines):
        sys.exit(1)
    print("", *devices(), wandb_state(), f"{shutil.disk_usage('.').free / 1e9:.1f} GB of disk are free here", sep="\n  ")
    from scegg.datasets.layouts import LAYOUTS
    from scegg.features.feature_file import feature_file
    for dataset in LAYOUTS:
        lines, fingerprint, ready = dataset_lines(options.data_root, dataset)
        found = [feature_line(path) for path in sorted(feature_file(dataset, "resnet101").parent.glob("*.hdf5"))]
        usable = [features for _, features in found if features and fingerprint in (None, features.split.fingerprint)]
        print("", dataset, *(f"  {line}" for line in [*lines, *(line for line, _ in found)]),
              f"  next: {next_command(options.data_root, dataset, ready, usable)}", sep="\n")
    waiting = unfinished(options.runs)
    print("", "unfinished", *(f"  {line}" for line in waiting or ["nothing"]), sep="\n")


if __name__ == "__main__":
    exit_on_user_error(main)
