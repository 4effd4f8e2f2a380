"""SUN and AWA2 as they lie on a disk, but for the photographs: rendered pictures stand for them."""

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import nn

import preprocessing
import train_joint
from helpers import SMALL_RUN, flags, read_summary
from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.make import cells
from scegg.features.backbones import BUILDERS
from scegg.features.weights import Assembly

SIDE = 32  # pixels of a picture


class Patches(nn.Module):
    """A backbone of one convolution: (B, 3, 32, 32) -> (B, 8, 2, 2)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images):
        return self.conv(images)

    def fold(self):
        """Nothing to fold."""


def patches(name, weights, img_size):
    network = Patches()
    return Assembly(network, network, network.state_dict(), "random")


def lay_out(real_data, root, dataset):
    """The real split files; a picture for each class, linked to all of its images' names."""
    mats = root / "xlsa17/data" / dataset
    mats.mkdir(parents=True)
    official = real_data / "xlsa17_full" / dataset
    (mats / "att_splits.mat").symlink_to(official / "att_splits.mat")
    with np.load(official / "images.npz") as images:
        files, labels = [f"/x/{file}" for file in images["image_files"]], images["labels"]
    arrays = {"image_files": cells(files), "labels": labels.astype(float)[:, None] + 1}
    scipy.io.savemat(mats / "res101.mat", arrays)

    rng = np.random.default_rng(0)
    pictures = {}
    for file, label in zip(files, labels, strict=True):
        path = root / dataset / file.removeprefix("/x/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if label not in pictures:
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            pictures[label] = path
        else:
            path.hardlink_to(pictures[label])


@pytest.mark.long
@pytest.mark.parametrize("dataset", ["SUN", "AWA2"])
def test_the_whole_way_on_the_real_split(real_data, tmp_path, monkeypatch, capsys, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUILDERS, "patches", patches)
    lay_out(real_data, tmp_path / "data", dataset)
    backbone = ["--backbone", "patches", "--img_size", str(SIDE)]
    w2v = str(real_data / "w2v" / f"{dataset}_attribute.pkl")
    preprocessing.main(["-d", dataset, *backbone, "--w2v", w2v, "-n", "0", "-b", "64"])
    said = capsys.readouterr().out
    assert "the full proposed split, the common release" in said

    settings = SMALL_RUN | {"nepoch": 1, "batch_size": 64}
    train_joint.main(["--dataset", dataset, *backbone, "--wandb", "disabled", *flags(**settings)])
    summary = read_summary(next((tmp_path / "runs").iterdir()))
    assert summary["full_published_split"] is True
    assert summary["split_fingerprint"] == LAYOUTS[dataset].release
    assert "published SC-EGG" in capsys.readouterr().out
