"""Where maps are kept: the choice, the flat file, and that every storage gives the same maps."""

import math
import shutil

import h5py
import pytest
import torch

from scegg.features.reader import normalize_positions, open_features
from scegg.features.sampler import BalancedSampler
from scegg.features.storage import FeatureMaps, Storage, available_ram, choose_storage
from scegg.speed import threads
from util import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("where", ["ram", "none", "device", "disk"])
def test_maps_are_the_files(features, where):
    data = open_features(features)
    trainval = data.split.trainval
    maps = FeatureMaps(data, trainval, CPU, Storage(where), lambda count: None)
    with h5py.File(features) as file:
        raw = torch.from_numpy(file["feature_map"][()][trainval])
    expected = normalize_positions(raw)
    torch.testing.assert_close(torch.cat(list(maps.in_order())), expected, rtol=0, atol=0)

    sampler = BalancedSampler(torch.from_numpy(data.split.labels[trainval]), 4)
    batches = list(maps.batches(sampler, 7))
    assert len(batches) == 7
    for positions, batch in batches:
        torch.testing.assert_close(batch, expected[positions], rtol=0, atol=0)


def test_storages_are_tried_in_order_of_speed(tmp_path, monkeypatch):
    """RAM if half of what is free holds the maps, else the disk if they fit, else nowhere."""
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr("scegg.features.storage.available_ram", lambda: 1000)

    def chosen(size, compressed=True, cache="auto"):
        return choose_storage(size, CPU, tmp_path, compressed, cache)

    assert chosen(400) == Storage("ram")
    assert chosen(600) == Storage("disk")
    assert chosen(2 * free) == Storage("none") == chosen(1, cache="none")
    assert chosen(400, compressed=False) == Storage("none")
    assert chosen(600, compressed=False, cache="ram") == Storage("ram")

    # one asked for by name must hold the maps
    for cache, size, message in (
        ("disk", 2 * free, "do not fit"),
        ("ram", 1001, "do not fit"),
        ("device", 1, "has no GPU"),
    ):
        with pytest.raises(UserError, match=f"--cache {cache}: .*{message}"):
            chosen(size, cache=cache)

    with open(tmp_path / "of.hdf5.1.cache", "wb") as file:
        file.truncate(2 * free)  # a sparse file
    assert chosen(2 * free, cache="disk") == Storage("disk")  # what is there needs no room


def test_free_memory_heeds_a_containers_limit(tmp_path, monkeypatch):
    """In a container, what it has left counts. Where nothing tells, RAM is taken only by name."""
    files = {"/proc/meminfo": tmp_path / "meminfo"}
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr("scegg.features.storage.Path", lambda path: files[path])
    assert math.isnan(available_ram())

    files["/proc/meminfo"].write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 4000\n")
    assert available_ram() == 8192
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_ram() == 2000

    # a cluster's job, and a container of version 1
    for group, limit, taken in (("job/step", "max", "anon"), ("memory/a", "limit_in_bytes", "")):
        (tmp_path / group).mkdir(parents=True)
        (tmp_path / group / f"memory.{limit}").write_text("4000\n")
        (tmp_path / group / "memory.stat").write_text(f"cache 1\n{taken or 'total_rss'} 3500\n")
        (tmp_path / "own").write_text(f"4:memory:/a\n0::/{group}\n")
        assert available_ram() == 500

    monkeypatch.setattr("scegg.features.storage.available_ram", lambda: math.nan)
    chosen = choose_storage(1000, CPU, tmp_path, compressed=True, cache="ram")
    assert chosen == Storage("ram")


def test_the_disk_cache_is_made_once_and_again_for_a_changed_file(features):
    def take():
        data, read = open_features(features), []
        maps = FeatureMaps(data, data.split.trainval, CPU, Storage("disk"), read.append)
        return sum(read), torch.cat(list(maps.in_order()))

    images, first = take()
    again, second = take()
    assert images == len(first) and again == 0 and torch.equal(first, second)

    with h5py.File(features, "r+") as file:
        file["feature_map"][...] = file["feature_map"][...][:, ::-1]
    images, third = take()
    assert images == len(third)
    torch.testing.assert_close(third, first.flip(2))

    for cache in features.parent.glob("*.cache"):
        cache.write_bytes(b"short")
    assert torch.equal(take()[1], third)
