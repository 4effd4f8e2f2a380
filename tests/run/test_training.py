"""A whole run on a small feature file: what it leaves, that it repeats, that mistakes are told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from benchmarks import plain_run
from helpers import (
    ROOT,
    SMALL_RUN,
    TRAIN_COMMAND,
    feature_arrays,
    flags,
    read_metrics,
    read_summary,
    run_script,
    run_training,
    small_run_arguments,
    write_features,
)
from model import SCEN, weighted_l1
from scegg.config import read_config
from scegg.datasets.layouts import LAYOUTS
from scegg.run import wandb_mirror as logs
from scegg.run.summary import result_table
from util import UserError

LOSSES = {
    "loss_LEN",
    "loss_GEN",
    "loss_distill",
    "loss_Dec",
    "critic_real",
    "critic_fake",
    "penalty",
    "lambda1",
    "loss_vae",
    "loss_rec_cls",
    "loss_unseen_cls",
    "loss_adv",
    "loss_Dec_fake",
    "loss_G",
}
METRICS = {
    "epoch",
    "acc_zs",
    "acc_seen",
    "acc_unseen",
    "H",
    "best_acc_zs",
    "best_acc_seen",
    "best_acc_unseen",
    "best_H",
}


class Finished(NamedTuple):
    """A finished run: its folder, the lines of its metrics file, its summary, its weights."""

    folder: Path
    metrics: list
    summary: dict
    weights: dict


def run(features, runs, *argv, **changes):
    """Train on a small file and read what the run left in a new folder of runs."""
    argv = small_run_arguments(features, runs, *argv, **changes)
    run_training("CUB", "sun_gzsl.yaml", argv)

    (folder,) = runs.iterdir()
    weights = torch.load(folder / "model.pt", weights_only=True)
    return Finished(folder, read_metrics(folder), read_summary(folder), weights)


def lines_of(finished, stage):
    """The lines of the metrics file that a stage wrote."""
    return [line for line in finished.metrics if line["stage"] == stage]


def test_a_run_leaves_everything(features, tmp_path, capsys):
    made = run(features, tmp_path / "runs", a1=0.5, a2=0.5)
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model.pt",
        "seen_unseen_curve.csv",
        "summary.json",
    ]
    assert read_config(made.folder / "config.yaml", {}).scen_iterations == 20

    keys = set().union(*made.metrics)
    assert keys >= METRICS and keys >= LOSSES
    assert [line["iteration"] for line in lines_of(made, "scen")] == [10, 20]
    epochs, summary = lines_of(made, "eggn"), made.summary
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[-1]["best_H"] == max(line["H"] for line in epochs) == summary["best_H"]

    assert summary["H"] == epochs[-1]["H"]
    assert summary["split_fingerprint"] and "eggn" in summary["seconds"]
    assert {"local_acc_zs", "global_H"} <= set(summary)
    assert summary["full_published_split"] is False

    assert set(made.weights) >= {"scen", "global_cls", "eggn"}
    scen = SCEN(torch.zeros(11, 10), torch.zeros(9, 11), 24)
    assert set(made.weights["scen"]) == set(scen.state_dict())

    output = capsys.readouterr().out.splitlines()
    assert output[-2].startswith("EGGN, best on test")
    assert output[-1].startswith("EGGN, last epoch, nothing picked")
    assert "published" not in "".join(output)


def test_one_seed_repeats_bit_for_bit_and_another_does_not(features, tmp_path):
    first = run(features, tmp_path / "a", seed=7, a1=0.5)
    again = run(features, tmp_path / "b", seed=7, a1=0.5)
    other = run(features, tmp_path / "c", seed=8, a1=0.5)

    assert first.metrics == again.metrics
    assert again.metrics != other.metrics
    for part in ("scen", "global_cls", "eggn"):
        for name, tensor in first.weights[part].items():
            assert torch.equal(tensor, again.weights[part][name]), name
    assert not torch.equal(first.weights["scen"]["len.W2"], other.weights["scen"]["len.W2"])


def test_batches_that_do_not_hold_batch_size_images(features, tmp_path):
    """6 seen classes at B = 64 make batches of 60 images, where the published code crashes."""
    made = run(features, tmp_path / "runs", batch_size=64, nepoch=1)
    assert made.metrics[-1]["epoch"] == 1


def test_czsl_run_has_no_gzsl_numbers(features, tmp_path):
    made = run(features, tmp_path / "runs", gzsl=False)
    evaluated = [line for line in made.metrics if "acc_zs" in line]
    assert len(evaluated) == 2
    assert not any("H" in line or "best_H" in line for line in evaluated)
    assert "best_acc_zs" in made.summary and "best_H" not in made.summary


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_where_the_maps_are_kept_changes_no_number(features, tmp_path, cache):
    made = run(features, tmp_path / "auto", nepoch=1)
    other = run(features, tmp_path / cache, "--cache", cache, nepoch=1)
    assert made.metrics == other.metrics
    for name, tensor in made.weights["scen"].items():
        assert torch.equal(tensor, other.weights["scen"][name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"nepoch": 0},
        {"scen_iterations": 0, "distill_iterations": 0, "nepoch": 1},
        {"compose_runtime": "mlp", "nepoch": 1},
        {"test_freq_epoch": 5, "nepoch": 3},
        {"encoded_noise": False, "freeze_dec": True, "feedback_loop": 1, "nepoch": 1},
    ],
)
def test_unusual_but_legal_settings(features, tmp_path, changes):
    made = run(features, tmp_path / "runs", **changes)
    assert ("H" in made.summary) == (changes["nepoch"] > 0)


def test_training_learns(tmp_path):
    """The made-up data carry their attributes linearly, so that classes can be told apart.

    Chance is 1/9, among the unseen classes 1/3.
    """
    arrays = feature_arrays(per_class=30, K=20, D=48)
    path = write_features(tmp_path / "f.hdf5", arrays)
    settings = {
        "scen_iterations": 200,
        "distill_iterations": 300,
        "nepoch": 12,
        "ngh": 128,
        "ndh": 128,
        "syn_num": 100,
        "classifier_epochs": 15,
        "batch_size": 18,
    }

    summary = run(path, tmp_path / "runs", **settings).summary
    assert summary["local_acc_seen"] > 60
    assert summary["global_acc_seen"] > 60
    assert summary["best_acc_zs"] > 50


def test_offline_wandb_run(features, tmp_path):
    """Without a login and a mode, W&B records offline, under the metric names, and asks nothing."""
    argv = ["--features", features, "--runs", "runs", "--device", "cpu"]
    argv += flags(**SMALL_RUN | {"nepoch": 1})
    done = subprocess.run(
        [*TRAIN_COMMAND, *argv],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    (record,) = tmp_path.glob("runs/*/wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for name in ("SCEGG", "best_acc_unseen", "loss_distill", "syn_num"):
        assert name.encode() in content, name


NO_SUCH_GPU = "cuda:99" if torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--syn_nun=3"], "unknown key syn_nun; did you mean syn_num"),
        (["--lr=fast"], "lr must be a number above 0"),
        ([f"--device={NO_SUCH_GPU}"], "CUDA"),
        (["--backbone=resnet50"], "holds features of backbone resnet101"),
        (["--features=none.hdf5"], "make it with preprocessing.py"),
        (["--config=none.yaml"], "could not be read"),
        (["--cache=device"], "--cache device: this run has no GPU"),
        (["--cache=attic"], "invalid choice: 'attic'"),
    ],
)
def test_mistakes(features, tmp_path, argv, message):
    places = ["--features", str(features), "--runs", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=message):
        run_training("CUB", "sun_gzsl.yaml", [*places, *argv])
    assert not (tmp_path / "runs").exists()


def test_mistakes_exit_with_status_2_and_one_line(tmp_path, monkeypatch):
    """One of them as it is started by hand."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, ROOT / "train_joint_CUB.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    ends = {"_CUB": (done.returncode, done.stderr)}
    for dataset in ("_SUN", "_AWA2", ""):
        ends[dataset] = run_script(f"train_joint{dataset}.py")

    for dataset, (status, said) in ends.items():
        assert status == 2 and said.count("\n") == 1, said
        assert said.startswith("error: ")
        assert "make it with preprocessing.py" in said
        assert f"--img_size {448 if dataset else 224}" in said


def test_another_split_in_the_data_root_is_refused(tmp_path, real_data):
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    argv = ["--features", str(path), "--data_root", str(real_data)]
    message = "holds split of other images: run preprocessing.py again"
    with pytest.raises(UserError, match=message):
        run_training("CUB", "sun_gzsl.yaml", argv)


def test_a_split_that_cannot_be_read_is_no_other_split(tmp_path):
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    mats = tmp_path / "xlsa17" / "data" / "CUB"
    mats.mkdir(parents=True)
    (mats / "att_splits.mat").write_bytes(b"<html>")
    argv = ["--features", str(path), "--data_root", str(tmp_path)]
    with pytest.raises(UserError, match="att_splits.mat is not a readable .mat file"):
        run_training("CUB", "sun_gzsl.yaml", argv)


def test_features_of_another_dataset_are_refused(tmp_path):
    path = write_features(tmp_path / "f.hdf5", feature_arrays(), dataset="TOY")
    message = (
        "holds features of dataset TOY, but the run asks for CUB: use train_joint.py --dataset TOY"
    )
    with pytest.raises(UserError, match=message):
        run_training("CUB", "sun_gzsl.yaml", ["--features", str(path)])


def test_missing_features_name_the_command_and_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/CUB").mkdir(parents=True)
    (tmp_path / "data/CUB/feature_map_efficientnet_lite2_CUB.hdf5").touch()

    command = "preprocessing.py --dataset CUB --backbone resnet101 --img_size 448"
    with pytest.raises(UserError, match=f"{command}, .*there is feature_map_efficientnet"):
        run_training("CUB", "sun_gzsl.yaml", [])


def test_published_row_stands_only_under_the_papers_data():
    assert "75.1    64.1    73.6    68.5" in result_table("CUB", True, [])

    other_data = result_table("CUB", False, [])
    assert "published" not in other_data and "not the paper's" in other_data
    assert "published" not in result_table("TOY", False, [], "gaussian")
    assert "(" not in result_table("TOY", False, [], "gaussian")


def test_a_full_run_on_gaussian_word_vectors_says_so():
    table = result_table("AWA2", True, [], "gaussian")
    assert table.startswith("AWA2 (Gaussian word vectors, not the paper's)  ")
    assert "published" not in table
    assert "published" in result_table("AWA2", True, [], "GoogleNews.bin")


def test_weighted_l1_is_smooth_where_prediction_equals_target():
    predicted = torch.tensor([[0.6, 0.8], [1.0, 0.0]], requires_grad=True)
    loss = weighted_l1(predicted, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert torch.isfinite(predicted.grad).all()
    assert not predicted.grad[0].any()


def test_saved_config_is_a_wandb_file(features, tmp_path):
    made = run(features, tmp_path / "runs", nepoch=0)
    config = yaml.safe_load((made.folder / "config.yaml").read_text())
    assert config["syn_num"] == {"value": 20}


def test_figures_are_drawn_at_the_end_and_a_missing_one_is_said(features, tmp_path, capsys):
    made = run(features, tmp_path / "runs", nepoch=1, log_figures=True, log_curves=True)
    files = {path.name for path in made.folder.iterdir()}
    assert files >= {"tsne.pdf", "tsne.png", "curve.png", "curves.png"}
    assert "H" in made.summary
    assert "no attention picture: " in capsys.readouterr().out


def test_the_baselines_run_is_found_for_the_picture(features, tmp_path, monkeypatch):
    runs, drawn = tmp_path / "runs", []
    baseline = {"visual_features": "cnn", "rec_seen_cls_weight": 0, "gen_unseen_cls_weight": 0}
    baseline_folder = run(features, runs, nepoch=1, **baseline).folder

    def tsne_figure(run, cnn):
        drawn.append((run.name, cnn.name))

    monkeypatch.setattr("scegg.report.tsne.tsne_figure", tsne_figure)
    argv = small_run_arguments(features, runs, nepoch=1, log_figures=True)
    run_training("CUB", "sun_gzsl.yaml", argv)
    ((name, cnn),) = drawn
    assert cnn == baseline_folder.name != name


@pytest.mark.parametrize(
    "mode, meant", [("dryrun", "offline"), ("run", "online"), ("disabled", "disabled")]
)
def test_wandb_modes_old_names_too(monkeypatch, mode, meant):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert logs.wandb_mode(None) == meant
    assert logs.wandb_mode("offline") == "offline"


def test_a_whole_run_of_the_transcription_learns_as_ours_does(tmp_path):
    arrays = feature_arrays(per_class=30, classes=16, unseen=(1, 5, 9, 13), K=30, D=64)
    features = write_features(tmp_path / "f.hdf5", arrays)
    settings = SMALL_RUN | {
        "batch_size": 24,
        "scen_iterations": 120,
        "scen_lr": 1e-3,
        "distill_iterations": 200,
        "nepoch": 5,
        "ngh": 64,
        "ndh": 64,
        "syn_num": 50,
        "classifier_lr": 3e-3,
        "classifier_epochs": 10,
        "a1": 0.5,
        "a2": 0.5,
        "seed": 1,
    }

    ours = run(features, tmp_path / "runs", **settings).summary
    record = tmp_path / "record.json"
    plain_run.main([str(features), "--json", str(record), *flags(**settings)])
    plain = json.loads(record.read_text())

    assert [row["epoch"] for row in plain["epochs"]] == list(range(1, 6))
    assert plain["best_H"] == max(row["H"] for row in plain["epochs"])
    assert set(plain["seconds"]) >= {"scen", "distill", "eggn", "evaluate"}
    for result in (plain, ours):  # chance is 25 and below 7
        assert result["best_acc_zs"] > 40 and result["best_H"] > 30, result


def test_a_dataset_of_ones_own_has_no_published_row(monkeypatch):
    """Also where its facts are known, and the data agree with them."""
    monkeypatch.setitem(LAYOUTS, "APY", LAYOUTS["CUB"])
    assert "published" not in result_table("APY", True, [])
