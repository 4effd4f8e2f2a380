"""Runs that are interrupted and resumed end as if they had not been."""

import random
import shlex
import signal
import subprocess
import time

import pytest
import torch

import train_joint
from helpers import TRAIN_COMMAND, feature_arrays, read_summary, write_features
from resuming import (
    SETTINGS,
    Killed,
    arguments,
    assert_same,
    kill_in_steps,
    leave_unfinished_run,
    outcome,
    start_process,
    train,
    train_and_die_before,
    write_features_with_val,
)
from scegg.processes import locked
from scegg.run import identity
from util import UserError


@pytest.fixture
def features(tmp_path):
    """The path of a small feature file with xlsa17's train and val classes."""
    return write_features_with_val(tmp_path / "features.hdf5")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_interrupted_at_any_step_ends_as_if_it_had_not_been(
    features, tmp_path, monkeypatch, setting
):
    """The process 'dies' in the middle of random steps of every stage.

    It is resumed with what was on disk then.
    """
    changes = SETTINGS[setting]
    train(features, tmp_path / "whole", changes)
    rng = random.Random(setting)
    steps_to_live, deaths = 0, 0

    def end_of_life(stage, step):
        nonlocal steps_to_live
        steps_to_live -= 1
        return steps_to_live == 0

    kill_in_steps(monkeypatch, after=end_of_life)
    more = []
    while not list((tmp_path / "killed").glob("*/summary.json")):
        steps_to_live = rng.randint(8, 24)
        try:
            train(features, tmp_path / "killed", changes, *more)
        except Killed:
            deaths += 1
            more = ["--resume"]

    assert deaths >= 3
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def train_for(argv, seconds):
    """Train in a process of its own and kill it after some seconds (None: never).

    Returns its exit status.
    """
    process = start_process(argv)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def survive_kills(features, tmp_path, kills, changes):
    """SIGKILL runs at `kills` random moments and resume each.

    Every finished one equals the uninterrupted one.
    """
    start = time.perf_counter()
    train_for(arguments(features, tmp_path / "whole", changes), None)
    usual, reference = time.perf_counter() - start, outcome(tmp_path / "whole")

    rng, done, finished = random.Random(0), 0, 0
    while done < kills or not finished:
        runs = tmp_path / f"killed-{finished}"
        more = ["--resume"] if list(runs.glob("*/checkpoint.pt")) else []
        seconds = rng.uniform(0.1, 0.6) * usual if done < kills else None
        status = train_for(arguments(features, runs, changes, *more), seconds)

        if status == -signal.SIGKILL:
            done += 1
            # A run may be finished and only its end not: its checkpoint is not needed any more.
            for summary in runs.glob("*/summary.json"):
                (summary.parent / "checkpoint.pt").unlink(missing_ok=True)
        if list(runs.glob("*/summary.json")):
            assert_same(outcome(runs), reference)
            finished += 1
        else:
            assert status == -signal.SIGKILL

    ended = {summary.parent.name for summary in tmp_path.glob("killed-*/*/summary.json")}
    partial = tmp_path.glob("killed-*/*/.*partial*")
    assert not [path for path in partial if path.parent.name in ended]


def test_sigkill_at_random_moments(features, tmp_path):
    survive_kills(features, tmp_path, 4, {"nepoch": 3})


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_twenty_sigkills_at_random_moments(features, tmp_path, setting):
    survive_kills(features, tmp_path, 20, {"nepoch": 6} | SETTINGS[setting])


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_names_the_command_to_go_on(features, tmp_path, signum, status):
    endless = {"scen_iterations": 100000, "checkpoint_every": 100000}
    process = subprocess.Popen(
        [*TRAIN_COMMAND, *arguments(features, tmp_path / "runs", endless)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while process.poll() is None and not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.05)
    time.sleep(0.5)

    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert out.splitlines()[-1] == (
        f"stopped; go on with: python {shlex.quote(TRAIN_COMMAND[1])} --resume {folder} "
        "--data_root none --device cpu --wandb disabled"
    )

    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["steps"]["scen"] > 0


def test_a_checkpoint_of_another_config_data_or_code_is_refused(features, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    folder = leave_unfinished_run(monkeypatch, features, runs)
    changed = "lr was 0.001 and is 0.5, syn_num was 20 and is 30; make these as they were"
    with pytest.raises(UserError, match=changed):
        train(features, runs, {"lr": 0.5, "syn_num": 30}, "--resume")

    other = write_features(tmp_path / "other.hdf5", feature_arrays(per_class=13))
    with pytest.raises(UserError, match="split_fingerprint was"):
        train(other, runs, {}, "--resume", folder.name)

    # other maps and attributes, all else alike
    remade = write_features(tmp_path / "remade.hdf5", feature_arrays(seed=1))
    with pytest.raises(UserError, match="features was .* and is"):
        train(remade, runs, {}, "--resume", folder.name)

    with monkeypatch.context() as patch:
        patch.setattr(identity, "code_version", lambda: "0123")
        with pytest.raises(UserError, match="code was .* and is 0123"):
            train(features, runs, {}, "--resume")

    train(features, runs, {}, "--resume", str(folder))
    with pytest.raises(UserError, match="has no unfinished run of CUB"):
        train(features, runs, {}, "--resume")
    with pytest.raises(UserError, match="this run is finished"):
        train(features, runs, {}, "--resume", folder.name)
    with pytest.raises(UserError, match="there is no such run"):
        train(features, runs, {}, "--resume", "CUB-1")


def test_a_resumed_run_goes_on_to_reuse_scen(features, tmp_path, monkeypatch, capsys):
    """It takes no SCEN that was trained on other maps."""
    runs, validated = tmp_path / "runs", SETTINGS["validated"]
    train(features, runs, {})

    moment = "validation distill", 20
    train_and_die_before(monkeypatch, moment, features, runs, validated, "--reuse_scen")
    (killed,) = (path.parent for path in runs.glob("*/checkpoint.pt"))
    train(features, runs, validated, "--resume", str(killed))
    assert read_summary(killed)["scen_from"]

    capsys.readouterr()
    remade = write_features(tmp_path / "remade.hdf5", feature_arrays(seed=1))
    train(remade, runs, {}, "--reuse_scen")
    assert "SCEN is taken" not in capsys.readouterr().out


def test_resuming_needs_no_flags(features, tmp_path, monkeypatch):
    """The run knows its config and its features."""
    runs = tmp_path / "runs"
    leave_unfinished_run(monkeypatch, features, runs)
    argv = ["--runs", str(runs), "--device", "cpu", "--wandb", "disabled", "--resume"]
    train_joint.main(argv, dataset="CUB")

    train(features, tmp_path / "whole", {})
    assert_same(outcome(runs), outcome(tmp_path / "whole"))


def test_two_processes_do_not_resume_one_run(features, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    folder = leave_unfinished_run(monkeypatch, features, runs)
    with locked(folder / ".lock", "training it"):
        with pytest.raises(UserError, match="another process is training"):
            train(features, runs, {}, "--resume", folder.name)

    # Without a name it is the last run that no other process trains.
    with locked(folder / ".lock", "training it"):
        with pytest.raises(UserError, match="no unfinished run"):
            train(features, runs, {}, "--resume")


def eggn_lines(folder):
    """The lines of a run's metrics file that stage 3 wrote."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if '"stage": "eggn"' in line]


def test_eight_runs_started_at_once_share_nothing_but_the_cache(features, tmp_path):
    """As a sweep's agents on one machine: a folder each, one cache built once, equal numbers."""
    runs = tmp_path / "runs"
    argv = arguments(features, runs, {"nepoch": 1}, "--cache", "disk", "--reuse_scen")
    processes = [start_process(argv) for _ in range(8)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8

    folders = sorted(runs.iterdir())
    assert len(folders) == 8
    assert len(list(tmp_path.glob("*.cache"))) == 1
    assert not list(tmp_path.rglob("*partial*"))

    metrics = [eggn_lines(folder) for folder in folders]
    assert metrics[0] and all(lines == metrics[0] for lines in metrics)


@pytest.mark.parametrize(
    "at",
    [
        ("validation scen", 20),
        ("validation embed", 1),
        ("validation distill", 30),
        ("validation eggn", 28),
        ("scen", 1),
        ("scen", 20),
        ("embed", 1),
        ("score", 1),
    ],
    ids=str,
)
def test_a_validated_run_killed_where_stages_and_phases_meet(features, tmp_path, monkeypatch, at):
    validated = SETTINGS["validated"]
    train_and_die_before(monkeypatch, at, features, tmp_path / "killed", validated)
    train(features, tmp_path / "killed", validated, "--resume")

    train(features, tmp_path / "whole", validated)
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
