"""Words of a dataset that a model lacks; byte order marks and line ends of Windows."""

import codecs

import numpy as np
import pytest

from scegg.datasets.word_vectors import (
    REPLACED_WHERE_MISSING,
    attribute_vectors,
    gaussian_vectors,
    read_vectors,
)
from scegg.datasets.xlsa17 import read_attribute_names


def write_model(path, words):
    """A word2vec .bin of random vectors; returns them."""
    rng = np.random.default_rng(0)
    vectors = {word: rng.normal(size=5).astype("<f4") for word in words}
    entries = [word.encode() + b" " + vector.tobytes() for word, vector in vectors.items()]
    path.write_bytes(f"{len(words)} 5\n".encode() + b"\n".join(entries) + b"\n")
    return vectors


@pytest.mark.parametrize(
    "name, words, pieces",
    [
        ("toughskin", ["tough", "skin"], ["tough", "skin"]),
        ("toughskin", ["toughskin", "tough", "skin"], ["toughskin"]),
        ("toughskin", ["toughs", "kin", "tough", "skin"], ["tough", "skin"]),
        ("nestspot", ["nests", "pot", "nest", "spot"], ["nest", "spot"]),
        ("quadrapedal", ["quadrupedal", "pedal"], ["quadrupedal"]),
        ("newworld", ["New_World"], ["New_World"]),
        ("newworld", ["new-world"], ["new-world"]),
        ("strainteeth", ["strain", "teeth"], ["strain", "teeth"]),
        # no word of AWA2: the division with the commoner words
        ("hookbeak", ["hook", "beak", "hoo", "kbeak"], ["hook", "beak"]),
        ("hookbeak", ["beak", "xxx", "hook", "hoo", "kbeak"], ["hook", "beak"]),
        ("Hookbeak", ["hook", "beak"], ["hook", "beak"]),
        ("african", ["African"], ["African"]),
        ("has_skin::toughskin", ["tough", "skin"], ["skin", "tough", "skin"]),
    ],
)
def test_what_stands_for_a_word(tmp_path, capsys, name, words, pieces):
    vectors = write_model(tmp_path / "m.bin", words)
    row = read_vectors(tmp_path / "m.bin", [name])[0]
    np.testing.assert_allclose(row, np.sum([vectors[piece] for piece in pieces], 0), rtol=1e-6)
    said = capsys.readouterr().out
    word = name.rpartition(":")[2]
    assert (f"no vector for {word}, read as " in said) == (word not in vectors)
    assert said.count("\n") <= 1


def test_every_word_known_to_be_missing_is_replaced(tmp_path, capsys):
    words = sorted({part for text in REPLACED_WHERE_MISSING.values() for part in text.split()})
    vectors = write_model(tmp_path / "m.bin", words)
    table = read_vectors(tmp_path / "m.bin", list(REPLACED_WHERE_MISSING))
    for row, text in zip(table, REPLACED_WHERE_MISSING.values(), strict=True):
        np.testing.assert_allclose(row, sum(vectors[part] for part in text.split()), rtol=1e-6)
    assert capsys.readouterr().out.count("read as") == len(REPLACED_WHERE_MISSING)


def test_an_unknown_attribute_gets_a_zero_row_and_is_named_loudly(tmp_path, capsys):
    vectors = write_model(tmp_path / "m.bin", ["black", "ocean"])
    table = read_vectors(tmp_path / "m.bin", ["black", "zzyzxqu", "ocean", "qqq"])
    np.testing.assert_array_equal(table[[0, 2]], [vectors["black"], vectors["ocean"]])
    assert not table[[1, 3]].any()
    said = capsys.readouterr().out
    assert "WARNING: " in said and "no word of 2 of 4 attributes: zzyzxqu, qqq" in said


def test_words_of_two_letters_are_no_parts(tmp_path, capsys):
    write_model(tmp_path / "m.bin", ["black", "ma", "lar"])
    assert not read_vectors(tmp_path / "m.bin", ["black", "malar"])[1].any()


def test_gaussian_vectors_are_as_before():
    row = gaussian_vectors(["quadrapedal"])[0]
    assert row[:2] == pytest.approx([-1.5721788, 1.1876593])


# ---------------------------------------------------------------- texts

# (encoding, the mark before it)
ENCODINGS = [
    ("utf-8", b""),
    ("utf-8-sig", b""),
    ("utf-16-le", b""),
    ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", b""),
    ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-32-le", b""),
    ("utf-32", b""),  # it writes a mark
    ("utf-32-be", b""),
]


@pytest.mark.parametrize("encoding, mark", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("numbered", [False, True])
def test_attribute_names(tmp_path, encoding, mark, end, numbered):
    names = ["has_bill_shape::dagger", "has_größe::klein", "black"]
    lines = [f" {n}\t{name}\0" if numbered else name for n, name in enumerate(names, 1)]
    (tmp_path / "TOY").mkdir()
    text = end.join(lines) + end + "\x1a"  # as files of DOS end
    content = mark + text.encode(encoding)
    (tmp_path / "TOY" / "attributes.txt").write_bytes(content)
    assert read_attribute_names(tmp_path, "TOY", 3) == names


@pytest.mark.parametrize("encoding, mark", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", [[], ["2 3"]])
def test_models_as_texts(tmp_path, encoding, mark, end, header):
    text = end.join([*header, "black 1 2 3", "weiß 4 5 6", ""])
    (tmp_path / "m.txt").write_bytes(mark + text.encode(encoding))
    table = read_vectors(tmp_path / "m.txt", ["weiß", "black"])
    np.testing.assert_array_equal(table, [[4, 5, 6], [1, 2, 3]])


def test_awa2_is_not_refused_for_a_word(tmp_path, capsys):
    (tmp_path / "w2v").mkdir()
    write_model(tmp_path / "w2v" / "news.bin", ["black", "tough", "skin", "ocean"])
    names = ["black", "toughskin", "quadrapedal", "ocean"]
    table, source = attribute_vectors(None, tmp_path, "AWA2", names, 4)
    assert source == "news.bin" and table.any(axis=1).tolist() == [True, True, False, True]
