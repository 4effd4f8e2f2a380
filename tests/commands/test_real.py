"""Real photographs end to end: 12 classes of CUB through preprocessing and training, judged against chance."""
import json
import os

import numpy as np
import pytest
import scipy.io
from helpers import flags, run_training

import preprocessing
from scegg.datasets.xlsa17 import read_dataset

SEEN, UNSEEN, IMAGES = 8, 4, 24


def write_subset(real_data, root):
    """A data root with the first 8 seen and 4 unseen classes of CUB-50, up to 24 images each, in the users' layout."""
    split, names, tails = read_dataset(real_data, "CUB")
    classes = np.concatenate([split.seen[:SEEN], split.unseen[:UNSEEN]])
    chosen = np.concatenate([np.flatnonzero(split.labels == label)[:IMAGES] for label in classes])
    new_index = {old: new for new, old in enumerate(chosen)}
    for old in chosen:
        (root / "CUB" / tails[old]).parent.mkdir(parents=True, exist_ok=True)
        os.symlink((real_data / "CUB" / tails[old]).resolve(), root / "CUB" / tails[old])
    os.symlink((real_data / "CUB" / "attributes.txt").resolve(), root / "CUB" / "attributes.txt")
    os.symlink((real_data / "w2v").resolve(), root / "w2v")
    folder = root / "xlsa17" / "data" / "CUB"
    folder.mkdir(parents=True)
    column = lambda texts: np.array(texts, dtype=object)[:, None]
    labels = np.searchsorted(np.sort(classes), split.labels[chosen])
    scipy.io.savemat(folder / "res101.mat", {"image_files": column(["/authors/" + tails[old] for old in chosen]),
                                             "labels": labels[:, None] + 1})
    locations = {name: np.array([new_index[i] for i in getattr(split, name) if i in new_index])[:, None] + 1
                 for name in ("trainval", "test_seen", "test_unseen")}
    order = np.sort(classes)
    scipy.io.savemat(folder / "att_splits.mat", {f"{name}_loc": loc for name, loc in locations.items()} | {
        "att": split.att[order].T, "original_att": split.original_att[order].T,
        "allclasses_names": column([names[label] for label in order])})


@pytest.mark.slow
def test_real_birds_are_recognised_far_above_chance(real_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_subset(real_data, tmp_path / "birds")
    preprocessing.main(["--dataset", "CUB", "--data_root", "birds", "--backbone", "efficientnet_lite2", "--img_size", "224", "-c"])
    run_training("CUB", "sun_gzsl.yaml", ["--data_root", "birds", "--device", "cpu", *flags(
        backbone="efficientnet_lite2", img_size=224, batch_size=16, scen_iterations=200, distill_iterations=300, nepoch=6,
        ngh=512, ndh=512, syn_num=60)])
    run, = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert "CUB (not the paper's full dataset)" in capsys.readouterr().out
    # chance: 25 % of 4 unseen classes, 8 % of all 12
    assert summary["local_acc_seen"] > 50 and summary["local_acc_zs"] > 40
    assert summary["best_acc_zs"] > 50 and summary["best_acc_unseen"] > 25 and summary["best_acc_seen"] > 40
    assert summary["best_H"] > 35
