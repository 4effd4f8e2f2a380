"""Metrics against scikit-learn, and the softmax classifier on data it must learn."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from helpers import SUN_CONFIG
from scegg.config import read_config
from scegg.method.by_class import is_clear_gain
from scegg.method.calibration import (
    LAST,
    STEPS,
    ShareChoice,
    area_under,
    calibrated,
    margins,
    seen_unseen_curve,
)
from scegg.method.eggn import EGGN
from scegg.method.embeddings import Embedding
from scegg.method.evaluation import (
    Evaluation,
    SoftmaxClassifier,
    harmonic_mean,
    logits_metrics,
    per_class_accuracy,
)

CONFIG = read_config(SUN_CONFIG, {})


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
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(0.0, 0.7) == 0
    assert harmonic_mean(60.9, 89.3) == pytest.approx(72.4, abs=0.05)
    both = harmonic_mean(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(both, torch.tensor([0.0, 1 / 3]))


def test_logits_metrics_by_hand():
    """Classes 0, 1 are seen and 2, 3 unseen. CZSL looks at unseen columns only, GZSL at all."""
    unseen_logits = torch.tensor([[9.0, 0, 2, 1], [0, 0, 3, 5]])  # GZSL takes the first for class 0
    unseen_labels = torch.tensor([2, 3])
    seen_logits = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]])
    seen_labels = torch.tensor([0, 1])

    metrics = logits_metrics(
        unseen_logits, unseen_labels, seen_logits, seen_labels, torch.tensor([2, 3])
    )
    assert metrics == pytest.approx((100, 50, 50, 50))


def test_softmax_classifier_learns_and_scores_every_epoch():
    torch.manual_seed(0)
    x, y = torch.randn(200, 6), torch.arange(200) % 2
    x[:, 0] += 4 * y
    config = dataclasses.replace(CONFIG, classifier_lr=0.05, classifier_epochs=7, syn_num=30)

    def score(linear):
        return per_class_accuracy(y, linear(x).argmax(dim=1), 2)

    scores, _ = SoftmaxClassifier(x, y, 2, config).fit(score)
    assert scores.shape == (7,) and scores[-1] > 0.95


def fitted_by_a_new_classifier(x, y, classes, config):
    """The weights that a classifier of its own reaches, made and trained in plain lines."""
    linear = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.normal_(linear.weight, 0.0, 0.02)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(
        linear.parameters(), config.classifier_lr, betas=(0.5, 0.999), fused=True
    )
    for _ in range(config.classifier_epochs):
        for batch in torch.randperm(len(x)).split(config.syn_num):
            loss = torch.nn.functional.cross_entropy(linear(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return linear


def test_a_classifier_that_is_trained_again_is_a_new_one():
    """Bit for bit, its random draws included; its tensors stay where a CUDA graph knows them."""
    config = dataclasses.replace(CONFIG, classifier_lr=0.05, classifier_epochs=3, syn_num=15)
    x, y = torch.rand(40, 6), torch.arange(40) % 4
    classifier = SoftmaxClassifier(torch.empty_like(x), y, 4, config)
    first_address = classifier.linear.weight.data_ptr()

    for seed in range(3):
        classifier.x.copy_(x + seed)
        torch.manual_seed(seed)
        classifier.fit(lambda linear: linear.bias.sum())
        after = torch.rand(1)

        torch.manual_seed(seed)
        expected = fitted_by_a_new_classifier(x + seed, y, 4, config)
        assert torch.equal(classifier.linear.weight, expected.weight)
        assert torch.equal(classifier.linear.bias, expected.bias)
        assert torch.equal(after, torch.rand(1))
    assert classifier.linear.weight.data_ptr() == first_address


def test_a_classifier_that_is_done_with_leaves_its_memory_at_once():
    """Its inputs take a GB; with protocol validated a second run follows."""
    classifier = SoftmaxClassifier(torch.rand(40, 6), torch.arange(40) % 4, 4, CONFIG)
    inputs = weakref.ref(classifier.x)
    gc.disable()
    try:
        classifier.epoch()
        del classifier
        assert inputs() is None
    finally:
        gc.enable()


def small_evaluation(chosen=None, **changes):
    """The test images as classifier inputs, by split, the unseen labels, and Scores of an EGGN."""
    torch.manual_seed(0)
    small = {"ngh": 8, "ndh": 8, "syn_num": 7, "classifier_epochs": 6, "classifier_lr": 0.05}
    config = dataclasses.replace(CONFIG, **small | changes)
    unseen, seen = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    eggn = EGGN(5, torch.rand(6, 3), None, config)
    embeddings = {
        "trainval": Embedding(torch.rand(40, 5), None, seen.repeat(10)),
        "test_seen": Embedding(torch.rand(80, 5), None, seen.repeat(20)),
        "test_unseen": Embedding(torch.rand(50, 5), None, unseen.repeat(25)),
    }
    scores = Evaluation(eggn, embeddings, unseen, config, chosen).scores(embeddings)
    inputs = {name: eggn.classifier_input(split.x) for name, split in embeddings.items()}
    return {name: (inputs[name], embeddings[name].y) for name in inputs}, unseen, scores


def accuracies_of(weights, tests, unseen):
    """acc_zs, and (U, S), of kept weights."""

    def accuracy(kind, name, labels):
        x, y = tests[name]
        logits = torch.nn.functional.linear(x, **weights[kind])
        return per_class_accuracy(y, labels[logits.argmax(dim=1)], 6)

    gzsl = [accuracy("gzsl", f"test_{name}", torch.arange(6)) for name in ("unseen", "seen")]
    return accuracy("czsl", "test_unseen", unseen), torch.stack(gzsl)


def test_the_classifiers_that_are_reported_are_kept():
    """Each has the accuracies that its epoch was reported with."""
    tests, unseen, scores = small_evaluation()
    epochs = {"picked": scores.best_epochs(), "last": (-1, -1)}
    assert len(scores.czsl.unique()) > 1 and len(scores.gzsl.unique(dim=0)) > 1

    for name, (czsl_epoch, gzsl_epoch) in epochs.items():
        acc_zs, gzsl = accuracies_of(scores.kept[name], tests, unseen)
        assert torch.equal(acc_zs, scores.czsl[czsl_epoch])
        assert torch.equal(gzsl, scores.gzsl[gzsl_epoch])
    assert torch.equal(scores.kept["last"]["gzsl"]["weight"], scores.linear.weight)


@pytest.mark.parametrize("chosen", [None, {"unseen_share": 0.35}])
def test_validated_reports_the_last_classifiers_and_calibrates_gzsls(chosen):
    tests, unseen, scores = small_evaluation(chosen, protocol="validated")
    _, _, papers = small_evaluation()
    assert torch.equal(scores.gzsl, papers.gzsl)  # the classifiers are the same ones

    metrics, share, by_class = scores.validated
    assert scores.reported() == metrics and (not chosen or share == chosen["unseen_share"])
    acc_zs, gzsl = accuracies_of(scores.kept["picked"], tests, unseen)
    assert metrics[:3] == tuple(100 * float(value) for value in (acc_zs, *gzsl))
    means = [100 * group.mean().item() for kind in ("czsl", "gzsl") for group in by_class[kind]]
    assert metrics[:3] == pytest.approx(means, abs=1e-4)
    assert acc_zs == scores.czsl[-1]

    is_seen = torch.tensor([True, False, True, True, False, True])
    last, picked = scores.kept["last"]["gzsl"], scores.kept["picked"]["gzsl"]
    taken = last["bias"] - picked["bias"]
    assert torch.equal(picked["weight"], last["weight"]) and not taken[unseen].any()
    assert torch.allclose(taken[is_seen], taken[0]) and taken[0] != 0

    own = torch.nn.functional.linear(tests["trainval"][0], **picked)
    sent = (margins(own, is_seen) < 0).double().mean().item()
    assert sent == pytest.approx(share, abs=1 / len(own))


def test_the_share_that_is_chosen_has_the_best_h_in_the_last_epochs():
    """Against classifiers that are calibrated, and asked for their predictions, one by one."""
    torch.manual_seed(1)
    is_seen = torch.tensor([True, True, False, True, False])
    real, linears = torch.randn(60, 4), [torch.nn.Linear(4, 5) for _ in range(LAST + 2)]
    for linear in linears:
        linear.bias.data += 3 * is_seen  # too few images are called unseen: a bias is a clear gain
    tests = {
        "test_unseen": (torch.randn(70, 4), torch.tensor([2, 4]).repeat(35)),
        "test_seen": (torch.randn(90, 4), torch.tensor([0, 1, 3]).repeat(30)),
    }
    choice = ShareChoice(*(y for _, y in tests.values()), is_seen)
    with torch.no_grad():
        for linear in linears:
            choice.look(linear(real), *(linear(x) for x, _ in tests.values()))

    def h_of_means(share):
        found = []
        for linear in linears[-LAST:]:
            weights = calibrated(linear, real, is_seen, share)
            found.append(
                [
                    per_class_accuracy(y, torch.nn.functional.linear(x, **weights).argmax(dim=1), 5)
                    for x, y in tests.values()
                ]
            )
        return harmonic_mean(*torch.tensor(found).mean(dim=0)).item()

    expected = [h_of_means(share) for share in [None, *choice.candidates.tolist()]]
    means = [torch.stack(found).mean(dim=(0, 2)) for found in zip(*choice.found, strict=True)]
    assert harmonic_mean(*means).tolist() == pytest.approx(expected, abs=1e-6)
    assert choice.best() == choice.candidates[int(np.argmax(expected[1:]))].item()


def test_a_clear_gain_lies_beyond_two_standard_errors_over_classes():
    """H's standard error is about that of classes drawn anew (the bootstrap)."""
    rng = np.random.default_rng(5)
    old = [torch.tensor(rng.uniform(0.2, 0.8, n)) for n in (200, 400)]
    noise = [torch.tensor(rng.normal(0, 0.1, len(group))) for group in old]

    def h(groups, draws=(slice(None),) * 2):
        return harmonic_mean(
            *(group[draw].mean() for group, draw in zip(groups, draws, strict=True))
        ).item()

    def moved(by):
        return [group + by + error - error.mean() for group, error in zip(old, noise, strict=True)]

    drawn = []
    for _ in range(2000):
        draws = [torch.tensor(rng.integers(0, len(group), len(group))) for group in old]
        drawn.append(h(moved(0), draws) - h(old, draws))
    error = np.std(drawn)
    assert not is_clear_gain(moved(1.8 * error), old) and is_clear_gain(moved(2.2 * error), old)
    assert not is_clear_gain(old, moved(2.2 * error)) and not is_clear_gain(old, old)

    one_group = [group[:1] for group in (moved(2.2 * error), old)]
    assert is_clear_gain([old[0] + 0.1], old[:1]) and not is_clear_gain(old[:1], old[:1])
    assert not is_clear_gain(*one_group)  # one class each tells nothing


def test_a_bias_that_gains_nothing_clear_is_left_out():
    classes = torch.arange(8)
    choice = ShareChoice(classes[:4], classes[4:], classes >= 4)
    none = torch.tensor([0.2, 0.4, 0.6, 0.8]).double()
    for gain, share in ((0.03, None), (0.1, 0.3)):
        found = none.repeat(STEPS + 1, 1)
        found[1:] -= 0.1
        found[31] = none + gain + torch.tensor([0.1, -0.1, 0.1, -0.1])
        choice.found.clear()
        choice.found.append((found, found))
        assert choice.best() == (share and pytest.approx(share))

    _, _, scores = small_evaluation({"unseen_share": None}, protocol="validated")
    picked, last = scores.kept["picked"]["gzsl"], scores.kept["last"]["gzsl"]
    assert torch.equal(picked["bias"], last["bias"]) and scores.validated.unseen_share is None


def test_no_gzsl_classifier_is_kept_where_there_is_none():
    _, _, scores = small_evaluation(gzsl=False)
    _, _, validated = small_evaluation(gzsl=False, protocol="validated")
    assert validated.reported() == scores.metrics() and validated.validated.unseen_share is None
    assert list(scores.kept["picked"]) == list(scores.kept["last"]) == ["czsl"]


def test_seen_unseen_curve_against_trying_every_bias():
    """At each of its points the curve says what the metric says of biased logits.

    Biased: with the point's bias taken from the logits of the seen classes.
    """
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, ngh=8, ndh=8, use_decoder=False)
    unseen, C = torch.tensor([1, 4]), 6
    eggn = EGGN(5, torch.rand(C, 3), None, config)
    linear = torch.nn.Linear(5, C)
    seen_labels = torch.tensor([0, 2, 3, 5]).repeat(10)
    test = {
        "test_seen": Embedding(torch.rand(40, 5), None, seen_labels),
        "test_unseen": Embedding(torch.rand(30, 5), None, unseen.repeat(15)),
    }
    is_seen = torch.tensor([1.0, 0, 1, 1, 0, 1])

    def biased_accuracy(split, bias):
        predicted = (linear(split.x) - bias * is_seen).argmax(dim=1)
        return per_class_accuracy(split.y, predicted, C).item()

    curve = seen_unseen_curve(eggn, linear, test, unseen)
    for bias, S, U in curve[1:].tolist():
        just_above = bias + 1e-6
        expected = tuple(
            biased_accuracy(test[name], just_above) for name in ("test_seen", "test_unseen")
        )
        assert pytest.approx(expected, abs=1e-6) == (S, U)

    assert curve[0, 2] == 0 and curve[-1, 1] == pytest.approx(0, abs=1e-9)
    assert 0 < area_under(curve) < 1


def test_area_under_a_curve_by_hand():
    curve = torch.tensor([[0.0, 0.8, 0.0], [1.0, 0.8, 0.5], [2.0, 0.0, 0.5]])
    assert area_under(curve) == pytest.approx(0.4)
