"""The W&B sweeps: every parameter is a key, and the agent's command line runs."""

import subprocess
import sys

import h5py
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from helpers import ROOT, SMALL_RUN, flags, read_summary, run_script
from scegg.config import FIELDS, parse_value

# what an agent gives beside the parameters where the run was preempted: W&B's config of it
HIDDEN = {
    "_wandb": {"value": {"cli_version": "0.31.0"}},
    "provenance": {"value": {"code": "0123"}},
}
SWEEPS = sorted((ROOT / "wandb_config" / "sweeps").glob("*.yaml"))


def lowest(entry):
    """The lower end of what a sweep may try."""
    if "value" in entry:
        return entry["value"]
    return entry["values"][0] if "values" in entry else entry["min"]


def highest(entry):
    """The upper end of what a sweep may try."""
    if "value" in entry:
        return entry["value"]
    return entry["values"][-1] if "values" in entry else entry["max"]


def trial(sweep, pick):
    """One set of a sweep's parameters, each picked (lowest, highest) from what it may try."""
    return {name: pick(entry) for name, entry in sweep["parameters"].items()}


def test_there_are_two_sweeps_for_every_dataset():
    both = [
        name
        for dataset in ("awa2", "cub", "sun", "toy")
        for name in (dataset, f"{dataset}_validated")
    ]
    assert [file.stem for file in SWEEPS] == both


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_parameter_is_a_key_of_the_right_type(file):
    sweep = yaml.safe_load(file.read_text())
    validated = file.stem.endswith("_validated")
    name = "val_best_H" if validated else "best_H"
    assert sweep["metric"] == {"name": name, "goal": "maximize"}
    assert ("protocol" in sweep["parameters"]) == validated
    assert sweep["run_cap"] > 0 and sweep["name"] and sweep["description"]
    assert sweep["early_terminate"]["type"] == "hyperband"
    assert (ROOT / sweep["program"]).is_file()

    for pick in (lowest, highest):
        for name, value in trial(sweep, pick).items():
            assert name in FIELDS
            assert parse_value(name, str(value), file.name) == value


def agents_command(sweep, parameters, dataset):
    """The command as W&B's agent puts it together; only the interpreter is this one."""
    args = {name: {"value": value} for name, value in parameters.items()}
    args |= HIDDEN | {"dataset": {"value": dataset}}
    parts = create_sweep_command_args({"args": args}) | {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [str(ROOT / sweep["program"])],
    }

    command = []
    for item in create_sweep_command(sweep["command"]):
        if item.startswith("${"):
            command += parts[item.removeprefix("${").removesuffix("}")]
        else:
            command.append(item)
    return command


def run_command(command, in_own_process):
    """A command of Python's: (exit status, stderr). Starting Python takes seconds."""
    if in_own_process:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        return done.returncode, done.stderr
    env, python, program, *argv = command
    assert (env, python) == ("/usr/bin/env", sys.executable)
    return run_script(program, *argv)


# the other validated files differ from these as TOY's does
@pytest.mark.parametrize(
    "file",
    [file for file in SWEEPS if file.stem.removesuffix("_validated") in (file.stem, "toy")],
    ids=lambda file: file.stem,
)
def test_the_agents_command_runs(file, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = yaml.safe_load(file.read_text())
    parameters = trial(sweep, lowest)
    small = {name: value for name, value in SMALL_RUN.items() if name not in parameters}
    own = ["--features", str(features), "--device", "cpu"]
    own += flags(backbone="resnet101", img_size=448, **small)

    with h5py.File(features, "a") as arrays:  # xlsa17's train and val classes, for validation
        trainval = arrays["trainval_loc"][()]
        is_val = arrays["labels"][()][trainval] == 0
        arrays["train_loc"], arrays["val_loc"] = trainval[~is_val], trainval[is_val]

    command = [*agents_command(sweep, parameters, file.stem.split("_")[0].upper()), *own]
    status, said = run_command(command, in_own_process=file.stem == "toy")
    assert status == 0, said

    (made,) = (tmp_path / "runs").iterdir()
    config = read_summary(made)["config"]
    assert {name: config[name] for name in parameters} == parameters
