"""Finished runs that another can use: --reuse_scen takes SCEN from one where stage 1 would make the same."""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from scegg.run.checkpoint import code_version
from scegg.config import Config, keys_of_stage
from scegg.features.reader import Features

SAMPLE = 16

def identity_of_data(features: Features) -> dict:
    """What tells one feature file from another, without reading it through: who made it, its arrays, and SAMPLE of its maps."""
    made_by = {name: str(features.provenance[name]) for name in sorted(features.provenance)}
    split = features.split
    digest = hashlib.sha256(repr((made_by, features.shape)).encode())
    some = np.unique(np.linspace(0, len(split.labels) - 1, SAMPLE).astype(int))
    for array in (split.att, split.original_att, split.train, split.val, features.w2v, features.raw(some).numpy()):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return {"split_fingerprint": split.fingerprint, "backbone": made_by.get("backbone", "unknown"), "features": digest.hexdigest()[:12]}


def identity_of_code(device: torch.device) -> dict:
    """What else a run's numbers depend on: the code, torch, and the kind of device."""
    return {"code": code_version(), "torch": str(torch.__version__), "device": device.type}


def finished_runs(runs: Path, wanted: dict):
    """Yield the folders in `runs` of finished runs whose summary, or its config, says all of `wanted`; newest first.

    Whatever else lies there is passed over.
    """
    for path in sorted(runs.glob("*/summary.json"), reverse=True):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            made = summary["config"] | summary
            alike = all(made.get(name) == value for name, value in wanted.items())
        except Exception:  # half a run, or none of ours: json has many names for it
            continue
        if alike:
            yield path.parent


def find_scen(runs: Path, config: Config, features: Features, device: torch.device) -> dict | None:
    """The newest finished run with this run's stage 1 (features, split, code, every key of it): its name and SCEN's weights.

    None if there is none, or nothing to reuse it for.
    """
    if config.visual_features == "cnn":
        return None
    wanted = identity_of_data(features) | identity_of_code(device) | {"scen_schedule": "frozen", "visual_features": "dense"}
    for folder in finished_runs(runs, wanted | {name: getattr(config, name) for name in ("seed", *keys_of_stage(1))}):
        try:
            scen = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["scen"]
        except Exception:  # torch has many names for a damaged file
            continue
        print(f"SCEN is taken from {folder}")
        return {"scen": scen, "run": folder.name}
    return None
