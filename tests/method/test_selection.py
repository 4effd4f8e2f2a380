"""Which numbers are reported, and on what they were chosen."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers import (
    SUN_CONFIG,
    feature_arrays,
    read_metrics,
    read_summary,
    run_training,
    small_run_arguments,
    write_features,
)
from scegg.config import read_config
from scegg.datasets.splits import Split
from scegg.method.evaluation import Metrics, Scores, Validated
from scegg.method.selection import Selection
from scegg.run import main
from scegg.run.pipeline import run_validation, with_equal_steps


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
    paper = Selection(read_config(SUN_CONFIG, {}))
    assert paper.update(1, FIRST_EPOCH)["best_acc_zs"] == pytest.approx(60)
    logged = paper.update(2, SECOND_EPOCH)
    assert logged["acc_zs"] == pytest.approx(50)
    assert logged["best_acc_zs"] == pytest.approx(60)
    assert paper.epoch == 2 and paper.picked["czsl"]["epoch"] == 1
    assert paper.unselected["acc_unseen"] == pytest.approx(10)
    assert paper.metrics().acc_seen == pytest.approx(60)

    again = Selection(paper.config)
    again.load_state_dict(paper.state_dict())
    assert again.metrics() == paper.metrics()


def by_class(*means):
    """Accuracies of four classes around each mean, in per cent to fractions."""
    return [mean / 100 + torch.tensor([-0.1, -0.05, 0.05, 0.1]) for mean in means]


def held_out(scores, acc_zs, U, S, H, share=None):
    """Scores with what a validated run reports of them."""
    accuracies = {"czsl": by_class(acc_zs), "gzsl": by_class(U, S)}
    return scores._replace(validated=Validated(Metrics(acc_zs, U, S, H), share, accuracies))


def test_a_validation_chooses_and_the_run_after_it_obeys():
    """Epochs are chosen by what validated reports, not by the best classifier epochs."""
    first, second = (
        held_out(FIRST_EPOCH, 50, 30, 60, 40, share=0.2),
        held_out(SECOND_EPOCH, 40, 50, 50, 50, share=0.3),
    )
    validation = Selection(read_config(SUN_CONFIG, {"nepoch": 2}))
    validation.update(1, first)
    validation.update(2, second)
    choice = validation.pick()
    assert choice == {"czsl": {"epoch": 1}, "gzsl": {"epoch": 2, "unseen_share": 0.3}}
    assert validation.metrics() == (50, 50, 50, 50) and validation.unseen_share == 0.3

    validated = Selection(validation.config, choice=choice)
    assert "best_H" not in validated.update(1, second)
    validated.update(2, first)
    assert validated.metrics() == (40, 30, 60, 40)
    assert validated.unselected["acc_unseen"] == pytest.approx(40)


@pytest.mark.parametrize("noise, epoch", ((0.3, 3), (0.0, 2)))
def test_an_earlier_epoch_must_be_a_clear_gain_over_the_last(noise, epoch):
    """Three points more H are chance if classes differ by much, else a gain."""
    validation = Selection(read_config(SUN_CONFIG, {"nepoch": 3}))
    first, better, last = (held_out(FIRST_EPOCH, H, H, H, H) for H in (40, 53, 50))
    for groups in last.validated.by_class.values():
        for group in groups:
            group += noise * torch.tensor([1, -1, -1, 1])

    for number, scores in enumerate((first, better, last), start=1):
        validation.update(number, scores)
    assert validation.pick()["gzsl"] == {"epoch": epoch, "unseen_share": None}
    assert validation.pick()["czsl"] == {"epoch": epoch}


def train(path, runs, *more, **changes):
    """A small run."""
    run_training("CUB", "sun_gzsl.yaml", small_run_arguments(path, runs, *more, **changes))


def test_a_validated_run_chooses_nothing_on_the_test_set(path, tmp_path):
    train(path, tmp_path / "runs", nepoch=4, protocol="validated")
    (made,) = (tmp_path / "runs").iterdir()
    summary, lines = read_summary(made), read_metrics(made)

    validation = [line for line in lines if line["stage"] == "validation eggn"]
    assert len(validation) == 4
    assert summary["val_best_H"] in [line["val_H"] for line in validation]
    assert summary["val_best_H"] >= validation[-1]["val_H"]

    tested = [line for line in lines if line["stage"] == "eggn" and "H" in line]
    assert len(tested) <= 3
    assert not any("best_H" in line for line in lines) and "best_H" not in summary
    chosen = next(line for line in tested if line["epoch"] == summary["best_epoch"])
    assert summary["H"] == chosen["H"] and 0 <= summary.get("unseen_share", 0) < 1

    assert {"last_H", "last_acc_zs", "ausuc"} <= set(summary)
    assert 0 <= summary["ausuc"] <= 1


class HiddenTestLabels(np.ndarray):
    """Labels of all images, of which those of the test images raise an error when touched."""

    def __getitem__(self, index):
        images = np.arange(len(self))[index]
        if np.isin(images, self.test).any():
            raise AssertionError("a test label was read")
        return self.view(np.ndarray)[index]

    def __array_function__(self, function, *_):
        raise AssertionError(f"all labels were given to {function.__name__}")

    __array_ufunc__ = __array_function__


def test_held_out_classes_have_classifiers_of_as_many_steps():
    """150 epochs of 90 + 2 x 10 features are as many as 330 of 40 + 10."""
    labels = np.repeat(np.arange(5), 30)
    parts = np.split(np.arange(150), [90, 120])
    att = np.ones((5, 3), np.float32)
    whole = Split(labels, parts[0], parts[1][:0], np.r_[parts[1], parts[2]], att, att)
    part = dataclasses.replace(
        whole, trainval=np.arange(40), test_unseen=np.arange(60, 90), att=att[:3]
    )
    config = read_config(SUN_CONFIG, {"classifier_epochs": 150, "syn_num": 10})
    assert with_equal_steps(config, part, whole).classifier_epochs == round(150 * 110 / 50)
    only_czsl = dataclasses.replace(config, gzsl=False)
    assert with_equal_steps(only_czsl, part, whole).classifier_epochs == 300
    one = dataclasses.replace(config, classifier_epochs=1)
    assert with_equal_steps(one, whole, part).classifier_epochs == 1  # not 50 / 110


def test_test_labels_are_read_only_after_everything_is_chosen(path, tmp_path, monkeypatch):
    """The choice is made without them, and the run goes on with what was chosen."""
    chosen = []

    def hiding(features, *rest):
        split, checkpoint = features.split, rest[3]
        hidden = split.labels.copy().view(HiddenTestLabels)
        hidden.test = np.r_[split.test_seen, split.test_unseen]
        with pytest.raises(AssertionError):
            hidden[split.test_unseen[:1]]
        with pytest.raises(AssertionError):
            np.unique(hidden)
        hidden_split = dataclasses.replace(split, labels=hidden)
        run_validation(dataclasses.replace(features, split=hidden_split), *rest)
        chosen.append(checkpoint.notes["choice"])

    monkeypatch.setattr(main, "run_validation", hiding)
    train(path, tmp_path / "runs", nepoch=3, protocol="validated")
    (made,) = (tmp_path / "runs").iterdir()
    (choice,), summary = chosen, read_summary(made)
    assert choice["gzsl"]["epoch"] == summary["best_epoch"]
    assert choice["gzsl"]["unseen_share"] == summary.get("unseen_share")


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
