"""The benchmarks at a tiny size: every stage runs, ours and the plain transcription's."""

import dataclasses
import json

import h5py
import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import table
from benchmarks.evaluation import evaluation_stage
from benchmarks.files import backbone_stage, file_stages
from benchmarks.flop import Size
from benchmarks.machine import Ceilings, Timer, measure_ceilings
from benchmarks.stages import Workbench
from benchmarks.training import training_stages
from helpers import ROOT, feature_arrays, write_features
from scegg.config import read_config
from util import UserError

CPU = torch.device("cpu")
TINY = Size(B=5, K=7, C=9, Cs=6, D=16, side=3, d_v=8, trainval=30, test=20)
SUN = ROOT / "wandb_config" / "sun_gzsl.yaml"
TINY_CONFIG = {
    "ngh": 32,
    "ndh": 48,
    "distill_hidden": 24,
    "syn_num": 9,
    "classifier_epochs": 3,
    "critic_iter": 2,
}
FILE_STAGES = 6  # written and read: plain, gzip and lzf


@pytest.fixture
def bench():
    config = dataclasses.replace(read_config(SUN, {}), **TINY_CONFIG)
    return Workbench(TINY, config, CPU, torch.rand(8, TINY.D, TINY.side, TINY.side))


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    monkeypatch.setattr(table, "backbone_stage", lambda device, _: backbone_stage(device, 64))


def test_every_stage_is_measured(bench, tmp_path, capsys):
    stages = table.all_stages(bench, bench.raw, tmp_path, against_plain=True)
    ceilings = Ceilings(matmul=1e9, copy=1e9)
    table.print_header(against_plain=True)
    records = list(table.measure(stages, CPU, Timer(CPU), 1, ceilings))
    for record in records:
        table.print_record(record)

    assert [record["stage"] for record in records] == [stage.name for stage in stages]
    compared = [record["stage"] for record in records if "ratio" in record]
    assert len(compared) == len(stages) - 1 - FILE_STAGES
    for record in records:
        assert record["seconds"] > 0 and record["of_ceiling"] > 0
        assert record["gflop"] > 0 or record["gbyte"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(stages) and "ratio" in lines[0]


def test_the_transcription_runs_only_when_it_is_asked_for(bench):
    stages = [*training_stages(bench, False), evaluation_stage(bench, False)]
    assert not any(stage.plain for stage in stages)


def test_files_are_read_as_they_were_written(bench, tmp_path):
    maps = bench.raw.numpy()
    for stage in file_stages(maps, tmp_path):
        stage.run()

    paths = sorted(tmp_path.glob("*.hdf5"))
    assert [path.stem for path in paths] == ["None", "gzip", "lzf"]
    for path in paths:
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file["feature_map"][:], maps)


def test_the_command_measures_a_feature_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))
    path = write_features(tmp_path / "features.hdf5", feature_arrays())
    chosen = ["--stages", "dense-feature", "--batch_size", "4", "--repeats", "1"]
    output = ["--json", str(tmp_path / "records.json"), "--against", "plain"]
    command.main(["--features", str(path), "--device", "cpu", *chosen, *output])

    machine, stage = json.loads((tmp_path / "records.json").read_text())
    assert machine["size"] == dataclasses.asdict(
        Size(B=4, K=11, C=9, Cs=6, D=24, side=3, d_v=10, trainval=54, test=54)
    )
    assert stage["stage"] == "dense-feature pass" and stage["ratio"] > 0
    assert "dense-feature pass" in capsys.readouterr().out


def test_wrong_flags_are_user_errors():
    with pytest.raises(UserError, match="--against"):
        command.main(["--against", "literal"])


def test_the_timer_takes_the_median_and_repeats_less_what_takes_long():
    timer, times = Timer(CPU), iter([1.0, 5.0, 1.0, 2.0, 9.0])
    timer.seconds = lambda call: next(times)
    assert timer.medians([None], repeats=3) == [2.0]  # of 5, 1 and 2, after the warm-up

    times = iter([100.0, 70.0])
    timer.seconds = lambda call: next(times)
    assert timer.medians([None], repeats=3) == [70.0]


def test_ceilings_are_measured(monkeypatch):
    timer = Timer(CPU)
    monkeypatch.setattr(timer, "medians", lambda calls, repeats: [2.0 for call in calls])
    matmul, copy = measure_ceilings(CPU, timer)
    assert matmul == 2048**3 and copy == 2**26 * 4
