"""SUN and AWA2 as they lie on a disk, but for the photographs: rendered pictures stand for them."""

import os
from concurrent.futures import ThreadPoolExecutor

import h5py
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
from scegg.features.backbones import BUILDERS, build_backbone
from scegg.features.feature_file import create_maps, make_provenance, write_annotations
from scegg.features.images import collate
from scegg.features.parts import MapWriter
from scegg.features.weights import Assembly

SIDE = 32  # pixels of a picture
CPU = torch.device("cpu")


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
        files, labels = images["image_files"], images["labels"]
    # rows of characters: scipy takes seconds for as many cells
    arrays = {"image_files": np.char.add("/x/", files), "labels": labels[:, None] + 1.0}
    scipy.io.savemat(mats / "res101.mat", arrays)

    pictures, rng = {}, np.random.default_rng(0)
    for folder in {os.path.dirname(file) for file in files.tolist()}:
        (root / dataset / folder).mkdir(parents=True, exist_ok=True)
    for file, label in zip(files.tolist(), labels.tolist(), strict=True):
        path = f"{root}/{dataset}/{file}"
        if label in pictures:
            os.link(pictures[label], path)
        else:
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            pictures[label] = path


def write_maps(flags):
    """The feature file of preprocessing.py, but each picture is read under one of its names."""
    options = preprocessing.parse_arguments([*flags, "-n", "0"])
    preprocessing.fill_in_defaults(options, CPU)
    annotations = preprocessing.read_annotations(options)
    network, weights = build_backbone(options.backbone, None, SIDE)
    pixels = preprocessing.pixel_normalization(options)
    provenance = make_provenance(options, weights, annotations.split, pixels.name, CPU)
    backbone = preprocessing.make_backbone(options, pixels, network, CPU)

    images = preprocessing.dataset_images(options, annotations.image_files)
    _, some, of_class = np.unique(annotations.split.labels, return_index=True, return_inverse=True)
    with torch.inference_mode():
        maps = backbone(collate(images.__getitems__(some))).numpy()[of_class]
    with h5py.File(options.output, "w") as file, ThreadPoolExecutor(1) as pool:
        writer = MapWriter(create_maps(file, maps.shape, None), None, pool)
        writer.write(maps)
        writer.drain(keep=0)
        write_annotations(file, annotations, provenance)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["SUN", "AWA2"])
def test_the_way_to_the_table_on_the_real_split(real_data, tmp_path, monkeypatch, capsys, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUILDERS, "patches", patches)
    lay_out(real_data, tmp_path / "data", dataset)
    backbone = ["--dataset", dataset, "--backbone", "patches", "--img_size", str(SIDE)]
    write_maps([*backbone, "--w2v", str(real_data / "w2v" / f"{dataset}_attribute.pkl")])
    said = capsys.readouterr().out
    assert "the full proposed split, the common release" in said

    few = {"nepoch": 1, "scen_iterations": 2, "classifier_epochs": 1, "batch_size": 2000}
    train_joint.main([*backbone, "--wandb", "disabled", *flags(**SMALL_RUN | few)])
    summary = read_summary(next((tmp_path / "runs").iterdir()))
    assert summary["full_published_split"] is True
    assert summary["split_fingerprint"] == LAYOUTS[dataset].release
    assert "published SC-EGG" in capsys.readouterr().out
