"""evaluate.py: every number of a run computed again, what differs, what is refused."""

import csv
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import evaluate
from helpers import (
    ROOT,
    feature_arrays,
    read_summary,
    run_training,
    small_run_arguments,
    write_features,
)
from scegg.features.reader import open_features
from scegg.method.evaluation import Scores, in_percent
from scegg.method.selection import Selection
from scegg.report.evaluation import Judge, evaluate_run, is_number
from scegg.run.winners import Winners
from util import UserError, save_tensors, sha256

VAL_AND_TRAIN = (0, 5), (2, 3, 6, 8)  # classes; 1, 4 and 7 are unseen
WITHOUT_GUIDE = {"rec_seen_cls_weight": 0, "gen_unseen_cls_weight": 0}
JOINT = {"scen_schedule": "joint", "joint_every": 2, "joint_refresh": 14, "joint_lr": 1e-3}
# the kinds of run, by name: what each changes in the config
KINDS = {
    "paper": {"a1": 0.5, "a2": 0.5, "seen_bias": 0.1},
    "validated": {"protocol": "validated", "nepoch": 3, "classifier_hidden_weight": 0.1},
    "joint": JOINT | {"joint_distill_iterations": 4, "nepoch": 3},
    "cnn": WITHOUT_GUIDE | {"visual_features": "cnn"},
    "no decoder, labels": {"use_decoder": False, "distill_target": "labels"},
    "czsl, mlp": {"gzsl": False, "compose_runtime": "mlp", "freeze_dec": True},
    "scen alone": {"nepoch": 0},
}


def train(folder, **changes):
    """A small run on a feature file with xlsa17's val classes; returns (features, run folder)."""
    arrays = feature_arrays()
    is_val = [label in VAL_AND_TRAIN[0] for label in arrays["labels"][arrays["trainval_loc"]]]
    arrays["val_loc"] = arrays["trainval_loc"][is_val]
    arrays["train_loc"] = arrays["trainval_loc"][[not value for value in is_val]]
    features = write_features(folder / "features.hdf5", arrays)

    settings = {"classifier_epochs": 6, "classifier_lr": 0.003, "scen_lr": 1e-3} | changes
    argv = small_run_arguments(features, folder / "runs", **settings)
    run_training("CUB", "sun_gzsl.yaml", argv)
    (made,) = (folder / "runs").iterdir()
    return features, made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(features, run folder) of a run in the paper's protocol; the tests copy what they change."""
    return train(tmp_path_factory.mktemp("paper"), **KINDS["paper"])


def check(run, features, *more):
    """evaluate.py on a run; returns its exit status."""
    try:
        evaluate.main(["--run", str(run), "--features", str(features), *map(str, more)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_computed_again_to_the_last_digit(tmp_path, capsys, kind):
    features, run = train(tmp_path, **KINDS[kind])
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert check(run, features) == 0

    said, numbers = capsys.readouterr().out, list(filter(is_number, read_summary(run)))
    assert said.startswith(table)
    assert f"all {len(numbers)} numbers of summary.json are the same" in said
    expected = {"scen alone": 8, "cnn": 14, "czsl, mlp": 12}.get(kind, 22)
    assert len(numbers) == expected


def test_the_epoch_that_is_named_is_gzsls_wherever_it_was_picked(monkeypatch):
    """With protocol validated it can come before CZSL's, and then it is kept first."""
    epochs = [(1, "gzsl"), (3, "czsl")]
    choice = {kind: {"epoch": epoch} for epoch, kind in epochs}
    selection, winners = Selection(SimpleNamespace(gzsl=True), choice), Winners()
    of_kinds = {"czsl": {}, "gzsl": {}}
    scores = Scores(torch.ones(1), torch.ones(1, 2), None, {"picked": of_kinds, "last": of_kinds})
    for epoch, _ in epochs:
        selection.update(epoch, scores)
        winners.keep_epoch(epoch, selection, scores, None, last=False)

    monkeypatch.setattr(Judge, "__init__", lambda *_: None)
    monkeypatch.setattr(Judge, "of_epoch", lambda *_: (in_percent(1), []))
    run = SimpleNamespace(
        config=SimpleNamespace(protocol="validated"), features=SimpleNamespace(split=None)
    )
    numbers, _ = evaluate_run(run, winners.kept, None)
    assert numbers["best_epoch"] == selection.epoch == 1


def test_a_winner_is_of_its_own_epoch_and_equal_tensors_are_stored_once(tmp_path):
    """In the joint schedule SCEN goes on learning after the picked epoch."""
    _, run = train(tmp_path, **KINDS["joint"], seed=3)
    content = torch.load(run / "model.pt", weights_only=True)
    winners = content["winners"]
    stages = [winners["local"], *winners["picked"].values(), winners["nothing_picked"]["gzsl"]]
    by_epoch = {stage.get("epoch", 0): stage["scen"]["len.V"] for stage in stages}
    assert len(by_epoch) > 2
    distinct = {tuple(tensor.flatten().tolist()) for tensor in by_epoch.values()}
    assert len(distinct) == len(by_epoch)

    tensors = {}

    def collect(value):
        for item in value.values() if isinstance(value, dict) else ():
            collect(item)
        if isinstance(value, torch.Tensor):
            tensors[value.untyped_storage().data_ptr()] = value

    collect(content)
    values = [(tensor.shape, tensor.numpy().tobytes()) for tensor in tensors.values()]
    assert len(set(values)) == len(values)


def test_a_number_that_differs_is_named(trained, tmp_path, capsys):
    features, run = trained
    shutil.copytree(run, tmp_path / "run")
    summary = read_summary(run)
    summary["best_H"] += 1e-6
    summary["val_best_H"] = 3.0
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))

    assert check(tmp_path / "run", features) == 1
    said = capsys.readouterr().err
    assert f"differs: best_H is {read_summary(run)['best_H']}, and {summary['best_H']} in" in said
    assert "differs: val_best_H is None, and 3.0 in summary.json" in said
    assert "2 numbers differ: the run was computed on cpu, this on cpu" in said


def test_the_report_adds_up_to_the_numbers(trained, tmp_path):
    features, run = trained
    assert check(run, features, "--report", "--output", tmp_path / "report") == 0
    summary = read_summary(run)

    def rows(name, **wanted):
        with open(tmp_path / "report" / f"{name}.csv", newline="") as file:
            found = list(csv.DictReader(file))
        return [row for row in found if wanted.items() <= row.items()]

    def mean(**wanted):
        values = [float(row["accuracy"]) for row in rows("per_class", **wanted)]
        return pytest.approx(sum(values) / len(values), abs=1e-3)

    picked = {"numbers": "picked", "task": "gzsl"}
    assert summary["best_acc_unseen"] == mean(**picked, kind="unseen")
    assert summary["best_acc_seen"] == mean(**picked, kind="seen")
    assert summary["last_acc_zs"] == mean(numbers="nothing_picked", task="czsl")
    assert summary["local_acc_seen"] == mean(numbers="local", task="gzsl", kind="seen")

    worst = rows("confusions", **picked)
    shares = [float(row["share"]) for row in worst]
    assert 0 < len(worst) <= 20 and shares == sorted(shares, reverse=True)
    assert all(row["class"] != row["predicted"] for row in worst)
    images = {row["class"]: int(row["images"]) for row in rows("per_class", **picked)}
    for row in worst:
        share = 100 * int(row["images"]) / images[row["class"]]
        assert float(row["share"]) == pytest.approx(share, abs=1e-3)


def test_held_out_classes_have_their_own_names(tmp_path):
    """The held-out split numbers its labels anew; the report names the classes of the file."""
    features, run = train(tmp_path, **KINDS["validated"])
    assert check(run, features, "--report", "--output", tmp_path / "report") == 0
    with open(tmp_path / "report" / "per_class.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["numbers"] == "validation"]

    names = {
        (task, kind): {row["class"] for row in rows if (row["task"], row["kind"]) == (task, kind)}
        for task, kind in (("czsl", "unseen"), ("gzsl", "unseen"), ("gzsl", "seen"))
    }
    class_names = open_features(features).class_names
    val, train_classes = ({class_names[label] for label in labels} for labels in VAL_AND_TRAIN)
    assert names == {
        ("czsl", "unseen"): val,
        ("gzsl", "unseen"): val,
        ("gzsl", "seen"): train_classes,
    }


def test_a_run_of_an_older_version_says_what_it_lacks():
    older = ROOT / "tests" / "golden" / "older_run"
    with pytest.raises(UserError, match="older version: its model.pt lacks the classifiers"):
        check(older, older / "features.hdf5")


def test_a_model_that_is_not_the_runs_own_is_refused(trained, tmp_path):
    features, run = trained
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "model.pt"
    content = torch.load(path, weights_only=True)
    content["winners"]["picked"]["gzsl"]["linear"]["weight"][0] += 1
    save_tensors(path, content)
    with pytest.raises(UserError, match="model.pt is not the file that the run wrote"):
        check(tmp_path / "run", features)

    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match="model.pt is damaged"):
        check(tmp_path / "run", features)


def drop(*path):
    """What takes an entry out of a nested dict."""

    def change(content):
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return change


def put(value, *path):
    """What replaces an entry of a nested dict."""

    def change(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


BEST = ("winners", "picked", "gzsl")
STRANGE = [
    put(3, "winners"),
    put({}, "winners", "other"),
    put([], *BEST),
    drop("winners", "picked", "czsl"),
    drop(*BEST, "epoch"),
    drop(*BEST, "scen"),
    drop(*BEST, "scen", "Z"),
    drop(*BEST, "linear"),
    drop(*BEST, "Dec"),
    drop("winners", "nothing_picked", "gzsl", "Dec"),
    drop("winners", "global", "global_cls"),
    put(torch.zeros(()), *BEST, "linear", "weight"),
    put({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, *BEST, "linear"),
    put(torch.zeros(3, 3), *BEST, "scen", "len.V"),
    put("text", *BEST, "Dec", "fc1.weight"),
    drop("class_names"),
    put([99], "unseen"),
    put(None, "features"),
    put([], "features", "precision"),
]


@pytest.mark.parametrize("change", STRANGE)
def test_a_strange_model_is_refused_in_one_line(trained, tmp_path, change):
    """A hand-made one, whose hash stands in summary.json."""
    features, run = trained
    copy = shutil.copytree(run, tmp_path / "run")
    content = torch.load(copy / "model.pt", weights_only=True)
    change(content)
    save_tensors(copy / "model.pt", content)
    summary = read_summary(run) | {"model_sha256": sha256(copy / "model.pt")}
    (copy / "summary.json").write_text(json.dumps(summary))

    with pytest.raises(UserError, match="not written by a run|do not fit"):
        check(copy, features)


@pytest.mark.parametrize("changes", [{"dataset": 5}, {"config": []}, {"device": 5, "best_H": {}}])
def test_a_strange_summary_is_no_traceback(trained, tmp_path, changes):
    features, run = trained
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").write_text(json.dumps(read_summary(run) | changes))
    if "device" in changes:
        assert check(copy, features) == 1  # best_H differs
        return
    with pytest.raises(UserError, match="summary.json or model.pt is damaged"):
        check(copy, features)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--format", "csv"], "--format goes with --images"),
        (["--attention"], "--attention goes with --images"),
        (["--output", "x"], "--output goes with --report or --attention"),
        (["--images", "a.jpg", "--max_megapixels", "0"], "--max_megapixels 0: must be at least 1"),
        (["--images", "a.jpg", "--report"], "--report goes without --images"),
        (["--features", "none.hdf5"], "none.hdf5 is missing"),
        (["--run", "nowhere"], "config.yaml is missing: name a run's folder"),
    ],
)
def test_mistakes_of_evaluate(trained, argv, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["--run", str(trained[1]), *argv])
