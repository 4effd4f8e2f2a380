"""What tests share: paths, small feature files made on the spot, small runs."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

import train_joint

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "published_scegg_small.npz"
SUN_CONFIG = ROOT / "wandb_config" / "sun_gzsl.yaml"

# The command line that `run_training("CUB", "sun_gzsl.yaml", ...)` stands for.
TRAIN_COMMAND = [
    sys.executable,
    str(ROOT / "train_joint_CUB.py"),
    "--config",
    str(SUN_CONFIG),
]

SMALL_RUN = {
    "batch_size": 6,
    "scen_iterations": 20,
    "distill_iterations": 30,
    "distill_hidden": 16,
    "nepoch": 2,
    "ngh": 32,
    "ndh": 32,
    "syn_num": 20,
    "classifier_epochs": 3,
    "log_freq_iteration": 10,
    "log_curves": False,  # drawing takes longer than such a run
}


def feature_arrays(seed=0, per_class=12, classes=9, unseen=(1, 4, 7), K=11, D=24, side=3):
    """The datasets of a small feature file from which a run can learn.

    Each image's map (D, side, side) is its class's attributes, mixed into the channels, plus noise.
    The last three images of every seen class are test images.
    """
    rng = np.random.default_rng(seed)
    original_att = rng.uniform(0, 100, (classes, K))
    att = original_att / np.linalg.norm(original_att, axis=1, keepdims=True)

    labels = np.repeat(np.arange(classes), per_class)
    to_channels = rng.normal(size=(K, D))
    signal = (att[labels] @ to_channels)[:, :, None, None]
    signal = signal + rng.normal(0, 0.3, (len(labels), D, side, side))

    is_unseen = np.isin(labels, unseen)
    held_out = np.arange(len(labels)) % per_class >= per_class - 3
    return {
        "feature_map": np.maximum(signal, 0).astype(np.float32),
        "labels": labels,
        "trainval_loc": np.flatnonzero(~is_unseen & ~held_out),
        "test_seen_loc": np.flatnonzero(~is_unseen & held_out),
        "test_unseen_loc": np.flatnonzero(is_unseen),
        "att": att,
        "original_att": original_att,
        "w2v_att": rng.normal(size=(K, 10)),
    }


def write_features(path, arrays, **attributes):
    """Write arrays as an HDF5 feature file; attributes become provenance."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file.attrs.update({"backbone": "resnet101", "img_size": 448} | attributes)
    return path


def flags(**values):
    """Keyword values as command-line flags."""
    return [f"--{name}={value}" for name, value in values.items()]


def small_run_arguments(features, runs, *more, **changes):
    """The arguments of a small run on the CPU: a feature file, the folder of runs, more flags.

    changes: keys of the config that differ from SMALL_RUN.
    """
    places = ["--features", str(features), "--runs", str(runs), "--data_root", "none"]
    return [*places, "--device", "cpu", *more, *flags(**SMALL_RUN | changes)]


def run_training(dataset, config, argv):
    """train_joint.py on a dataset with a file of wandb_config/."""
    train_joint.main(["--config", str(ROOT / "wandb_config" / config), *argv], dataset=dataset)


def run_script(name, *argv):
    """A script of the project in this process: (exit status, stderr).

    Starting Python for it takes seconds.
    """
    words, status, said = [name, *map(str, argv)], 0, io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            status = end.code
    return status, said.getvalue()


def read_metrics(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_summary(folder):
    """The summary of a finished run."""
    return json.loads((folder / "summary.json").read_text())
