"""What the tests of reports share: made-up summaries, the table's command, a small run of TOY."""

import csv
import io
import json
from typing import NamedTuple

import torch

import results
from helpers import SMALL_RUN, flags, run_training

METRICS = ("acc_zs", "acc_unseen", "acc_seen", "H")
PREFIXES = ("local_", "global_", "", "best_", "last_")
FULL = {
    "split_fingerprint": "62d41356ed4d",
    "full_published_split": True,
    "backbone": "resnet101",
}
IMG_SIZE = 64


def accuracies(start, prefixes=PREFIXES):
    """Metrics of a summary: start, start + 1, ... in the order of prefixes and METRICS."""
    keys = [prefix + name for prefix in prefixes for name in METRICS]
    return {key: start + index for index, key in enumerate(keys)}


def write_run(folder, name="CUB-20260101-000000-abc", start=20.0, **changes):
    """A run folder with the summary of a run on full CUB; returns the summary's path.

    A change to ... leaves the key out.
    """
    summary = {"dataset": "CUB", "seed": 1, "method": "SC-EGG", "protocol": "paper"}
    summary |= FULL
    summary |= accuracies(start)
    summary |= changes
    summary.setdefault("config", {"seed": summary["seed"], "syn_num": 300, "lr": 1e-4})

    path = folder / name / "summary.json"
    path.parent.mkdir(parents=True)
    kept = {key: value for key, value in summary.items() if value is not Ellipsis}
    path.write_text(json.dumps(kept))
    return path


def printed_table(capsys, folder, *argv, format):
    """(stdout, stderr) of results.py on a folder."""
    results.main([str(folder), "--format", format, *argv])
    return capsys.readouterr()


def table_rows(capsys, folder, *argv):
    """The table's rows by (method, dataset), and stderr."""
    out, err = printed_table(capsys, folder, *argv, format="csv")
    rows = csv.DictReader(io.StringIO(out))
    return {(row["method"], row["dataset"]): row for row in rows}, err


class ToyRun(NamedTuple):
    """A data root with 7 classes of 6 images, their feature file, and the folder of a run on it."""

    root: object
    features: object
    folder: object


def train_on_toy(features, runs, **changes):
    """Train a small run in the folder `runs`; returns the run's folder."""
    argv = ["--features", str(features), "--runs", str(runs)]
    argv += ["--device", "cpu", "--data_root", "none"]
    settings = SMALL_RUN | {"img_size": IMG_SIZE} | changes
    run_training("TOY", "toy.yaml", [*argv, *flags(**settings)])
    return next(runs.iterdir())


def as_baseline(run):
    """What a run of the CNN-feature baseline leaves: no SCEN, the scaler, EGGN."""
    weights = dict(run.weights)
    for name in ("scen", "global_cls"):
        weights.pop(name, None)

    minimum, maximum = torch.rand(2, run.features.shape[0]).sort(dim=0).values
    weights["scaler"] = {"minimum": minimum, "maximum": maximum}
    return run._replace(weights=weights)
