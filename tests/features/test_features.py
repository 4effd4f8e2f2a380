"""Readers: the official splits, what a damaged or foreign file is told, and class-balanced batches."""
import dataclasses
import math
import shutil
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from helpers import feature_arrays, write_features
from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.splits import check_split
from scegg.datasets.xlsa17 import class_table, image_tail, read_dataset, read_split
from scegg.features.feature_file import gzip_chunks
from scegg.features.reader import normalize_positions, open_features
from scegg.features.sampler import BalancedSampler
from scegg.features.storage import FeatureMaps, Storage, available_ram, choose_storage
from util import UserError


@pytest.mark.parametrize("folder, dataset, overlap", [("CUB", "CUB", True), ("SUN", "SUN", True), ("AWA2", "AWA2", True),
                                                      ("AWA2_other_release", "AWA2", False)])
def test_official_splits(real_data, tmp_path, folder, dataset, overlap):
    """SPEC section 2's table, and its trap: train_loc and val_loc never reach outside trainval."""
    source = real_data / "xlsa17_full" / folder / "att_splits.mat"
    (tmp_path / "xlsa17" / "data").mkdir(parents=True)
    (tmp_path / "xlsa17" / "data" / dataset).symlink_to(source.parent)
    with np.load(real_data / "xlsa17_full" / dataset / "images.npz") as images:
        labels, names = images["labels"].astype(np.int64), images["class_names"]
        tails = [image_tail("/some/where/" + path, LAYOUTS[dataset].anchor, source) for path in images["image_files"]]
    assert tails == [path.replace("//", "/") for path in images_of(real_data, dataset)]
    split, class_names = read_split(tmp_path, dataset, labels)
    assert split.counts() == LAYOUTS[dataset].published and split.is_published(dataset)
    # the two releases of AWA2 share their test images, and so the fingerprint
    assert split.fingerprint == LAYOUTS[dataset].release and "the common release" in split.describe(dataset)
    assert [name.replace("/", "_") for name in class_names] == [name.replace("/", "_") for name in names]
    raw = scipy.io.loadmat(source)
    reaches_out = np.intersect1d(raw["train_loc"], raw["test_seen_loc"]).size > 0
    assert reaches_out == overlap
    assert np.isin(split.train, split.trainval).all() and np.isin(split.val, split.trainval).all()
    assert len(split.train) + len(split.val) == len(split.trainval)


def images_of(real_data, dataset):
    with np.load(real_data / "xlsa17_full" / dataset / "images.npz") as images:
        return list(images["image_files"])


def test_cub50(real_data):
    split, class_names, tails = read_dataset(real_data, "CUB")
    assert split.counts() == (2889, 50, 40, 312, 1837, 460, 592) and not split.is_published("CUB")
    assert all((real_data / "CUB" / tail).is_file() for tail in tails[::100])
    assert [tails[i].split("/")[-2] for i in range(0, 2889, 100)] == [class_names[c] for c in split.labels[::100]]


@pytest.mark.parametrize("text, anchor, tail", [
    ("/BS/x/CUB_200_2011/CUB_200_2011/images/1.A/b.jpg", "CUB_200_2011", "CUB_200_2011/images/1.A/b.jpg"),
    ("/BS/SUN/images/a/abbey/s.jpg", "images", "images/a/abbey/s.jpg"),
    ("/x/Animals_with_Attributes2//JPEGImages/antelope/a_1.jpg", "Animals_with_Attributes2",
     "Animals_with_Attributes2/JPEGImages/antelope/a_1.jpg")])
def test_image_tails(text, anchor, tail):
    assert image_tail(text, anchor, "res101.mat") == tail


@pytest.mark.parametrize("text", ["/x/photos/a.jpg", "/x/images/../../etc/passwd", "images"])
def test_strange_image_paths_are_refused(text):
    with pytest.raises(UserError, match="has no folder images"):
        image_tail(text, "images", "res101.mat")


def test_fingerprint_follows_labels_and_splits(features):
    split = open_features(features).split
    same = dataclasses.replace(split, trainval=split.trainval[::-1].copy())
    moved = dataclasses.replace(split, trainval=split.trainval[1:], test_seen=np.append(split.test_seen, split.trainval[0]))
    assert split.fingerprint == same.fingerprint != moved.fingerprint


def broken(**changes):
    """A change to the arrays of a good feature file."""
    def change(arrays):
        for name, edit in changes.items():
            arrays[name] = edit(arrays[name])
    return change


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop("att"), "lacks att"), (lambda arrays: arrays.pop("feature_map"), "lacks feature_map"),
    (broken(labels=lambda a: a + 1), "labels run from 1 to 9, but there are 9 classes: .*off by one"),
    (broken(labels=lambda a: a - 1), "labels run from -1"), (broken(labels=lambda a: a[:-1]), "as many as labels"),
    (broken(labels=lambda a: a.astype(float)), "labels must be a vector of whole numbers"),
    (broken(test_unseen_loc=lambda a: a + 12), "test_unseen_loc and|share|both seen and unseen|without a trainval"),
    (broken(trainval_loc=lambda a: np.append(a, 108)), "trainval_loc runs from 0 to 108, but there are 108 images"),
    (broken(trainval_loc=lambda a: np.append(a, a[0])), "names an image twice"),
    (broken(trainval_loc=lambda a: a[:0]), "trainval_loc is empty"),
    (broken(test_seen_loc=lambda a: np.append(a, 0)), "trainval_loc and test_seen_loc share 1 images"),
    (broken(w2v_att=lambda a: a[:-1]), "10 attribute word vectors .* K = 11"),
    (broken(original_att=lambda a: a[:, 1:]), "differ in shape"), (broken(att=lambda a: a * np.nan), "NaN or infinity"),
    (broken(w2v_att=lambda a: a / 0), "w2v_att holds NaN"), (broken(att=lambda a: a * 0), "no attribute at all"),
    (broken(feature_map=lambda a: a[..., 0]), "expected floats"), (broken(feature_map=lambda a: a.astype(int)), "expected floats")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_impossible_files_are_refused(tmp_path, change, message):
    arrays = feature_arrays()
    change(arrays)
    with pytest.raises(UserError, match=message):
        open_features(write_features(tmp_path / "f.hdf5", arrays))


def test_foreign_backbone_size_and_changed_split(features, tmp_path):
    assert open_features(features, "resnet101", 448)
    with pytest.raises(UserError, match="holds features of backbone resnet101, but the run asks for resnet50"):
        open_features(features, "resnet50", 448)
    with pytest.raises(UserError, match="img_size 448, but the run asks for 224"):
        open_features(features, "resnet101", 224)
    with pytest.raises(UserError, match="changed afterwards"):
        open_features(write_features(tmp_path / "g.hdf5", feature_arrays(), split_fingerprint="0123456789ab"))


def test_published_file_without_provenance_is_taken(tmp_path, capsys):
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        for name, array in feature_arrays().items():
            file[name] = array
    features = open_features(tmp_path / "p.hdf5", "resnet101", 448)
    assert features.shape == (24, 3, 3) and "does not say what made it" in capsys.readouterr().out


def test_truncated_missing_and_foreign_files(features, tmp_path):
    whole = features.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "t.hdf5").write_bytes(whole[:keep])
        with pytest.raises(UserError, match="not a complete HDF5 file"):
            open_features(tmp_path / "t.hdf5")
    with pytest.raises(UserError, match="is missing: make it with preprocessing.py"):
        open_features(tmp_path / "none.hdf5")


def test_nan_in_a_map_is_found_when_it_is_read(tmp_path):
    arrays = feature_arrays()
    arrays["feature_map"][17, 3, 1, 1] = np.nan
    features = open_features(write_features(tmp_path / "f.hdf5", arrays))
    features.read(np.arange(17))
    with pytest.raises(UserError, match="feature map of image 17 holds NaN"):
        features.read(np.arange(10, 20))


def gzip_features(path, chunk=None, mask=0):
    """The small feature file with its maps as gzip chunks, an image each; `chunk`, with its filter mask, in place of image 3's."""
    arrays = feature_arrays()
    maps = arrays.pop("feature_map")
    write_features(path, arrays)
    with h5py.File(path, "a") as file:
        target = file.create_dataset("feature_map", data=maps, chunks=(1, *maps.shape[1:]), compression="gzip")
        if chunk is not None:
            target.id.write_direct_chunk((3, 0, 0, 0), chunk, mask)
    return maps


def test_gzip_chunks_are_read_as_hdf5_reads_them(tmp_path):
    maps = gzip_features(tmp_path / "f.hdf5")
    features = open_features(tmp_path / "f.hdf5")
    with h5py.File(features.path) as file:
        assert gzip_chunks(file["feature_map"])
    assert np.array_equal(features.raw(np.arange(len(maps))[::-1]), maps[::-1])
    plain = maps[5].tobytes()  # a chunk that HDF5 left as it was, since gzip gained nothing
    gzip_features(tmp_path / "f.hdf5", plain, mask=1)
    assert np.array_equal(open_features(tmp_path / "f.hdf5").raw(np.array([3, 4])), maps[[5, 4]])


@pytest.mark.parametrize("chunk", [b"no gzip at all", zlib.compress(b"too short"), zlib.compress(bytes(10**7)), zlib.compress(bytes(4096))[:9]])
def test_damaged_gzip_chunks_and_bombs_are_refused(tmp_path, chunk):
    gzip_features(tmp_path / "f.hdf5", chunk)
    with pytest.raises(UserError, match="damaged"):
        open_features(tmp_path / "f.hdf5").raw(np.array([2, 3]))


def test_overlapping_split_check_names_the_file(features):
    split = open_features(features).split
    with pytest.raises(UserError, match="some.mat: trainval_loc and test_unseen_loc share"):
        check_split(dataclasses.replace(split, test_unseen=np.append(split.test_unseen, split.trainval[0])), "some.mat")


def test_normalize_positions():
    raw = torch.rand(2, 5, 3, 4)
    maps = normalize_positions(raw)
    assert maps.shape == (2, 12, 5) and maps.is_contiguous()
    torch.testing.assert_close(maps.norm(dim=2), torch.ones(2, 12))
    torch.testing.assert_close(maps[1, 7], raw[1, :, 1, 3] / raw[1, :, 1, 3].norm())


@pytest.mark.parametrize("classes, batch_size, held", [(40, 40, 40), (40, 64, 40), (40, 100, 80), (40, 8, 8), (150, 64, 64), (3, 64, 63)])
def test_balanced_batches(classes, batch_size, held):
    """min(Cs, B) distinct classes, max(B // Cs, 1) images of each: AWA2's 40 classes at B = 64 give 40 images."""
    torch.manual_seed(0)
    labels = torch.randint(classes, (classes * 20,)) * 2 + 1  # labels need not be dense
    labels[:classes] = torch.arange(classes) * 2 + 1
    sampler = BalancedSampler(labels, batch_size)
    table = sampler.draw(50)
    assert sampler.batch_size == held and table.shape == (50, held)
    for row in labels[table]:
        chosen, counts = row.unique(return_counts=True)
        assert len(chosen) == min(classes, batch_size) and (counts == max(batch_size // classes, 1)).all()


def test_every_image_is_drawn():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 5 + [1] * 50 + [2])
    counts = torch.bincount(BalancedSampler(labels, 3).draw(5000).flatten(), minlength=56).float()
    assert (counts[:5] / 1000 - 1).abs().max() < 0.2 and (counts[5:55] / 100 - 1).abs().max() < 0.5 and counts[55] == 5000


@pytest.mark.parametrize("where", ["ram", "none", "device", "disk"])
def test_maps_are_the_files(features, where):
    data = open_features(features)
    maps = FeatureMaps(data, data.split.trainval, torch.device("cpu"), Storage(where), lambda count: None)
    with h5py.File(features) as file:
        expected = normalize_positions(torch.from_numpy(file["feature_map"][()][data.split.trainval]))
    torch.testing.assert_close(torch.cat(list(maps.in_order())), expected, rtol=0, atol=0)
    sampler = BalancedSampler(torch.from_numpy(data.split.labels[data.split.trainval]), 4)
    batches = list(maps.batches(sampler, 7))
    assert len(batches) == 7
    for positions, batch in batches:
        torch.testing.assert_close(batch, expected[positions], rtol=0, atol=0)


def test_places_are_tried_in_order_of_speed(tmp_path, monkeypatch):
    """RAM if half of what is free holds the maps, else the disk if they fit, else nowhere; a place asked for must hold them."""
    cpu, free = torch.device("cpu"), shutil.disk_usage(tmp_path).free
    monkeypatch.setattr("scegg.features.storage.available_ram", lambda: 1000)
    assert choose_storage(400, cpu, tmp_path, True) == Storage("ram") and choose_storage(600, cpu, tmp_path, True) == Storage("disk")
    assert choose_storage(2 * free, cpu, tmp_path, True) == Storage("none") == choose_storage(1, cpu, tmp_path, True, "none")
    assert choose_storage(400, cpu, tmp_path, False) == Storage("none") and choose_storage(600, cpu, tmp_path, False, "ram") == Storage("ram")
    for cache, size, message in (("disk", 2 * free, "do not fit"), ("ram", 1001, "do not fit"), ("device", 1, "has no GPU")):
        with pytest.raises(UserError, match=f"--cache {cache}: .*{message}"):
            choose_storage(size, cpu, tmp_path, True, cache)
    with open(tmp_path / "of.hdf5.1.cache", "wb") as file:
        file.truncate(2 * free)  # a sparse file
    assert choose_storage(2 * free, cpu, tmp_path, True, "disk") == Storage("disk")  # what is there needs no room


def test_free_memory_heeds_a_containers_limit(tmp_path, monkeypatch):
    """RAM is chosen by what the container has left, where there is one; where nothing tells, only what asks for it by name."""
    files = {"/proc/meminfo": tmp_path / "meminfo", "/sys/fs/cgroup": tmp_path}
    monkeypatch.setattr("scegg.features.storage.Path", lambda path: files[path])
    assert math.isnan(available_ram())
    files["/proc/meminfo"].write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 4000\n")
    assert available_ram() == 8192
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_ram() == 2000
    monkeypatch.setattr("scegg.features.storage.available_ram", lambda: math.nan)
    assert choose_storage(1000, torch.device("cpu"), tmp_path, compressed=True, cache="ram") == Storage("ram")


def test_the_disk_cache_is_made_once_and_again_for_a_changed_file(features):
    def take():
        data, read = open_features(features), []
        maps = FeatureMaps(data, data.split.trainval, torch.device("cpu"), Storage("disk"), read.append)
        return sum(read), torch.cat(list(maps.in_order()))

    (images, first), (again, second) = take(), take()
    assert images == len(first) and again == 0 and torch.equal(first, second)
    with h5py.File(features, "r+") as file:
        file["feature_map"][...] = file["feature_map"][...][:, ::-1]
    images, third = take()
    assert images == len(third)
    torch.testing.assert_close(third, first.flip(2))
    for cache in features.parent.glob("*.cache"):
        cache.write_bytes(b"short")
    assert torch.equal(take()[1], third)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_never_end_in_a_traceback(features, seed):
    rng, whole = np.random.default_rng(seed), features.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        features.write_bytes(damaged)
        try:
            data = open_features(features)
            data.read(np.arange(len(data.split.labels)))
        except UserError:
            pass


def test_another_writers_train_loc_is_kept_inside_trainval(features):
    with h5py.File(features, "r+") as file:
        trainval, test_seen = file["trainval_loc"][()], file["test_seen_loc"][()]
        file["train_loc"] = np.concatenate([trainval[:5], test_seen])
    assert open_features(features).split.train.tolist() == trainval[:5].tolist()


@pytest.mark.parametrize("value", ["text", scipy.sparse.eye(3).tocsc(), np.ones((3, 3)) * 1j, np.array([["a"], ["b"]], dtype=object)])
def test_class_attributes_of_a_wrong_kind(value):
    with pytest.raises(UserError, match="att is not a table of numbers"):
        class_table(value, "att_splits.mat: att")
