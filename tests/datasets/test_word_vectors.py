"""Word vectors: every format, and no file that runs code."""

import pickle
import struct

import numpy as np
import pytest

from scegg.datasets.word_vectors import (
    attribute_vectors,
    attribute_words,
    find_vectors,
    gaussian_vectors,
    read_vectors,
)
from util import UserError

NAMES = [
    "has_bill_shape::curved_(up_or_down)",
    "has_wing_color::grey",
    "has_shape::long-legged-like",
]
WORDS = {
    "bill": [1, 0, 0],
    "shape": [0, 1, 0],
    "curved": [0, 0, 1],
    "wing": [2, 0, 0],
    "color": [0, 2, 0],
    "gray": [0, 0, 2],
    "long": [1, 1, 0],
    "legged": [0, 1, 1],
    "like": [1, 0, 1],
    "unused": [9, 9, 9],
}
SUMS = np.array([[1, 1, 1], [2, 2, 2], [2, 3, 2]])


def test_words_of_attributes():
    assert attribute_words(NAMES[0]) == ["bill", "shape", "curved"]
    assert attribute_words(NAMES[1]) == ["wing", "color", "gray"]
    assert attribute_words(NAMES[2]) == ["shape", "long", "legged", "like"]
    assert attribute_words("has_upperparts_color::blue") == ["upper", "parts", "color", "blue"]
    assert attribute_words("has_bill_shape::spatulate") == ["bill", "shape", "broad"]
    assert attribute_words("vacationing/ touring") == ["vacationing", "touring"]


# ---------------------------------------------------------------- tables


def test_real_tables(real_data):
    for dataset, attributes in (("CUB", 312), ("SUN", 102), ("AWA2", 85)):
        path = real_data / "w2v" / f"{dataset}_attribute.pkl"
        table = read_vectors(path, None)
        assert table.shape == (attributes, 300) and np.isfinite(table).all()
        with open(path, "rb") as file:
            trusted = pickle.load(file)
        np.testing.assert_allclose(table, trusted, rtol=1e-6)


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays_of_every_protocol(tmp_path, protocol):
    table = np.arange(1.0, 13).reshape(4, 3)
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(table, protocol))
    np.testing.assert_array_equal(read_vectors(tmp_path / "t.pkl", None), table)


def test_a_zero_row_is_said_and_taken(tmp_path, capsys):
    np.save(tmp_path / "t.npy", [[1.0, 2], [0, 0]])
    np.testing.assert_array_equal(read_vectors(tmp_path / "t.npy", None), [[1, 2], [0, 0]])
    assert "rows [1]" in capsys.readouterr().out


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_hostile_files_run_nothing(tmp_path):
    marker = tmp_path / "it_ran"
    objects = np.empty(1, dtype=object)
    objects[0] = Hostile(marker)
    text = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Hostile(marker)))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(objects))
    (tmp_path / "c.pkl").write_bytes(text)
    np.save(tmp_path / "d.npy", objects, allow_pickle=True)

    for name in ("a.pkl", "b.pkl", "c.pkl", "d.npy"):
        with pytest.raises(UserError, match="refused"):
            read_vectors(tmp_path / name, None)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps([1, 2]), "does not hold a table"),
        (pickle.dumps(np.ones(3)), "does not hold a table"),
        (b"", "refused"),
        (pickle.dumps(np.full((2, 2), np.nan)), "NaN"),
    ],
)
def test_damaged_tables(tmp_path, content, message):
    (tmp_path / "t.pkl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_vectors(tmp_path / "t.pkl", None)


# ---------------------------------------------------------------- models of words


def write_bin(path, words=WORDS):
    """A word2vec .bin file."""
    content = f"{len(words)} 3\n".encode()
    for word, vector in words.items():
        content += word.encode() + b" " + struct.pack("<3f", *vector) + b"\n"
    path.write_bytes(content)
    return path


def test_word2vec_and_glove_files_give_the_same_sums(tmp_path):
    lines = [f"{word} {' '.join(map(str, vector))}" for word, vector in WORDS.items()]
    (tmp_path / "w2v.txt").write_text("\n".join([f"{len(WORDS)} 3", *lines]))
    (tmp_path / "glove.txt").write_text("\n".join(lines))
    (tmp_path / "fasttext.vec").write_text("\n".join([f"{len(WORDS)} 3", *lines]))
    write_bin(tmp_path / "w2v.bin")
    for name in ("w2v.bin", "w2v.txt", "glove.txt", "fasttext.vec"):
        np.testing.assert_array_equal(read_vectors(tmp_path / name, NAMES), SUMS)


def test_missing_words_are_named_and_left_out(tmp_path, capsys):
    few = {word: vector for word, vector in WORDS.items() if word != "curved"}
    path = write_bin(tmp_path / "few.bin", few)
    np.testing.assert_array_equal(read_vectors(path, NAMES)[0], [1, 1, 0])
    assert "no vector for curved" in capsys.readouterr().out

    path = write_bin(tmp_path / "none.bin", {"unused": [1, 2, 3]})
    with pytest.raises(UserError, match="knows no word of 3 attributes"):
        read_vectors(path, NAMES)


def test_truncated_model(tmp_path):
    path = write_bin(tmp_path / "w.bin")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        read_vectors(path, NAMES)


# ---------------------------------------------------------------- which source is taken


def test_related_attributes_share_gaussian_words():
    table = gaussian_vectors(["has_wing_color::red", "has_tail_color::red", "red"])
    wing, tail = gaussian_vectors(["wing", "tail"])
    np.testing.assert_allclose(table[0] - table[1], wing - tail, rtol=1e-4, atol=1e-5)


def test_sources_in_order(tmp_path, capsys):
    table, source = attribute_vectors(None, tmp_path, "CUB", NAMES, 3)
    assert source == "gaussian" and "Gaussian" in capsys.readouterr().out
    np.testing.assert_array_equal(table, gaussian_vectors(NAMES))

    (tmp_path / "w2v").mkdir()
    write_bin(tmp_path / "w2v" / "model.bin")
    assert attribute_vectors(None, tmp_path, "CUB", NAMES, 3)[1] == "model.bin"
    np.save(tmp_path / "w2v" / "CUB_attribute.npy", SUMS)
    assert attribute_vectors(None, tmp_path, "CUB", NAMES, 3)[1] == "CUB_attribute.npy"

    with pytest.raises(UserError, match="3 word vectors, but CUB has 4"):
        attribute_vectors(None, tmp_path, "CUB", NAMES, 4)
    with pytest.raises(UserError, match="no word vectors and no attribute names"):
        attribute_vectors(None, tmp_path / "elsewhere", "CUB", None, 3)


def test_hidden_files_are_no_models(tmp_path):
    (tmp_path / "._a.bin").write_bytes(b"\0\5\x16\7")  # macOS makes them on disks of others
    assert find_vectors(tmp_path, "CUB") is None
    (tmp_path / "a.txt").write_text("black 1 2\n")
    assert find_vectors(tmp_path, "CUB") == tmp_path / "a.txt"
