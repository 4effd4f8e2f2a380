"""Attention maps: the images, the maps, how they are painted, what stands above them."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from model import LEN, SCEN
from report_helpers import IMG_SIZE
from scegg.features.reader import Features
from scegg.report.attention import (
    Picture,
    attend,
    attention_figure,
    attribute_title,
    dataset_images,
    figure_of,
    heat_over,
    read_images,
)
from scegg.report.style import class_title, write_picture
from scegg.run.trained import load_run, restore_scen
from util import UserError


def test_global_map_is_the_mean_of_the_local_ones_and_they_sum_to_one(run):
    scen = restore_scen(run)
    feature_map = run.features.read(np.array([3]))[0]
    attention = attend(scen, feature_map)
    A, scores = LEN.forward(scen.len, feature_map[None])

    torch.testing.assert_close(attention.global_map, A[0].mean(dim=1))
    assert attention.global_map.sum().item() == pytest.approx(1, abs=1e-5)
    assert attention.local_maps.shape == (8, 4)
    assert attention.local_maps.sum(dim=1).numpy() == pytest.approx(np.ones(8), abs=1e-5)

    assert attention.top.tolist() == np.argsort(-scores[0].numpy())[:8].tolist()
    assert torch.equal(attention.local_maps, A[0].T[attention.top])
    assert torch.equal(attention.scores, scores[0])


def test_fewer_than_eight_attributes():
    scen = SCEN(torch.randn(5, 7), torch.rand(3, 5), 6)
    assert attend(scen, torch.randn(4, 6)).local_maps.shape == (5, 4)


def test_the_picture_shown_is_the_crop_the_network_saw(toy_run, run):
    """Pixels are torchvision's, and the same file through the backbone has the file's map."""
    images = dataset_images(run, toy_run.root, 3, seed=0)
    index = run.features.split.test_unseen[0]
    with h5py.File(toy_run.features) as file:
        path = toy_run.root / "TOY" / file["image_files"][index].decode()
    (shown,) = read_images(run, [path])

    steps = [
        transforms.Resize(IMG_SIZE),
        transforms.CenterCrop(IMG_SIZE),
        transforms.PILToTensor(),
    ]
    expected = transforms.Compose(steps)(Image.open(path).convert("RGB"))
    assert torch.equal(shown.pixels, expected)
    assert images[0].pixels.shape == (3, IMG_SIZE, IMG_SIZE)

    in_file = run.features.read(np.array([index]))[0]
    torch.testing.assert_close(shown.feature_map, in_file, rtol=1e-3, atol=1e-4)
    figure = attention_figure(run, [shown])
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, expected.permute(1, 2, 0))
    assert len(figure.axes) == 10
    assert figure.axes[1].get_title().startswith("GEN: global")


def test_drawing_leaves_torchs_state_alone(toy_run, run):
    images = dataset_images(run, toy_run.root, 3, seed=0)
    state = torch.get_rng_state()
    assert len(attention_figure(run, images).axes) == 30
    assert torch.equal(state, torch.get_rng_state())


def test_test_images_are_chosen_by_seed_unseen_and_seen_in_turn(toy_run, run):
    def titles(seed, count=4):
        return [shown.title for shown in dataset_images(run, toy_run.root, count, seed)]

    kinds = [title.split("(")[1] for title in titles(0)]
    assert kinds == ["unseen)", "seen)"] * 2
    assert titles(0) == titles(0)
    assert any(titles(0) != titles(seed) for seed in (1, 2, 3))
    split = run.features.split
    assert len(titles(0, 1000)) == len(split.test_seen) + len(split.test_unseen)


def test_heat_lies_where_the_attention_is():
    pixels = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    weights = torch.tensor([0.1, 0.1, 0.1, 0.7])
    picture = heat_over(pixels, weights, (2, 2))
    assert picture.shape == (40, 40, 3)
    assert picture.min() >= 0 and picture.max() <= 1

    dark = np.full(3, 50 / 255)
    assert picture[35, 35].sum() > picture[5, 5].sum()
    assert picture[5, 5] == pytest.approx(dark, abs=0.01)
    uniform = heat_over(pixels, torch.full((4,), 0.25), (2, 2))
    assert uniform == pytest.approx(np.full((40, 40, 3), 50 / 255))


@pytest.mark.parametrize(
    "name, title",
    [
        ("has_wing_color::red", "wing color:\nred"),
        ("has_bill_shape::curved_(up_or_down)", "bill shape:\ncurved"),
        ("has_bill_length::about_the_same_as_head", "bill length:\nabout the same as\nhead"),
        ("furry", "furry"),
        ("sailing/ boating", "sailing/ boating"),
    ],
)
def test_attribute_titles(name, title):
    assert attribute_title(name) == title


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    row = [Picture("$x^$", np.zeros((4, 4, 3)))]
    write_picture(figure_of([row]), tmp_path / "dollars.pdf")
    assert (tmp_path / "dollars.pdf").exists()


def test_class_titles():
    assert class_title("001.Black_footed_Albatross") == "Black footed Albatross"
    assert class_title("grizzly+bear") == "grizzly bear"


def test_features_of_other_weights_than_the_backbones_are_refused(toy_run, run):
    provenance = run.features.provenance | {"weights_sha256": "0" * 64, "weights": "mine.pth"}
    features = Features(**vars(run.features) | {"provenance": provenance})
    image = next(toy_run.root.glob("TOY/images/*/*.jpg"))
    message = "was made with the weights mine.pth, not .*: give that file as --weights"
    with pytest.raises(UserError, match=message):
        read_images(run._replace(features=features), [image])


def test_a_feature_file_without_paths_asks_for_images(toy_run, tmp_path):
    shutil.copy(toy_run.features, tmp_path / "f.hdf5")
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        del file["image_files"]
    other = load_run(toy_run.folder, tmp_path / "f.hdf5")
    message = "does not say which images it was made from: name images with --images"
    with pytest.raises(UserError, match=message):
        dataset_images(other, toy_run.root, 2, 0)
