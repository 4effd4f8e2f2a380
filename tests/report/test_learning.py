"""Learning curves: what a log holds is what is drawn, alone and over seeds."""

import json
import shutil

import pytest
from matplotlib import pyplot

import visualize
from helpers import SUN_CONFIG, read_metrics, read_summary
from scegg.config import config_yaml, read_config
from scegg.report.learning import learning_figure, panels_of, read_logs
from util import UserError

LOG = [
    {"stage": "scen", "iteration": 10, "loss_LEN": 2.0, "loss_GEN": 1.0},
    {"stage": "scen", "iteration": 20, "loss_LEN": 1.0, "loss_GEN": 0.5},
    {"stage": "local", "local_H": 20.0},
    {"stage": "distill", "iteration": 10, "loss_distill": 3.0},
    {"stage": "eggn", "epoch": 1, "critic_real": 1.0, "penalty": 0.5, "lambda1": 9.0, "H": 40.0},
    {"stage": "eggn", "epoch": 2, "critic_real": 2.0, "penalty": 0.4, "lambda1": 8.0, "H": 50.0},
    {"stage": "eggn", "epoch": 3, "critic_real": 3.0, "penalty": 0.3, "lambda1": 7.0, "H": 50.0},
]


def write_log(folder, lines=LOG, seed=1, **changes):
    """A run's folder with its config and log."""
    folder.mkdir()
    overrides = {name: str(value) for name, value in {"seed": seed, **changes}.items()}
    (folder / "config.yaml").write_text(config_yaml(read_config(SUN_CONFIG, overrides)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines_by_name(folders):
    """The drawn lines by name, (x, mean, deviation, picked)."""
    panels = panels_of(read_logs(folders))
    lines = [line for panel in panels for line in panel.lines]
    return {line.name: [part.tolist() for part in line[1:4]] + [line.picked] for line in lines}


def test_a_run_alone(tmp_path):
    lines = lines_by_name([write_log(tmp_path / "a")])
    assert lines["loss_LEN"][:2] == [[10, 20], [2.0, 1.0]]
    assert lines["critic_real"][:2] == [[1, 2, 3], [1.0, 2.0, 3.0]]
    assert lines["lambda1"][1] == [9.0, 8.0, 7.0]
    assert lines["H"][3] == [(2, 50.0)]  # the first of two equal ones, as a run picks it


def test_seeds_are_a_mean_and_a_band_where_all_have_points(tmp_path):
    other = [line | {"H": 44.0} if "H" in line else line for line in LOG[:-1]]
    folders = [write_log(tmp_path / "a"), write_log(tmp_path / "b", other, seed=2)]
    x, mean, deviation, picked = lines_by_name(folders)["H"]
    assert (x, mean) == ([1, 2], [42.0, 47.0])
    assert deviation == pytest.approx([8**0.5, 18**0.5])
    assert picked == [(2, 50.0), (1, 44.0)]

    visualize.main(["curves", "--run", *map(str, folders)])
    assert pyplot.imread(tmp_path / "curves.png").shape[1] == 2100  # beside the runs


def test_validated_runs_mark_what_the_held_out_classes_picked(tmp_path):
    held_out = [
        {"stage": "validation eggn", "epoch": epoch, "val_H": H, "val_acc_zs": 1.0}
        for epoch, H in ((1, 60.0), (2, 30.0), (3, 10.0))
    ]
    folder = write_log(tmp_path / "a", held_out + LOG, protocol="validated")
    lines = lines_by_name([folder])
    assert lines["H"][3] == [(1, 40.0)]
    assert lines["val_H"][:2] == [[1, 2, 3], [60.0, 30.0, 10.0]]
    assert not lines["val_H"][3]


def test_a_real_run_says_the_epoch_of_its_summary(toy_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(toy_run.folder, folder)
    (run,) = read_logs([folder])
    summary = read_summary(folder)
    assert run.picked("H") == (summary["best_epoch"], summary["best_H"])

    drawn = {line.name for panel in panels_of([run]) for line in panel.lines}
    logged = {name for line in read_metrics(folder) if "epoch" in line for name in line}
    losses = {name for name in logged if name.startswith(("loss_", "critic_"))}
    zero = {name for name in losses if not any(line.get(name) for line in read_metrics(folder))}
    assert losses - zero | {"penalty", "lambda1", "acc_zs", "H"} <= drawn
    assert learning_figure([run])._suptitle.get_text() == "run"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 2, "lr": 0.5}, "they differ in lr; draw them one by one"),
        ({"seed": 1}, "they differ in nothing, not even in the seed"),
    ],
)
def test_runs_of_different_configs_are_refused(tmp_path, changes, message):
    folders = [write_log(tmp_path / "a"), write_log(tmp_path / "b", **changes)]
    with pytest.raises(UserError, match=message):
        visualize.main(["curves", "--run", *map(str, folders)])


def test_logs_that_are_none(tmp_path):
    folder = write_log(tmp_path / "a")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"stage": "eg')  # it is being written
    assert lines_by_name([folder])["H"][0] == [1, 2, 3]

    for text, message in (("", "nothing to draw"), ("{}\n", "no"), ("[1]\n", "not the log")):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            visualize.main(["curves", "--run", str(folder)])
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="could not be read"):
        visualize.main(["curves", "--run", str(folder)])
