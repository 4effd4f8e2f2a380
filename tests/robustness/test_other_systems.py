"""Windows and macOS: what only some systems have is simulated as missing."""

import getpass
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import scegg
import util
from helpers import ROOT
from scegg import processes
from scegg.features.reader import open_features
from scegg.features.storage import FeatureMaps, Storage
from scegg.processes import locked
from util import UserError

IMPORTS = """
import os, signal, sys
import torch, wandb  # these know their systems
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "preadv", "pread"):
    delattr(os, name)
del signal.alarm, signal.SIGALRM, signal.SIGKILL
import evaluate, preprocessing, results, train_joint, visualize, util
from scegg import processes
assert processes.fatal_signal(lambda: None, 1) == 0
print(util.peak_memory_gb(util.pick_device("cpu")))
"""


class Msvcrt:
    """Windows' locks: of bytes, refused with EACCES; made here of Linux's."""

    LK_NBLCK = 2

    def __init__(self, fcntl):
        self.fcntl = fcntl

    def locking(self, descriptor, mode, count):
        assert mode == self.LK_NBLCK and os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        try:
            self.fcntl.flock(descriptor, self.fcntl.LOCK_EX | self.fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None


@pytest.fixture
def windows(monkeypatch):
    """This system, without what Windows lacks."""
    monkeypatch.setattr(processes, "msvcrt", Msvcrt(processes.fcntl))
    monkeypatch.setattr(processes, "fcntl", None)
    for module in (processes, util):
        monkeypatch.setattr(module, "resource", None)
    for name in ("fork", "register_at_fork", "preadv", "pread"):
        monkeypatch.delattr(os, name)
    for name in ("SIGALRM", "SIGKILL"):
        monkeypatch.delattr(signal, name)


def test_every_command_can_be_imported():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "{}\n", done.stderr


def test_locks_are_windows_own(windows, tmp_path):
    path = tmp_path / ".lock"
    with locked(path, "testing"):
        with pytest.raises(UserError, match="another process is testing"), locked(path, "testing"):
            pass
    assert not path.exists()
    with locked(path, "testing", wait=True):
        assert path.exists()


def test_without_any_locks_it_is_said(windows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "msvcrt", None)
    with locked(tmp_path / ".lock", "testing"):
        pass
    assert "has no locks (Function not implemented)" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["none", "ram", "disk"])
def test_features_are_read(windows, features, where):
    data = open_features(features)
    maps = FeatureMaps(data, data.split.trainval, torch.device("cpu"), Storage(where))
    assert torch.equal(torch.cat(list(maps.in_order())), data.read(data.split.trainval))
    assert np.isfinite(data.w2v).all()


def test_a_containers_user_may_have_neither_name_nor_home(tmp_path, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {"PATH": os.environ["PATH"]}
    monkeypatch.setattr(os, "environ", environment)
    scegg.provide_user()
    assert environment["HOME"] == str(tmp_path)
    assert getpass.getuser() == environment["USER"] == f"user{os.getuid()}"

    before = dict(environment)
    scegg.provide_user()  # a name and a home that are there stay
    assert environment == before
