"""Which numbers are reported, and on what they were chosen."""
import json

import numpy as np
import pytest
import torch
from helpers import SMALL_RUN, feature_arrays, flags, run_training, write_features

from scegg.method.evaluation import Scores
from scegg.method.selection import Selection


@pytest.fixture
def path(tmp_path):
    """A small feature file with xlsa17's train and val classes; as in its common release these reach into the test images."""
    arrays = feature_arrays()
    seen_images = np.flatnonzero(~np.isin(arrays["labels"], (1, 4, 7)))
    is_val = np.isin(arrays["labels"][seen_images], (0, 5))
    return write_features(tmp_path / "f.hdf5", arrays | {"train_loc": seen_images[~is_val], "val_loc": seen_images[is_val]})


def scores(czsl, gzsl):
    return Scores(torch.tensor(czsl), torch.tensor(gzsl), None)


def test_selection_on_what_is_evaluated_and_by_choice():
    first = scores([0.2, 0.6, 0.5], [[0.1, 0.9], [0.5, 0.5], [0.4, 0.5]])
    second = scores([0.3, 0.4, 0.5], [[0.2, 0.9], [0.5, 0.6], [0.1, 0.1]])
    paper = Selection(gzsl=True)
    assert paper.update(1, first)["best_acc_zs"] == pytest.approx(60)
    logged = paper.update(2, second)
    assert logged["acc_zs"] == pytest.approx(50) and logged["best_acc_zs"] == pytest.approx(60)
    assert paper.pick() == {"czsl": (1, 1), "gzsl": (2, 1)} and paper.epoch == 2
    assert paper.unselected["acc_unseen"] == pytest.approx(10) and paper.metrics().acc_seen == pytest.approx(60)

    validated = Selection(gzsl=True, choice={"czsl": (1, 2), "gzsl": (2, 0)})
    assert "best_H" not in validated.update(1, first)
    validated.update(2, second)
    assert validated.metrics() == pytest.approx((50, 20, 90, 2 * 20 * 90 / 110))
    again = Selection(gzsl=True)
    again.load_state_dict(paper.state_dict())
    assert again.metrics() == paper.metrics()


def test_a_validated_run_chooses_nothing_on_the_test_set(path, tmp_path):
    run_training("CUB", "sun_gzsl.yaml", ["--features", str(path), "--runs", str(tmp_path / "runs"), "--device", "cpu", "--data_root",
                                              "none", *flags(**SMALL_RUN | {"nepoch": 4, "protocol": "validated"})])
    made, = (tmp_path / "runs").iterdir()
    summary = json.loads((made / "summary.json").read_text())
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if line["stage"] == "validation eggn"]
    assert summary["val_best_H"] == max(line["val_H"] for line in validation) and len(validation) == 4
    tested = [line for line in lines if line["stage"] == "eggn" and "H" in line]
    assert len(tested) <= 3 and not any("best_H" in line for line in lines) and "best_H" not in summary
    assert summary["H"] == next(line["H"] for line in tested if line["epoch"] == summary["best_epoch"])
    assert {"last_H", "last_acc_zs", "ausuc"} <= set(summary) and 0 <= summary["ausuc"] <= 1


def test_seen_bias_moves_images_to_the_unseen_classes(path, tmp_path):
    found = {}
    for bias in (0, 1000):
        run_training("CUB", "sun_gzsl.yaml", ["--features", str(path), "--runs", str(tmp_path / str(bias)), "--device", "cpu", "--data_root",
                                                  "none", *flags(**SMALL_RUN | {"seen_bias": bias})])
        summary, = (tmp_path / str(bias)).glob("*/summary.json")
        found[bias] = json.loads(summary.read_text())
    assert found[1000]["acc_seen"] == 0 and found[1000]["acc_zs"] == found[0]["acc_zs"] and found[1000]["ausuc"] == found[0]["ausuc"]


def test_scen_is_reused_only_where_stage_1_is_the_same(path, tmp_path, capsys):
    def train(*more, **changes):
        run_training("CUB", "sun_gzsl.yaml", ["--features", str(path), "--runs", str(tmp_path / "runs"), "--device", "cpu", "--data_root",
                                                  "none", *more, *flags(**SMALL_RUN | changes)])
        return max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime), "SCEN is taken from" in capsys.readouterr().out

    first, taken = train("--reuse_scen")
    assert not taken
    again, taken = train("--reuse_scen")
    assert taken and json.loads((again / "summary.json").read_text())["scen_from"] == first.name
    weights = [torch.load(folder / "model.pt", weights_only=True)["eggn"] for folder in (first, again)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert train("--reuse_scen", lr=1e-4)[1] and not train("--reuse_scen", scen_lr=1e-3)[1] and not train(seed=4)[1]
