"""One run, from its flags to its summary: SCEN, scaler, distillation, EGGN with its evaluation."""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from scegg.config import Config, default_config, parse_flags, read_config
from scegg.datasets.layouts import LAYOUTS, add_layout_flag, find_layout
from scegg.datasets.xlsa17 import SPLIT_KEYS, VALIDATION_KEYS, read_mat, split_file, split_of
from scegg.features.feature_file import feature_file
from scegg.features.ranks import require_one_process
from scegg.features.reader import Features, open_features
from scegg.features.storage import Storage, choose_storage
from scegg.processes import locked
from scegg.run.checkpoint import Checkpoint, Stopped, check_saved, read_checkpoint
from scegg.run.folder import RunFolder, folder_to_resume, new_folder
from scegg.run.identity import identity_of_code, identity_of_data, provenance
from scegg.run.pipeline import Pipeline, run_validation
from scegg.run.reuse import find_scen
from scegg.run.summary import result_rows, result_table, save_curve, summarise
from scegg.run.wandb_mirror import PROJECT, Mirror, wandb_mode
from scegg.run.winners import description
from scegg.speed.allocator import keep_freed_memory
from scegg.speed.onednn import fast_matmul
from scegg.speed.threads import fix_threads
from util import (
    FlagParser,
    UserError,
    pick_device,
    remedy,
    remove_partials,
    seed_everything,
)

# flags that a resumed run needs again, and their defaults; the others are in its config
FLAGS_TO_REPEAT = {
    "dataset": "TOY",
    "data_root": Path("data"),
    "layout": None,
    "device": None,
    "cache": "auto",
    "wandb": None,
    "wandb_project": None,
    "wandb_name": None,
    "wandb_group": None,
}


class Job(NamedTuple):
    """What a run trains, checked. scen: weights to start from (`find_scen`), or None."""

    dataset: str
    config: Config
    features: Features
    device: torch.device
    storage: Storage
    scen: dict | None


def main(argv=None, dataset: str | None = None, report: Callable | None = None):
    """Parse flags, check all that can be checked, train (or continue), print the table.

    dataset: that of a script which names it; None: --dataset does. report: draws and tells W&B
    what a finished run has to show (`scegg.report.figures.report_run`).
    """
    options, overrides = parse_flags(flag_parser(dataset), argv)
    require_one_process()
    dataset = dataset or options.dataset
    find_layout(dataset, options.data_root, options.layout)
    keep_freed_memory()
    fix_threads()

    with contextlib.ExitStack() as held:
        path = saved = None
        if options.resume is not None:
            path = folder_to_resume(options.runs, dataset, options.resume)
            held.enter_context(locked(path / ".lock", f"training {path}"))
            saved = read_checkpoint(path / "checkpoint.pt")

        job, identity, notes = prepare(options, overrides, dataset, path, saved)
        if path is None:
            path = new_folder(options.runs, dataset)
            held.enter_context(locked(path / ".lock", f"training {path}"))
            notes["wandb_id"] = os.environ.get("WANDB_RUN_ID", "").strip() or path.name
        remove_partials(path)
        print(f"run {path} on {job.device}" + (", resumed" if saved else ""))

        mirror = mirror_of(job, path, notes["wandb_id"], options)
        folder = RunFolder(path, job.config, mirror, notes["logged"])
        checkpoint = Checkpoint(folder, identity, saved)
        checkpoint.notes |= notes

        with closing_logs(folder, resume_command(path, options)):
            with checkpoint.signals(), fast_matmul(job.device):
                table, summary = train(job, folder, checkpoint)
            folder.finish(summary)
            if report:
                report(path, job, options.data_root, mirror)
            if job.config.log_model:
                mirror.log_artifacts(path, job.features.path, summary)

    print(f"saved {path}: config.yaml, metrics.jsonl, summary.json, model.pt\n\n{table}")


def flag_parser(dataset: str | None) -> FlagParser:
    """The run's own flags; every key of the config is one besides."""
    parser = FlagParser(f"Train SC-EGG on {dataset or 'a dataset'}.")
    if dataset is None:
        names = ", ".join(LAYOUTS)
        help = f"{names}, or one of your own (default: TOY)"
        parser.add_argument("--dataset", default="TOY", help=help)
    else:  # a sweep's agent gives a preempted run its whole config again
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument("--dataset", choices=[dataset], **hidden)
    add_layout_flag(parser)
    add_input_flags(parser)
    add_run_flags(parser)
    return parser


def add_input_flags(parser: FlagParser):
    """What is trained on, and with what settings."""
    flag = parser.add_argument
    flag(
        "--config",
        type=Path,
        nargs="+",
        help="W&B YAML file, and others laid over it (default: the dataset's in wandb_config/)",
    )
    flag("--features", type=Path, help="HDF5 feature file (default: where preprocessing puts it)")
    flag(
        "--data_root",
        type=Path,
        default=Path("data"),
        help="its xlsa17 split, if there, must be the features' own",
    )

    flag("--device", help="cpu, cuda or a GPU's number (default: CUDA if there is one)")
    flag(
        "--cache",
        choices=("auto", "device", "ram", "disk", "none"),
        default="auto",
        help="where trainval's feature maps are kept (default: the fastest place that holds them; "
        "beside a CPU an uncompressed file itself)",
    )


def add_run_flags(parser: FlagParser):
    """Where the run lies, what it continues or takes from others, who is told of it."""
    flag = parser.add_argument
    flag("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    flag(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue this unfinished run, or the last one of the dataset",
    )
    flag(
        "--reuse_scen",
        action="store_true",
        help="take SCEN from a finished run in --runs with the same stage 1, if there is one",
    )

    flag(
        "--wandb",
        choices=("online", "offline", "disabled"),
        help="default: WANDB_MODE, else online if logged in and offline if not",
    )
    for name, default in (
        ("project", f"WANDB_PROJECT, else {PROJECT}"),
        ("name", "WANDB_NAME, else that of the run's folder"),
        ("group", "WANDB_RUN_GROUP, else one for all seeds of a config"),
    ):
        flag(f"--wandb_{name}", help=f"the run's {name} in W&B (default: {default})")


# ---- before the run


def prepare(
    options, overrides: dict, dataset: str, path: Path | None, saved: dict | None
) -> tuple[Job, dict, dict]:
    """Read and check what the run needs; returns its Job, its identity, and its first notes.

    path, saved: folder and checkpoint of a run to continue. Raises UserError for all that is wrong.
    """
    own_config = path / "config.yaml" if path else default_config(dataset)
    if not options.config and not own_config.is_file():
        raise UserError(
            f"{own_config} is missing: name a config with --config, such as "
            "wandb_config/cub_gzsl.yaml"
        )
    config = read_config(options.config or [own_config], overrides)
    device = pick_device(options.device)

    feature_path = options.features
    if feature_path is None and saved:
        feature_path = Path(saved["notes"]["features"])
    if feature_path is None:
        feature_path = made_features(dataset, config)
    features = open_features(feature_path, config.backbone, config.img_size, dataset)
    check_against_xlsa17(options.data_root, dataset, features)

    identity = identity_of(dataset, config, features, device)
    notes = {"features": str(feature_path.resolve()), "logged": 0, "reuse_scen": options.reuse_scen}
    if saved:
        check_saved(saved, identity, path / "checkpoint.pt")
        notes = saved["notes"]

    print(features.split.describe(dataset))
    storage = storage_of_maps(features, device, options)
    scen = None
    if notes.get("reuse_scen", False):
        scen = find_scen(options.runs, config, features, device)
    return Job(dataset, config, features, device, storage, scen), identity, notes


def identity_of(dataset: str, config: Config, features: Features, device: torch.device) -> dict:
    """What must be equal for the run to continue: config, data, code."""
    return {
        "dataset": dataset,
        **dataclasses.asdict(config),
        **identity_of_data(features),
        **identity_of_code(device),
    }


def storage_of_maps(features: Features, device: torch.device, options) -> Storage:
    """Where trainval's feature maps are kept while stage 1 draws from them."""
    size = features.size(len(features.split.trainval))
    folder = features.path.parent
    packed = features.compressed and not features.is_repacked
    return choose_storage(size, device, folder, packed, options.cache)


def made_features(dataset: str, config: Config) -> Path:
    """Where preprocessing.py puts the features that a config asks for.

    Raises UserError with the command that makes them, and what else is there.
    """
    path = feature_file(dataset, config.backbone)
    if path.is_file():
        return path

    others = ", ".join(sorted(other.name for other in path.parent.glob("[!.]*.hdf5")))
    hint = f" (there is {others}: give its --backbone)" if others else ""
    raise UserError(
        f"{path} is missing: make it with preprocessing.py --dataset {dataset} --backbone "
        f"{config.backbone} --img_size {config.img_size}, or name it with --features{hint}"
    )


def check_against_xlsa17(data_root: Path, dataset: str, features: Features):
    """Raises UserError if data_root holds another split than the features were made with.

    So it does for other class attributes, and for a split that cannot be read.
    """
    path = split_file(data_root, dataset)
    if not path.is_file():
        return

    content = read_mat(path, SPLIT_KEYS, VALIDATION_KEYS)
    try:
        split, _ = split_of(content, features.split.labels, path)
        fingerprint = split.fingerprint
    except UserError:  # labels of one dataset, locations of another
        fingerprint = "of other images"
    if fingerprint != features.split.fingerprint_of_images:
        raise UserError(
            f"{features.path} was made with split {features.split.fingerprint}, but {data_root} "
            f"holds split {fingerprint}: run preprocessing.py again, or name the right --data_root"
        )
    is_ours = "split_fingerprint" in features.provenance and features.split.semantics is None
    if is_ours and not same_numbers(split.att, features.split.att):
        raise UserError(
            f"{features.path} was made with other class attributes than {path} holds: run "
            "preprocessing.py again, or name the right --data_root"
        )


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tables agree, but for the rounding of float32."""
    return one.shape == other.shape and np.allclose(one, other, atol=1e-5)


def mirror_of(job: Job, path: Path, wandb_id: str, options) -> Mirror:
    """The run in W&B."""
    facts = {"dataset": job.dataset, "provenance": provenance(job.features, job.device)}
    names = {name: getattr(options, f"wandb_{name}") for name in ("project", "name", "group")}
    return Mirror(path, job.config, facts, wandb_mode(options.wandb), wandb_id, **names)


# ---- the run


def train(job: Job, folder: RunFolder, checkpoint: Checkpoint) -> tuple[str, dict]:
    """The whole procedure. Returns the result table as text and the summary.

    Raises UserError for a loss that is not finite, and for a split that protocol validated cannot
    divide.
    """
    dataset, config, features, device, storage, scen = job
    notes = checkpoint.notes
    seed_everything(config.seed)
    torch.set_float32_matmul_precision(config.matmul_precision)

    if config.protocol == "validated" and config.nepoch and "choice" not in notes:
        run_validation(features, config, device, storage, checkpoint, folder.log)

    checkpoint.begin("")
    pipeline = Pipeline(
        features,
        features.split,
        config,
        device,
        storage,
        checkpoint,
        folder.log,
        notes.get("choice"),
    )
    if scen and "scen" not in checkpoint.done:
        pipeline.scen.load_state_dict(scen["scen"])
        checkpoint.done["scen"] = config.scen_iterations
        notes["scen_from"] = scen["run"]
    checkpoint.save()
    pipeline.run()

    winners = dict(pipeline.winners.kept)
    if "validation_winners" in notes:
        winners["validation"] = notes["validation_winners"]
    model = pipeline.weights() | description(dataset, features, config) | {"winners": winners}
    notes["model_sha256"] = folder.save_weights(model)
    curve = notes.pop("curve", None)
    if curve is not None:
        save_curve(folder.path / "seen_unseen_curve.csv", curve)

    summary = summarise(dataset, features, config, device, notes, pipeline.selection)
    published, w2v = summary["full_published_split"], summary["w2v"]
    return result_table(dataset, published, result_rows(summary), w2v), summary


def resume_command(path: Path, options) -> str:
    """The command that continues a run, with the flags that are not in its config."""
    flags = ""
    for name, value in vars(options).items():
        if name in FLAGS_TO_REPEAT and value != FLAGS_TO_REPEAT[name]:
            flags += f" --{name} {shlex.quote(str(value))}"
    script = shlex.quote(str(Path(sys.argv[0]).resolve()))
    return f"python {script} --resume {shlex.quote(str(path.resolve()))}{flags}"


@contextlib.contextmanager
def closing_logs(folder: RunFolder, resume: str):
    """Close the logs however the run ends.

    A stop names the command that continues; too little memory or disk, what to change first.
    """
    try:
        yield
    except Stopped as stop:
        folder.close(exit_code=1)
        print(f"stopped; go on with: {resume}", flush=True)
        sys.exit(128 + stop.signum)

    except BaseException as error:
        folder.close(exit_code=1)
        out_of_memory = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        if out_of_memory or "can't allocate memory" in str(error):
            raise UserError(
                "the memory is full: lower --batch_size or --syn_num, make the networks smaller, "
                "or keep the feature maps elsewhere (--cache ram, --cache disk), in a new run; on "
                f"a larger machine: {resume}"
            ) from None

        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # else Python tries once more at its end, and complains
            reason = "a pipe broke: nobody reads the output any more, or W&B's process ended"
            raise UserError(f"{reason}; go on with: {resume}") from None
        if isinstance(error, OSError):
            raise UserError(
                f"{error.filename or folder.path}: {error.strerror or error}; {remedy(error)} "
                f"first, then go on with: {resume}"
            ) from None
        raise
    folder.close(exit_code=0)
