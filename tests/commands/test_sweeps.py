"""The W&B sweeps: every parameter is a key, and the agent's command line runs."""
import json
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, SMALL_RUN
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from scegg.config import FIELDS, parse_value

SWEEPS = sorted((ROOT / "wandb_config" / "sweeps").glob("*.yaml"))


def trial(sweep, pick):
    """One set of parameters, each the lower or the upper end of what the sweep may try."""
    return {name: entry["values"][pick] if "values" in entry else entry["max" if pick else "min"]
            for name, entry in sweep["parameters"].items()}


def test_there_is_a_sweep_for_every_dataset():
    assert [file.stem for file in SWEEPS] == ["awa2", "cub", "sun", "toy"]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_parameter_is_a_key_of_the_right_type(file):
    sweep = yaml.safe_load(file.read_text())
    assert sweep["metric"] == {"name": "best_H", "goal": "maximize"} and sweep["early_terminate"]["type"] == "hyperband"
    assert (ROOT / sweep["program"]).is_file()
    for pick in (0, -1):
        for name, value in trial(sweep, pick).items():
            assert name in FIELDS and parse_value(name, str(value), file.name) == value


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_agents_command_runs(file, features, tmp_path):
    """The command as W&B's agent puts it together (only the interpreter is this one), on a small feature file."""
    sweep = yaml.safe_load(file.read_text())
    own = [f"--{name}={value}" for name, value in SMALL_RUN.items() if name not in sweep["parameters"]]
    parts = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial(sweep, 0).items()}})
    parts |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [str(ROOT / sweep["program"])]}
    command = [word for item in create_sweep_command(sweep["command"])
               for word in (parts[item[2:-1]] if item.startswith("${") else [item])]
    done = subprocess.run([*command, "--features", str(features), "--device", "cpu", "--backbone=resnet101", "--img_size=448", *own],
                          cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made, = (tmp_path / "runs").iterdir()
    config = json.loads((made / "summary.json").read_text())["config"]
    assert {name: config[name] for name in sweep["parameters"]} == trial(sweep, 0)
