"""Fixtures of the reports' tests: a small run of TOY, made once."""

import pytest

import preprocessing
from report_helpers import IMG_SIZE, ToyRun, train_on_toy
from scegg.datasets import toy
from scegg.run.trained import load_run


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A ToyRun; the tests copy what they change."""
    root = tmp_path_factory.mktemp("toy")
    toy.render(root, classes=7, unseen=3, images_per_class=6)

    features = root / "features.hdf5"
    argv = ["--dataset", "TOY", "--data_root", str(root), "--output", str(features)]
    argv += ["--backbone", "efficientnet_lite2", "--img_size", str(IMG_SIZE), "--num_workers", "0"]
    preprocessing.main(argv)
    return ToyRun(root, features, train_on_toy(features, root / "runs"))


@pytest.fixture
def run(toy_run):
    """The run, loaded."""
    return load_run(toy_run.folder, toy_run.features)
