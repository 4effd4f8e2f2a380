"""A whole run on a small feature file: what it leaves behind, that it repeats, that mistakes are told."""
import json
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import ROOT, SMALL_RUN, feature_arrays, flags, run_training, write_features

from benchmarks import plain_run as literal_run
from scegg.run import folder as logs
from scegg.config import read_config
from scegg.report import tsne
from model import SCEN, weighted_l1
from scegg.run.summary import result_table
from util import UserError

LOSSES = {"loss_LEN", "loss_GEN", "loss_distill", "loss_Dec", "critic_real", "critic_fake", "penalty", "lambda1", "loss_vae",
          "loss_rec_cls", "loss_unseen_cls", "loss_adv", "loss_Dec_fake", "loss_G"}
METRICS = {"epoch", "acc_zs", "acc_seen", "acc_unseen", "H", "best_acc_zs", "best_acc_seen", "best_acc_unseen", "best_H"}


def run(features, folder, *argv, **changes):
    """Train on a small file; returns (run folder, metrics lines, summary, weights)."""
    run_training("CUB", "sun_gzsl.yaml", ["--features", str(features), "--runs", str(folder), "--device", "cpu",
                                              "--data_root", "none", *argv, *flags(**SMALL_RUN | changes)])
    made, = folder.iterdir()
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    return made, lines, json.loads((made / "summary.json").read_text()), torch.load(made / "model.pt", weights_only=True)


def test_a_run_leaves_everything(features, tmp_path, capsys):
    folder, lines, summary, weights = run(features, tmp_path / "runs", a1=0.5, a2=0.5)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "metrics.jsonl", "model.pt", "seen_unseen_curve.csv", "summary.json"]
    assert read_config(folder / "config.yaml", {}).scen_iterations == 20
    keys = set().union(*lines)
    assert METRICS <= keys and LOSSES <= keys
    assert [line["iteration"] for line in lines if line["stage"] == "scen"] == [10, 20]
    epochs = [line for line in lines if line["stage"] == "eggn"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[-1]["best_H"] == max(line["H"] for line in epochs) == summary["best_H"]
    assert summary["H"] == epochs[-1]["H"] and summary["split_fingerprint"] and "eggn" in summary["seconds"]
    assert {"local_acc_zs", "global_H"} <= set(summary) and summary["full_published_split"] is False
    assert set(weights) >= {"scen", "global_cls", "eggn"} and set(weights["scen"]) == set(
        SCEN(torch.zeros(11, 10), torch.zeros(9, 11), 24).state_dict())
    last = capsys.readouterr().out.splitlines()
    assert last[-2].startswith("EGGN, best on test") and last[-1].startswith("EGGN, last epoch, nothing picked") and "published" not in "".join(last)


def test_one_seed_repeats_bit_for_bit_and_another_does_not(features, tmp_path):
    first, again, other = (run(features, tmp_path / name, seed=seed, a1=0.5)
                           for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert first[1] == again[1] != other[1]
    for part in ("scen", "global_cls", "eggn"):
        for name, tensor in first[3][part].items():
            assert torch.equal(tensor, again[3][part][name]), name
    assert not torch.equal(first[3]["scen"]["len.W2"], other[3]["scen"]["len.W2"])


def test_batches_that_do_not_hold_batch_size_images(features, tmp_path):
    """6 seen classes at B = 64: 60 images a batch, where the published code crashes."""
    _, lines, _, _ = run(features, tmp_path / "runs", batch_size=64, nepoch=1)
    assert lines[-1]["epoch"] == 1


def test_czsl_run_has_no_gzsl_numbers(features, tmp_path):
    _, lines, summary, _ = run(features, tmp_path / "runs", gzsl=False)
    evaluated = [line for line in lines if "acc_zs" in line]
    assert len(evaluated) == 2 and not any("H" in line or "best_H" in line for line in evaluated)
    assert "best_acc_zs" in summary and "best_H" not in summary


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_where_the_maps_are_kept_changes_no_number(features, tmp_path, cache):
    _, lines, _, weights = run(features, tmp_path / "auto", nepoch=1)
    _, other_lines, _, other_weights = run(features, tmp_path / cache, "--cache", cache, nepoch=1)
    assert lines == other_lines
    assert all(torch.equal(tensor, other_weights["scen"][name]) for name, tensor in weights["scen"].items())


@pytest.mark.parametrize("changes", [dict(nepoch=0), dict(scen_iterations=0, distill_iterations=0, nepoch=1),
                                     dict(compose_runtime="mlp", nepoch=1), dict(test_freq_epoch=5, nepoch=3),
                                     dict(encoded_noise=False, freeze_dec=True, feedback_loop=1, nepoch=1)])
def test_unusual_but_legal_settings(features, tmp_path, changes):
    _, lines, summary, _ = run(features, tmp_path / "runs", **changes)
    assert ("H" in summary) == (changes["nepoch"] > 0)


def test_training_learns(tmp_path):
    """The made-up data carry their attributes linearly: classes must be told apart far above chance (1/9, unseen 1/3)."""
    path = write_features(tmp_path / "f.hdf5", feature_arrays(per_class=30, K=20, D=48))
    _, _, summary, _ = run(path, tmp_path / "runs", scen_iterations=200, distill_iterations=300, nepoch=12, ngh=128, ndh=128,
                           syn_num=100, classifier_epochs=15, batch_size=18)
    assert summary["local_acc_seen"] > 60 and summary["global_acc_seen"] > 60 and summary["best_acc_zs"] > 50


def test_offline_wandb_run(features, tmp_path, monkeypatch):
    """Not logged in, no mode asked for: W&B records offline, under the metric names, and asks nothing."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    argv = ["--features", features, "--runs", "runs", "--device", "cpu", *flags(**SMALL_RUN | {"nepoch": 1})]
    done = subprocess.run([sys.executable, ROOT / "train_joint_CUB.py", "--config", ROOT / "wandb_config/sun_gzsl.yaml", *argv],
                          cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, timeout=120)
    assert done.returncode == 0, done.stderr
    record, = tmp_path.glob("runs/*/wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert all(name.encode() in content for name in ("SCEGG", "best_acc_unseen", "loss_distill", "syn_num"))


@pytest.mark.parametrize("argv, message", [
    (["--syn_nun=3"], "unknown key syn_nun; did you mean syn_num"), (["--lr=fast"], "lr must be a number above 0"),
    (["--device=cuda"] if not torch.cuda.is_available() else ["--device=cuda:99"], "CUDA"),
    (["--backbone=resnet50"], "holds features of backbone resnet101"), (["--features=none.hdf5"], "make it with preprocessing.py"),
    (["--config=none.yaml"], "could not be read"), (["--cache=device"], "--cache device: this run has no GPU"),
    (["--cache=attic"], "invalid choice: 'attic'")])
def test_mistakes(features, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        run_training("CUB", "sun_gzsl.yaml", ["--features", str(features), "--runs", str(tmp_path / "runs"), *argv])
    assert not (tmp_path / "runs").exists()


def test_mistakes_exit_with_status_2_and_one_line(tmp_path):
    for script in ("train_joint_CUB.py", "train_joint_SUN.py", "train_joint_AWA2.py", "train_joint.py"):
        done = subprocess.run([sys.executable, ROOT / script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and "make it with preprocessing.py" in done.stderr


def test_another_split_in_the_data_root_is_refused(tmp_path, real_data):
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    with pytest.raises(UserError, match="holds split of other images: run preprocessing.py again"):
        run_training("CUB", "sun_gzsl.yaml", ["--features", str(path), "--data_root", str(real_data)])


def test_features_of_another_dataset_are_refused(tmp_path):
    path = write_features(tmp_path / "f.hdf5", feature_arrays(), dataset="TOY")
    with pytest.raises(UserError, match="holds features of dataset TOY, but the run asks for CUB: use the script of TOY"):
        run_training("CUB", "sun_gzsl.yaml", ["--features", str(path)])


def test_missing_features_name_the_command_and_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/CUB").mkdir(parents=True)
    (tmp_path / "data/CUB/feature_map_efficientnet_lite2_CUB.hdf5").touch()
    with pytest.raises(UserError, match=r"preprocessing.py --dataset CUB --backbone resnet101, .*there is feature_map_efficientnet"):
        run_training("CUB", "sun_gzsl.yaml", [])


def test_published_row_stands_only_under_the_papers_data():
    assert "75.1    64.1    73.6    68.5" in result_table("CUB", True, [])
    assert "published" not in result_table("CUB", False, []) and "not the paper's" in result_table("CUB", False, [])
    assert "published" not in result_table("TOY", False, [])


def test_weighted_l1_is_smooth_where_prediction_equals_target():
    predicted = torch.tensor([[0.6, 0.8], [1.0, 0.0]], requires_grad=True)
    loss = weighted_l1(predicted, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and torch.isfinite(predicted.grad).all() and not predicted.grad[0].any()


def test_saved_config_is_a_wandb_file(features, tmp_path):
    folder, *_ = run(features, tmp_path / "runs", nepoch=0)
    assert yaml.safe_load((folder / "config.yaml").read_text())["syn_num"] == {"value": 20}


def test_figures_are_drawn_at_the_end_and_a_missing_one_is_said(features, tmp_path, capsys):
    folder, _, summary, _ = run(features, tmp_path / "runs", nepoch=1, log_figures=True)
    assert {"tsne.pdf", "tsne.png"} <= {path.name for path in folder.iterdir()} and "H" in summary
    assert "no attention picture: " in capsys.readouterr().out
    assert "curve.png" in {path.name for path in folder.iterdir()}


def test_the_baselines_run_is_found_for_the_picture(features, tmp_path, monkeypatch):
    run(features, tmp_path / "runs", nepoch=1, visual_features="cnn", rec_seen_cls_weight=0, gen_unseen_cls_weight=0)
    baseline, = (tmp_path / "runs").iterdir()
    drawn = []
    monkeypatch.setattr(tsne, "tsne_figure", lambda run, cnn: drawn.append((run.name, cnn.name)))
    run_training("CUB", "sun_gzsl.yaml", ["--features", str(features), "--runs", str(tmp_path / "runs"), "--device", "cpu",
                                              "--data_root", "none", *flags(**SMALL_RUN | {"nepoch": 1, "log_figures": True})])
    (name, cnn), = drawn
    assert cnn == baseline.name != name


@pytest.mark.parametrize("mode, meant", [("dryrun", "offline"), ("run", "online"), ("disabled", "disabled")])
def test_wandb_modes_old_names_too(monkeypatch, mode, meant):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert logs.wandb_mode(None) == meant and logs.wandb_mode("offline") == "offline"


def test_a_whole_run_of_the_transcription_learns_as_ours_does(tmp_path):
    features = write_features(tmp_path / "f.hdf5", feature_arrays(per_class=30, classes=16, unseen=(1, 5, 9, 13), K=30, D=64))
    settings = SMALL_RUN | dict(batch_size=24, scen_iterations=200, scen_lr=1e-3, distill_iterations=300, nepoch=8, ngh=64, ndh=64, syn_num=50,
                                classifier_lr=3e-3, classifier_epochs=10, a1=0.5, a2=0.5, seed=1)
    _, _, ours, _ = run(features, tmp_path / "runs", **settings)
    literal_run.main([str(features), "--json", str(tmp_path / "record.json"), *flags(**settings)])
    plain = json.loads((tmp_path / "record.json").read_text())
    assert [row["epoch"] for row in plain["epochs"]] == list(range(1, 9))
    assert plain["best_H"] == max(row["H"] for row in plain["epochs"]) and set(plain["seconds"]) >= {"scen", "distill", "eggn", "evaluate"}
    for result in (plain, ours):  # chance is 25 and below 7
        assert result["best_acc_zs"] > 40 and result["best_H"] > 30, result
