"""t-SNE: which images and features are shown, and that a seed repeats the picture."""

import h5py
import numpy as np
import pytest
import torch

from report_helpers import as_baseline, train_on_toy
from scegg.datasets.splits import Split
from scegg.report import tsne
from scegg.report.tsne import (
    PER_CLASS,
    choose_images,
    synthesize,
    tsne_figure,
    tsne_panels,
    visual_features,
)
from scegg.run.trained import load_run, restore_scen


def test_panels_share_classes_and_coordinates(run):
    panels = tsne_panels(run, as_baseline(run), seed=0)
    split = run.features.split
    titles = [panel.title.split(" (")[0] for panel in panels]
    assert titles == ["real seen", "real unseen", "synthetic unseen"] * 2

    classes = [set(panel.classes) for panel in panels]
    assert classes[0] == classes[3] == set(split.seen)
    assert classes[1] == classes[2] == classes[4] == classes[5] == set(split.unseen)
    for panel in panels:
        assert panel.points.shape == (len(panel.classes), 2)
        assert np.isfinite(panel.points).all()
    assert len(panels[2].points) == len(panels[5].points) == PER_CLASS * len(split.unseen)

    figure = tsne.draw_tsne(panels, run)
    limits = [axes.get_xlim() + axes.get_ylim() for axes in figure.axes]
    assert len(limits) == 6
    assert limits[0] == limits[1] == limits[2]
    assert limits[3] == limits[4] == limits[5]


def test_images_are_held_out_at_most_so_many_and_of_ten_classes(monkeypatch):
    monkeypatch.setattr(tsne, "PER_CLASS", 4)
    labels = np.repeat(np.arange(30), 12)
    is_seen, is_late = labels < 15, np.arange(360) % 12 >= 6
    trainval = np.flatnonzero(is_seen & ~is_late)
    test_seen, test_unseen = np.flatnonzero(is_seen & is_late), np.flatnonzero(~is_seen)
    att = np.ones((30, 5), np.float32)
    split = Split(labels, trainval, test_seen, test_unseen, att, att)

    chosen = choose_images(split, seed=3)
    for images, test in ((chosen.seen, split.test_seen), (chosen.unseen, split.test_unseen)):
        assert np.isin(images, test).all()
        assert (np.unique(labels[images], return_counts=True)[1] == [4] * 10).all()

    same, other = choose_images(split, seed=3), choose_images(split, seed=4)
    assert np.array_equal(chosen.seen, same.seen)
    assert set(labels[chosen.seen]) != set(labels[other.seen])


def test_visual_features_are_pooled_maps_and_what_eggn_was_trained_on(run):
    scen, indices = restore_scen(run), np.array([0, 30, 5])
    pooled, dense = visual_features(run, scen, indices)
    with h5py.File(run.features.path) as file:
        maps = np.stack([file["feature_map"][index] for index in indices])
    np.testing.assert_allclose(pooled, maps.mean(axis=(2, 3)), rtol=1e-5)
    assert dense.shape == pooled.shape == (3, 1280)

    _, trained_on = visual_features(run, scen, run.features.split.trainval)
    assert trained_on.min() == pytest.approx(0, abs=1e-5)
    assert trained_on.max() == pytest.approx(1, abs=1e-5)


def test_synthetic_features_of_a_baseline_lie_in_the_pooled_range(run):
    baseline = as_baseline(run)
    x, y = synthesize(baseline, run.features.split.unseen)
    scaler = baseline.weights["scaler"]
    assert (x >= scaler["minimum"].numpy() - 1e-5).all()
    assert (x <= scaler["maximum"].numpy() + 1e-5).all()
    assert (np.unique(y, return_counts=True)[1] == PER_CLASS).all()


def points_of(figure):
    """All points of a figure (n, 2)."""
    points = [axes.collections[0].get_offsets() for axes in figure.axes if axes.collections]
    return np.concatenate(points)


def test_one_seed_repeats_the_picture_and_torchs_state_is_left_alone(run):
    state = torch.get_rng_state()
    first, again = points_of(tsne_figure(run, seed=5)), points_of(tsne_figure(run, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, again)
    assert not np.array_equal(first, points_of(tsne_figure(run, seed=6)))


def test_a_panel_without_its_run_is_blank_and_says_what_it_needs(run):
    figure = tsne_figure(run)
    assert [len(axes.collections) for axes in figure.axes] == [1, 1, 0, 1, 1, 1]
    assert "visual_features: cnn" in figure.axes[2].texts[0].get_text()


def test_a_run_without_eggn_says_so(toy_run, tmp_path):
    folder = train_on_toy(toy_run.features, tmp_path / "runs", nepoch=0)
    figure = tsne_figure(load_run(folder, toy_run.features))
    assert len(figure.axes[5].collections) == 0
    assert "nepoch 0" in figure.axes[5].texts[0].get_text()
