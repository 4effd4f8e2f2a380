"""Fixtures: where the real data lie, and a small feature file."""

import os
from pathlib import Path

import pytest

from helpers import ROOT, feature_arrays, write_features

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_SILENT", "true")

REAL_DATA = Path(os.environ.get("SCEGG_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real data (CUB-50, the official splits), no part of the repository."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real data; SCEGG_TEST_DATA names the folder")
    return REAL_DATA


@pytest.fixture
def features(tmp_path):
    """The path of a small feature file."""
    return write_features(tmp_path / "features.hdf5", feature_arrays())
