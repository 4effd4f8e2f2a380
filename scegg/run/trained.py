"""Load a finished run from its folder: its config, its features and its trained networks.

    run = load_run(Path("runs/CUB-20260101-000000-abc"))
    scen, eggn = restore_scen(run), restore_eggn(run)

Networks come frozen, on the CPU and in evaluation mode.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model import SCEN
from scegg.config import Config, read_config
from scegg.datasets.layouts import LAYOUTS
from scegg.features.feature_file import feature_file
from scegg.features.reader import Features, open_features
from scegg.method.eggn import EGGN
from util import UserError, is_of_disk, load_tensors, text_encoding, unreadable

NOT_FINISHED = "the run is not finished"
REMEDIES = {
    "config.yaml": "name a run's folder",
    "summary.json": NOT_FINISHED,
    "model.pt": NOT_FINISHED,
}


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
    for name, remedy in REMEDIES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {remedy}")

    config = read_config(folder / "config.yaml", {})
    dataset, weights, fingerprint, trained_with = read_results(folder)
    changed = [
        name
        for name, value in dataclasses.asdict(config).items()
        if trained_with.get(name, value) != value
    ]
    if changed:
        raise UserError(
            f"{folder / 'config.yaml'} was changed after the run ({', '.join(changed)}): make it "
            "as it was; summary.json holds every value"
        )
    if dataset not in list(LAYOUTS):
        raise UserError(f"{folder / 'summary.json'}: there is no dataset {dataset}")

    path = features or feature_file(dataset, config.backbone)
    opened = open_features(path, config.backbone, config.img_size, dataset)
    if opened.split.fingerprint != fingerprint:
        raise UserError(
            f"{folder} was trained on split {fingerprint}, but {opened.path} holds split "
            f"{opened.split.fingerprint}: name the run's own file with --features"
        )
    return TrainedRun(folder.name, dataset, config, opened, weights)


def read_results(folder: Path) -> tuple[str, dict, str, dict]:
    """A run's dataset, its weights, its split's fingerprint, and the config it was trained with.

    Raises UserError if summary.json or model.pt is damaged.
    """
    try:
        path = folder / "summary.json"
        summary = json.loads(path.read_text(text_encoding(path)))
        weights = load_tensors(folder / "model.pt")
        return summary["dataset"], weights, weights["split_fingerprint"], dict(summary["config"])
    except UserError:
        raise
    except Exception as error:  # json and torch raise many kinds over damaged files
        if is_of_disk(error):
            raise unreadable(error.filename or folder, error) from None
        raise UserError(
            f"{folder}: summary.json or model.pt is damaged ({UserError(error)})"
        ) from None


def restore(module: nn.Module, run: TrainedRun, part: str) -> nn.Module:
    """Load the weights that the run holds under `part` into the module, and freeze it.

    Raises UserError if they do not fit.
    """
    try:
        module.load_state_dict(run.weights[part])
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{run.name}: its {part} weights do not fit; were they made with other features or "
            "another version?"
        ) from None
    return module.requires_grad_(False).eval()


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
    # a new SCEN draws its first weights: the caller's random state stays what it was
    with torch.random.fork_rng(devices=[]):
        scen = SCEN(w2v, att, run.features.shape[0], run.config.compose_runtime)
    return restore(scen, run, "scen")


def restore_eggn(run: TrainedRun) -> EGGN:
    """The run's trained EGGN (docs/method.md, section 6), ready to synthesise.

    It has neither guide nor optimisers. A new EGGN draws its first weights from torch's random
    state. Raises UserError for a run without EGGN, and for weights that do not fit.
    """
    att = torch.from_numpy(run.features.split.att)
    eggn = EGGN(run.features.shape[0], att, None, run.config)
    return restore(eggn, run, "eggn")
