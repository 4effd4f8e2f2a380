"""One run of SC-EGG: SCEN (LEN + GEN), scaler, distillation, EGGN with evaluation."""
import contextlib
import dataclasses
import os
import shlex
import sys
from pathlib import Path

import torch

from scegg.run.checkpoint import Checkpoint, Stopped, check_identity, read_checkpoint
from scegg.config import Config, default_config, parse_flags, read_config
from scegg.features.reader import Features, open_features
from scegg.run.folder import Run, folder_to_resume, git_commit, new_folder, wandb_mode
from scegg.features.storage import Storage, choose_storage
from scegg.speed.onednn import fast_products
from scegg.method.selection import present
from scegg.run.summary import result_rows, result_table, results, save_curve
from scegg.run.reuse import find_scen, finished_runs, identity_of_code, identity_of_data
from scegg.run.pipeline import Training
from util import (FlagParser, UserError, keep_freed_memory, locked, peak_memory_gb, pick_device,
                  remove_partials, seed_everything)
from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.splits import validation_split
from scegg.datasets.xlsa17 import read_split
from scegg.features.feature_file import feature_file



def train(dataset: str, features: Features, config: Config, device: torch.device, place: Storage, run: Run,
          checkpoint: Checkpoint, scen: dict | None) -> tuple[str, dict]:
    """The whole procedure; scen: weights to start from (`find_scen`). Returns the result table as text and the summary.

    Raises UserError for a loss that is not finite and for splits that protocol validated cannot divide.
    """
    seed_everything(config.seed)
    torch.set_float32_matmul_precision(config.matmul_precision)
    facts = checkpoint.facts
    if config.protocol == "validated" and config.nepoch and "choice" not in facts:
        checkpoint.begin("validation ")
        split = validation_split(features.split, config.val_share, config.seed, features.path)
        validation = Training(features, split, config, device, place, checkpoint, lambda stage, values: run.log(
            f"validation {stage}", {name if name in ("iteration", "epoch") else f"val_{name}": value for name, value in values.items()}))
        validation.run()
        facts["choice"] = validation.selection.pick()
        facts["validation"] = {f"val_{name}": value for name, value in validation.selection.best().items()}
        del validation
    checkpoint.begin("")
    training = Training(features, features.split, config, device, place, checkpoint, run.log, facts.get("choice"))
    if scen and "scen" not in checkpoint.done:
        training.scen.load_state_dict(scen["scen"])
        checkpoint.done["scen"] = config.scen_iterations
        facts["scen_from"] = scen["run"]
    checkpoint.save()
    training.run()
    run.save_weights(training.weights() | {"split_fingerprint": features.split.fingerprint, "attribute_names": features.attribute_names,
                                           "class_names": features.class_names})
    curve = facts.pop("curve", None)
    if curve is not None:
        save_curve(run.folder / "seen_unseen_curve.csv", curve)
    summary = {"dataset": dataset, "method": config.method, "protocol": config.protocol, "seed": config.seed}
    summary |= identity_of_data(features) | {"full_published_split": features.split.is_published(dataset), "git_commit": git_commit()}
    seconds = dict(facts["seconds"])
    seconds |= {f"{phase}eggn": seconds[f"{phase}eggn"] - seconds[f"{phase}evaluate"] for phase in ("", "validation ")
                if f"{phase}evaluate" in seconds}
    summary |= identity_of_code(device) | {"seconds": {name: round(value, 3) for name, value in seconds.items()}}
    summary |= peak_memory_gb(device) | present({name: facts.get(name) for name in ("scen_from", "ausuc")}) | facts.get("validation", {})
    for name in ("local", "global"):
        summary |= {f"{name}_{key}": value for key, value in facts.get(name, {}).items()}
    summary |= results(training.selection, config) | {"config": dataclasses.asdict(config)}
    rows = result_rows(facts, training.selection, config)
    return result_table(dataset, summary["full_published_split"], rows), summary


def draw_figures(run: Run, dataset: str, config: Config, features: Features, data_root: Path):
    """log_figures: t-SNE, attention maps and the seen-unseen curve into the run's folder and W&B; what a run lacks for one is said.

    For the t-SNE of synthetic CNN features a run of the baseline on the same features is looked for beside this one.
    """
    import visualize  # matplotlib and scikit-learn take seconds to load
    weights = torch.load(run.folder / "model.pt", map_location="cpu", weights_only=True)
    trained = visualize.Trained(run.folder.name, dataset, config, features, weights)
    baselines = finished_runs(run.folder.parent, identity_of_data(features) | {"dataset": dataset, "visual_features": "cnn"})
    baseline = lambda: next((visualize.load_run(folder, features.path) for folder in baselines), None)
    drawings = {"tsne": lambda: visualize.tsne_figure(trained, baseline()),
                "attention": lambda: visualize.attention_figure(trained, visualize.dataset_images(trained, data_root, 4, config.seed)),
                "curve": lambda: visualize.curve_figure(visualize.read_curve(run.folder / "seen_unseen_curve.csv"), run.folder.name)}
    for name, draw in drawings.items():
        try:
            visualize.save(draw(), run.folder / name)
            run.log_picture(name, run.folder / f"{name}.png")
        except Exception as error:  # the run is finished: a picture is not worth a traceback
            print(f"no {name} picture: {UserError(error)}")


def check_against_xlsa17(data_root: Path, dataset: str, features: Features):
    """Raises UserError if data_root has an xlsa17 split and the features were made with another one."""
    if (data_root / "xlsa17" / "data" / dataset / "att_splits.mat").is_file():
        try:
            fingerprint = read_split(data_root, dataset, features.split.labels)[0].fingerprint
        except UserError:  # labels of one dataset, locations of another
            fingerprint = "of other images"
        if fingerprint != features.split.fingerprint:
            raise UserError(f"{features.path} was made with split {features.split.fingerprint}, but {data_root} holds "
                            f"split {fingerprint}: run preprocessing.py again, or name the right --data_root")


def made_features(dataset: str, backbone: str) -> Path:
    """Where preprocessing.py puts the features of a backbone; raises UserError with its command, and what else is there."""
    path = feature_file(dataset, backbone)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*.hdf5"))
        raise UserError(f"{path} is missing: make it with preprocessing.py --dataset {dataset} --backbone {backbone}, or name it with "
                        "--features" + (f" (there is {', '.join(others)}: give its --backbone)" if others else ""))
    return path


def place_of_maps(features: Features, device: torch.device, cache: str) -> Storage:
    """Where trainval's feature maps are to be kept while stage 1 draws from them."""
    return choose_storage(features.size(len(features.split.trainval)), device, features.path.parent, features.compressed, cache)


def resume_command(folder: Path, options) -> str:
    """The command that goes on with a run, with the flags that are not in its config."""
    kept = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in vars(options).items()
                   if name in ("dataset", "device", "data_root", "cache", "wandb") and value not in (None, "auto", Path("data"), "TOY"))
    return f"python {Path(sys.argv[0]).name} --resume {shlex.quote(str(folder.resolve()))}{kept}"


@contextlib.contextmanager
def ending(run: Run, resume: str):
    """Close the logs however the run ends. A stop names the command to go on with; too little memory what to change."""
    try:
        yield
    except Stopped as stop:
        run.close(exit_code=1)
        print(f"stopped; go on with: {resume}", flush=True)
        sys.exit(128 + stop.signum)
    except BaseException as error:
        run.close(exit_code=1)
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise UserError("the memory is full: lower --batch_size or --syn_num, make the networks smaller, or keep the feature maps "
                            f"elsewhere (--cache ram, --cache disk), in a new run; on a larger machine: {resume}") from None
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or run.folder}: {error.strerror}; free some disk space or mend the disk, then go on "
                            f"with: {resume}") from None
        raise
    run.close(exit_code=0)


def main(argv=None, dataset: str | None = None):
    """Parse flags, check everything that can be checked, train (or go on training), print the table.

    dataset: the one of a script that names it; None: --dataset does.
    """
    parser = FlagParser(f"Train SC-EGG on {dataset or 'a dataset'}.")
    if dataset is None:
        parser.add_argument("--dataset", choices=list(LAYOUTS), default="TOY", help="what to train on (default: TOY)")
    parser.add_argument("--config", type=Path, nargs="+", default=None,
                        help="W&B YAML file; further ones, an ablation's, are laid over it (default: the dataset's in wandb_config/)")
    parser.add_argument("--features", type=Path, default=None, help="HDF5 feature file (default: where preprocessing.py puts it)")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="its xlsa17 split, if there, must be the features' own")
    parser.add_argument("--device", default=None, help="cpu, cuda or a GPU's number (default: CUDA if there is one)")
    parser.add_argument("--cache", choices=("auto", "device", "ram", "disk", "none"), default="auto",
                        help="where trainval's feature maps are kept (default: the fastest place that holds them; beside a CPU an uncompressed file itself)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--resume", nargs="?", const="", default=None, metavar="RUN",
                        help="go on with this unfinished run, or with the last one of the dataset")
    parser.add_argument("--reuse_scen", action="store_true",
                        help="take SCEN from a finished run in --runs with the same stage 1, if there is one")
    parser.add_argument("--wandb", choices=("online", "offline", "disabled"), default=None,
                        help="default: WANDB_MODE, else online if logged in and offline if not")
    options, overrides = parse_flags(parser, argv)
    dataset = dataset or options.dataset
    keep_freed_memory()
    with contextlib.ExitStack() as held:
        folder = saved = None
        if options.resume is not None:
            folder = folder_to_resume(options.runs, dataset, options.resume)
            held.enter_context(locked(folder / ".lock", f"training {folder}"))
            saved = read_checkpoint(folder / "checkpoint.pt")
        config = read_config(options.config or [folder / "config.yaml" if folder else default_config(dataset)], overrides)
        device = pick_device(options.device)
        path = options.features or (Path(saved["facts"]["features"]) if saved else made_features(dataset, config.backbone))
        features = open_features(path, config.backbone, config.img_size, dataset)
        check_against_xlsa17(options.data_root, dataset, features)
        identity = {"dataset": dataset} | dataclasses.asdict(config) | identity_of_data(features) | identity_of_code(device)
        if saved:
            check_identity(saved["identity"], identity, folder / "checkpoint.pt")
        print(features.split.describe(dataset))
        place = place_of_maps(features, device, options.cache)
        reuse_scen = saved["facts"].get("reuse_scen", False) if saved else options.reuse_scen
        scen = find_scen(options.runs, config, features, device) if reuse_scen else None
        if not saved:
            folder = new_folder(options.runs, dataset)
            held.enter_context(locked(folder / ".lock", f"training {folder}"))
        remove_partials(folder)
        print(f"run {folder} on {device}" + (", resumed" if saved else ""))
        known = saved["facts"] if saved else {"features": str(path.resolve()), "logged": 0, "reuse_scen": reuse_scen,
                                              "wandb_id": os.environ.get("WANDB_RUN_ID", folder.name)}
        run = Run(folder, config, dataset, wandb_mode(options.wandb), known["wandb_id"], known["logged"])
        checkpoint = Checkpoint(run, identity, saved)
        checkpoint.facts |= known
        with ending(run, resume_command(folder, options)):
            with checkpoint.signals(), fast_products(device):
                table, summary = train(dataset, features, config, device, place, run, checkpoint, scen)
            run.finish(summary)
            if config.log_figures:
                draw_figures(run, dataset, config, features, options.data_root)
    print(f"saved {run.folder}: config.yaml, metrics.jsonl, summary.json, model.pt\n\n{table}")

