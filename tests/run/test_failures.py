"""Runs that go wrong: losses that are not finite, full disks, damaged checkpoints."""

import functools
import subprocess
import sys

import pytest
import torch

from helpers import TRAIN_COMMAND
from resuming import JOINT, arguments, leave_unfinished_run, train, write_features_with_val
from scegg.method.steps import LossMeter
from scegg.run.folder import RunFolder
from util import UserError, exit_on_user_error


@pytest.fixture
def features(tmp_path):
    """The path of a small feature file with xlsa17's train and val classes."""
    return write_features_with_val(tmp_path / "features.hdf5")


def test_a_disk_that_fills_under_the_log_names_the_command_to_go_on_with(
    features, tmp_path, monkeypatch
):
    log = RunFolder.log

    def full(self, stage, values):
        if stage == "eggn":
            raise OSError(28, "No space left on device")
        log(self, stage, values)

    monkeypatch.setattr(RunFolder, "log", full)
    message = "No space left on device; free some disk space .*--resume"
    with pytest.raises(UserError, match=message):
        train(features, tmp_path / "runs", {})

    monkeypatch.undo()
    train(features, tmp_path / "runs", {}, "--resume")


def test_an_output_that_nobody_reads_is_no_fault_of_the_disk(
    features, tmp_path, monkeypatch, capsys
):
    def broken(self, stage, values):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(RunFolder, "log", broken)
    with pytest.raises(UserError, match="nobody reads the output .* go on with: .*--resume"):
        train(features, tmp_path / "runs", {})

    def before_the_run():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(SystemExit, match="2"):
        exit_on_user_error(before_the_run)
    assert capsys.readouterr().err.endswith("error: nobody reads the output any more\n")


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(features, tmp_path):
    """A limit on the size of files stands for the disk.

    The first checkpoint fits, EGGN's do not.
    """
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash", *TRAIN_COMMAND]
    argv = arguments(features, tmp_path / "runs", {"ngh": 256, "ndh": 256})
    done = subprocess.run([*limited, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "raise the limit (ulimit -f)" in done.stderr

    (folder,) = (tmp_path / "runs").iterdir()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["steps"]["distill"] > 0
    assert not list(folder.glob("*partial*"))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_checkpoint_is_told_in_one_line(features, tmp_path, monkeypatch, damage):
    """damage: what is in the file instead; None: its first 5000 bytes."""
    path = leave_unfinished_run(monkeypatch, features, tmp_path / "runs") / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000] if damage is None else damage)
    with pytest.raises(UserError, match="checkpoint.pt is damaged") as caught:
        train(features, tmp_path / "runs", {}, "--resume")
    assert "\n" not in str(caught.value)


# what a stranger may put into a checkpoint: where, and what instead
MANGLED = [
    ("notes", 5),
    ("notes", {5: "features"}),
    ("notes, features", 7),
    ("notes, features", "features\0.hdf5"),
    ("notes, logged", "0"),
    ("notes, logged", -1),
    ("notes, wandb_id", None),
    ("notes, reuse_scen", "yes"),
    ("notes, seconds", [1.0]),
    ("notes, seconds, scen", "long"),
    ("notes, seconds, evaluate", 1.0),
    ("notes, graphs", None),
    ("notes, graphs, step", "many"),
    ("notes, local", "good"),
    ("notes, local, acc_zs", "good"),
    ("notes, choice", {"czsl": 3}),
    ("notes, choice", {"czsl": {"epoch": 1, "unseen_share": 2}}),
    ("notes, choice", {"czsl": {"epoch": 1}, "gzsl": {"epoch": 1}}),
    ("notes, validation", [1]),
    ("notes, validation_winners", {"czsl": {}}),
    ("notes, ausuc", "large"),
    ("notes, curve", torch.zeros(4)),
    ("steps", [20]),
    ("steps, distill", "20"),
    ("steps, distill", None),
    ("identity, seed", torch.zeros(2)),
    ("parts, selection", {"picked": [], "last": None, "unselected": None}),
    ("parts, selection", 5),
    ("parts, winners, kept", {"picked": 5}),
    ("parts, embeddings", {}),
    ("parts, embeddings, trainval", [torch.zeros(3)] * 3),
    ("parts, distill_losses, rows", torch.zeros(2, 7)),
    ("parts, distill_losses, first", "1"),
    ("parts, scen", ["weights"]),
]


def test_a_checkpoint_of_wrong_types_is_told_in_one_line(features, tmp_path, monkeypatch):
    path = leave_unfinished_run(monkeypatch, features, tmp_path / "runs") / "checkpoint.pt"
    for where, content in MANGLED:
        saved = torch.load(path, weights_only=True)
        whole, (*outer, last) = path.read_bytes(), where.split(", ")
        functools.reduce(dict.__getitem__, outer, saved)[last] = content
        torch.save(saved, path)

        with pytest.raises(UserError, match="checkpoint.pt (is damaged|belongs to)") as caught:
            train(features, tmp_path / "runs", {}, "--resume")
        assert "\n" not in str(caught.value), where
        path.write_bytes(whole)
    train(features, tmp_path / "runs", {}, "--resume")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classifier_lr": 1e38}, r"the softmax classifier, iteration \d+: loss is"),
        (
            JOINT | {"joint_lr": 1e30},
            r"stage 3 \((SCEN|distillation)\), iteration \d+: joint_",
        ),
        ({"scen_lr": 1e30}, r"stage 1 \(SCEN\), iteration \d+: loss_LEN is"),
        ({"lr": 1e30}, r"stage 3 \(EGGN\), iteration \d+: \w+ is (nan|inf)"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    features, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        train(features, tmp_path / "runs", changes)

    (path,) = (tmp_path / "runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)["parts"]
    for name, value in saved["scen"].items():
        assert "scaler" in name or torch.isfinite(value).all(), name
    for name, value in saved.get("eggn", {}).items():
        assert torch.isfinite(value).all(), name


def test_the_meter_names_iteration_and_term():
    meter = LossMeter("stage 9", "one", "two")
    for value in (1.0, 2.0):
        meter.add(torch.tensor([value, 3.0]))
    assert meter.read() == {"one": 1.5, "two": 3.0}
    assert meter.read() == {}

    meter.add(torch.tensor([1.0, 3.0]))
    meter.add(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="stage 9, iteration 4: two is nan"):
        meter.state_dict()
