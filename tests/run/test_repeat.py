"""A run repeats bit for bit in processes of its own, while others want the cores."""

import contextlib
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import ROOT, SMALL_RUN, feature_arrays, flags, write_features
from scegg.speed.threads import granted_cores

BUSY = "while True: pass"


@pytest.fixture
def wide_features(tmp_path):
    """A feature file whose products are large enough for several threads."""
    arrays = feature_arrays(D=256, side=7)
    return write_features(tmp_path / "features.hdf5", arrays)


@contextlib.contextmanager
def load(processes):
    """Keep so many processes busy for a block."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def start(features, folder, iterations):
    """A small run in a process of its own."""
    sizes = {"batch_size": 36, "scen_iterations": iterations, "ngh": 512, "ndh": 512}
    argv = ["--features", features, "--runs", folder, "--device", "cpu", "--data_root", "none"]
    argv += ["--wandb", "disabled", "--backbone", "resnet101", *flags(**SMALL_RUN | sizes)]
    return subprocess.Popen(
        [sys.executable, ROOT / "train_joint_CUB.py", *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process, folder):
    """Hashes of what the run logged and of its weights, once it has ended."""
    _, said = process.communicate()
    assert process.returncode == 0, said
    (made,) = (path.parent for path in folder.glob("*/summary.json"))
    digest = hashlib.sha256()
    for tensor in tensors_of(torch.load(made / "model.pt", weights_only=True)):
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return (made / "metrics.jsonl").read_bytes(), digest.hexdigest()


def tensors_of(content):
    """All tensors in a nested dict, the winners' among them."""
    if isinstance(content, torch.Tensor):
        yield content
    for part in content.values() if isinstance(content, dict) else ():
        yield from tensors_of(part)


def outcomes(features, folder, times, iterations):
    """What runs leave that are started two at a time, and one by one, beside others' work."""
    found = set()
    for turn in range(times):
        together = 1 + turn // 2 % 2
        with load(processes=turn % 3 * granted_cores()):
            folders = [folder / f"{turn}-{number}" for number in range(together)]
            runs = [start(features, place, iterations) for place in folders]
            found |= {outcome(*run) for run in zip(runs, folders, strict=True)}
    return found


@pytest.mark.slow
def test_a_run_repeats_bit_for_bit_under_load(wide_features, tmp_path):
    assert len(outcomes(wide_features, tmp_path, times=2, iterations=30)) == 1


@pytest.mark.long
def test_many_runs_repeat_bit_for_bit_under_load(wide_features, tmp_path):
    assert len(outcomes(wide_features, tmp_path, times=40, iterations=200)) == 1
