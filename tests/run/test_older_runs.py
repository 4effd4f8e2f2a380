"""What runs of older versions left is still read: config.yaml, feature file, model.pt.

`tests/golden/older_run` was made by an earlier version. In its weights the feedback network is
called F, and its config knows no key that is newer.
"""

import json
import shutil

import pytest
import torch

from helpers import ROOT
from scegg.config import read_config
from scegg.features.reader import open_features
from scegg.features.storage import FeatureMaps
from scegg.method.embeddings import embed_splits
from scegg.method.evaluation import Evaluation, logits_metrics
from scegg.run.trained import load_run, restore_eggn, restore_scen
from util import seed_stream

OLDER_RUN = ROOT / "tests" / "golden" / "older_run"
SPLITS = ("trainval", "test_seen", "test_unseen")


@pytest.fixture
def run():
    """The older run, loaded."""
    return load_run(OLDER_RUN, OLDER_RUN / "features.hdf5")


@pytest.fixture
def summary():
    """The numbers that it printed at its time."""
    return json.loads((OLDER_RUN / "summary.json").read_text())


def embeddings_of(run, scen):
    """Every split's embedding by the older run's SCEN."""
    split, device = run.features.split, torch.device("cpu")
    maps = {name: FeatureMaps(run.features, getattr(split, name), device) for name in SPLITS}
    labels = {name: torch.from_numpy(split.labels[getattr(split, name)]) for name in SPLITS}
    return embed_splits(scen, {name: (maps[name], labels[name]) for name in SPLITS})


def test_its_weights_give_the_numbers_that_it_reported(run, summary):
    """SCEN's and EGGN's, the feedback network under its older name among them."""
    unseen = torch.from_numpy(run.features.split.unseen)
    embeddings = embeddings_of(run, restore_scen(run))
    test_unseen, test_seen = embeddings["test_unseen"], embeddings["test_seen"]

    local = logits_metrics(
        test_unseen.local_logits, test_unseen.y, test_seen.local_logits, test_seen.y, unseen
    )
    for name, value in local._asdict().items():
        assert value == pytest.approx(summary[f"local_{name}"], abs=0.01)

    eggn = restore_eggn(run)
    seed_stream(run.config.seed, "evaluate", run.config.nepoch)
    last = Evaluation(eggn, embeddings, unseen, run.config).scores(embeddings).metrics()
    for name, value in last._asdict().items():
        assert value == pytest.approx(summary[f"last_{name}"], abs=0.01)


def test_the_feedback_network_is_read_under_its_older_name(run):
    older = {name for name in run.weights["eggn"] if name.startswith("F.")}
    eggn = restore_eggn(run)
    assert len(older) == 4
    for name, value in eggn.Fb.named_parameters():
        assert torch.equal(value, run.weights["eggn"][f"F.{name}"])


def test_its_config_loads_also_where_a_newer_key_is_lacking(run, tmp_path):
    lines = (OLDER_RUN / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("seen_bias", "joint_", "use_decoder"))]
    (tmp_path / "config.yaml").write_text("".join(older))
    assert len(older) == len(lines) - 6
    assert read_config(tmp_path / "config.yaml", {}) == run.config

    for name in ("model.pt", "summary.json"):
        shutil.copy(OLDER_RUN / name, tmp_path / name)
    assert load_run(tmp_path, OLDER_RUN / "features.hdf5").config == run.config


def test_its_feature_file_opens():
    features = open_features(OLDER_RUN / "features.hdf5", "resnet101", 448)
    assert features.shape == (24, 3, 3)
    assert len(features.split.train) + len(features.split.val) == len(features.split.trainval)
