"""Tables as Python 2 and numpy 1 pickled them; what is hostile stays refused."""

import pickle
import struct

import numpy as np
import pytest

from scegg.datasets.pickled_array import read_pickle
from scegg.datasets.word_vectors import read_vectors
from util import UserError


class Python2Pickler(pickle._Pickler):
    """Pickles bytes and texts as Python 2 pickled its `str`."""

    def save_str(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin-1")
        if not self.bin:
            self.write(b"S" + repr(data)[1:].encode() + b"\n")
        elif len(data) < 256:
            self.write(b"U" + bytes([len(data)]) + data)
        else:
            self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_str, str: save_str}


def as_python2(value, path, protocol):
    """Write a pickle as Python 2 with numpy 1 wrote it."""
    with open(path, "wb") as file:
        Python2Pickler(file, protocol).dump(value)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    with open(path, "rb") as file:
        trusted = pickle.load(file, encoding="latin1")
    np.testing.assert_array_equal(trusted, value)
    return path


def table(dtype, rows=30, order="C"):
    """A table whose bytes take every value."""
    rng = np.random.default_rng(0)
    values = rng.normal(scale=1000, size=(rows, 40)).astype(dtype)
    return np.asarray(values, order=order)


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", "<i8", "<i4", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_python_2(tmp_path, protocol, dtype, order):
    values = table(dtype, order=order)
    path = as_python2(values, tmp_path / "t.pkl", protocol)
    np.testing.assert_array_equal(read_pickle(path), values)
    np.testing.assert_array_equal(read_vectors(path, None), values.astype(np.float32))


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_small_arrays_and_long_numbers_of_python_2(tmp_path, protocol):
    values = table("<f8", rows=1)
    path = as_python2(values, tmp_path / "t.pkl", protocol)
    np.testing.assert_array_equal(read_pickle(path), values)

    if protocol == 0:  # on 64 bits, numpy 1 wrote shapes as long: (30L, 40L)
        path.write_bytes(path.read_bytes().replace(b"(I1\nI40\n", b"(L1L\nL40L\n"))
        np.testing.assert_array_equal(read_pickle(path), values)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_pickle_that_windows_passed_on_as_a_text(tmp_path, protocol):
    values = table("<f8")
    path = as_python2(values, tmp_path / "t.pkl", protocol)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(read_pickle(path), values)


@pytest.mark.parametrize("protocol", range(6))
def test_other_pickles_keep_each_line_end(tmp_path, protocol):
    values = np.full((3, 4), 0x0A0D, "<u2").astype("<u2")  # its bytes are \r\n
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(values, protocol))
    np.testing.assert_array_equal(read_pickle(tmp_path / "t.pkl"), values)


HOSTILE = {
    "a function": b"cposix\nsystem\np0\n(S'touch CANARY'\np1\ntp2\nRp3\n.",
    "with the line ends of Windows": b"cposix\r\nsystem\r\n(S'touch CANARY'\r\ntR.",
    "a binary function": b"\x80\x02cposix\nsystem\nU\x0ctouch CANARY\x85R.",
    "an instance": b"(S'touch CANARY'\nios\nsystem\n.",
    "python 2's builtins": b'c__builtin__\neval\n(S\'open("CANARY", "w")\'\ntR.',
    "behind a text of any bytes": b"S'\xff\xfe'\n0cposix\nsystem\n(S'touch CANARY'\ntR.",
    "a copied constructor": b"ccopy_reg\n_reconstructor\n(cposix\nsystem\ncos\nx\nNtR.",
    "memory by the memo": b"S'\xff'\np99999999999\n.",
    "a text without an end": b"S'\xff\xff",
    "a text": b"S'\xff'\n.",
    "no opcode": b"S'\xff'\n\xfe.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_of_python_2(tmp_path, kind):
    canary = tmp_path / "it_ran"
    (tmp_path / "t.pkl").write_bytes(HOSTILE[kind].replace(b"CANARY", str(canary).encode()))
    with pytest.raises(UserError, match="refused|does not hold a table") as caught:
        read_vectors(tmp_path / "t.pkl", None)
    assert not canary.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_objects_and_false_shapes_of_python_2(tmp_path, protocol):
    values = table("<f8", rows=2)
    path = as_python2(values, tmp_path / "t.pkl", protocol)
    whole = path.read_bytes()
    objects = {0: (b"S'f8'", b"S'O8'"), 1: (b"U\x02f8", b"U\x02O8"), 2: (b"U\x02f8", b"U\x02O8")}
    shapes = {0: (b"I40\n", b"I90\n"), 1: (b"K\x28", b"K\x5a"), 2: (b"K\x28", b"K\x5a")}
    for old, new in (objects[protocol], shapes[protocol]):
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(UserError, match="refused"):
            read_vectors(path, None)
