"""Small runs that die and are resumed: how tests start, kill and compare them."""

import contextlib
import json
import os
from typing import NamedTuple

import pytest
import torch

from forks import forks
from helpers import feature_arrays, run_training, small_run_arguments, write_features
from scegg.run.checkpoint import Checkpoint

RUN = {"checkpoint_every": 7, "a1": 0.5, "a2": 0.5, "feedback_loop": 2}
JOINT = {"scen_schedule": "joint", "joint_every": 3, "joint_refresh": 8}

# The kinds of run, by name: what each changes in the config.
SETTINGS = {
    "frozen": {},
    "joint": JOINT | {"joint_distill_iterations": 4},
    "validated": {"protocol": "validated"},
    "cnn": {"visual_features": "cnn", "rec_seen_cls_weight": 0, "gen_unseen_cls_weight": 0},
    "supervised": {"distill_target": "labels", "compose_runtime": "mlp", "test_freq_epoch": 2},
}


class Killed(BaseException):
    """Stands for a kill: nothing in the project catches it."""


def write_features_with_val(path):
    """A small feature file with xlsa17's train and val classes."""
    arrays = feature_arrays()
    labels = torch.from_numpy(arrays["labels"][arrays["trainval_loc"]])
    is_val = torch.isin(labels, torch.tensor([0, 5])).numpy()
    arrays |= {
        "train_loc": arrays["trainval_loc"][~is_val],
        "val_loc": arrays["trainval_loc"][is_val],
    }
    return write_features(path, arrays)


def arguments(features, runs, changes, *more):
    """The command line of a small run; changes: keys of the config."""
    return small_run_arguments(features, runs, "--wandb", "disabled", *more, **RUN | changes)


def train(features, runs, changes, *more):
    """Train in this process."""
    run_training("CUB", "sun_gzsl.yaml", arguments(features, runs, changes, *more))


def train_silently(argv):
    """The work of a process of its own."""
    os.environ["WANDB_SILENT"] = "true"
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            run_training("CUB", "sun_gzsl.yaml", argv)


def start_process(argv, action=train_silently):
    """Train in a process of its own; returns it."""
    process = forks().Process(target=action, args=(argv,))
    process.start()
    return process


def never(stage, step):
    """No step at all."""
    return False


def kill_in_steps(patch, *, before=never, after=never):
    """Make a run die (Killed) before some steps, or when the work of some is done but not counted.

    before, after: say of (stage with its phase, step) whether to die. patch: a MonkeyPatch.
    """
    steps = Checkpoint.steps

    def dying_steps(self, stage, total, every, unit):
        whole_name = self.phase + stage
        for step in steps(self, stage, total, every, unit):
            if before(whole_name, step):
                raise Killed
            yield step
            if after(whole_name, step):
                raise Killed

    patch.setattr(Checkpoint, "steps", dying_steps)


def train_and_die_before(monkeypatch, moment, features, runs, changes, *more):
    """Leave a run that died before a step; moment: (stage with its phase, step)."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_steps(patch, before=lambda stage, step: (stage, step) == moment)
        train(features, runs, changes, *more)


def leave_unfinished_run(monkeypatch, features, runs):
    """Leave a run that died in a step of distillation; returns its folder."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_steps(patch, after=lambda stage, step: (stage, step) == ("distill", 20))
        train(features, runs, {})

    (folder,) = runs.iterdir()
    return folder


class Outcome(NamedTuple):
    """What a finished run left: its metrics file byte for byte, its weights, its numbers."""

    metrics: bytes
    weights: dict
    numbers: dict


def is_number(name):
    """Whether an entry of a summary is a result."""
    return "acc" in name or name.endswith("H") or name == "ausuc"


def outcome(runs):
    """The outcome of the one finished run in a folder of runs, which left nothing half done."""
    (made,) = (path.parent for path in runs.glob("*/summary.json"))
    assert not (made / "checkpoint.pt").exists() and not list(made.glob(".*partial*"))

    summary = json.loads((made / "summary.json").read_text())
    return Outcome(
        metrics=(made / "metrics.jsonl").read_bytes(),
        weights=torch.load(made / "model.pt", weights_only=True),
        numbers={name: value for name, value in summary.items() if is_number(name)},
    )


def assert_same(ours, reference):
    """Two outcomes are equal bit for bit."""
    assert ours.metrics == reference.metrics
    assert ours.numbers == reference.numbers
    assert reference.weights["winners"]
    assert_same_content(ours.weights, reference.weights, "model.pt")


def assert_same_content(ours, reference, where):
    """Nested dicts of tensors and other values are equal; where: their place, in words."""
    if isinstance(reference, dict):
        assert ours.keys() == reference.keys(), where
        for name in reference:
            assert_same_content(ours[name], reference[name], f"{where}, {name}")
    elif isinstance(reference, torch.Tensor):
        assert torch.equal(ours, reference), where
    else:
        assert ours == reference, where
