"""Figures: the numbers behind them, the files, and what a user's mistakes are told; on a small TOY run made here."""
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL_RUN, feature_arrays, flags, run_training, write_features
from PIL import Image
from torchvision import transforms

import preprocessing
from scegg.datasets import toy
import visualize
from model import LEN
from util import UserError
from visualize import PER_CLASS, attend, attribute_title, class_title, dataset_images, image_files, load_run, tsne_panels
from scegg.datasets.splits import Split

SIZE = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data root with 7 classes of 6 images, their feature file and a run on it: (root, features, run folder)."""
    root = tmp_path_factory.mktemp("toy")
    toy.render(root, classes=7, unseen=3, images_per_class=6)
    features = root / "features.hdf5"
    preprocessing.main(["--dataset", "TOY", "--backbone", "efficientnet_lite2", "--img_size", str(SIZE), "--num_workers", "0",
                        "--data_root", str(root), "--output", str(features)])
    return root, features, train(features, root / "runs")


def train(features, folder, **changes):
    """The folder of a small run."""
    run_training("TOY", "toy.yaml", ["--features", str(features), "--runs", str(folder), "--device", "cpu", "--data_root", "none",
                                         *flags(**SMALL_RUN | {"img_size": SIZE} | changes)])
    return next(folder.iterdir())


@pytest.fixture
def run(made):
    return load_run(made[2], made[1])


def as_baseline(run):
    """What a run of the CNN-feature baseline leaves: no SCEN, the scaler, EGGN."""
    pooled = torch.rand(2, run.features.shape[0]).sort(dim=0).values
    weights = {name: value for name, value in run.weights.items() if name not in ("scen", "global_cls")}
    return run._replace(weights=weights | {"scaler": {"minimum": pooled[0], "maximum": pooled[1]}})


def cli(*argv):
    visualize.main([str(word) for word in argv])


# attention

def test_global_map_is_the_mean_of_the_local_ones_and_they_sum_to_one(run):
    scen = visualize.restore_scen(run)
    maps = run.features.read(np.array([3]))[0]
    attention = attend(scen, maps)
    A, scores = LEN.forward(scen.len, maps[None])
    torch.testing.assert_close(attention.overall, A[0].mean(dim=1))
    assert attention.overall.sum().item() == pytest.approx(1, abs=1e-5)
    assert attention.local.shape == (8, 4) and attention.local.sum(dim=1).numpy() == pytest.approx(np.ones(8), abs=1e-5)
    assert attention.top.tolist() == np.argsort(-scores[0].numpy())[:8].tolist()
    assert torch.equal(attention.local, A[0].T[attention.top]) and torch.equal(attention.scores, scores[0])


def test_fewer_than_eight_attributes():
    scen = visualize.SCEN(torch.randn(5, 7), torch.rand(3, 5), 6)
    assert attend(scen, torch.randn(4, 6)).local.shape == (5, 4)


def test_the_picture_shown_is_the_crop_the_network_saw(made, run):
    """Pixels equal torchvision's transform, and the same file through the backbone has the feature file's map."""
    images = dataset_images(run, made[0], 3, seed=0)
    with h5py.File(made[1]) as file:
        index = run.features.split.test_unseen[0]
        path = made[0] / "TOY" / file["image_files"][index].decode()
    shown, = image_files(run, [path])
    expected = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.PILToTensor()])(
        Image.open(path).convert("RGB"))
    assert torch.equal(shown.pixels, expected) and images[0].pixels.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(shown.maps, run.features.read(np.array([index]))[0], rtol=1e-3, atol=1e-4)
    figure = visualize.attention_figure(run, [shown])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected.permute(1, 2, 0))
    state = torch.get_rng_state()
    assert len(visualize.attention_figure(run, images).axes) == 30 and torch.equal(state, torch.get_rng_state())
    assert len(figure.axes) == 10 and figure.axes[1].get_title().startswith("GEN: global")


def test_test_images_are_chosen_by_seed_unseen_and_seen_in_turn(made, run):
    titles = lambda seed, count=4: [shown.title for shown in dataset_images(run, made[0], count, seed)]
    assert [title.split("(")[1] for title in titles(0)] == ["unseen)", "seen)"] * 2
    assert titles(0) == titles(0) and any(titles(0) != titles(seed) for seed in (1, 2, 3))
    assert len(titles(0, 1000)) == len(run.features.split.test_seen) + len(run.features.split.test_unseen)


def test_heat_lies_where_the_attention_is():
    pixels = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    weights = torch.tensor([0.1, 0.1, 0.1, 0.7])
    picture = visualize.heat_over(pixels, weights, (2, 2))
    assert picture.shape == (40, 40, 3) and picture.min() >= 0 and picture.max() <= 1
    assert picture[35, 35].sum() > picture[5, 5].sum() and picture[5, 5] == pytest.approx(np.full(3, 50 / 255), abs=0.01)
    uniform = visualize.heat_over(pixels, torch.full((4,), 0.25), (2, 2))
    assert uniform == pytest.approx(np.full((40, 40, 3), 50 / 255))


@pytest.mark.parametrize("name, title", [
    ("has_wing_color::red", "wing color:\nred"), ("has_bill_shape::curved_(up_or_down)", "bill shape:\ncurved"),
    ("has_bill_length::about_the_same_as_head", "bill length:\nabout the same as\nhead"), ("furry", "furry"),
    ("sailing/ boating", "sailing/ boating")])
def test_attribute_titles(name, title):
    assert attribute_title(name) == title


def test_class_titles():
    assert (class_title("001.Black_footed_Albatross"), class_title("grizzly+bear")) == ("Black footed Albatross", "grizzly bear")


# t-SNE

def test_panels_share_classes_and_coordinates(run):
    panels = tsne_panels(run, as_baseline(run), seed=0)
    split = run.features.split
    assert [panel.title.split(" (")[0] for panel in panels] == ["real seen", "real unseen", "synthetic unseen"] * 2
    classes = [set(panel.classes) for panel in panels]
    assert classes[0] == classes[3] == set(split.seen) and classes[1] == classes[2] == classes[4] == classes[5] == set(split.unseen)
    assert all(panel.points.shape == (len(panel.classes), 2) and np.isfinite(panel.points).all() for panel in panels)
    assert len(panels[2].points) == len(panels[5].points) == PER_CLASS * len(split.unseen)
    figure = visualize.draw_tsne(panels, run)
    limits = [axes.get_xlim() + axes.get_ylim() for axes in figure.axes]
    assert len(limits) == 6 and limits[0] == limits[1] == limits[2] and limits[3] == limits[4] == limits[5]


def test_images_are_held_out_at_most_so_many_and_of_ten_classes(monkeypatch):
    monkeypatch.setattr(visualize, "PER_CLASS", 4)
    labels = np.repeat(np.arange(30), 12)
    where = lambda first, seen: np.flatnonzero((np.arange(360) % 12 >= first) & ((labels < 15) == seen))
    table = np.ones((30, 5), np.float32)
    split = Split(labels, np.setdiff1d(where(0, True), where(6, True)), where(6, True), where(0, False), table, table)
    chosen = visualize.choose_images(split, seed=3)
    for name, test in (("seen", split.test_seen), ("unseen", split.test_unseen)):
        assert np.isin(chosen[name], test).all() and (np.unique(labels[chosen[name]], return_counts=True)[1] == [4] * 10).all()
    same, other = visualize.choose_images(split, seed=3), visualize.choose_images(split, seed=4)
    assert np.array_equal(chosen["seen"], same["seen"]) and set(labels[chosen["seen"]]) != set(labels[other["seen"]])


def test_visual_features_are_pooled_maps_and_what_eggn_was_trained_on(run):
    scen, indices = visualize.restore_scen(run), np.array([0, 30, 5])
    pooled, dense = visualize.visual_features(run, scen, indices)
    with h5py.File(run.features.path) as file:
        maps = np.stack([file["feature_map"][index] for index in indices])
    np.testing.assert_allclose(pooled, maps.mean(axis=(2, 3)), rtol=1e-5)
    _, trained_on = visualize.visual_features(run, scen, run.features.split.trainval)
    assert trained_on.min() == pytest.approx(0, abs=1e-5) and trained_on.max() == pytest.approx(1, abs=1e-5)
    assert dense.shape == pooled.shape == (3, 1280)


def test_synthetic_features_of_a_baseline_lie_in_the_pooled_range(run):
    baseline = as_baseline(run)
    x, y = visualize.synthesize(baseline, run.features.split.unseen)
    scaler = baseline.weights["scaler"]
    assert (x >= scaler["minimum"].numpy() - 1e-5).all() and (x <= scaler["maximum"].numpy() + 1e-5).all()
    assert (np.unique(y, return_counts=True)[1] == PER_CLASS).all()


def test_one_seed_repeats_the_picture_and_torchs_state_is_left_alone(run):
    state = torch.get_rng_state()
    first, again = (tsne_points(visualize.tsne_figure(run, seed=5)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, again) and not np.array_equal(first, tsne_points(visualize.tsne_figure(run, seed=6)))


def tsne_points(figure):
    return np.concatenate([axes.collections[0].get_offsets() for axes in figure.axes if axes.collections])


def test_a_panel_without_its_run_is_blank_and_says_what_it_needs(run):
    figure = visualize.tsne_figure(run)
    assert [len(axes.collections) for axes in figure.axes] == [1, 1, 0, 1, 1, 1]
    assert "visual_features: cnn" in figure.axes[2].texts[0].get_text()


def test_a_run_without_eggn_says_so(made, tmp_path):
    run = load_run(train(made[1], tmp_path / "runs", nepoch=0), made[1])
    figure = visualize.tsne_figure(run)
    assert len(figure.axes[5].collections) == 0 and "nepoch 0" in figure.axes[5].texts[0].get_text()


# the seen-unseen curve

CURVE = "seen_bias,acc_seen,acc_unseen\n-inf,80.0,0.0\n-1,80.0,20.0\n0.5,60.0,40.0\n2,0.0,60.0\n"


def test_curve(made, tmp_path):
    (tmp_path / "seen_unseen_curve.csv").write_text(CURVE)
    curve = visualize.read_curve(tmp_path / "seen_unseen_curve.csv")
    assert visualize.area_under(torch.from_numpy(curve / 100)) == pytest.approx(0.2 * 0.8 + 0.2 * 0.7 + 0.2 * 0.3)
    axes, = visualize.curve_figure(curve, "TOY").axes
    assert axes.get_title() == "TOY: AUSUC 0.360"
    marked, = (line for line in axes.lines if line.get_marker() == "o")
    assert marked.get_xydata().tolist() == [[20.0, 80.0]]  # the last point that a bias of 0 has reached
    cli("curve", "--run", tmp_path)
    assert (tmp_path / "curve.pdf").stat().st_size and (tmp_path / "curve.png").stat().st_size


# command line

def test_files_are_written_into_the_runs_folder_and_repeat(made, tmp_path, capsys):
    root, features, folder = made
    shutil.copytree(folder, tmp_path / "run")
    cli("tsne", "--run", tmp_path / "run", "--features", features)
    cli("attention", "--run", tmp_path / "run", "--features", features, "--data_root", root, "--count", 2)
    for name in ("tsne", "attention"):
        assert (tmp_path / "run" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / "run" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert Image.open(tmp_path / "run" / f"{name}.png").width == 2100  # 7 in at 300 dpi
    image = next(root.glob("TOY/images/*/*.jpg"))
    for name in ("a", "b.png"):
        cli("attention", "--run", folder, "--features", features, "--images", image, image, "--output", tmp_path / name)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert "wrote" in capsys.readouterr().out and not list(tmp_path.glob(".*"))


def test_baseline_runs_by_name(made, run, tmp_path):
    folder = tmp_path / "baseline"
    shutil.copytree(made[2], folder)
    torch.save(as_baseline(run).weights, folder / "model.pt")
    cli("tsne", "--run", made[2], "--cnn_run", folder, "--features", made[1], "--output", tmp_path / "six")
    assert (tmp_path / "six.png").is_file()
    for argv, message in ((("tsne", "--run", folder), "is a run of the CNN-feature baseline, it has no SCEN"),
                          (("attention", "--run", folder, "--data_root", made[0]), "it has no SCEN"),
                          (("tsne", "--run", made[2], "--cnn_run", made[2]), "is not a run of the CNN-feature baseline")):
        with pytest.raises(UserError, match=message):
            cli(*argv, "--features", made[1])


@pytest.mark.parametrize("argv, message", [
    (["tsne", "--run", "nowhere"], "nowhere: there is no such run"), (["tsne"], "required: --run"), ([], "required: command"),
    (["tsne", "--run", "RUN", "--cnn_run", "nowhere"], "nowhere: there is no such run"),
    (["tsne", "--run", "RUN", "--features", "none.hdf5"], "none.hdf5 is missing"),
    (["attention", "--run", "RUN", "--data_root", "none"], "is not a readable image"),
    (["attention", "--run", "RUN", "--images", "text.jpg"], "text.jpg is not a readable image"),
    (["attention", "--run", "RUN", "--count", "0"], "--count 0: must be from 1"),
    (["curve", "--run", "RUN"], "seen_unseen_curve.csv is missing"), (["curve", "--run", "."], "is not a seen-unseen curve"),
    (["tsne", "--run", "."], "config.yaml is missing: name a run's folder"), (["paint"], "invalid choice: 'paint'")])
def test_mistakes(made, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "seen_unseen_curve.csv").write_text("a,b\n1,2\n")
    shutil.copytree(made[2], tmp_path / "run", ignore=shutil.ignore_patterns("*.csv"))
    argv = [str(tmp_path / "run") if word == "RUN" else word for word in argv]
    more = ["--features", made[1]] if argv[:1] in (["tsne"], ["attention"]) and "--features" not in argv else []
    with pytest.raises(UserError, match=message):
        cli(*argv, *more)


def test_unfinished_damaged_and_foreign_runs(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made[2], folder)
    other = write_features(tmp_path / "other.hdf5", feature_arrays(), backbone="efficientnet_lite2", img_size=SIZE)
    with pytest.raises(UserError, match="was trained on split .*, but .* holds split .*: name the run's own file"):
        load_run(folder, other)
    weights = torch.load(folder / "model.pt", weights_only=True)
    torch.save(weights | {"scen": {name: tensor[:1] for name, tensor in weights["scen"].items()}}, folder / "model.pt")
    with pytest.raises(UserError, match="its scen weights do not fit"):
        cli("tsne", "--run", folder, "--features", made[1])
    (folder / "model.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="model.pt is damaged"):
        load_run(folder, made[1])
    (folder / "model.pt").unlink()
    with pytest.raises(UserError, match="model.pt is missing: the run is not finished"):
        load_run(folder, made[1])


def test_features_of_other_weights_than_the_backbones_are_refused(made, run):
    provenance = run.features.provenance | {"weights_sha256": "0" * 64, "weights": "mine.pth"}
    other = run._replace(features=visualize.Features(**vars(run.features) | {"provenance": provenance}))
    with pytest.raises(UserError, match="was made with the weights mine.pth, not .*: give that file as --weights"):
        image_files(other, [next(made[0].glob("TOY/images/*/*.jpg"))])


def test_a_feature_file_without_paths_asks_for_images(made, run, tmp_path):
    shutil.copy(made[1], tmp_path / "f.hdf5")
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        del file["image_files"]
    with pytest.raises(UserError, match="does not say which images it was made from: name images with --images"):
        dataset_images(load_run(made[2], tmp_path / "f.hdf5"), made[0], 2, 0)


def test_mistakes_exit_with_status_2_and_one_line(made):
    done = subprocess.run([sys.executable, ROOT / "visualize.py", "tsne", "--run", "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: nowhere: there is no such run\n")
