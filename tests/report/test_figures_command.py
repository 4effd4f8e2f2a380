"""visualize.py: the files it writes, the runs it takes, and what a user's mistakes are told."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import visualize
from helpers import ROOT, feature_arrays, read_summary, write_features
from report_helpers import IMG_SIZE, as_baseline
from scegg.run.trained import load_run
from util import UserError


def draw(*argv):
    """visualize.py with these words."""
    visualize.main([str(word) for word in argv])


def test_files_are_written_into_the_runs_folder_and_repeat(toy_run, tmp_path, capsys):
    folder, of_run = tmp_path / "run", ("--features", toy_run.features)
    shutil.copytree(toy_run.folder, folder)
    draw("tsne", "--run", folder, *of_run)
    draw("attention", "--run", folder, *of_run, "--data_root", toy_run.root, "--count", 2)
    for name in ("tsne", "attention"):
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert Image.open(folder / f"{name}.png").width == 2100  # 7 in at 300 dpi

    image = next(toy_run.root.glob("TOY/images/*/*.jpg"))
    for name in ("a", "b.png"):
        output = ("--output", tmp_path / name)
        draw("attention", "--run", toy_run.folder, *of_run, "--images", image, image, *output)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert "wrote" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_baseline_runs_by_name(toy_run, run, tmp_path):
    baseline, of_run = tmp_path / "baseline", ("--features", toy_run.features)
    shutil.copytree(toy_run.folder, baseline)
    torch.save(as_baseline(run).weights, baseline / "model.pt")
    output = ("--output", tmp_path / "six")
    draw("tsne", "--run", toy_run.folder, "--cnn_run", baseline, *of_run, *output)
    assert (tmp_path / "six.png").is_file()

    summary = read_summary(baseline)
    for change in ({"features": "a7c76a3f3fd8"}, {"dataset": "CUB"}):
        (baseline / "summary.json").write_text(json.dumps(summary | change))
        with pytest.raises(UserError, match="baseline was not trained on the features of"):
            draw("tsne", "--run", toy_run.folder, "--cnn_run", baseline, *of_run)
    (baseline / "summary.json").write_text(json.dumps(summary))

    with pytest.raises(UserError, match="is a run of the CNN-feature baseline, it has no SCEN"):
        draw("tsne", "--run", baseline, *of_run)
    with pytest.raises(UserError, match="it has no SCEN"):
        draw("attention", "--run", baseline, "--data_root", toy_run.root, *of_run)
    with pytest.raises(UserError, match="is not a run of the CNN-feature baseline"):
        draw("tsne", "--run", toy_run.folder, "--cnn_run", toy_run.folder, *of_run)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["tsne", "--run", "nowhere"], "nowhere: there is no such run"),
        (["tsne"], "required: --run"),
        ([], "required: command"),
        (["tsne", "--run", "RUN", "--cnn_run", "nowhere"], "nowhere: there is no such run"),
        (["tsne", "--run", "RUN", "--features", "none.hdf5"], "none.hdf5 is missing"),
        (["attention", "--run", "RUN", "--data_root", "none"], "is not a readable image"),
        (["attention", "--run", "RUN", "--images", "text.jpg"], "text.jpg is not a readable image"),
        (["attention", "--run", "RUN", "--count", "0"], "--count 0: must be from 1"),
        (["curve", "--run", "RUN"], "seen_unseen_curve.csv is missing"),
        (["curve", "--run", "."], "is not a seen-unseen curve"),
        (["tsne", "--run", "."], "config.yaml is missing: name a run's folder"),
        (["paint"], "invalid choice: 'paint'"),
    ],
)
def test_mistakes(toy_run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "seen_unseen_curve.csv").write_text("a,b\n1,2\n")
    without_curve = shutil.ignore_patterns("*.csv")
    shutil.copytree(toy_run.folder, tmp_path / "run", ignore=without_curve)

    argv = [str(tmp_path / "run") if word == "RUN" else word for word in argv]
    if argv[:1] in (["tsne"], ["attention"]) and "--features" not in argv:
        argv += ["--features", toy_run.features]
    with pytest.raises(UserError, match=message):
        draw(*argv)


def test_an_image_that_preprocessing_was_allowed_to_read_is_allowed_here(toy_run, tmp_path):
    Image.new("L", (3000, 2000), 77).save(tmp_path / "large.png")
    command = ["attention", "--run", toy_run.folder, "--features", toy_run.features]
    command += ["--images", tmp_path / "large.png", "--output", tmp_path / "drawn"]
    with pytest.raises(UserError, match="a larger --max_megapixels .*visualize.py"):
        draw(*command, "--max_megapixels", 5)
    with pytest.raises(UserError, match="--max_megapixels 0: must be from 1"):
        draw(*command, "--max_megapixels", 0)
    draw(*command, "--max_megapixels", 6)
    assert (tmp_path / "drawn.png").is_file()


def test_unfinished_damaged_and_foreign_runs(toy_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(toy_run.folder, folder)
    provenance = {"backbone": "efficientnet_lite2", "img_size": IMG_SIZE}
    other = write_features(tmp_path / "other.hdf5", feature_arrays(), **provenance)
    message = "was trained on split .*, but .* holds split .*: name the run's own file"
    with pytest.raises(UserError, match=message):
        load_run(folder, other)

    weights = torch.load(folder / "model.pt", weights_only=True)
    weights["scen"] = {name: tensor[:1] for name, tensor in weights["scen"].items()}
    torch.save(weights, folder / "model.pt")
    with pytest.raises(UserError, match="its scen weights do not fit"):
        draw("tsne", "--run", folder, "--features", toy_run.features)

    (folder / "model.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="model.pt is damaged"):
        load_run(folder, toy_run.features)
    (folder / "model.pt").unlink()
    with pytest.raises(UserError, match="model.pt is missing: the run is not finished"):
        load_run(folder, toy_run.features)


def test_mistakes_exit_with_status_2_and_one_line():
    command = [sys.executable, ROOT / "visualize.py", "tsne", "--run", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: nowhere: there is no such run\n")
