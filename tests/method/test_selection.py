"""Which numbers are reported, and on what they were chosen."""

import numpy as np
import pytest
import torch

from helpers import (
    feature_arrays,
    read_metrics,
    read_summary,
    run_training,
    small_run_arguments,
    write_features,
)
from scegg.method.evaluation import Scores
from scegg.method.selection import Selection


@pytest.fixture
def path(tmp_path):
    """A small feature file with xlsa17's train and val classes.

    As in xlsa17's common release, these reach into the test images.
    """
    arrays = feature_arrays()
    seen_images = np.flatnonzero(~np.isin(arrays["labels"], (1, 4, 7)))
    is_val = np.isin(arrays["labels"][seen_images], (0, 5))
    arrays |= {"train_loc": seen_images[~is_val], "val_loc": seen_images[is_val]}
    return write_features(tmp_path / "f.hdf5", arrays)


FIRST_EPOCH = Scores(
    czsl=torch.tensor([0.2, 0.6, 0.5]),
    gzsl=torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.4, 0.5]]),
    linear=None,
)
SECOND_EPOCH = Scores(
    czsl=torch.tensor([0.3, 0.4, 0.5]),
    gzsl=torch.tensor([[0.2, 0.9], [0.5, 0.6], [0.1, 0.1]]),
    linear=None,
)


def test_selection_on_what_is_evaluated_and_by_choice():
    paper = Selection(gzsl=True)
    assert paper.update(1, FIRST_EPOCH)["best_acc_zs"] == pytest.approx(60)
    logged = paper.update(2, SECOND_EPOCH)
    assert logged["acc_zs"] == pytest.approx(50)
    assert logged["best_acc_zs"] == pytest.approx(60)
    assert paper.pick() == {"czsl": (1, 1), "gzsl": (2, 1)} and paper.epoch == 2
    assert paper.unselected["acc_unseen"] == pytest.approx(10)
    assert paper.metrics().acc_seen == pytest.approx(60)

    validated = Selection(gzsl=True, choice={"czsl": (1, 2), "gzsl": (2, 0)})
    assert "best_H" not in validated.update(1, FIRST_EPOCH)
    validated.update(2, SECOND_EPOCH)
    assert validated.metrics() == pytest.approx((50, 20, 90, 2 * 20 * 90 / 110))

    again = Selection(gzsl=True)
    again.load_state_dict(paper.state_dict())
    assert again.metrics() == paper.metrics()


def train(path, runs, *more, **changes):
    """A small run."""
    run_training("CUB", "sun_gzsl.yaml", small_run_arguments(path, runs, *more, **changes))


def test_a_validated_run_chooses_nothing_on_the_test_set(path, tmp_path):
    train(path, tmp_path / "runs", nepoch=4, protocol="validated")
    (made,) = (tmp_path / "runs").iterdir()
    summary, lines = read_summary(made), read_metrics(made)

    validation = [line for line in lines if line["stage"] == "validation eggn"]
    assert len(validation) == 4
    assert summary["val_best_H"] == max(line["val_H"] for line in validation)

    tested = [line for line in lines if line["stage"] == "eggn" and "H" in line]
    assert len(tested) <= 3
    assert not any("best_H" in line for line in lines) and "best_H" not in summary
    chosen = next(line for line in tested if line["epoch"] == summary["best_epoch"])
    assert summary["H"] == chosen["H"]

    assert {"last_H", "last_acc_zs", "ausuc"} <= set(summary)
    assert 0 <= summary["ausuc"] <= 1


def test_seen_bias_moves_images_to_the_unseen_classes(path, tmp_path):
    found = {}
    for bias in (0, 1000):
        train(path, tmp_path / str(bias), seen_bias=bias)
        (made,) = (tmp_path / str(bias)).iterdir()
        found[bias] = read_summary(made)

    assert found[1000]["acc_seen"] == 0
    assert found[1000]["acc_zs"] == found[0]["acc_zs"]
    assert found[1000]["ausuc"] == found[0]["ausuc"]


def test_scen_is_reused_only_where_stage_1_is_the_same(path, tmp_path, capsys):
    def train_and_look(*more, **changes):
        """(the run's folder, whether it took SCEN from another run)"""
        train(path, tmp_path / "runs", *more, **changes)
        made = max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
        return made, "SCEN is taken from" in capsys.readouterr().out

    first, taken = train_and_look("--reuse_scen")
    assert not taken
    again, taken = train_and_look("--reuse_scen")
    assert taken and read_summary(again)["scen_from"] == first.name

    weights = torch.load(first / "model.pt", weights_only=True)["eggn"]
    same_weights = torch.load(again / "model.pt", weights_only=True)["eggn"]
    for name, tensor in weights.items():
        assert torch.equal(tensor, same_weights[name])

    _, taken = train_and_look("--reuse_scen", lr=1e-4)
    assert taken
    _, taken = train_and_look("--reuse_scen", scen_lr=1e-3)
    assert not taken
    _, taken = train_and_look(seed=4)
    assert not taken
