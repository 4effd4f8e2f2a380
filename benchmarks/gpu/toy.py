"""Part f: TOY's whole run on CPU and on CUDA, killed and resumed, and twice with one seed."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.parts import ROOT, Job
from scegg.datasets import toy
from util import pick_device

PIXELS = ["--backbone", "efficientnet_lite2", "--normalization", "backbone"]
SMALL_SIZES = {"classes": 6, "images_per_class": 6, "unseen": 2}
SMALL_SETTINGS = {
    "img_size": 64,
    "batch_size": 4,
    "scen_iterations": 10,
    "distill_iterations": 10,
    "nepoch": 8,
    "ngh": 32,
    "ndh": 32,
    "distill_hidden": 16,
    "syn_num": 5,
    "classifier_epochs": 2,
    "checkpoint_every": 5,
    "log_curves": False,  # drawing takes longer than such a run
}
RESULTS = ("best_acc_zs", "best_acc_unseen", "best_acc_seen", "best_H", "acc_zs", "H")
LOOK_EVERY = 0.01  # seconds from one look at a run's log to the next


def run(job: Job):
    """Preprocess on each device and train there; all runs go side by side.

    Raises RuntimeError for a command that fails.
    """
    device = pick_device(None).type
    data = job.folder / "data"
    data.mkdir()
    toy.render(data, **(SMALL_SIZES if job.small else {}))
    commands = ToyCommands(job, data)
    for command in [commands.preprocess(name) for name in {"cpu", device}]:
        command.finish()

    first, again = commands.train("first", device), commands.train("again", device)
    on_cpu = commands.train("cpu", "cpu") if device != "cpu" else None
    killed = commands.kill_and_resume(device)
    for command in (first, again):
        command.finish()
    folders = {name: commands.folder(name) for name in ("first", "again")}
    folders["killed and resumed"] = killed

    for name in ("again", "killed and resumed"):
        compare(job, f"{device}: first and {name}", folders["first"], folders[name])
    runs = {f"{device}, {name}": folder for name, folder in folders.items()}
    add_table(job, runs)

    if on_cpu:
        on_cpu.finish()
        compare(job, "cpu and cuda", commands.folder("cpu"), folders["first"])
        add_table(job, {"cpu": commands.folder("cpu")} | runs)


class Command(NamedTuple):
    """A command that runs; what it prints goes to the log."""

    process: subprocess.Popen
    log: Path

    def finish(self):
        """Wait for its end. Raises RuntimeError, with its last line, if it failed."""
        if self.process.wait():
            raise RuntimeError(f"{self.log.stem} failed: {self.last_line()}")

    def last_line(self) -> str:
        """The last line that it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


class ToyCommands:
    """The project's own commands on TOY."""

    def __init__(self, job: Job, data: Path):
        self.job, self.data = job, data
        self.settings = SMALL_SETTINGS if job.small else {}

    def start(self, name: str, *words: str) -> Command:
        """Start a script of the project."""
        log = self.job.folder / f"{name}.log"
        with open(log, "ab") as file:
            command = [sys.executable, *words]
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        return Command(process, log)

    def features(self, device: str) -> str:
        """The feature file that a device makes."""
        return str(self.job.folder / f"{device}.hdf5")

    def preprocess(self, device: str) -> Command:
        """Make the feature file."""
        flags = ["--dataset", "TOY", "--data_root", str(self.data), "--device", device, *PIXELS]
        flags += ["--img_size", str(self.settings.get("img_size", 224))]
        flags += ["--output", self.features(device)]
        return self.start(f"preprocessing-{device}", "preprocessing.py", *flags)

    def train(self, name: str, device: str, resume: bool = False) -> Command:
        """Train on the features that the device made."""
        flags = ["--features", self.features(device), "--data_root", str(self.data)]
        flags += ["--device", device, "--runs", str(self.runs(name)), "--wandb", "disabled"]
        if resume:
            flags.append("--resume")
        else:
            flags += [f"--{key}={value}" for key, value in self.settings.items()]
        return self.start(f"training-{name}", "train_joint.py", *flags)

    def runs(self, name: str) -> Path:
        """Where a run has its folder."""
        return self.job.folder / f"runs-{name}"

    def folder(self, name: str) -> Path:
        """A run's folder."""
        (folder,) = self.runs(name).glob("TOY-*")
        return folder

    def kill_and_resume(self, device: str) -> Path:
        """The folder of a run that was killed after an epoch of EGGN, and resumed.

        Raises RuntimeError if it ended before.
        """
        command = self.train("killed", device)
        while not self.has_epoch("killed"):
            if command.process.poll() is not None:
                raise RuntimeError(f"a run ended before it was killed: {command.last_line()}")
            time.sleep(LOOK_EVERY)
        command.process.kill()
        command.process.wait()

        self.train("killed", device, resume=True).finish()
        return self.folder("killed")

    def has_epoch(self, name: str) -> bool:
        """Whether a run has logged an epoch of EGGN."""
        logs = self.runs(name).glob("TOY-*/metrics.jsonl")
        return any('"eggn"' in log.read_text() for log in logs)


def compare(job: Job, which: str, one: Path, other: Path):
    """Add a row on how far the weights of two finished runs are apart."""
    weights, others = weights_of(one), weights_of(other)
    difference = torch.linalg.vector_norm(weights - others) / torch.linalg.vector_norm(weights)
    equal = "yes" if torch.equal(weights, others) else "no"
    job.add(
        runs=which,
        **{"equal bit for bit": equal, "relative difference of all weights": difference.item()},
    )


def weights_of(folder: Path) -> torch.Tensor:
    """All weights of a finished run, one after the other, in float64."""
    saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    networks = [saved[name] for name in ("scen", "global_cls", "eggn")]
    tensors = [tensor.double().flatten() for network in networks for tensor in network.values()]
    return torch.cat(tensors)


def add_table(job: Job, folders: dict[str, Path]):
    """Add the results and seconds of runs, a column each."""
    summaries = {
        name: json.loads((folder / "summary.json").read_text()) for name, folder in folders.items()
    }
    for result in RESULTS:
        job.add(result=f"{result}, %", **{name: one[result] for name, one in summaries.items()})

    stages = {stage: None for one in summaries.values() for stage in one["seconds"]}
    for stage in stages:
        seconds = {name: one["seconds"].get(stage) for name, one in summaries.items()}
        job.add(result=f"{stage}, s", **seconds)
