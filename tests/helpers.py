"""What tests share: paths, small feature files made on the spot, small runs."""

from pathlib import Path

import h5py
import numpy as np

import train_joint

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "published_scegg_small.npz"


def feature_arrays(seed=0, per_class=12, classes=9, unseen=(1, 4, 7), K=11, D=24, side=3):
    """The datasets of a small, learnable feature file: class signatures mixed into random non-negative maps."""
    rng = np.random.default_rng(seed)
    original_att = rng.uniform(0, 100, (classes, K))
    att = original_att / np.linalg.norm(original_att, axis=1, keepdims=True)
    labels = np.repeat(np.arange(classes), per_class)
    to_channels = rng.normal(size=(K, D))
    signal = (att[labels] @ to_channels)[:, :, None, None] + rng.normal(0, 0.3, (len(labels), D, side, side))
    is_unseen = np.isin(labels, unseen)
    held_out = np.arange(len(labels)) % per_class >= per_class - 3
    where = lambda mask: np.flatnonzero(mask)
    return {"feature_map": np.maximum(signal, 0).astype(np.float32), "labels": labels,
            "trainval_loc": where(~is_unseen & ~held_out), "test_seen_loc": where(~is_unseen & held_out),
            "test_unseen_loc": where(is_unseen), "att": att, "original_att": original_att,
            "w2v_att": rng.normal(size=(K, 10))}


def write_features(path, arrays, **attributes):
    """Write arrays as an HDF5 feature file; attributes become provenance."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file.attrs.update({"backbone": "resnet101", "img_size": 448} | attributes)
    return path


SMALL_RUN = {"batch_size": 6, "scen_iterations": 20, "distill_iterations": 30, "distill_hidden": 16, "nepoch": 2, "ngh": 32,
             "ndh": 32, "syn_num": 20, "classifier_epochs": 3, "log_freq_iteration": 10}


def flags(**values):
    """Keyword values as command-line flags."""
    return [f"--{name}={value}" for name, value in values.items()]


def run_training(dataset, config, argv):
    """train_joint.py on a dataset with a file of wandb_config/."""
    train_joint.main(["--config", str(ROOT / "wandb_config" / config), *argv], dataset=dataset)
