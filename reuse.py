"""--reuse_scen: SCEN of a finished run, where stage 1 of this run would make the same one."""
import hashlib
import json
from pathlib import Path

import torch

from checkpoint import code_version
from config import SCEN_KEYS, Config
from dataset import Features


def identity_of_data(features: Features) -> dict:
    """What tells one feature file from another, without reading it through."""
    made_by = {name: str(features.provenance[name]) for name in sorted(features.provenance)}
    return {"split_fingerprint": features.split.fingerprint, "backbone": made_by.get("backbone", "unknown"),
            "features": hashlib.sha256(repr((made_by, features.shape, features.path.stat().st_size)).encode()).hexdigest()[:12]}


def identity_of_code(device: torch.device) -> dict:
    """What else a run's numbers depend on: the code, torch, and the kind of device."""
    return {"code": code_version(), "torch": str(torch.__version__), "device": device.type}


def find_scen(runs: Path, config: Config, features: Features, device: torch.device) -> dict | None:
    """The newest finished run with this run's stage 1 (features, split, code, every key of it): its name and SCEN's weights.

    None if there is none, or nothing to reuse it for. Whatever else lies in `runs` is passed over.
    """
    if config.visual_features == "cnn":
        return None
    wanted = identity_of_data(features) | identity_of_code(device) | {"scen_schedule": "frozen", "visual_features": "dense"}
    wanted |= {name: getattr(config, name) for name in ("seed", *SCEN_KEYS)}
    for path in sorted(runs.glob("*/summary.json"), reverse=True):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            made = summary["config"] | summary
            if all(made.get(name) == value for name, value in wanted.items()):
                scen = torch.load(path.parent / "model.pt", map_location="cpu", weights_only=True)["scen"]
                print(f"SCEN is taken from {path.parent}")
                return {"scen": scen, "run": path.parent.name}
        except Exception:  # half a run, or none of ours: json and torch have many names for it
            continue
    return None
