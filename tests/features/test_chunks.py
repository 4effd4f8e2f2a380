"""Feature files of other writers: chunks of any shape, any floats, whole and damaged."""

import errno
import os
import zlib

import h5py
import numpy as np
import pytest
import torch

from helpers import feature_arrays, write_features
from scegg.features import chunks as chunks_module
from scegg.features import repack
from scegg.features.chunks import Packing, Target, read_chunks
from scegg.features.reader import open_features
from scegg.features.storage import FeatureMaps, Storage
from util import UserError

FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "shuffled": {"compression": "gzip", "shuffle": True},
}
# of maps (108, 24, 3, 3): as h5py might choose, one map, a part of one, tall, beyond the edges
SHAPES = [(40, 5, 1, 1), (1, 24, 3, 3), (1, 7, 3, 2), (108, 1, 1, 1), (2, 24, 3, 3), (50, 24, 2, 3)]


def foreign_features(path, chunks, dtype="f4", **filters):
    """The small feature file with its maps in these chunks; returns the maps as float32."""
    arrays = feature_arrays()
    maps = arrays.pop("feature_map").astype(dtype)
    write_features(path, arrays)
    with h5py.File(path, "a") as file:
        file.create_dataset("feature_map", data=maps, chunks=chunks, **filters)
    return maps.astype(np.float32)


@pytest.mark.parametrize("chunks", [*SHAPES, True])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_every_chunk_shape_gives_the_files_numbers(tmp_path, monkeypatch, chunks, filters, dtype):
    monkeypatch.setattr(repack, "BLOCK", 20_000)  # several blocks
    maps = foreign_features(tmp_path / "f.hdf5", chunks, dtype, **filters)
    features = open_features(tmp_path / "f.hdf5")
    some = np.array([107, 3, 3, 50, 0])
    assert np.array_equal(features.raw(some).numpy(), maps[some])
    assert np.array_equal(features.raw(np.arange(108)).numpy(), maps)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_parts_of_maps_are_read(tmp_path, filters):
    maps = foreign_features(tmp_path / "f.hdf5", (40, 5, 1, 2), **filters)
    part = np.empty((30, 11, 3, 3), np.float32)
    with h5py.File(tmp_path / "f.hdf5") as file:
        read_chunks(file["feature_map"], [Target(part, image=25, channel=8)])
    assert np.array_equal(part, maps[25:55, 8:19])


@pytest.mark.parametrize("before", [0, 512])
def test_chunks_may_lie_anywhere_in_the_file(tmp_path, before):
    arrays = feature_arrays()
    maps = arrays.pop("feature_map")
    with h5py.File(tmp_path / "f.hdf5", "w", userblock_size=before) as file:
        for name, array in arrays.items():
            file[name] = array
        target = file.create_dataset("feature_map", maps.shape, "f4", chunks=(40, 5, 1, 1))
        for image in (80, 0, 40):
            for row in (2, 0, 1):
                target[image : image + 40, :, row] = maps[image : image + 40, :, row]
    assert np.array_equal(open_features(tmp_path / "f.hdf5").raw(np.arange(108)).numpy(), maps)


def test_a_file_is_repacked_once_and_anew_when_it_changes(tmp_path, capsys):
    path = tmp_path / "f.hdf5"
    maps = foreign_features(path, (40, 5, 1, 1), compression="gzip")
    assert np.array_equal(open_features(path).raw(np.array([7, 90])).numpy(), maps[[7, 90]])
    assert "40 images share each chunk of" in capsys.readouterr().out

    (file,) = tmp_path.glob("*.repacked")
    before = file.stat().st_mtime_ns
    features = open_features(path)
    assert np.array_equal(features.raw(np.array([7])).numpy(), maps[[7]])
    assert file.stat().st_mtime_ns == before and not capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted([path, file])

    with h5py.File(path, "r+") as changed:
        changed["feature_map"][7] = 2 * maps[7]
    os.utime(path, ns=(1, 1))
    assert np.array_equal(open_features(path).raw(np.array([7])).numpy(), 2 * maps[[7]])


def test_a_file_that_was_replaced_meanwhile_is_not_taken_for_the_new_one(tmp_path):
    path, new = tmp_path / "f.hdf5", tmp_path / "new.hdf5"
    maps, some = foreign_features(path, (40, 5, 1, 1)), np.array([7])
    opened = open_features(path)
    foreign_features(new, (40, 5, 1, 1))
    with h5py.File(new, "r+") as changed:
        changed["feature_map"][7] = 2 * maps[7]
    os.replace(new, path)

    assert np.array_equal(opened.raw(some).numpy(), maps[some])
    assert np.array_equal(open_features(path).raw(some).numpy(), 2 * maps[some])


def test_random_batches_without_a_cache_come_from_the_repacked_file(tmp_path):
    maps = foreign_features(tmp_path / "f.hdf5", (108, 3, 1, 1), compression="gzip")
    features = open_features(tmp_path / "f.hdf5")
    kept = FeatureMaps(features, np.arange(108), torch.device("cpu"), Storage("none"))
    position = torch.tensor([100, 2, 51])
    assert torch.equal(kept.fetch(position), torch.from_numpy(maps)[position])

    (tmp_path / "f.hdf5").unlink()  # no more needed
    assert torch.equal(kept.fetch(position + 1), torch.from_numpy(maps)[position + 1])


def test_without_room_beside_it_the_temporary_folder_serves(tmp_path, monkeypatch):
    path, elsewhere = tmp_path / "f.hdf5", tmp_path / "tmp"
    elsewhere.mkdir()
    maps = foreign_features(path, (40, 5, 1, 1))
    monkeypatch.setattr(repack.tempfile, "tempdir", str(elsewhere))

    monkeypatch.setattr(repack, "has_room", lambda folder, size: folder == elsewhere)
    assert np.array_equal(open_features(path).raw(np.array([7])).numpy(), maps[[7]])
    assert sorted(tmp_path.iterdir()) == [path, elsewhere] and not list(elsewhere.iterdir())

    monkeypatch.setattr(repack, "has_room", lambda folder, size: False)
    with pytest.raises(UserError, match="40 images share .* let TMPDIR name a folder with room"):
        open_features(path).raw(np.array([7]))


def test_blocks_are_whole_chunks_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(repack, "BLOCK", 4 * 40 * 24 * 9 * 2 // 3)  # two thirds of a row of chunks
    foreign_features(tmp_path / "f.hdf5", (40, 8, 3, 1))
    with h5py.File(tmp_path / "f.hdf5") as file:
        blocks = list(repack.blocks(file["feature_map"]))
    starts = [(images.start, channels.start) for images, channels in blocks]
    assert starts == [(0, 0), (0, 16), (40, 0), (40, 16), (80, 0), (80, 16)]
    assert (blocks[-1][0].stop, blocks[-1][1].stop) == (108, 24)


def damage(path, content):
    """Put other bytes into the chunk of images 40 to 79 and the first channels."""
    with h5py.File(path, "r+") as file:
        file["feature_map"].id.write_direct_chunk((40, 0, 0, 0), content)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", zlib.compress(b"short"), zlib.compress(bytes(10**7)), zlib.compress(b"")],
)
@pytest.mark.parametrize("filters", ["gzip", "lzf", "shuffled"])
def test_damaged_chunks_and_bombs_are_refused_and_nothing_is_left(tmp_path, content, filters):
    path = tmp_path / "f.hdf5"
    foreign_features(path, (40, 5, 3, 3), **FILTERS[filters])
    damage(path, content)
    with pytest.raises(UserError, match="is damaged"):
        open_features(path).raw(np.array([0]))
    assert list(tmp_path.iterdir()) == [path]


def test_a_short_chunk_and_a_long_one_are_not_taken_for_two_whole_ones(tmp_path):
    foreign_features(tmp_path / "f.hdf5", (1, 12, 3, 3), compression="gzip")
    with h5py.File(tmp_path / "f.hdf5", "r+") as file:
        for channel, length in ((0, 4 * 12 * 9 - 1), (12, 4 * 12 * 9 + 1)):
            content = zlib.compress(bytes(length))
            file["feature_map"].id.write_direct_chunk((3, channel, 0, 0), content)
    with pytest.raises(UserError, match="its maps do not end where they should"):
        open_features(tmp_path / "f.hdf5").raw(np.array([3]))


def test_without_h5pys_own_function_hdf5_unpacks_lzf(tmp_path, monkeypatch):
    maps = foreign_features(tmp_path / "f.hdf5", (1, 5, 2, 2), compression="lzf")
    monkeypatch.delitem(chunks_module.UNDO, h5py.h5z.FILTER_LZF)
    features = open_features(tmp_path / "f.hdf5")
    assert np.array_equal(features.raw(np.arange(108)).numpy(), maps)


def partly_written(path, chunks, dtype="f4", rows=100, **filters):
    """The small feature file whose maps were written up to a row; returns all of them."""
    arrays = feature_arrays()
    maps = arrays.pop("feature_map")
    write_features(path, arrays)
    with h5py.File(path, "a") as file:
        target = file.create_dataset("feature_map", maps.shape, dtype, chunks=chunks, **filters)
        if rows:
            target[:rows] = maps[:rows]
    return maps


@pytest.mark.parametrize("chunks", [(1, 24, 3, 3), (1, 5, 3, 3), (4, 24, 3, 3), (50, 5, 1, 2)])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_a_map_that_was_never_written_is_no_map_of_zeros(tmp_path, chunks, filters, dtype):
    maps = partly_written(tmp_path / "f.hdf5", chunks, dtype, **filters)
    features = open_features(tmp_path / "f.hdf5")
    missing = r"the map of image 100 was never written\): run preprocessing.py again"
    with pytest.raises(UserError, match=missing):
        features.raw(np.array([3, 100, 107]))
    if chunks[0] == 1:  # it needs no chunk that is not there
        some = np.array([99, 0, 3])
        assert np.array_equal(features.raw(some).numpy(), maps[some].astype(dtype))


def test_a_channel_that_was_never_written_is_no_channel_of_zeros(tmp_path):
    partly_written(tmp_path / "f.hdf5", (1, 8, 3, 3))
    with h5py.File(tmp_path / "f.hdf5", "r+") as file:
        file["feature_map"][100:107] = 1
        file["feature_map"][107, :16] = 1
    features = open_features(tmp_path / "f.hdf5")
    assert np.array_equal(features.raw(np.array([106])).numpy(), np.ones((1, 24, 3, 3)))
    with pytest.raises(UserError, match="the map of image 107 was never written"):
        features.raw(np.array([106, 107]))


def test_maps_in_one_piece_that_were_never_written_are_no_maps_of_zeros(tmp_path):
    partly_written(tmp_path / "f.hdf5", None, rows=0)
    with pytest.raises(UserError, match="the map of image 5 was never written"):
        open_features(tmp_path / "f.hdf5").raw(np.array([5]))


def test_a_damaged_repacked_file_is_named(tmp_path):
    path = tmp_path / "f.hdf5"
    foreign_features(path, (40, 5, 1, 1))
    open_features(path).raw(np.array([0]))
    (file,) = tmp_path.glob("*.repacked")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"\.repacked is damaged .*: delete it and run again"):
        open_features(path).raw(np.array([0]))


def test_a_mount_that_goes_away_while_a_file_is_repacked_is_no_damage(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    path = tmp_path / "f.hdf5"
    foreign_features(path, (40, 5, 1, 1))
    features = open_features(path)
    monkeypatch.setattr("shutil.disk_usage", stale)
    with pytest.raises(UserError, match="could not be read .*: see whether its disk or mount"):
        features.raw(np.array([0]))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="EIO comes from Linux's /proc")
def test_a_repacked_file_that_the_disk_does_not_give_is_no_damage(tmp_path):
    path = tmp_path / "f.hdf5"
    foreign_features(path, (40, 5, 1, 1))
    features = open_features(path)
    features.raw(np.array([0]))
    with open("/proc/self/mem", "rb") as gone:
        os.dup2(gone.fileno(), features.repacked.disk.fileno())
    message = r"\.repacked could not be read \(Input/output error\): see whether its disk"
    with pytest.raises(UserError, match=message):
        features.raw(np.array([1]))


def test_floats_that_numpy_lacks_are_left_to_hdf5(tmp_path):
    unusual = h5py.h5t.IEEE_F32LE.copy()
    unusual.set_fields(15, 8, 7, 0, 8)
    unusual.set_size(2)
    unusual.set_ebias(63)
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        space, properties = (
            h5py.h5s.create_simple((6, 4, 1, 1)),
            h5py.h5p.create(h5py.h5p.DATASET_CREATE),
        )
        properties.set_chunk((3, 4, 1, 1))
        maps = h5py.Dataset(h5py.h5d.create(file.id, b"maps", unusual, space, properties))
        maps[...] = np.arange(24, dtype=np.float32).reshape(6, 4, 1, 1)
        assert Packing.of(maps) is None

        read = np.empty((6, 4, 1, 1), np.float32)
        read_chunks(maps, [Target(read, 0)])
    assert np.array_equal(read.ravel(), np.arange(24))
