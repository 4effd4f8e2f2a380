"""Runs that are killed, stopped or go wrong, and what becomes of them."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, SMALL_RUN, feature_arrays, flags, run_training, write_features

import train_joint
from scegg.run import identity
from scegg.run.checkpoint import Checkpoint
from scegg.run.folder import RunFolder
from scegg.method.losses import LossMeter
from util import UserError, locked

RUN = SMALL_RUN | {"checkpoint_every": 7, "a1": 0.5, "a2": 0.5, "feedback_loop": 2}
SETTINGS = {"frozen": {}, "joint": {"scen_schedule": "joint", "joint_every": 3, "joint_refresh": 8, "joint_distill_iterations": 4},
            "validated": {"protocol": "validated"}, "cnn": {"visual_features": "cnn", "rec_seen_cls_weight": 0, "gen_unseen_cls_weight": 0},
            "supervised": {"distill_target": "labels", "compose_runtime": "mlp", "test_freq_epoch": 2}}


@pytest.fixture
def features(tmp_path):
    """A small feature file with xlsa17's train and val classes."""
    arrays = feature_arrays()
    is_val = torch.isin(torch.from_numpy(arrays["labels"][arrays["trainval_loc"]]), torch.tensor([0, 5])).numpy()
    arrays |= {"train_loc": arrays["trainval_loc"][~is_val], "val_loc": arrays["trainval_loc"][is_val]}
    return write_features(tmp_path / "features.hdf5", arrays)


def arguments(features, folder, changes, *more):
    return ["--features", str(features), "--runs", str(folder), "--device", "cpu", "--data_root", "none", "--wandb", "disabled",
            *flags(**RUN | changes), *more]


def train(features, folder, changes, *more):
    run_training("CUB", "sun_gzsl.yaml", arguments(features, folder, changes, *more))


def outcome(folder):
    """What a finished run left: its metrics file, byte for byte, its weights, and its numbers."""
    made, = (path.parent for path in folder.glob("*/summary.json"))
    summary = json.loads((made / "summary.json").read_text())
    numbers = {name: value for name, value in summary.items() if "acc" in name or name.endswith("H") or name == "ausuc"}
    assert not (made / "checkpoint.pt").exists() and not list(made.glob(".*partial*"))
    return (made / "metrics.jsonl").read_bytes(), torch.load(made / "model.pt", weights_only=True), numbers


def assert_same(run, reference):
    assert run[0] == reference[0] and run[2] == reference[2]
    for part in ("scen", "global_cls", "scaler", "eggn"):
        for name, tensor in reference[1].get(part, {}).items():
            assert torch.equal(tensor, run[1][part][name]), (part, name)


class Killed(BaseException):
    """Stands for a kill: nothing in the project catches it."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_interrupted_at_any_step_ends_as_if_it_had_not_been(features, tmp_path, monkeypatch, setting):
    """The process 'dies' in the middle of random steps of every stage, and is resumed with what stood on disk then."""
    changes = SETTINGS[setting]
    train(features, tmp_path / "whole", changes)
    rng, steps, deaths = random.Random(setting), Checkpoint.steps, 0

    def dying(self, stage, total, every, unit):
        nonlocal life
        for step in steps(self, stage, total, every, unit):
            yield step
            life -= 1
            if life == 0:
                raise Killed

    monkeypatch.setattr(Checkpoint, "steps", dying)
    more = []
    while not list((tmp_path / "killed").glob("*/summary.json")):
        life = rng.randint(8, 24)
        try:
            train(features, tmp_path / "killed", changes, *more)
        except Killed:
            deaths += 1
            more = ["--resume"]
    assert deaths >= 3
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def child(argv):
    os.environ["WANDB_SILENT"] = "true"
    sys.stdout = sys.stderr = open(os.devnull, "w")
    run_training("CUB", "sun_gzsl.yaml", argv)


def survive_kills(features, tmp_path, kills, changes):
    """SIGKILL runs at random moments until `kills` have been, resuming each; every finished one equals the uninterrupted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_joint"])
    whole = context.Process(target=child, args=(arguments(features, tmp_path / "whole", changes),))
    start = time.perf_counter()
    whole.start()
    whole.join()
    usual, reference = time.perf_counter() - start, outcome(tmp_path / "whole")
    rng, done, finished = random.Random(0), 0, 0
    while done < kills or not finished:
        folder = tmp_path / f"killed-{finished}"
        more = ["--resume"] if list(folder.glob("*/checkpoint.pt")) else []
        process = context.Process(target=child, args=(arguments(features, folder, changes, *more),))
        process.start()
        process.join(rng.uniform(0.1, 0.6) * usual if done < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            done += 1
            for summary in folder.glob("*/summary.json"):  # killed when its run was finished and only its end was not
                (summary.parent / "checkpoint.pt").unlink(missing_ok=True)
        if list(folder.glob("*/summary.json")):
            assert_same(outcome(folder), reference)
            finished += 1
        else:
            assert process.exitcode == -signal.SIGKILL
    assert not [path for path in tmp_path.glob("killed-*/*/.*partial*") if path.parent.name in
                {made.parent.name for made in tmp_path.glob("killed-*/*/summary.json")}]


def test_sigkill_at_random_moments(features, tmp_path):
    survive_kills(features, tmp_path, 4, {"nepoch": 3})


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_twenty_sigkills_at_random_moments(features, tmp_path, setting):
    survive_kills(features, tmp_path, 20, {"nepoch": 6} | SETTINGS[setting])


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_names_the_command_to_go_on(features, tmp_path, signum, status):
    argv = arguments(features, tmp_path / "runs", {"scen_iterations": 100000, "checkpoint_every": 100000})
    process = subprocess.Popen([sys.executable, ROOT / "train_joint_CUB.py", "--config", ROOT / "wandb_config/sun_gzsl.yaml", *argv],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    folder, = (tmp_path / "runs").iterdir()
    assert process.returncode == status and "Traceback" not in err
    assert out.splitlines()[-1] == (f"stopped; go on with: python train_joint_CUB.py --resume {folder} --data_root none --device cpu "
                                    "--wandb disabled")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["steps"]["scen"] > 0


def stop(features, folder, monkeypatch, **changes):
    """Leave an unfinished run."""
    steps = Checkpoint.steps

    def dying(self, stage, total, every, unit):
        for step in steps(self, stage, total, every, unit):
            yield step
            if stage == "distill" and step == 20:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "steps", dying)
        train(features, folder, changes)
    made, = folder.iterdir()
    return made


def test_a_checkpoint_of_another_config_data_or_code_is_refused(features, tmp_path, monkeypatch):
    folder = stop(features, tmp_path / "runs", monkeypatch)
    with pytest.raises(UserError, match="lr was 0.001 and is 0.5, syn_num was 20 and is 30; make these as they were"):
        train(features, tmp_path / "runs", {"lr": 0.5, "syn_num": 30}, "--resume")
    other = write_features(tmp_path / "other.hdf5", feature_arrays(per_class=13))
    with pytest.raises(UserError, match="split_fingerprint was"):
        train(other, tmp_path / "runs", {}, "--resume", folder.name)
    remade = write_features(tmp_path / "remade.hdf5", feature_arrays(seed=1))  # other maps and attributes, all else alike
    with pytest.raises(UserError, match="features was .* and is"):
        train(remade, tmp_path / "runs", {}, "--resume", folder.name)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "code_version", lambda: "0123")
        with pytest.raises(UserError, match="code was .* and is 0123"):
            train(features, tmp_path / "runs", {}, "--resume")
    train(features, tmp_path / "runs", {}, "--resume", str(folder))
    with pytest.raises(UserError, match="has no unfinished run of CUB"):
        train(features, tmp_path / "runs", {}, "--resume")
    with pytest.raises(UserError, match="this run is finished"):
        train(features, tmp_path / "runs", {}, "--resume", folder.name)
    with pytest.raises(UserError, match="there is no such run"):
        train(features, tmp_path / "runs", {}, "--resume", "CUB-1")


def test_a_resumed_run_goes_on_to_reuse_scen(features, tmp_path, monkeypatch, capsys):
    """And takes none that was trained on other maps."""
    train(features, tmp_path / "runs", {})
    steps = Checkpoint.steps

    def dying(self, stage, total, every, unit):
        for step in steps(self, stage, total, every, unit):
            if (self.phase + stage, step) == ("validation distill", 20):
                raise Killed
            yield step

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "steps", dying)
        train(features, tmp_path / "runs", SETTINGS["validated"], "--reuse_scen")
    killed, = (path.parent for path in (tmp_path / "runs").glob("*/checkpoint.pt"))
    train(features, tmp_path / "runs", SETTINGS["validated"], "--resume", str(killed))
    assert json.loads((killed / "summary.json").read_text())["scen_from"]
    capsys.readouterr()
    remade = write_features(tmp_path / "remade.hdf5", feature_arrays(seed=1))
    train(remade, tmp_path / "runs", {}, "--reuse_scen")
    assert "SCEN is taken" not in capsys.readouterr().out


def test_a_disk_that_fills_under_the_log_names_the_command_to_go_on_with(features, tmp_path, monkeypatch):
    log = RunFolder.log

    def full(self, stage, values):
        if stage == "eggn":
            raise OSError(28, "No space left on device")
        log(self, stage, values)

    monkeypatch.setattr(RunFolder, "log", full)
    with pytest.raises(UserError, match="No space left on device; free some disk space .*--resume"):
        train(features, tmp_path / "runs", {})
    monkeypatch.undo()
    train(features, tmp_path / "runs", {}, "--resume")


def test_resuming_needs_no_flags(features, tmp_path, monkeypatch):
    """The run knows its config and its features."""
    stop(features, tmp_path / "runs", monkeypatch)
    train_joint.main(["--runs", str(tmp_path / "runs"), "--device", "cpu", "--wandb", "disabled", "--resume"], dataset="CUB")
    train(features, tmp_path / "whole", {})
    assert_same(outcome(tmp_path / "runs"), outcome(tmp_path / "whole"))


def test_two_processes_do_not_resume_one_run(features, tmp_path, monkeypatch):
    folder = stop(features, tmp_path / "runs", monkeypatch)
    with locked(folder / ".lock", "training it"), pytest.raises(UserError, match="another process is training"):
        train(features, tmp_path / "runs", {}, "--resume", folder.name)
    with locked(folder / ".lock", "training it"), pytest.raises(UserError, match="no unfinished run"):
        train(features, tmp_path / "runs", {}, "--resume")  # the last one that is not being trained


def test_eight_runs_started_at_once_share_nothing_but_the_cache(features, tmp_path):
    """As the agents of a sweep on one machine: a folder each, one cache built once, equal numbers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_joint"])
    argv = arguments(features, tmp_path / "runs", {"nepoch": 1}, "--cache", "disk", "--reuse_scen")
    processes = [context.Process(target=child, args=(argv,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 8 and len(list(tmp_path.glob("*.cache"))) == 1 and not list(tmp_path.rglob("*partial*"))
    metrics = [[line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"stage": "eggn"' in line] for folder in folders]
    assert all(lines == metrics[0] for lines in metrics) and metrics[0]


@pytest.mark.parametrize("at", [("validation scen", 20), ("validation embed", 1), ("validation distill", 30), ("validation eggn", 28),
                                ("scen", 1), ("scen", 20), ("embed", 1), ("score", 1)], ids=str)
def test_a_validated_run_killed_where_stages_and_phases_meet(features, tmp_path, monkeypatch, at):
    steps = Checkpoint.steps

    def dying(self, stage, total, every, unit):
        for step in steps(self, stage, total, every, unit):
            if (self.phase + stage, step) == at:
                raise Killed
            yield step

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "steps", dying)
        train(features, tmp_path / "killed", SETTINGS["validated"])
    train(features, tmp_path / "killed", SETTINGS["validated"], "--resume")
    train(features, tmp_path / "whole", SETTINGS["validated"])
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(features, tmp_path):
    """A limit on the size of files stands for the disk: the first checkpoint fits, EGGN's do not."""
    argv = arguments(features, tmp_path / "runs", {"ngh": 256, "ndh": 256})
    done = subprocess.run(["bash", "-c", 'ulimit -f 300; exec "$@"', "bash", sys.executable, ROOT / "train_joint_CUB.py", "--config",
                           ROOT / "wandb_config/sun_gzsl.yaml", *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "free some disk space" in done.stderr, done.stderr
    folder, = (tmp_path / "runs").iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["steps"]["distill"] > 0 and not list(folder.glob("*partial*"))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_checkpoint_is_told_in_one_line(features, tmp_path, monkeypatch, damage):
    path = stop(features, tmp_path / "runs", monkeypatch) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000] if damage is None else damage)
    with pytest.raises(UserError, match="checkpoint.pt is damaged") as caught:
        train(features, tmp_path / "runs", {}, "--resume")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, message", [
    ({"classifier_lr": 1e38}, r"the softmax classifier, iteration \d+: loss is"),
    ({"scen_schedule": "joint", "joint_every": 3, "joint_refresh": 8, "joint_lr": 1e30}, r"stage 3 \((SCEN|distillation)\), iteration \d+: joint_"),
    ({"scen_lr": 1e30}, r"stage 1 \(SCEN\), iteration \d+: loss_LEN is"), ({"lr": 1e30}, r"stage 3 \(EGGN\), iteration \d+: \w+ is (nan|inf)")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(features, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(features, tmp_path / "runs", changes)
    path, = (tmp_path / "runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)["parts"]
    assert all(torch.isfinite(value).all() for name, value in saved["scen"].items() if "scaler" not in name)
    assert all(torch.isfinite(value).all() for value in saved.get("eggn", {}).values())


def test_the_meter_names_iteration_and_term():
    meter = LossMeter("stage 9", "one", "two")
    for value in (1.0, 2.0):
        meter.add(torch.tensor([value, 3.0]))
    assert meter.read() == {"one": 1.5, "two": 3.0} and meter.read() == {}
    meter.add(torch.tensor([1.0, 3.0]))
    meter.add(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="stage 9, iteration 4: two is nan"):
        meter.state_dict()
