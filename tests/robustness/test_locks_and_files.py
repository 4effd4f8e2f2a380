"""The lock, the atomic file, and errors: what is promised when processes and disks fail."""

import errno
import io
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import util
from scegg import processes
from scegg.features.loading import ToMainProcess
from scegg.features.reader import open_features
from scegg.features.repack import has_room
from scegg.features.storage import Storage, choose_storage
from scegg.processes import locked
from util import UserError, atomic_path


def hold_until_killed(path, held):
    """Hold the lock; a helper that survives this process holds nothing."""
    with locked(path, "testing"):
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        held.touch()
        time.sleep(60)


def test_a_lock_is_free_again_once_its_holder_is_killed(tmp_path):
    path, held = tmp_path / ".lock", tmp_path / "held"
    holder = os.fork()
    if holder == 0:
        hold_until_killed(path, held)
    while not held.exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is testing"), locked(path, "testing"):
        pass

    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locked(path, "testing"):
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOSPC, "free some disk space"),
        (errno.EDQUOT, "free some disk space"),
        (errno.EROFS, "let its disk be written to"),
        (errno.EIO, "see whether its disk or mount is still there"),
        (errno.ESTALE, "see whether its disk or mount is still there"),
        (errno.EINVAL, "see what is the matter with its disk"),
    ],
)
def test_a_disk_that_fails_leaves_the_old_file(tmp_path, monkeypatch, code, remedy):
    (tmp_path / "f").write_text("old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(util.os, "fsync", fail)
    message = f"f could not be written \\({os.strerror(code)}\\): {remedy} or name another place"
    with pytest.raises(UserError, match=message), atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "f").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_are_one_printable_line(capsys):
    def fail():
        raise UserError("a\n  b\x1b[31m\udcff")

    def open_nothing():
        Path("/nowhere/x").read_text()

    for main, said in (
        (fail, "error: a b?[31m?\n"),
        (open_nothing, "error: [Errno 2] No such file or directory: '/nowhere/x'\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            util.exit_on_user_error(main)
        assert stop.value.code == 2 and capsys.readouterr().err == said


@pytest.mark.parametrize("take", [lambda: torch.empty(1 << 45), lambda: bytes(1 << 60)])
def test_no_more_memory_is_one_line(capsys, take):
    with pytest.raises(SystemExit) as stop:
        util.exit_on_user_error(take)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "memory" in said and said.endswith("ask for less at once, or stop other programs\n")


def test_a_child_that_crashes_or_hangs_is_told():
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    fatal = processes.fatal_signal
    assert fatal(lambda: None, 5) == 0
    assert fatal(lambda: 1 / 0, 5) == 0
    assert fatal(lambda: os.kill(os.getpid(), signal.SIGSEGV), 5) == signal.SIGSEGV
    assert fatal(lambda: time.sleep(9), 1) == signal.SIGALRM
    assert resource.getrlimit(resource.RLIMIT_CORE) == limit


def test_where_no_process_can_be_had_nothing_is_tried(features, monkeypatch):
    def refuse():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", refuse)
    assert len(open_features(features).read(np.arange(3))) == 3


@pytest.mark.parametrize(
    "name, said",
    [
        ("SIGSEGV", "f is damaged, HDF5 crashed over it: make it again"),
        (
            "SIGALRM",
            "either its disk does not answer, or HDF5 hung .* disk is well, make it",
        ),
        ("SIGKILL", "f: the process that tried it was killed .SIGKILL.: is memory short?"),
        ("SIGTERM", "f: the process that tried it was killed .SIGTERM.: is memory short?"),
    ],
)
def test_only_a_crash_is_damage(tmp_path, name, said):
    def die():
        os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(UserError, match=said):
        processes.require_survivable(die, tmp_path / "f", 5, "HDF5", "make it again")


def test_letters_that_stdout_cannot_take_are_escaped(tmp_path, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", written)
    util.exit_on_user_error(lambda: print("wrote \u4e2d/\udce9"))
    written.flush()
    assert written.buffer.getvalue() == b"wrote \\u4e2d/\\udce9\n"


def test_a_disk_that_does_not_tell_its_size_has_room(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(0, 0, 0)  # what many mounts of FUSE say
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    util.require_space(tmp_path, 1e15, "f")
    assert has_room(tmp_path, 10**15)
    assert choose_storage(10**15, torch.device("cpu"), tmp_path, True, "disk") == Storage("disk")
    assert ToMainProcess(2, 10**6).in_shared_memory
