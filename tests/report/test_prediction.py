"""evaluate.py --images: from pictures to classes, by a run's folder alone."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from report_helpers import train_on_toy
from scegg.config import CONFIG_FOLDER, read_config
from scegg.report import evaluation, pictures
from scegg.report.evaluation import Judge
from scegg.report.prediction import Predictor, predict
from scegg.run.trained import read_run, winners_of
from util import UserError

CPU = torch.device("cpu")


@pytest.fixture
def alone(toy_run, tmp_path, monkeypatch):
    """A copy of the run's folder in an empty place, without feature file and dataset."""
    shutil.copytree(toy_run.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "FeatureMaps", None)
    return tmp_path / "copy"


def name_pictures(capsys, run, *argv):
    """(exit status, stdout, stderr) of evaluate.py on pictures."""
    status = 0
    capsys.readouterr()
    try:
        evaluate.main(["--run", str(run), "--images", *map(str, argv)])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def toy_pictures(toy_run):
    return sorted(toy_run.root.glob("TOY/images/*/*.jpg"))


def test_every_test_image_gets_the_class_that_its_features_get(toy_run, run):
    """Its features, made on the spot, are those of the feature file, but for rounding."""
    files = read_run(toy_run.folder)
    winner = winners_of(files)["picked"]["gzsl"]
    _, (_, answers) = Judge(run, run.features.split, CPU).of_epoch(
        "picked", winners_of(files)["picked"]
    )
    split = run.features.split
    indices = np.concatenate([split.test_seen, split.test_unseen])
    paths = [toy_run.root / "TOY" / run.features.image_files[index] for index in indices]

    predictor = Predictor(files, CPU)
    found = list(predict(predictor, paths, CPU, pytest.fail))
    labels = [item.guesses[0].label for item in found]
    assert labels == answers.predicted.tolist() and winner["epoch"] > 0
    kinds = [item.guesses[0].kind for item in found]
    unseen = set(split.unseen.tolist())
    assert kinds == ["unseen" if label in unseen else "seen" for label in labels]

    crops = torch.stack([pictures.read_crop(path, run.config.img_size) for path in paths])
    maps = predictor.backbone(crops)
    in_file = run.features.raw(indices)
    assert (maps - in_file).norm() / in_file.norm() < 1e-5


def test_probabilities_attributes_and_bias_are_those_of_the_networks(toy_run, run):
    files = read_run(toy_run.folder)
    predictor = Predictor(files, CPU)
    index = run.features.split.test_unseen[:1]
    path = toy_run.root / "TOY" / run.features.image_files[index[0]]
    (item,) = predict(predictor, [path], CPU, pytest.fail)

    maps = run.features.read(index)
    output = predictor.embedder(maps)
    for guess in item.guesses:
        terms = predictor.terms(guess.label, output.scores[0])
        torch.testing.assert_close(terms.sum(), output.local_logits[0, guess.label])
        best = terms.argsort(descending=True)[:3].tolist()
        assert [name for name, _ in guess.attributes] == [
            run.features.attribute_names[place] for place in best
        ]
    chances = [guess.probability for guess in item.guesses]
    assert len(chances) == 5 and chances == sorted(chances, reverse=True) and sum(chances) < 1

    predictor.bias = 1000.0 * torch.tensor([kind == "seen" for kind in predictor.kinds])
    (item,) = predict(predictor, [path], CPU, pytest.fail)
    assert [guess.kind for guess in item.guesses[:3]] == ["unseen"] * 3


def test_a_folder_with_broken_pictures_goes_on_elsewhere(toy_run, alone, capsys):
    """Status 1; each broken picture is a line, each other one is named, in every format."""
    good = toy_pictures(toy_run)[:5]
    for number, path in enumerate(good):
        place = alone.parent / "many" / f"sub {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{number}.JPG")
    whole = good[0].read_bytes()
    (alone.parent / "many" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (alone.parent / "many" / "text.png").write_text("no picture")
    (alone.parent / "many" / "notes.txt").write_text("not looked at")

    status, out, err = name_pictures(capsys, alone, "many", "none.jpg", "--format", "json")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and [item["image"] for item in found] == [
        "many/sub 0/0.JPG",
        "many/sub 0/2.JPG",
        "many/sub 0/4.JPG",
        "many/sub 1/1.JPG",
        "many/sub 1/3.JPG",
    ]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split()[1] for line in errors] == ["many/half.jpg", "many/text.png", "none.jpg"]
    assert err.splitlines()[-1] == "5 pictures were named, 3 could not be read"

    status, out, _ = name_pictures(capsys, alone, "many", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1 and len(rows) == 25
    assert [row["class"] for row in rows[:5]] == [one["class"] for one in found[0]["classes"]]

    status, out, _ = name_pictures(capsys, alone, "many/sub 1")
    assert status == 0 and len(out.splitlines()) == 12 and " %  " in out.splitlines()[1]
    with pytest.raises(UserError, match="there are no pictures in there"):
        name_pictures(capsys, alone, alone)


def test_hidden_files_in_folders_are_no_pictures(tmp_path):
    (tmp_path / ".checkpoints").mkdir()
    for name in ("a.jpg", "._a.jpg", ".checkpoints/a.jpg"):
        (tmp_path / name).touch()
    assert list(pictures.picture_files([tmp_path], print)) == [tmp_path / "a.jpg"]


def test_results_are_printed_before_the_next_pictures_are_read(toy_run, monkeypatch):
    read, predictor = [], Predictor(read_run(toy_run.folder), CPU)

    def paths():
        for path in toy_pictures(toy_run) * 100:
            read.append(path)
            yield path

    monkeypatch.setattr("scegg.report.prediction.picture_files", lambda places, tell: paths())
    found = predict(predictor, [], CPU, pytest.fail)
    for _ in range(6):
        next(found)
    assert len(read) == 8  # two batches of four


def test_attention_is_drawn_of_what_spoke_for_the_best_class(toy_run, alone, capsys):
    picture = alone.parent / f"{'a' * 250}.jpg"  # as long as names may be
    shutil.copy(toy_pictures(toy_run)[0], picture)
    status, out, _ = name_pictures(capsys, alone, picture, "--attention", "--format", "json")
    drawn = json.loads(out)["attention"]
    assert status == 0 and drawn.startswith(str(alone / "attention" / "000001_aaa"))
    assert Image.open(drawn).width == 2100


def test_runs_of_other_kinds_name_pictures(toy_run, tmp_path, capsys):
    """CZSL alone: unseen classes alone. The baseline: no attributes. SCEN alone: distilled."""
    picture = toy_pictures(toy_run)[0]
    baseline = {"visual_features": "cnn", "rec_seen_cls_weight": 0, "gen_unseen_cls_weight": 0}
    kinds = {"czsl": {"gzsl": False, "nepoch": 1}, "cnn": baseline | {"nepoch": 1}}
    for name, changes in (kinds | {"alone": {"nepoch": 0}}).items():
        run = train_on_toy(toy_run.features, tmp_path / name, **changes)
        _, out, _ = name_pictures(capsys, run, picture, "--format", "json")
        classes = json.loads(out)["classes"]
        if name == "czsl":
            assert {one["kind"] for one in classes} == {"unseen"} and len(classes) == 3
            assert sum(one["probability"] for one in classes) == pytest.approx(1)
        assert bool(classes[0]["attributes"]) == (name != "cnn")

    with pytest.raises(UserError, match="has no attention: leave --attention out"):
        name_pictures(
            capsys, tmp_path / "cnn" / next((tmp_path / "cnn").iterdir()), picture, "--attention"
        )


def test_other_weights_than_the_features_had_are_refused(toy_run, alone, capsys, monkeypatch):
    monkeypatch.setattr("scegg.features.backbones.hash_weights", lambda network: "0" * 64)
    with pytest.raises(UserError, match="was made with the weights .*: give that file as --weig"):
        name_pictures(capsys, alone, toy_pictures(toy_run)[0])


def test_weights_that_cannot_be_had_are_named(monkeypatch):
    def offline(*args):
        raise UserError("no download")

    monkeypatch.setattr(pictures, "build_backbone", offline)
    config = read_config(CONFIG_FOLDER / "toy.yaml", {})
    with pytest.raises(UserError, match="no download .the weights of runs/X: own.pth."):
        pictures.load_backbone(config, {"weights": "own.pth"}, "runs/X", None, torch.device("cpu"))
