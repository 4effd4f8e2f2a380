"""doctor names the command that mends a half-unpacked or misplaced dataset; the command works."""

import subprocess

import pytest

from scegg import doctor
from scegg.datasets.xlsa17 import image_folder


def pictures(folder):
    (folder / "001.A").mkdir(parents=True)
    (folder / "001.A/x.jpg").touch()


@pytest.mark.parametrize(
    "dataset, lies_in",
    [
        ("CUB", "download/CUB_200_2011/images"),
        ("CUB", "CUB_200_2011/CUB_200_2011/CUB_200_2011/images"),
        ("AWA2", "AwA2-data/Animals_with_Attributes2/JPEGimages"),
        ("SUN", "my photos/Images"),
    ],
)
def test_pictures_in_another_place(tmp_path, dataset, lies_in):
    pictures(tmp_path / dataset / lies_in)
    (line,) = doctor.mending_lines(tmp_path, dataset)
    subprocess.run(["sh", "-c", line.partition(": ")[2]], check=True)
    assert (image_folder(tmp_path, dataset) / "001.A/x.jpg").is_file()
    assert doctor.mending_lines(tmp_path, dataset) == []


def test_archives_that_were_not_unpacked(tmp_path):
    (tmp_path / "CUB").mkdir()
    assert doctor.mending_lines(tmp_path, "CUB") == []
    (tmp_path / "CUB/CUB_200_2011.tgz").touch()
    (tmp_path / "CUB/more.zip").touch()
    first, second = doctor.mending_lines(tmp_path, "CUB")
    assert first == f"unpack it: tar -xzf {tmp_path}/CUB/CUB_200_2011.tgz -C {tmp_path}/CUB"
    assert second == f"unpack it: unzip -q {tmp_path}/CUB/more.zip -d {tmp_path}/CUB"


def test_variants_that_are_simply_read_need_no_mending(tmp_path):
    pictures(tmp_path / "CUB/CUB_200_2011/CUB_200_2011/images")
    pictures(tmp_path / "AWA2/Animals_with_Attributes2/JPEGimages")
    assert doctor.mending_lines(tmp_path, "CUB") == doctor.mending_lines(tmp_path, "AWA2") == []
