"""Real photographs from end to end: 10 classes of CUB are preprocessed and trained on."""

import os

import numpy as np
import pytest
import scipy.io

import preprocessing
from helpers import flags, read_summary, run_training
from scegg.datasets.xlsa17 import read_dataset

SEEN, UNSEEN, IMAGES = 6, 4, 16


def link(source, target):
    """A symbolic link to what `source` really is; makes the folder around it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source.resolve(), target)


def matlab_column(texts):
    """Texts as MATLAB's cell array (n, 1)."""
    return np.array(texts, dtype=object)[:, None]


def write_subset(real_data, root):
    """A data root in the users' layout with some of CUB-50.

    The first 6 seen and 4 unseen classes, up to 16 images of each.
    """
    split, names, tails = read_dataset(real_data, "CUB")
    classes = np.concatenate([split.seen[:SEEN], split.unseen[:UNSEEN]])
    of_classes = [np.flatnonzero(split.labels == label)[:IMAGES] for label in classes]
    chosen = np.concatenate(of_classes)

    link(real_data / "w2v", root / "w2v")
    link(real_data / "CUB" / "attributes.txt", root / "CUB" / "attributes.txt")
    for image in chosen:
        link(real_data / "CUB" / tails[image], root / "CUB" / tails[image])

    folder = root / "xlsa17" / "data" / "CUB"
    folder.mkdir(parents=True)
    order = np.sort(classes)
    image_files = matlab_column(["/authors/" + tails[image] for image in chosen])
    labels = np.searchsorted(order, split.labels[chosen])[:, None] + 1
    scipy.io.savemat(folder / "res101.mat", {"image_files": image_files, "labels": labels})
    scipy.io.savemat(folder / "att_splits.mat", att_splits(split, names, chosen, order))


def att_splits(split, names, chosen, order):
    """The content of att_splits.mat for chosen images of classes in this order."""
    new_index = {old: new for new, old in enumerate(chosen)}
    content = {
        "att": split.att[order].T,
        "original_att": split.original_att[order].T,
        "allclasses_names": matlab_column([names[label] for label in order]),
    }
    for name in ("trainval", "test_seen", "test_unseen"):
        images = [new_index[image] for image in getattr(split, name) if image in new_index]
        content[f"{name}_loc"] = np.array(images)[:, None] + 1
    return content


@pytest.mark.slow
def test_real_birds_are_recognised_far_above_chance(real_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_subset(real_data, tmp_path / "birds")

    backbone = ["--backbone", "efficientnet_lite2", "--img_size", "224"]
    preprocessing.main(["--dataset", "CUB", "--data_root", "birds", *backbone, "-c"])
    settings = {
        "batch_size": 12,
        "scen_iterations": 100,
        "distill_iterations": 150,
        "nepoch": 10,
        "ngh": 256,
        "ndh": 256,
        "syn_num": 60,
        "log_curves": False,
    }
    argv = ["--data_root", "birds", "--device", "cpu", *backbone, *flags(**settings)]
    run_training("CUB", "sun_gzsl.yaml", argv)

    assert "CUB (not the paper's full dataset)" in capsys.readouterr().out
    (made,) = (tmp_path / "runs").iterdir()
    summary = read_summary(made)
    # chance: 25 % of 4 unseen classes, 10 % of all 10
    assert summary["local_acc_seen"] > 50 and summary["local_acc_zs"] > 40
    assert summary["best_acc_zs"] > 50
    assert summary["best_acc_unseen"] > 25 and summary["best_acc_seen"] > 40
    assert summary["best_H"] > 35
