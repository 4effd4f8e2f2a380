"""What W&B is told, read back from its own offline files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

import train_joint
from helpers import (
    SUN_CONFIG,
    read_metrics,
    read_summary,
    run_training,
    small_run_arguments,
)
from resuming import start_process, train_silently
from scegg.config import read_config
from scegg.run import wandb_mirror
from scegg.run.folder import RunFolder
from wandb_reader import offline_runs

ACCURACIES = ("acc_zs", "acc_seen", "acc_unseen", "H")
VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_NAME": "named",
    "WANDB_ENTITY": "lab",
    "WANDB_RUN_GROUP": "grouped",
    "WANDB_TAGS": "one,two",
    "WANDB_JOB_TYPE": "job",
}


@pytest.fixture
def offline(monkeypatch):
    """W&B begins anew, with the variables that a test sets: it reads them once a process."""
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def train(features, runs, *more, **changes):
    """A small run that logs offline; returns its folder."""
    before = set(runs.glob("*"))
    argv = small_run_arguments(features, runs, "--wandb", "offline", *more, **changes)
    run_training("CUB", "sun_gzsl.yaml", argv)
    wandb.teardown()  # its process writes the file to its end
    (folder,) = set(runs.glob("*")) - before
    return folder


def only_run(folder):
    """The one offline run below a folder."""
    (run,) = offline_runs(folder)
    return run


def test_a_runs_file(features, tmp_path, offline):
    """Names, axes, summaries, group, tag, provenance, artifacts of one run."""
    folder = train(features, tmp_path / "runs", log_model=True, seed=3)
    run, lines = only_run(folder), read_metrics(folder)

    assert (run.run.project, run.run.display_name) == ("SCEGG", folder.name)
    assert (list(run.run.tags), run.run.job_type) == (["CUB"], "train")
    check_names(run, lines)
    check_axes(run)
    check_provenance(run.config, read_summary(folder))
    check_artifacts(run, folder, features)
    # five groups of numbers: of 3 unseen classes in CZSL, of all 9 in GZSL
    assert run.history[-1]["per_class.nrows"] == 5 * (3 + 9)

    summary = read_summary(folder)
    assert run.summary["best_H"] == summary["best_H"]
    assert run.summary["H"] == {"max": max(line["H"] for line in lines if "H" in line)}

    sync = ["wandb", "sync", "--dry-run", *map(str, tmp_path.glob("runs/*/wandb"))]
    done = subprocess.run(sync, capture_output=True, text=True, env=quiet_environment())
    assert "Would sync 1 run(s)" in done.stdout + done.stderr


def quiet_environment():
    """This process's environment, in which W&B speaks."""
    bin = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": bin + os.pathsep + os.environ["PATH"]}
    environment.pop("WANDB_SILENT", None)
    return environment


def check_names(run, lines):
    """A row of the history for every line of metrics.jsonl, with the same values."""
    assert run.steps == list(range(1, len(lines) + 1))
    for row, line in zip(run.history, lines, strict=True):
        stage = line.pop("stage")
        for name, value in line.items():
            assert row[f"{stage}/{name.removeprefix(stage + '_')}"] == value
        for name in ("epoch", *ACCURACIES, *(f"best_{name}" for name in ACCURACIES)):
            assert row.get(name) == line.get(name)
        own = {name for name in row if not name.startswith("_") and "/" not in name}
        assert {name for name in own if not name.startswith("per_class.")} <= set(line)


def check_axes(run):
    """Each stage has its own x axis; of accuracies the summary keeps the highest."""
    axes = {"scen/*": "scen/iteration", "distill/*": "distill/iteration", "eggn/*": "eggn/epoch"}
    assert {name: run.metrics[name].step_metric for name in axes} == axes
    for name in ACCURACIES:
        assert run.metrics[name].step_metric == "epoch" and run.metrics[name].summary.max
        assert run.metrics[f"eggn/{name}"].step_metric == "eggn/epoch"
        assert run.metrics[f"best_{name}"].summary.max is False


def check_provenance(config, summary):
    """The config has it from the first record on, and the run's folder says the same."""
    provenance = config["provenance"]
    for name in ("split_fingerprint", "features", "git_commit", "code", "torch", "device"):
        assert provenance[name] == summary[name]
    assert "weights_sha256" in provenance and provenance["device_name"]
    assert provenance["versions"]["wandb"] == wandb.__version__
    assert (config["dataset"], config["seed"]) == ("CUB", 3)


def check_artifacts(run, folder, features):
    """The model with its numbers, as it lies; the feature file by reference."""
    model, data = run.artifacts["model"], run.artifacts["dataset"]
    paths = {entry.path: entry.local_path for entry in model.manifest.contents}
    assert paths["model.pt"] == str(folder / "model.pt")
    assert json.loads(model.metadata)["best_H"] == read_summary(folder)["best_H"]
    (reference,) = data.manifest.contents
    assert reference.ref == features.resolve().as_uri()
    assert json.loads(data.metadata)["features"] == read_summary(folder)["features"]


def test_wandbs_variables_and_flags_over_them(features, tmp_path, offline):
    for name, value in VARIABLES.items():
        offline.setenv(name, value)
    offline.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    small = {"nepoch": 1, "scen_iterations": 2, "distill_iterations": 2}

    train(features, tmp_path / "runs", **small)
    run = only_run(tmp_path / "elsewhere").run
    names = (run.project, run.display_name, run.entity, run.run_group, run.job_type)
    assert names == ("theirs", "named", "lab", "grouped", "job")
    assert list(run.tags) == ["CUB", "one", "two"]
    assert not list(tmp_path.glob("runs/*/wandb"))

    flags = ["--wandb_project=p", "--wandb_name=n", "--wandb_group=g"]
    train(features, tmp_path / "runs", *flags, **small)
    run = offline_runs(tmp_path / "elsewhere")[-1].run
    assert (run.project, run.display_name, run.run_group) == ("p", "n", "g")


def test_seeds_share_a_group_and_ablations_a_job_type(features, tmp_path, offline):
    small = {"nepoch": 1, "scen_iterations": 2, "distill_iterations": 2}
    runs = tmp_path / "runs"
    one = only_run(train(features, runs, seed=1, **small)).run
    two = only_run(train(features, runs, seed=2, **small)).run
    drawing = {"log_figures": True, "log_curves": True}
    drawn = train(features, runs, seed=2, method="no guide", **drawing, **small)
    other = only_run(drawn)
    assert one.run_group == two.run_group != other.run.run_group
    assert (one.job_type, other.run.job_type) == ("train", "ablation")

    captions = {name: row[name] for row in other.history for name in row if "caption" in name}
    assert set(captions) >= {"curves.caption", "tsne.caption", "curve.caption"}
    assert captions["curves.caption"].startswith("CUB: learning curves")


def test_no_step_is_logged_twice_or_never_after_a_kill(features, tmp_path, offline, capsys):
    """A file of each process: together they have every line of metrics.jsonl once."""
    runs = tmp_path / "runs"
    changes = {"checkpoint_every": 10**6, "log_freq_iteration": 5, "distill_iterations": 1500}
    argv = small_run_arguments(features, runs, "--wandb", "offline", **changes)
    process = start_process(argv, train_until_killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    time.sleep(1)  # W&B's own process outlives it for a moment
    (folder,) = runs.iterdir()

    offline.setenv("WANDB_SILENT", "false")
    argv = ["--runs", str(runs), "--device", "cpu", "--wandb", "offline", "--resume"]
    train_joint.main(argv, dataset="CUB")
    wandb.teardown()
    first, second = offline_runs(folder)
    assert second.run.run_id == folder.name
    assert first.steps + second.steps == list(range(1, len(read_metrics(folder)) + 1))
    said = capsys.readouterr().err
    assert "wandb: " in said  # it is not silent
    assert "WARNING" not in said and "Tried to log" not in said and "gnor" not in said


def train_until_killed(argv):
    """Train, and die by SIGKILL in the middle of stage 2."""
    log, lines = RunFolder.log, iter(range(150))

    def log_or_die(self, stage, values):
        log(self, stage, values)
        if stage == "distill" and next(lines, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.log = log_or_die
    train_silently(argv)


class Server:
    """A run in W&B that its server says it has the steps below `starting_step` of."""

    resumed, starting_step = True, 4

    def __init__(self):
        self.logged = []

    def define_metric(self, *_, **__):
        pass

    def log(self, values, step):
        self.logged.append((step, values["scen/iteration"]))


def test_online_the_server_says_which_steps_it_has(tmp_path, monkeypatch):
    """Whatever it lacks is sent again, be it kept or cut off; what it has is not."""
    server = Server()
    monkeypatch.setattr(wandb_mirror, "start_wandb", lambda mode, **settings: server)
    facts = {"dataset": "CUB", "provenance": {}}
    config = read_config(SUN_CONFIG, {})
    mirror = wandb_mirror.Mirror(tmp_path, config, facts, "online", "an_id")

    mirror.start([{"stage": "scen", "iteration": 10 * step} for step in range(1, 6)])
    mirror.log(6, "scen", {"iteration": 60})
    assert server.logged == [(4, 40), (5, 50), (6, 60)]


def test_in_a_sweep_project_and_id_are_the_sweeps(tmp_path, monkeypatch):
    """W&B warns where a run names them."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    facts = {"dataset": "CUB", "provenance": {}}
    config = read_config(SUN_CONFIG, {})
    settings = wandb_mirror.Mirror(tmp_path, config, facts, "online", "an_id").settings
    assert settings["project"] is None and settings["id"] is None


def test_names_carry_their_stage_and_the_papers_stand_beside():
    names = wandb_mirror.names_in_wandb(
        "validation eggn", {"epoch": 2, "val_H": 1.0, "val_loss_G": 3.0}
    )
    assert names == {
        "val_eggn/epoch": 2,
        "epoch": 2,
        "val_eggn/H": 1.0,
        "val_H": 1.0,
        "val_eggn/loss_G": 3.0,
    }
    assert wandb_mirror.names_in_wandb("global", {"global_H": 1.0}) == {"global/H": 1.0}
