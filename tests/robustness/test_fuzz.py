"""Damaged and impossible files of every kind we read: a right result, or one line that says what is wrong; no traceback, no hang.

`SCEGG_FUZZ=20 pytest tests/test_fuzz.py` tries twenty times as many cases, others every time.
"""
import contextlib
import io
import os
import pickle
import shutil
import signal
import struct

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import ROOT, feature_arrays
from scegg.config import Config, read_config
from scegg.datasets import toy
from scegg.datasets.splits import check_split
from scegg.datasets.word_vectors import read_vectors
from scegg.datasets.xlsa17 import read_dataset
from scegg.features.images import Images, Unreadable, image_transform
from scegg.features.reader import open_features
from util import UserError

TIMES = int(os.environ.get("SCEGG_FUZZ", 1))
SECONDS = 20  # that one case may take on a busy machine
pytestmark = [pytest.mark.filterwarnings("ignore")]


def cases(count):
    return settings(max_examples=count * TIMES, derandomize=TIMES == 1, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def time_limit():
    def stop(signum, frame):
        raise AssertionError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def right_or_refused(read, is_right):
    """Either `read()` gives what `is_right` holds true, or a UserError of one line."""
    with time_limit():
        try:
            result = read()
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
        else:
            assert is_right(result)


def in_a_child(action):
    """Run `action` in a forked process, for HDF5 may crash over damaged bytes; returns (exit status, what it wrote to stderr)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(writer, repr(error).encode()[:2000])
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        text = said.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@st.composite
def damages(draw):
    """A function from whole bytes to damaged ones."""
    where = st.floats(0, 1, exclude_max=True)
    flips = draw(st.lists(st.tuples(where, st.integers(0, 255)), min_size=0, max_size=6))
    keep = draw(st.one_of(st.just(1.0), where))
    zeros = draw(st.one_of(st.none(), st.tuples(where, st.integers(1, 200))))

    def damage(whole: bytes) -> bytes:
        content = bytearray(whole)
        for at, value in flips:
            content[int(at * len(content))] = value
        if zeros:
            start = int(zeros[0] * len(content))
            content[start:start + zeros[1]] = bytes(len(content[start:start + zeros[1]]))
        return bytes(content[:round(keep * len(content))])
    return damage


# what a stranger can put in place of an array
EDITS = {
    "nan": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a), "inf": lambda a: a * np.inf,
    "negative": lambda a: -a, "one more": lambda a: a + 1, "huge": lambda a: a + 2**40, "empty": lambda a: a[:0],
    "one": lambda a: a[:1], "short": lambda a: a[:-1], "twice": lambda a: np.concatenate([a, a]), "flat": lambda a: a.ravel(),
    "deep": lambda a: a[..., None], "scalar": lambda a: a.ravel()[0], "floats": lambda a: a + 0.5, "text": lambda a: "text",
    "bytes": lambda a: np.array([b"\xff\xfe"] * 4), "complex": lambda a: a + 1j, "zero": lambda a: a * 0, "double": lambda a: a * 1e300,
    "same": lambda a: a, "int8": lambda a: a.astype(np.int8), "uint64": lambda a: a.astype(np.uint64), "reversed": lambda a: a[::-1],
    "moved": lambda a: np.roll(a, 1, axis=0), "booleans": lambda a: a > 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------- feature files

def write_hdf5(path, arrays, **attributes):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            chunks = {"chunks": (1, *array.shape[1:]), "compression": "gzip"} if name == "feature_map" and np.ndim(array) == 4 and array.size else {}
            file.create_dataset(name, data=array, **chunks)
        file.attrs.update({"backbone": "resnet101", "img_size": 448} | attributes)


def read_features(path):
    features = open_features(path, "resnet101", 448)
    return features, features.read(np.arange(len(features.split.labels)))


def are_features(result):
    features, maps = result
    return check_split(features.split, "file") and len(maps) == len(features.split.labels) and torch.isfinite(maps).all()


@cases(80)
@given(damage=damages())
def test_damaged_feature_files(folder, damage):
    path = folder / "whole.hdf5"
    if not path.exists():
        write_hdf5(path, feature_arrays(per_class=6, D=8) | {"allclasses_names": [b"bird"] * 9})
    (folder / "damaged.hdf5").write_bytes(damage(path.read_bytes()))
    status, text = in_a_child(lambda: right_or_refused(lambda: read_features(folder / "damaged.hdf5"), are_features))
    assert status == 0, text


@cases(60)
@given(changes=st.dictionaries(st.sampled_from([*feature_arrays(per_class=4), "train_loc", "allclasses_names"]),
                               st.sampled_from([*EDITS]), min_size=1, max_size=2),
       attribute=st.sampled_from([{}, {"backbone": 7}, {"img_size": [448, 448]}, {"dataset": np.ones(3)}, {"split_fingerprint": b"\xff"},
                                  {"backbone": h5py.Empty("f")}, {"note": "\u2028"}]))
def test_impossible_feature_files(folder, changes, attribute):
    arrays = feature_arrays(per_class=4, D=8)
    for name, edit in changes.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # an edit that makes no array of this one
            arrays[name] = EDITS[edit](arrays.get(name, np.arange(9)))
    write_hdf5(folder / "f.hdf5", arrays, **attribute)
    right_or_refused(lambda: read_features(folder / "f.hdf5"), are_features)


# ---------------------------------------------------------------- .mat files

@pytest.fixture(scope="module")
def data_root(folder):
    toy.render(folder / "data", classes=5, unseen=1, images_per_class=5)
    shutil.copytree(folder / "data/xlsa17/data/TOY", folder / "mats")
    return folder / "data"


def is_dataset(result):
    split, names, tails = result
    return check_split(split, "mat") and len(names) == len(split.att) and len(tails) == len(split.labels)


@cases(60)
@given(name=st.sampled_from(["res101.mat", "att_splits.mat"]), damage=damages(), compressed=st.booleans())
def test_damaged_mat_files(folder, data_root, name, damage, compressed):
    shutil.copytree(folder / "mats", data_root / "xlsa17/data/TOY", dirs_exist_ok=True)
    arrays = {key: value for key, value in scipy.io.loadmat(folder / "mats" / name).items() if key[0] != "_"}
    whole = io.BytesIO()
    scipy.io.savemat(whole, arrays, do_compression=compressed)
    (data_root / "xlsa17/data/TOY" / name).write_bytes(damage(whole.getvalue()))
    right_or_refused(lambda: read_dataset(data_root, "TOY"), is_dataset)


@cases(50)
@given(changes=st.dictionaries(st.sampled_from(["labels", "image_files", "trainval_loc", "train_loc", "test_seen_loc", "test_unseen_loc",
                                                "att", "original_att", "allclasses_names"]), st.sampled_from([*EDITS]),
                               min_size=1, max_size=2))
def test_impossible_mat_files(folder, data_root, changes):
    for name in ("res101.mat", "att_splits.mat"):
        arrays = {key: value for key, value in scipy.io.loadmat(folder / "mats" / name).items() if key[0] != "_"}
        for key, edit in changes.items():
            with contextlib.suppress(TypeError, ValueError, OverflowError, KeyError):
                arrays[key] = EDITS[edit](arrays[key])
        scipy.io.savemat(data_root / "xlsa17/data/TOY" / name, arrays)
    right_or_refused(lambda: read_dataset(data_root, "TOY"), is_dataset)


@pytest.mark.parametrize("change, message", [
    (dict(labels=lambda a: np.where(a == a[0], a[-1], a)), "test_seen_loc|share|both seen and unseen|runs? from"),  # a class of no image
    (dict(test_unseen_loc=lambda a: a[:0]), "test_unseen_loc is empty"),
    (dict(trainval_loc=lambda a: a[5:]), "test_seen_loc holds 1 classes without a trainval image"),
    (dict(test_seen_loc=lambda a: np.vstack([a, a[:1]])), "names an image twice"),
    (dict(test_unseen_loc=lambda a: np.vstack([a, [[1]]])), "share 1 images|both seen and unseen"),
    (dict(allclasses_names=lambda a: np.vstack([a[:1], a[:-1]])), "allclasses_names has .* twice")])
def test_splits_that_cannot_be(folder, data_root, change, message):
    shutil.copytree(folder / "mats", data_root / "xlsa17/data/TOY", dirs_exist_ok=True)
    for name in ("res101.mat", "att_splits.mat"):
        arrays = {key: value for key, value in scipy.io.loadmat(folder / "mats" / name).items() if key[0] != "_"}
        arrays |= {key: edit(arrays[key] if arrays[key].dtype.kind == "O" else arrays[key].astype(int)) for key, edit in change.items() if key in arrays}
        scipy.io.savemat(data_root / "xlsa17/data/TOY" / name, arrays)
    try:
        read_dataset(data_root, "TOY")
    except UserError:
        with pytest.raises(UserError, match=message):
            read_dataset(data_root, "TOY")
    else:
        assert "labels" in change  # two classes become one: unusual, and possible


# ---------------------------------------------------------------- word vectors

NAMES = ["has_bill_shape::curved", "has_wing_color::grey"]
WORDS = {"bill": [1, 0, 0], "shape": [0, 1, 0], "curved": [0, 0, 1], "wing": [2, 0, 0], "color": [0, 2, 0], "gray": [0, 0, 2]}


def vector_files():
    """Good files of every format, by a name whose suffix tells it."""
    table, npy = np.arange(1.0, 13).reshape(4, 3), io.BytesIO()
    np.save(npy, table)
    files = {f"p{protocol}.pkl": pickle.dumps(table, protocol) for protocol in range(6)}
    binary = b"".join(word.encode() + b" " + struct.pack("<3f", *vector) + b"\n" for word, vector in WORDS.items())
    lines = "\n".join(f"{word} {' '.join(map(str, vector))}" for word, vector in WORDS.items()).encode()
    return files | {"t.npy": npy.getvalue(), "m.bin": b"6 3\n" + binary, "m.txt": b"6 3\n" + lines, "glove.txt": lines}


FILES = vector_files()


def is_table(table):
    return table.dtype == np.float32 and table.ndim == 2 and table.size and np.isfinite(table).all()


@cases(250)
@given(name=st.sampled_from([*FILES]), damage=damages())
def test_damaged_word_vectors(folder, name, damage):
    (folder / name).write_bytes(damage(FILES[name]))
    right_or_refused(lambda: read_vectors(folder / name, NAMES), is_table)


@cases(80)
@given(suffix=st.sampled_from([".pkl", ".npy", ".bin", ".txt"]), content=st.binary(max_size=60))
def test_word_vectors_of_any_bytes(folder, suffix, content):
    (folder / f"any{suffix}").write_bytes(content)
    right_or_refused(lambda: read_vectors(folder / f"any{suffix}", NAMES), is_table)


# ---------------------------------------------------------------- images

def encoded(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, kind)
    return whole.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}


@cases(120)
@given(kind=st.sampled_from([*PICTURES]), damage=damages())
def test_damaged_images(folder, kind, damage):
    (folder / "image.jpg").write_bytes(damage(PICTURES[kind]))

    def read():
        item = Images([folder / "image.jpg"], image_transform(32))[0]
        if isinstance(item, Unreadable):
            assert str(folder / "image.jpg") in item
            raise UserError(item)
        return item
    right_or_refused(read, lambda item: item.shape == (3, 32, 32) and item.dtype == torch.uint8)


# ---------------------------------------------------------------- configs

TOY = (ROOT / "wandb_config" / "toy.yaml").read_bytes()
KEYS = [line.split(":")[0] for line in TOY.decode().splitlines() if line[:1].isalpha()]
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
                   st.dates(), st.sampled_from(["1e999", "0x1F", "1_000", "!!python/object:os.system", "&a [*a]", "? []", "2001-99-99"]))


@cases(100)
@given(damage=damages())
def test_damaged_configs(folder, damage):
    (folder / "c.yaml").write_bytes(damage(TOY))
    right_or_refused(lambda: read_config(folder / "c.yaml", {}), lambda config: isinstance(config, Config))


@cases(50)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_configs_of_any_value(folder, key, value):
    lines = [f"{key}: {{value: {value}}}" if line.startswith(f"{key}:") else line for line in TOY.decode().splitlines()]
    (folder / "c.yaml").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    right_or_refused(lambda: read_config(folder / "c.yaml", {}), lambda config: isinstance(config, Config))
