"""Load a finished run from its folder: its config, its features and its trained networks.

    run = load_run(Path("runs/CUB-20260101-000000-abc"))
    scen, eggn = restore_scen(run), restore_eggn(run)

`read_run` and `winners_of` need no features. Networks come frozen, on the CPU and in evaluation
mode.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import SCEN, Decoder, Scaler, global_classifier
from scegg.config import Config, read_config
from scegg.datasets.layouts import require_known
from scegg.features.feature_file import feature_file
from scegg.features.reader import Features, open_features
from scegg.method.eggn import EGGN
from scegg.run.winners import check_model
from util import UserError, is_of_disk, load_tensors, sha256, text_encoding, unreadable

NOT_FINISHED = "the run is not finished"
REMEDIES = {
    "config.yaml": "name a run's folder",
    "summary.json": NOT_FINISHED,
    "model.pt": NOT_FINISHED,
}


class RunFiles(NamedTuple):
    """What the folder of a finished run holds; weights: the content of model.pt."""

    folder: Path
    config: Config
    summary: dict
    weights: dict


class TrainedRun(NamedTuple):
    """A finished run: the folder's name, dataset, config, features, and what model.pt holds."""

    name: str
    dataset: str
    config: Config
    features: Features
    weights: dict

    @property
    def is_baseline(self) -> bool:
        """Whether it is a run of the CNN-feature baseline, which has no SCEN."""
        return "scen" not in self.weights


def load_run(folder: Path, features: Path | None = None) -> TrainedRun:
    """The finished run in `folder`; features: its feature file, if preprocessing put it elsewhere.

    Raises UserError for a folder that holds no finished run, for a config that was changed since,
    and for features of another split, backbone or image size.
    """
    return with_features(read_run(folder), features)


def read_run(folder: Path) -> RunFiles:
    """The files of the finished run in `folder`, without its features.

    Raises UserError for a folder that holds no finished run, for damaged files, and for a config
    that was changed since.
    """
    for name, remedy in REMEDIES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {remedy}")

    config = read_config(folder / "config.yaml", {})
    summary, weights = read_results(folder)
    changed = [
        name
        for name, value in dataclasses.asdict(config).items()
        if summary["config"].get(name, value) != value
    ]
    if changed:
        raise UserError(
            f"{folder / 'config.yaml'} was changed after the run ({', '.join(changed)}): make it "
            "as it was; summary.json holds every value"
        )
    return RunFiles(folder, config, summary, weights)


def read_results(folder: Path) -> tuple[dict, dict]:
    """A run's summary.json and model.pt. Raises UserError if one of them is damaged."""
    try:
        path = folder / "summary.json"
        summary = json.loads(path.read_text(text_encoding(path)))
        weights = load_tensors(folder / "model.pt")
        _ = summary["config"].keys(), Path(summary["dataset"]), weights["split_fingerprint"]
        return summary, weights
    except UserError:
        raise
    except Exception as error:  # json and torch raise many kinds over damaged files
        if is_of_disk(error):
            raise unreadable(error.filename or folder, error) from None
        raise UserError(
            f"{folder}: summary.json or model.pt is damaged ({UserError(error)})"
        ) from None


def with_features(files: RunFiles, features: Path | None = None) -> TrainedRun:
    """A finished run with its feature file open.

    Raises UserError for features of another split, backbone or image size.
    """
    folder, config = files.folder, files.config
    dataset, fingerprint = files.summary["dataset"], files.weights["split_fingerprint"]
    require_known(dataset, f"{folder / 'summary.json'}: ")

    path = features or feature_file(dataset, config.backbone)
    opened = open_features(path, config.backbone, config.img_size, dataset)
    if opened.split.fingerprint != fingerprint:
        raise UserError(
            f"{folder} was trained on split {fingerprint}, but {opened.path} holds split "
            f"{opened.split.fingerprint}: name the run's own file with --features"
        )
    return TrainedRun(folder.name, dataset, config, opened, files.weights)


# ---- networks


def restore(module: nn.Module, run_name: str, weights: dict, part: str) -> nn.Module:
    """Load what the weights hold under `part` into the module, and freeze it.

    Raises UserError if they do not fit.
    """
    try:
        module.load_state_dict(weights[part])
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise not_fitting(run_name, part) from None
    return module.requires_grad_(False).eval()


def not_fitting(run_name: str, part: str) -> UserError:
    """What a user is told of weights that do not fit."""
    return UserError(
        f"{run_name}: its {part} weights do not fit; were they made with other features or "
        "another version?"
    )


def restore_scen(run: TrainedRun) -> SCEN:
    """The run's trained SCEN (docs/method.md, sections 4 and 5).

    Raises UserError for a run of the baseline, and for weights that do not fit.
    """
    if run.is_baseline:
        raise UserError(
            f"{run.name} is a run of the CNN-feature baseline, it has no SCEN: name a run with "
            "visual_features dense"
        )

    w2v = torch.from_numpy(run.features.w2v)
    att = torch.from_numpy(run.features.split.att)
    scen = new_scen(w2v, att, run.features.shape[0], run.config)
    return restore(scen, run.name, run.weights, "scen")


def new_scen(w2v: Tensor, att: Tensor, channels: int, config: Config) -> SCEN:
    """A SCEN to load weights into. It draws its first ones: torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        return SCEN(w2v, att, channels, config.compose_runtime)


def restore_eggn(run: TrainedRun) -> EGGN:
    """The run's trained EGGN (docs/method.md, section 6), ready to synthesise.

    It has neither guide nor optimisers. A new EGGN draws its first weights from torch's random
    state. Raises UserError for a run without EGGN, and for weights that do not fit.
    """
    att = torch.from_numpy(run.features.split.att)
    eggn = EGGN(run.features.shape[0], att, None, run.config)
    return restore(eggn, run.name, run.weights, "eggn")


# ---- winners: the networks behind the run's numbers


class Classifier(nn.Module):
    """A softmax classifier behind the decoder that it was trained with, if any.

    x (n, D) dense-semantic features -> class logits. hidden_weight: classifier_hidden_weight.
    """

    def __init__(self, decoder: Decoder | None, linear: nn.Linear, hidden_weight: float):
        super().__init__()
        self.decoder, self.linear, self.hidden_weight = decoder, linear, hidden_weight

    def forward(self, x: Tensor) -> Tensor:
        if self.decoder:
            x = self.decoder.classifier_input(x, self.hidden_weight)
        return self.linear(x)


def winners_of(files: RunFiles) -> dict:
    """What model.pt keeps behind the run's numbers (`scegg.run.winners.Winners`).

    Raises UserError for a run of an older version, and for a model.pt that was changed.
    """
    if "winners" not in files.weights:
        raise UserError(
            f"{files.folder} is a run of an older version: its model.pt lacks the classifiers "
            "behind its numbers; train it again"
        )
    path = files.folder / "model.pt"
    if sha256(path) != files.summary.get("model_sha256"):
        raise UserError(
            f"{path} is not the file that the run wrote (its SHA-256 is not that of summary.json): "
            "copy it again"
        )
    try:
        check_model(files.weights)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} was not written by a run ({type(error).__name__}: {error}): copy the run again"
        ) from None
    return files.weights["winners"]


def restore_embedder(
    run_name: str, winner: dict, config: Config, shape: tuple[int, int]
) -> SCEN | Scaler:
    """What made the features that a winner was trained on.

    That is SCEN, or the scaler of pooled features in a run of the baseline. shape (C, K) of the
    class attributes; other sizes are the weights' own. Raises UserError for weights that do not
    fit.
    """
    part = "scaler" if config.visual_features == "cnn" else "scen"
    try:
        weights = winner[part]
        if part == "scaler":
            network = Scaler(len(weights["minimum"]))
        else:
            w2v = torch.zeros(shape[1], weights["len.V"].shape[1])
            network = new_scen(w2v, torch.zeros(shape), channels_of(winner), config)
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError):
        raise not_fitting(run_name, part) from None
    return restore(network, run_name, winner, part)


def channels_of(winner: dict) -> int:
    """The channels D of the maps that a winner's embedder takes."""
    if "scaler" in winner:
        return len(winner["scaler"]["minimum"])
    return winner["scen"]["len.W1"].shape[1]


def require_channels(run_name: str, winner: dict, channels: int):
    """Raises UserError if a winner's embedder takes maps of other channels."""
    if channels_of(winner) != channels:
        raise not_fitting(run_name, "winners'")


def restore_classifier(run_name: str, winner: dict, config: Config, classes: int) -> nn.Module:
    """The classifier of a winner, x (n, D) -> logits (n, classes).

    It is the distilled one in what was kept after stage 2. Raises UserError as restore_embedder.
    """
    try:
        classifier = new_classifier(run_name, winner, config)
        logits = classifier(torch.zeros(1, channels_of(winner)))
        fits = logits.shape == (1, classes)
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError, ValueError):
        fits = False
    if not fits:
        raise not_fitting(run_name, "winners'")
    return classifier


def new_classifier(run_name: str, winner: dict, config: Config) -> nn.Module:
    """`restore_classifier` without its checks."""
    if "global_cls" in winner:
        first, last = winner["global_cls"]["0.weight"], winner["global_cls"]["2.weight"]
        network = global_classifier(first.shape[1], len(first), len(last))
        return restore(network, run_name, winner, "global_cls")

    classes, inputs = winner["linear"]["weight"].shape
    decoder = None
    if "Dec" in winner:
        hidden, channels = winner["Dec"]["fc1.weight"].shape
        decoder = Decoder(channels, len(winner["Dec"]["fc3.weight"]), hidden)
        restore(decoder, run_name, winner, "Dec")
    linear = restore(nn.Linear(inputs, classes), run_name, winner, "linear")
    return Classifier(decoder, linear, config.classifier_hidden_weight)
