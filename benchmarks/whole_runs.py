"""Whole training runs in a process of their own: seconds of each stage and peak memory."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from benchmarks.flop import SIZES
from scegg.features.feature_file import create_maps

IMAGES, ATTRIBUTES, CLASSES = 37322, 85, 50  # AWA2's
SUMMARY_KEYS = ("seconds", "peak_ram_gb", "peak_gpu_gb", "device", "best_H", "best_acc_zs")


def whole_run(command: list[str]) -> dict:
    """Run a training script in a folder of its own; its summary's seconds and peak memory.

    A run that fails ends this process with its exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command, "--runs", folder])
        if done.returncode:
            sys.exit(done.returncode)
        seconds = time.perf_counter() - start
        (path,) = Path(folder).glob("*/summary.json")
        summary = json.loads(path.read_text())

    record = {"stage": "whole run", "wall_seconds": seconds}
    return record | {key: summary[key] for key in SUMMARY_KEYS if key in summary}


def stream_run(channels: int, folder: Path) -> dict:
    """Train SCEN from the disk, on a file with as many images as AWA2.

    Resident memory must not grow with the file.
    """
    path = folder / "stream.hdf5"
    write_stream_file(path, channels)

    command = ["train_joint_AWA2.py", "--features", str(path), "--cache", "disk"]
    command += ["--scen_iterations", "100", "--distill_iterations", "1", "--nepoch", "0"]
    record = whole_run([*command, "--wandb", "disabled"])

    record["stage"] = f"37,322 images at D = {channels} from the disk cache"
    record["file_gb"] = path.stat().st_size / 1e9
    return record


def write_stream_file(path: Path, channels: int):
    """A feature file of AWA2's size with random maps at D channels."""
    size, rng = SIZES["AWA2"], np.random.default_rng(0)
    shape = (channels, size.side, size.side)
    labels = np.arange(IMAGES) % CLASSES
    held_out = np.arange(IMAGES) // CLASSES % 5 == 0
    is_seen = labels < size.Cs
    block = np.maximum(rng.standard_normal((256, *shape), dtype=np.float32), 0)
    att = rng.random((CLASSES, ATTRIBUTES))

    arrays = {
        "labels": labels,
        "att": att,
        "original_att": att,
        "w2v_att": rng.standard_normal((ATTRIBUTES, size.d_v)),
        "trainval_loc": np.flatnonzero(is_seen & ~held_out),
        "test_seen_loc": np.flatnonzero(is_seen & held_out),
        "test_unseen_loc": np.flatnonzero(~is_seen),
    }
    with h5py.File(path, "w") as file:
        maps = create_maps(file, (IMAGES, *shape), None)
        for start in range(0, IMAGES, len(block)):
            stop = min(start + len(block), IMAGES)
            maps[start:stop] = block[: stop - start]
        for name, array in arrays.items():
            file[name] = array
