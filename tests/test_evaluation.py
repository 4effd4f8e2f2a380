"""Metrics against scikit-learn, and the softmax classifier on data it must learn."""
import dataclasses

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import balanced_accuracy_score

from config import read_config
from evaluation import fit_softmax, harmonic_mean, logits_metrics, per_class_accuracy

CONFIG = read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {})


@pytest.mark.parametrize("seed", range(5))
def test_per_class_accuracy_is_balanced_accuracy(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 40))
    target, predicted = rng.integers(0, classes, 300), rng.integers(0, classes, 300)
    predicted = np.where(rng.random(300) < 0.4, target, predicted)
    ours = per_class_accuracy(torch.tensor(target), torch.tensor(predicted), classes)
    assert ours.item() == pytest.approx(balanced_accuracy_score(target, predicted), abs=1e-6)


def test_absent_classes_do_not_count():
    target, predicted = torch.tensor([3, 3, 5]), torch.tensor([3, 0, 5])
    assert per_class_accuracy(target, predicted, 10).item() == pytest.approx(0.75)
    assert per_class_accuracy(target[:0], predicted[:0], 10).item() == 0


def test_harmonic_mean():
    assert harmonic_mean(0.0, 0.0) == 0 and harmonic_mean(0.0, 0.7) == 0
    assert harmonic_mean(60.9, 89.3) == pytest.approx(72.4, abs=0.05)
    both = harmonic_mean(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(both, torch.tensor([0.0, 1 / 3]))


def test_logits_metrics_by_hand():
    """Classes 0, 1 seen and 2, 3 unseen: CZSL looks at unseen columns only, GZSL at all."""
    test_unseen = torch.tensor([[9.0, 0, 2, 1], [0, 0, 3, 5]])  # GZSL takes the first for class 0
    test_seen = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]])
    metrics = logits_metrics(test_unseen, torch.tensor([2, 3]), test_seen, torch.tensor([0, 1]), torch.tensor([2, 3]))
    assert metrics == pytest.approx((100, 50, 50, 50))


def test_softmax_classifier_learns_and_scores_every_epoch():
    torch.manual_seed(0)
    x, y = torch.randn(200, 6), torch.arange(200) % 2
    x[:, 0] += 4 * y
    config = dataclasses.replace(CONFIG, classifier_lr=0.05, classifier_epochs=7, syn_num=30)
    scores, _ = fit_softmax(x, y, 2, config, lambda linear: per_class_accuracy(y, linear(x).argmax(dim=1), 2))
    assert scores.shape == (7,) and scores[-1] > 0.95
