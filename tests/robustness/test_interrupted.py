"""Preprocessing that is killed, crowded or short of room: it goes on, to the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import preprocessing
from helpers import ROOT, feature_arrays, write_features
from scegg.datasets import toy
from scegg.features.extract import Backbone
from scegg.features.feature_file import create_maps
from scegg.features.images import PixelNormalization
from scegg.features.parts import Parts
from scegg.features.reader import open_features
from scegg.features.storage import FlatCache
from util import UserError

OFFLINE = ["--dataset", "TOY", "--backbone", "efficientnet_lite2"]
OFFLINE += ["--img_size", "64", "--num_workers", "0"]

# It imports torch once and forks a process for every line of JSON, its arguments. It prints the
# process id, then the exit status.
SERVER = """
import json, os, resource, signal, sys
import preprocessing, util
from scegg.features import parts
parts.PART = 4
make, stops = parts.Parts.make, iter([signal.SIGSTOP])
def make_and_stop(self, *arguments):
    make(self, *arguments)
    os.kill(os.getpid(), next(stops, 0))
for line in iter(sys.stdin.readline, ""):
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        if asked["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"],) * 2)
        if asked["stops"]:
            parts.Parts.make = make_and_stop
        try:
            util.exit_on_user_error(lambda: preprocessing.main(asked["argv"]))
            sys.stdout.flush()
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Preprocessing:
    """A real process that preprocesses a small TOY into `output`, and can be killed.

    stops: it stops itself (SIGSTOP) after the first part.
    """

    def __init__(self, server, data_root, output: Path, *more, largest_file=0, stops=False):
        output.parent.mkdir(parents=True, exist_ok=True)
        self.server = server
        self.output = output
        self.log = output.parent.with_suffix(".log")

        argv = [*OFFLINE, "--device", "cpu", "--data_root", str(data_root)]
        argv += ["--output", str(output), *more]
        asked = {"argv": argv, "log": str(self.log), "largest_file": largest_file, "stops": stops}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        self.process = int(server.stdout.readline())

    def end(self) -> tuple[int, str]:
        """(exit status, everything it said), once it has ended."""
        return int(self.server.stdout.readline()), self.log.read_text()

    def is_over(self) -> bool:
        return Path(f"/proc/{self.process}/stat").read_text().split()[2] == "Z"

    def kill_when(self, due) -> bool:
        """SIGKILL as soon as `due()` holds; returns whether it still ran."""
        ended = time.time() + 60
        while not due() and time.time() < ended and not self.is_over():
            pass
        os.kill(self.process, signal.SIGKILL)
        return self.end()[0] == -signal.SIGKILL


@pytest.fixture(scope="module")
def server():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    toy.render(root, classes=7, unseen=2, images_per_class=5)
    return root


@pytest.fixture(scope="module")
def whole(server, toy_root, tmp_path_factory):
    """An uninterrupted run's file, and the seconds it took."""
    output = tmp_path_factory.mktemp("whole") / "out" / "maps.hdf5"
    began = time.time()
    status, said = Preprocessing(server, toy_root, output, "-c").end()
    assert status == 0, said
    return output.read_bytes(), time.time() - began


# ---------------------------------------------------------------- killed, or stopped


def survive(kills, server, toy_root, folder, whole, seed):
    """Kill runs at random moments, some of them while they join, and let the last one end."""
    expected, seconds = whole
    rng = np.random.default_rng(seed)
    output = folder / "maps.hdf5"

    hits = 0  # kills that hit
    while hits < kills:
        run = Preprocessing(server, toy_root, output, "-c")
        at = time.time() + rng.uniform(0, seconds)
        if rng.random() < 0.3:
            hits += run.kill_when(lambda: any(folder.glob(".maps.hdf5.partial-*")))
        else:
            hits += run.kill_when(lambda: time.time() > at)
        if output.exists():  # whole or not there
            assert output.read_bytes() == expected
            output.unlink()

    status, said = Preprocessing(server, toy_root, output, "-c").end()
    assert status == 0 and output.read_bytes() == expected, said
    assert [path.name for path in folder.iterdir()] == ["maps.hdf5"]


def test_three_random_kills_change_no_byte(server, toy_root, tmp_path, whole):
    survive(3, server, toy_root, tmp_path / "out", whole, seed=0)


@pytest.mark.long
def test_twenty_random_kills_change_no_byte(server, toy_root, tmp_path, whole):
    survive(20, server, toy_root, tmp_path / "out", whole, seed=int(time.time()))


def is_stopped(process) -> bool:
    """Whether every thread of a process is; they do not stop at once."""
    stats = [stat.read_text() for stat in Path(f"/proc/{process}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def test_a_second_process_is_refused_while_the_first_works(server, toy_root, tmp_path, whole):
    output = tmp_path / "out" / "maps.hdf5"
    first = Preprocessing(server, toy_root, output, "-c", stops=True)
    while not is_stopped(first.process):
        time.sleep(0.001)

    try:
        before = sorted(output.parent.rglob("*"))
        message = "another process is making .*maps.hdf5 .*: wait for it, or stop it"
        with pytest.raises(UserError, match=message):
            preprocess(toy_root, output)
        assert sorted(output.parent.rglob("*")) == before
    finally:
        os.kill(first.process, signal.SIGCONT)
    assert first.end()[0] == 0 and output.read_bytes() == whole[0]


def preprocess(toy_root, output, *more):
    """In this process."""
    argv = [*OFFLINE, "--data_root", str(toy_root), "--output", str(output), *more]
    preprocessing.main(argv)


def test_what_killed_runs_left_is_removed_or_named(toy_root, tmp_path, capsys):
    others = tmp_path / "maps.hdf5.parts-0123456789ab"
    others.mkdir()
    (others / "00000000-a.hdf5").write_bytes(bytes(20_000_000))
    for name in (".maps.hdf5.partial-7", ".other.hdf5.partial-7"):
        (tmp_path / name).touch()

    preprocess(toy_root, tmp_path / "maps.hdf5")
    said = capsys.readouterr().out
    assert f"{others} (0.02 GB) was left by a run with other settings" in said
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".other.hdf5.partial-7", "maps.hdf5", others.name]


# ---------------------------------------------------------------- short of room


@pytest.mark.parametrize(
    "largest_file, fails", [(20_000, "parts-"), (150_000, "maps.hdf5 could not be written")]
)
def test_a_disk_that_takes_no_more(server, toy_root, tmp_path, whole, largest_file, fails):
    """One line, status 2, and the parts stay.

    A limit on a file's size stands for a full disk: the error comes from the same calls.
    """
    output = tmp_path / "out" / "maps.hdf5"
    limited = Preprocessing(server, toy_root, output, "-c", largest_file=largest_file)
    status, said = limited.end()
    assert status == 2 and not output.exists(), said

    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert fails in error and said.endswith(error + "\n")
    assert "raise the limit (ulimit -f) and run again; the finished parts stay" in error
    assert not list(output.parent.rglob(".*"))
    if largest_file >= 100_000:
        assert len(list(output.parent.glob("*.parts-*/*.hdf5"))) == 9

    assert Preprocessing(server, toy_root, output, "-c").end()[0] == 0
    assert output.read_bytes() == whole[0]


def leave_1000_bytes(monkeypatch):
    """Let every disk say that 1000 bytes of it are free."""
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "and the parts it is joined from will take 0.00 GB"),
        (["-c"], "by an estimate of what compression"),
    ],
)
def test_room_is_checked_before_the_first_image(toy_root, tmp_path, monkeypatch, flags, message):
    leave_1000_bytes(monkeypatch)
    monkeypatch.setattr(Backbone, "maps", None)
    with pytest.raises(UserError, match=message):
        preprocess(toy_root, tmp_path / "out" / "maps.hdf5", *flags)
    assert not list((tmp_path / "out").iterdir())


class Crowded(torch.nn.Module):
    """A network on a GPU whose memory holds `most` images."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, images):
        if len(images) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return images.mean(dim=1, keepdim=True)


def crowded_backbone(most):
    pixels = PixelNormalization("resnet101")
    return Backbone(pixels, Crowded(most), torch.device("cpu"), torch.float32, 9)


def test_a_full_gpu_gets_fewer_images_at_once(capsys):
    images = torch.randint(256, (9, 3, 4, 4), dtype=torch.uint8)
    crowded, roomy = crowded_backbone(2), crowded_backbone(9)
    assert torch.equal(crowded(images), roomy(images)) and crowded.at_once == 2
    assert torch.equal(crowded(images[:1]), roomy(images[:1]))
    expected = [
        f"the GPU's memory is full: going on with {count} images at once" for count in (5, 3, 2)
    ]
    assert capsys.readouterr().out.splitlines() == expected

    with pytest.raises(UserError, match="too small for one image: use a smaller --img_size"):
        crowded_backbone(0)(images)


# ---------------------------------------------------------------- joined, and cached


def test_a_joined_file_is_read_again_before_it_is_named(tmp_path):
    parts = Parts(tmp_path / "maps.hdf5", [Path(__file__)] * 6, None, {})
    maps = np.random.default_rng(0).random((6, 3, 2, 2), dtype=np.float32)
    parts.make(0, [maps[:4], maps[4:]])
    wrong, holed = maps.copy(), maps.copy()
    wrong[3, 1], holed[5, 0] = 0, np.nan

    for content, message in (
        (wrong, "image 3 was not joined as it was made"),
        (holed, "image 5"),
        (maps[:5], "5 of 6 maps"),
        (None, "read again"),
    ):
        with h5py.File(tmp_path / "joined", "w") as file:
            if content is not None:
                create_maps(file, (6, 3, 2, 2), None)[: len(content)] = content
        with pytest.raises(UserError, match=message):
            parts.verify(tmp_path / "joined")

    (part,) = parts.folder.iterdir()
    part.write_bytes(part.read_bytes()[:900])
    with pytest.raises(UserError, match="is damaged .*: delete it and run again"):
        parts.join(lambda file: None)
    assert not (tmp_path / "maps.hdf5").exists()


def test_processes_that_want_the_same_cache_make_it_once(tmp_path, monkeypatch):
    features = open_features(write_features(tmp_path / "f.hdf5", feature_arrays()))
    trainval, made = features.split.trainval, []
    (tmp_path / "x").touch()

    def build(_):
        return FlatCache(features, trainval, made.append).take(torch.arange(len(trainval)))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(build, range(4)))
    assert sum(made) == len(trainval)
    assert all(torch.equal(maps, features.read(trainval)) for maps in results)
    assert len(list(tmp_path.iterdir())) == 3  # the file, the cache, x: no lock and no part of one

    next(tmp_path.glob("*.cache")).unlink()
    leave_1000_bytes(monkeypatch)
    with pytest.raises(UserError, match="the cache f.hdf5..*cache will take 0.00 GB"):
        build(0)
