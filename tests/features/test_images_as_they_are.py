"""Whole images of every kind: deep greys by their range, large photographs, much text."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import preprocessing
from scegg.features.images import MEGAPIXELS, Images, Unreadable, read_image, to_rgb
from util import UserError

GREY = np.linspace(0, 255, 40 * 50).round().astype(np.uint8).reshape(40, 50)


def pixels(image):
    """A transform: the RGB picture as it is."""
    return torch.from_numpy(np.array(image))


def read_grey(path):
    """The grey picture in a file, (h, w) uint8."""
    picture = read_image(path, pixels)
    assert picture.dtype == torch.uint8 and picture.shape[2] == 3
    assert torch.equal(picture[..., 0], picture[..., 1])
    assert torch.equal(picture[..., 0], picture[..., 2])
    return picture[..., 0].numpy()


def tiff(path, data, shape, bits, sample_format=1, order="<", photometric=1, **extra):
    """A TIFF of one strip of grey, written here byte by byte."""
    height, width = shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: height, 279: len(data), 339: sample_format} | extra.get("tags", {})

    entries = b""
    for tag, value in sorted(tags.items()):
        kind, letter = (11, "f") if isinstance(value, float) else (4, "I")
        entries += struct.pack(f"{order}HHI{letter}", tag, kind, 1, value)
    mark = {"<": b"II", ">": b"MM"}[order]
    header = mark + struct.pack(f"{order}HI", 42, 8 + len(data))
    count = struct.pack(f"{order}H", len(tags))
    path.write_bytes(header + data + count + entries + bytes(4))
    return path


def tiff_of(path, values, bits, sample_format=1, order="<", **more):
    """A TIFF of an array's values."""
    kind = {1: "u", 2: "i", 3: "f"}[sample_format]
    data = values.astype(f"{order}{kind}{bits // 8}").tobytes()
    return tiff(path, data, values.shape, bits, sample_format, order, **more)


# ---------------------------------------------------------------- deep greys


def test_16_bit_png(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_grey(tmp_path / "a.png"), GREY)

    half = np.full((9, 9), 32768, np.uint16)  # Pillow's own conversion makes this white
    Image.fromarray(half).save(tmp_path / "b.png")
    assert (read_grey(tmp_path / "b.png") == 128).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "scale, bits, sample_format",
    [
        (257, 16, 1),
        (1, 32, 1),
        (257, 32, 1),
        (1, 32, 2),
        (257, 32, 2),
        (1 / 255, 32, 3),
        (1, 32, 3),
        (257, 32, 3),
    ],
)
def test_deep_tiffs(tmp_path, scale, bits, sample_format, order):
    if (order, bits, sample_format) == (">", 32, 1):
        pytest.skip("Pillow does not read these")
    path = tiff_of(tmp_path / "a.tif", GREY * float(scale), bits, sample_format, order)
    np.testing.assert_array_equal(read_grey(path), GREY)


def test_signed_16_bits_end_at_32767(tmp_path):
    path = tiff_of(tmp_path / "a.tif", np.full((9, 9), 32767), 16, 2)
    assert (read_grey(path) == 255).all()


def test_12_bits_end_at_4095(tmp_path):
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x08, 0x00])  # 4095, 0; 2048, 2048
    path = tiff(tmp_path / "a.tif", packed, (2, 2), 12)
    np.testing.assert_array_equal(read_grey(path), [[255, 0], [128, 128]])


def test_white_that_is_zero_is_turned_round(tmp_path):
    path = tiff_of(tmp_path / "a.tif", GREY * 257.0, 16, photometric=0)
    np.testing.assert_array_equal(read_grey(path), 255 - GREY)


def test_a_tiff_may_say_its_largest_sample(tmp_path):
    path = tiff_of(tmp_path / "a.tif", GREY * 4.0, 32, 3, tags={341: 1020.0})
    np.testing.assert_array_equal(read_grey(path), GREY)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_every_16_bit_mode(mode):
    kind = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
    deep = (GREY.astype(np.uint16) * 257).astype(kind)
    image = Image.frombytes(mode, (50, 40), deep.tobytes())
    np.testing.assert_array_equal(np.array(to_rgb(image))[..., 1], GREY)


@pytest.mark.parametrize(
    "values, sample_format",
    [
        (np.full((9, 9), 1e6), 2),
        (np.full((9, 9), -1.0), 2),
        (np.full((9, 9), -0.5), 3),
        (np.full((9, 9), 1e6), 3),
        (np.full((9, 9), np.inf), 3),
        (np.where(np.eye(9), np.nan, 0.5), 3),
    ],
)
def test_an_unknown_range_is_refused_in_a_line(tmp_path, values, sample_format):
    path = tiff_of(tmp_path / "a.tif", values, 32, sample_format)
    with pytest.raises(UserError, match=r"a.tif: its values run from .* which is white") as caught:
        read_image(path, pixels)
    assert "restore" not in str(caught.value) and "\n" not in str(caught.value)


def test_portable_maps_of_any_depth(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    (tmp_path / "a.pgm").write_bytes(b"P5 50 40 65535\n" + deep.astype(">u2").tobytes())
    floats = (GREY[::-1] / 255).astype("<f4")  # from the last row on
    (tmp_path / "a.pfm").write_bytes(b"Pf\n50 40\n-1.0\n" + floats.tobytes())
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "a.ppm")
    for name in ("a.pgm", "a.pfm", "a.ppm"):
        np.testing.assert_array_equal(read_grey(tmp_path / name), GREY)


# ---------------------------------------------------------------- large ones


def test_a_photograph_of_100_megapixels_is_read(tmp_path):
    Image.new("L", (10_000, 10_000), 77).save(tmp_path / "a.png", compress_level=1)
    shrunk = read_image(tmp_path / "a.png", lambda image: image.resize((4, 4)))
    assert shrunk.getpixel((1, 1)) == (77, 77, 77)


def test_a_bomb_is_refused_by_its_pixels_and_a_flag_allows_more(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (3000, 2000)).save(path)
    item = Images([path], pixels, megapixels=5)[0]
    assert isinstance(item, Unreadable) and "3000 x 2000 pixels" in item
    assert "--max_megapixels" in item and "restore" not in item
    sent = pickle.loads(pickle.dumps(Images([path], pixels, workers=2, megapixels=6)))
    assert sent[0].shape == (2000, 3000, 3)

    Image.new("1", (4000, 4000)).save(path)  # more than twice as many: Pillow refuses it first
    assert "--max_megapixels" in Images([path], pixels, megapixels=5)[0]


def test_the_flag():
    options = preprocessing.parse_arguments(["-d", "TOY", "-n", "1"])
    assert preprocessing.dataset_images(options, []).megapixels == MEGAPIXELS >= 100
    options = preprocessing.parse_arguments(["-d", "TOY", "-n", "1", "--max_megapixels", "900"])
    assert preprocessing.dataset_images(options, []).megapixels == 900
    with pytest.raises(UserError, match="--max_megapixels 0: must be at least 1"):
        preprocessing.parse_arguments(["-d", "TOY", "--max_megapixels", "0"])


@pytest.mark.parametrize("compressed", [False, True])
def test_a_png_with_megabytes_of_text_is_read(tmp_path, compressed):
    about = PngInfo()
    about.add_text("history", "edited; " * 400_000, zip=compressed)
    about.add_itxt("more", "edited; " * 400_000, zip=compressed)
    Image.fromarray(GREY).save(tmp_path / "a.png", pnginfo=about)
    np.testing.assert_array_equal(read_grey(tmp_path / "a.png"), GREY)


def test_a_png_whose_text_is_a_bomb_is_refused(tmp_path):
    about = PngInfo()
    about.add_text("history", "0" * (80 << 20), zip=True)
    Image.fromarray(GREY).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(UserError, match="too large"):
        read_image(tmp_path / "a.png", pixels)


def test_advice_about_a_whole_file_of_another_kind(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(GREY).save(whole, "JPEG2000")
    (tmp_path / "a.jpg").write_bytes(whole.getvalue())
    with pytest.raises(UserError, match="put a JPEG or PNG there that opens") as caught:
        read_image(tmp_path / "a.jpg", pixels)
    assert "restore" not in str(caught.value)
