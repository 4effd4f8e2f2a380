"""Decoding processes: little shared memory, none, and processes that die or get stuck."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from helpers import ROOT
from scegg.features import loading
from scegg.features.images import Images, image_transform
from scegg.features.loading import load_batches, told_of_lost_workers, usable_workers
from util import UserError

BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.fixture
def paths(tmp_path):
    """Eight small pictures."""
    pictures = []
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), np.uint8)
        pictures.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(pictures[-1])
    return pictures


def loaded(paths, workers, *more):
    """All batches, through so many processes; more: steps behind the image's transform."""
    steps = [*image_transform(32).transforms, *more]
    images = Images(paths, transforms.Compose(steps), workers)
    with told_of_lost_workers():
        return list(load_batches(images, BATCHES, workers, pinned=False))


def same(batches, others):
    """Whether they are equal, in the memory layout too."""
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(one, other) and one.stride() == other.stride() for one, other in pairs)


def test_little_shared_memory_is_seen_told_and_spared(paths, monkeypatch, capsys):
    expected = loaded(paths, 0)
    assert same(loaded(paths, 2), expected) and not capsys.readouterr().out

    needed = (2 * loading.PREFETCHED + 2) * 3 * 3 * 32 * 32
    usage = SimpleNamespace(total=4 * needed, free=2 * needed)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)

    def forbidden(self):
        raise AssertionError("shared memory is used")

    monkeypatch.setattr(torch.Tensor, "share_memory_", forbidden)
    assert same(loaded(paths, 2), expected)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "they go through pipes" in said


def test_shared_memory_that_others_fill_meanwhile(paths, monkeypatch):
    expected = loaded(paths, 0)

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert same(loaded(paths, 2), expected)


def test_a_system_without_locks_decodes_in_threads(monkeypatch, capsys):
    assert usable_workers(3) == 3 and usable_workers(0) == 0

    def lacking():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(multiprocessing, "Lock", lacking)
    assert usable_workers(3) == 0
    assert "pictures are decoded in threads" in capsys.readouterr().out


class InWorker:
    """A step of the transform that does something in a decoding process."""

    def __init__(self, action):
        self.action, self.parent = action, os.getpid()

    def __call__(self, image):
        if os.getpid() != self.parent:
            self.action()
        return image


def sleep():
    """As a disk that does not answer."""
    time.sleep(600)


def stop():
    """A process that hears no SIGTERM."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die():
    """What the system does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("action", [sleep, stop])
def test_processes_that_are_stuck_are_given_up(paths, monkeypatch, action):
    monkeypatch.setattr(loading, "PATIENCE", 1)
    began = time.monotonic()
    with pytest.raises(UserError, match="gave no batch in 1 seconds"):
        loaded(paths, 2, InWorker(action))
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children() and time.monotonic() - began < 30


def test_a_killed_process_is_told_of(paths):
    with pytest.raises(UserError, match="a decoding process was killed"):
        loaded(paths, 2, InWorker(die))


def test_a_low_limit_of_open_files_is_told_of():
    said = "Too many open files. Communication with the workers is no longer possible."  # torch's
    with pytest.raises(UserError, match="ulimit -n.*fewer --num_workers"):
        with loading.told_of_lost_workers():
            raise RuntimeError(said)


IN_A_SMALL_ROOM = """
import sys
from scegg.features.images import Images, image_transform
from scegg.features.loading import load_batches
paths = sys.argv[1:] * 40
batches = [list(range(at, at + 40)) for at in range(0, len(paths), 40)]
images = Images(paths, image_transform(64), 2)
print(sum(len(batch) for batch in load_batches(images, batches, 2, pinned=False)))
"""


def test_a_containers_shared_memory(paths):
    """A real /dev/shm of 1 MB, where the system lets us mount one."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("this user may mount nothing")

    command = f'{mount} && exec "$@"'
    program = [sys.executable, "-c", IN_A_SMALL_ROOM, *map(str, paths)]
    done = subprocess.run(
        [*inside, command, "sh", *program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "320", done.stderr
