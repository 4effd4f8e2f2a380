"""What a run's numbers depend on beside its config: feature file, code, torch, device."""

import contextlib
import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from scegg.features.reader import Features

ROOT = Path(__file__).resolve().parents[2]
FINGERPRINT_MAPS = 16  # feature maps that are read to tell a file from another


def identity_of_data(features: Features) -> dict:
    """What tells one feature file from another, without reading it through.

    That is who made it, its arrays, and FINGERPRINT_MAPS of its maps.
    """
    made_by = {name: str(features.provenance[name]) for name in sorted(features.provenance)}
    split = features.split
    some = np.linspace(0, len(split.labels) - 1, FINGERPRINT_MAPS)
    maps = features.raw(np.unique(some.astype(int))).numpy()

    digest = hashlib.sha256(repr((made_by, features.shape)).encode())
    for array in (split.att, split.original_att, split.train, split.val, features.w2v, maps):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return {
        "split_fingerprint": split.fingerprint,
        "backbone": made_by.get("backbone", "unknown"),
        "features": digest.hexdigest()[:12],
    }


def identity_of_code(device: torch.device) -> dict:
    """The code, torch, and the kind of device."""
    return {"code": code_version(), "torch": str(torch.__version__), "device": device.type}


def provenance(features: Features, device: torch.device) -> dict:
    """Where a run's numbers come from, as W&B's config has it from the run's start."""
    is_gpu = device.type == "cuda"
    versions = {name: version(name) for name in ("numpy", "h5py", "torchvision", "wandb")}
    return {
        **identity_of_data(features),
        **identity_of_code(device),
        "device_name": torch.cuda.get_device_name(device) if is_gpu else processor(),
        "git_commit": git_commit(),
        "feature_file": str(features.path.resolve()),
        "features_made_with": features.provenance,
        "weights_sha256": features.provenance.get("weights_sha256"),
        "versions": {"python": platform.python_version(), **versions},
    }


def processor() -> str:
    """The CPU's name, as far as the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_version() -> str:
    """12 hex digits that change with any file of scegg/, model.py or util.py."""
    digest = hashlib.sha256()
    for path in [ROOT / "model.py", ROOT / "util.py", *sorted((ROOT / "scegg").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def git_commit() -> str | None:
    """The commit of this code; "+changes" says that files differ from it. None without git."""
    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def git(*words: str) -> str:
    """What a git command prints about this checkout. Raises OSError or CalledProcessError."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
