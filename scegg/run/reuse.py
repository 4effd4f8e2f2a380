"""Finished runs that another can use: --reuse_scen takes SCEN from one with an equal stage 1."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from scegg.config import Config, keys_of_stage
from scegg.features.reader import Features
from scegg.run.identity import identity_of_code, identity_of_data
from util import text_encoding


def finished_runs(runs: Path, wanted: dict) -> Iterator[Path]:
    """The folders in `runs` of finished runs that agree with all of `wanted`, newest first.

    wanted: entries of a summary or of its config. Whatever else lies there is passed over.
    """
    for path in sorted(runs.glob("*/summary.json"), reverse=True):
        try:
            summary = json.loads(path.read_text(text_encoding(path)))
            found = summary["config"] | summary
            agrees = all(found.get(name) == value for name, value in wanted.items())
        except Exception:  # half a run, or none of ours: json has many names for it
            continue
        if agrees:
            yield path.parent


def find_scen(runs: Path, config: Config, features: Features, device: torch.device) -> dict | None:
    """The newest finished run with this run's stage 1: its name and SCEN's weights.

    Equal must be features, split, code, and every key that stage 1 depends on. None if there is no
    such run, or nothing to reuse it for.
    """
    if config.visual_features == "cnn":
        return None

    wanted = identity_of_data(features) | identity_of_code(device)
    wanted |= {"scen_schedule": "frozen", "visual_features": "dense"}
    wanted |= {name: getattr(config, name) for name in ("seed", *keys_of_stage(1))}
    for folder in finished_runs(runs, wanted):
        try:
            weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
            scen = weights["scen"]
        except Exception:  # torch has many names for a damaged file
            continue
        print(f"SCEN is taken from {folder}")
        return {"scen": scen, "run": folder.name}
    return None
