"""The lock, the atomic file, and errors: what is promised when processes and disks fail."""

import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest

import util
from scegg import processes
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


def test_a_child_that_crashes_or_hangs_is_told():
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    assert processes.survives(lambda: None, 5)
    assert processes.survives(lambda: 1 / 0, 5)
    assert not processes.survives(lambda: os.kill(os.getpid(), signal.SIGSEGV), 5)
    assert not processes.survives(lambda: time.sleep(9), 1)
    assert resource.getrlimit(resource.RLIMIT_CORE) == limit
