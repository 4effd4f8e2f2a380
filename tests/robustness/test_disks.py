"""Disks that are not a local disk: no locks, no sync of folders, errors that are not damage."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import preprocessing
import util
from helpers import ROOT, feature_arrays, write_features
from scegg import processes
from scegg.datasets import toy
from scegg.datasets.word_vectors import read_vectors
from scegg.datasets.xlsa17 import read_mat
from scegg.features import disk, parts, reader
from scegg.features.extract import Backbone
from scegg.features.parts import Parts
from scegg.features.reader import open_features
from scegg.features.storage import FeatureMaps, Storage
from scegg.features.weights import read_state
from scegg.processes import locked
from scegg.run.checkpoint import read_checkpoint
from util import UserError, atomic_path

CPU = torch.device("cpu")
GONE = "could not be read \\(Input/output error\\): see whether its disk or mount is still there"


def failing(code):
    """A stand-in for any call of the system: it fails with this errno."""

    def fail(*arguments, **_):
        raise OSError(code, os.strerror(code), *(str(a) for a in arguments if isinstance(a, Path)))

    return fail


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize(
    "name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EPERM", "EACCES", "EIO", "ENOTTY"]
)
def test_whatever_the_errno_a_disk_without_locks_is_said_so_in_a_line(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(processes.fcntl, "flock", failing(getattr(errno, name)))
    with locked(tmp_path / ".lock", "testing", wait=True):
        pass
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"the disk of {tmp_path} has no locks" in said and "let no other process" in said
    assert not list(tmp_path.iterdir())


def test_runs_beside_each_other_make_the_same_cache_without_locks(features, monkeypatch, capsys):
    monkeypatch.setattr(processes.fcntl, "flock", failing(errno.ENOLCK))
    data, others = open_features(features), []

    def meanwhile(_):
        if not others:
            others.append(None)
            others.append(FeatureMaps(data, data.split.trainval, CPU, Storage("disk")))

    ours = FeatureMaps(data, data.split.trainval, CPU, Storage("disk"), meanwhile)
    for maps in (ours, others[1]):
        assert torch.equal(torch.cat(list(maps.in_order())), data.read(data.split.trainval))
    assert "has no locks" in capsys.readouterr().out
    assert len(list(features.parent.iterdir())) == 2


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_synced_fails_no_finished_file(tmp_path, monkeypatch, code):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(util.os, "fsync", sync_files_only)
    util.write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ETXTBSY, errno.EACCES, errno.EPERM])
def test_a_file_that_somebody_holds_open_is_named_with_the_remedy(tmp_path, monkeypatch, code):
    def refuse(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    (tmp_path / "f").write_text("old")
    monkeypatch.setattr(util.os, "replace", refuse)
    with pytest.raises(UserError, match="f could not be written .*: close the program that holds"):
        util.write_text(tmp_path / "f", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]

    with pytest.raises(UserError, match="holds it open and run again; the finished parts stay"):
        with atomic_path(tmp_path / "f", parts.THEN) as temporary:
            temporary.write_text("new")


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    toy.render(root, classes=7, unseen=2, images_per_class=5)
    return root


def preprocess(toy_root, output):
    argv = ["--dataset", "TOY", "--backbone", "efficientnet_lite2", "--img_size", "64"]
    argv += ["--num_workers", "0", "--data_root", str(toy_root), "--output", str(output)]
    preprocessing.main(argv)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_is_asked_what_it_can_do_before_the_first_image(
    toy_root, tmp_path, monkeypatch, call
):
    monkeypatch.setattr(os, call, failing(errno.EINVAL))
    monkeypatch.setattr(Backbone, "maps", None)
    with pytest.raises(UserError, match="could not be written .*Invalid argument"):
        preprocess(toy_root, tmp_path / "out" / "maps.hdf5")
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_is_a_folder_is_refused_before_the_first_image(toy_root, tmp_path):
    with pytest.raises(UserError, match="--output .* is a folder: name a file"):
        preprocess(toy_root, tmp_path)


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, is_there):
    target, link = tmp_path / "scratch" / "maps.hdf5", tmp_path / "maps.hdf5"
    link.symlink_to(target)
    if is_there:
        target.parent.mkdir()
        target.touch()
    options = preprocessing.parse_arguments(["-d", "TOY", "-n", "0", "--output", str(link)])
    preprocessing.fill_in_defaults(options, CPU)
    assert options.output == target.resolve()


def test_a_file_that_is_too_large_for_the_disk_is_refused_before_the_first_image(
    tmp_path, monkeypatch
):
    limit = util.resource.getrlimit(util.resource.RLIMIT_FSIZE)
    util.resource.setrlimit(util.resource.RLIMIT_FSIZE, (2**32 - 1, limit[1]))  # as FAT's
    try:
        util.require_file_size(tmp_path, 2**32 - 1, "f")
        with pytest.raises(UserError, match="f will take 4.29 GB, and the disk of .* takes no"):
            util.require_file_size(tmp_path, 2**32, "f")
    finally:
        util.resource.setrlimit(util.resource.RLIMIT_FSIZE, limit)
    util.require_file_size(tmp_path, 2**32, "f")
    assert not list(tmp_path.iterdir())


def test_parts_that_cannot_be_removed_fail_no_finished_file(tmp_path, monkeypatch, capsys):
    some = Parts(tmp_path / "maps.hdf5", [Path(__file__)] * 3, None, {})
    some.make(0, [np.ones((3, 2, 2, 2), np.float32)])
    monkeypatch.setattr(shutil, "rmtree", failing(errno.EBUSY))
    some.join(lambda file: None)
    assert (tmp_path / "maps.hdf5").exists()
    assert "could not be removed (Device or resource busy): delete it" in capsys.readouterr().out


# ---------------------------------------------------------------- reading


class GoneFile(disk.SourceFile):
    """A file on a mount that goes away once it is open."""

    def __init__(self, path):
        super().__init__(path)
        go_away(self)

    def seek(self, offset, whence=os.SEEK_SET):
        if whence == os.SEEK_END:
            return self.stamp[0]
        return super().seek(offset, whence)


def go_away(file):
    """Let every read of an open file fail with EIO, as those of /proc/self/mem do."""
    gone = os.open("/proc/self/mem", os.O_RDONLY)
    os.dup2(gone, file.fileno())
    os.close(gone)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="EIO comes from Linux's /proc")
def test_a_mount_that_went_away_is_no_damage(features, tmp_path, monkeypatch):
    data = open_features(features)
    go_away(data.disk)
    with pytest.raises(UserError, match=GONE):
        data.read(np.arange(3))

    some = Parts(tmp_path / "maps.hdf5", [Path(__file__)] * 3, None, {})
    some.make(0, [np.ones((3, 2, 2, 2), np.float32)])
    for module in (reader, parts):
        monkeypatch.setattr(module, "SourceFile", GoneFile)
    with pytest.raises(UserError, match=GONE):
        open_features(features)
    with pytest.raises(UserError, match=GONE):
        some.join(lambda file: None)
    assert some.paths[0].exists()


GONE_AT_ONCE = """
import os, sys
from scegg.features.disk import SourceFile, open_hdf5
file = SourceFile(sys.argv[1])
os.dup2(os.open("/proc/self/mem", os.O_RDONLY), file.fileno())
try:
    open_hdf5(file)
except OSError:
    sys.exit(2)
"""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="EIO comes from Linux's /proc")
def test_a_mount_that_went_away_crashes_nothing_at_the_end(features):
    done = subprocess.run([sys.executable, "-c", GONE_AT_ONCE, features], cwd=ROOT)
    assert done.returncode == 2


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES])
def test_a_file_that_cannot_be_opened_is_neither_missing_nor_damaged(features, monkeypatch, code):
    for module, name in ((Path, "stat"), (reader, "SourceFile")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(code))
            with pytest.raises(UserError, match=f"could not be read .*{os.strerror(code)}"):
                open_features(features)


def test_a_checkpoint_the_disk_does_not_give_is_not_damaged(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr("builtins.open", failing(errno.ESTALE))
    with pytest.raises(UserError, match="checkpoint.pt could not be read .*: see whether its disk"):
        read_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_file_for_which_there_is_too_little_memory_is_not_damaged(
    tmp_path, features, monkeypatch, error
):
    def fail(*arguments, **_):
        raise error

    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(UserError, match="checkpoint.pt could not be read, the memory is full"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    data = open_features(features)
    monkeypatch.setattr(reader, "read_maps", fail)
    with pytest.raises(UserError, match="features.hdf5 could not be read, the memory is full"):
        data.read(np.arange(3))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_weights_and_mat_files_the_disk_does_not_give_are_not_damaged(tmp_path, monkeypatch, code):
    (tmp_path / "w.pth").touch()
    (tmp_path / "a.mat").touch()
    monkeypatch.setattr("torch.load", failing(code))
    monkeypatch.setattr("scipy.io.loadmat", failing(code))
    with pytest.raises(UserError, match="w.pth could not be read .*: see whether its disk"):
        read_state(tmp_path / "w.pth")
    with pytest.raises(UserError, match="a.mat could not be read .*: see whether its disk"):
        read_mat(tmp_path / "a.mat", ("labels",))


def test_hdf5s_own_locks_are_not_asked_for(features, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    with open(features, "rb") as held:
        processes.fcntl.flock(held, processes.fcntl.LOCK_EX)
        data = open_features(features)
        assert len(data.read(np.arange(3))) == 3


# ---------------------------------------------------------------- files that change meanwhile


def test_a_run_goes_on_with_the_file_it_began_with(features):
    data = open_features(features)
    before, trainval = data.read(np.arange(5)), data.split.trainval

    new = write_features(features.with_name("new.hdf5"), feature_arrays(seed=1))
    os.replace(new, features)
    assert torch.equal(data.read(np.arange(5)), before)

    # a cache of the old file is not taken for one of the new
    for opened in (data, open_features(features)):
        maps = FeatureMaps(opened, trainval, CPU, Storage("disk"))
        assert torch.equal(torch.cat(list(maps.in_order())), opened.read(trainval))


def test_a_file_that_is_written_to_meanwhile_stops_the_run(features):
    data = open_features(features)
    data.read(np.arange(5))
    whole = features.read_bytes()

    features.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="was changed while it was read: let its writer end"):
        data.read(np.arange(100))
    features.write_bytes(whole[::-1])
    with pytest.raises(UserError, match="was changed while it was read"):
        data.read(np.arange(5))


def test_word_vectors_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.npy"
    np.save(path, np.ones((2, 3)))

    def load(path, **flags):
        table = np.ones((2, 3))
        path.write_bytes(b"another")
        return table

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(UserError, match="w.npy was changed while it was read: run again"):
        read_vectors(path, None)
