"""Damaged word vectors, images and configs: a right result, or one line; no hang."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fuzzing import cases, damages, right_or_refused
from helpers import ROOT
from scegg.config import Config, read_config
from scegg.datasets.word_vectors import read_vectors
from scegg.features.images import Images, Unreadable, image_transform
from util import UserError

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------- word vectors

NAMES = ["has_bill_shape::curved", "has_wing_color::grey"]
WORDS = {
    "bill": [1, 0, 0],
    "shape": [0, 1, 0],
    "curved": [0, 0, 1],
    "wing": [2, 0, 0],
    "color": [0, 2, 0],
    "gray": [0, 0, 2],
}


def vector_files():
    """Good files of every format, by a name whose suffix tells it."""
    table, npy = np.arange(1.0, 13).reshape(4, 3), io.BytesIO()
    np.save(npy, table)
    files = {f"p{protocol}.pkl": pickle.dumps(table, protocol) for protocol in range(6)}

    binary, lines = b"6 3\n", []
    for word, vector in WORDS.items():
        binary += word.encode() + b" " + struct.pack("<3f", *vector) + b"\n"
        lines.append(f"{word} {' '.join(map(str, vector))}")
    text = "\n".join(lines).encode()
    return files | {
        "t.npy": npy.getvalue(),
        "m.bin": binary,
        "m.txt": b"6 3\n" + text,
        "glove.txt": text,
    }


FILES = vector_files()


def is_table(table):
    is_float32 = table.dtype == np.float32
    return is_float32 and table.ndim == 2 and table.size and np.isfinite(table).all()


@cases(250)
@given(name=st.sampled_from([*FILES]), damage=damages())
def test_damaged_word_vectors(folder, name, damage):
    (folder / name).write_bytes(damage(FILES[name]))
    right_or_refused(lambda: read_vectors(folder / name, NAMES), is_table)


@cases(80)
@given(suffix=st.sampled_from([".pkl", ".npy", ".bin", ".txt"]), content=st.binary(max_size=60))
def test_word_vectors_of_any_bytes(folder, suffix, content):
    path = folder / f"any{suffix}"
    path.write_bytes(content)
    right_or_refused(lambda: read_vectors(path, NAMES), is_table)


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
    path = folder / "image.jpg"
    path.write_bytes(damage(PICTURES[kind]))

    def read():
        item = Images([path], image_transform(32))[0]
        if isinstance(item, Unreadable):
            assert str(path) in item
            raise UserError(item)
        return item

    right_or_refused(read, lambda item: item.shape == (3, 32, 32) and item.dtype == torch.uint8)


# ---------------------------------------------------------------- configs

TOY = (ROOT / "wandb_config" / "toy.yaml").read_bytes()
KEYS = [line.split(":")[0] for line in TOY.decode().splitlines() if line[:1].isalpha()]
STRANGE_VALUES = ["1e999", "0x1F", "1_000", "!!python/object:os.system"]
STRANGE_VALUES += ["&a [*a]", "? []", "2001-99-99"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dates(),
    st.sampled_from(STRANGE_VALUES),
)


def is_config(config):
    return isinstance(config, Config)


@cases(100)
@given(damage=damages())
def test_damaged_configs(folder, damage):
    (folder / "c.yaml").write_bytes(damage(TOY))
    right_or_refused(lambda: read_config(folder / "c.yaml", {}), is_config)


@cases(50)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_configs_of_any_value(folder, key, value):
    lines = TOY.decode().splitlines()
    for number, line in enumerate(lines):
        if line.startswith(f"{key}:"):
            lines[number] = f"{key}: {{value: {value}}}"
    text = "\n".join(lines)
    (folder / "c.yaml").write_text(text, encoding="utf-8", errors="replace")
    right_or_refused(lambda: read_config(folder / "c.yaml", {}), is_config)
