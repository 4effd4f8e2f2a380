"""A run's folder and its mirror in Weights & Biases: config, metrics line by line, summary, weights."""
import dataclasses
import datetime
import json
import os
import secrets
import subprocess
from pathlib import Path

import torch
import wandb

from config import Config, config_yaml
from util import UserError, atomic_path, write_text

PROJECT = "SCEGG"


def wandb_mode(flag: str | None) -> str:
    """--wandb, else WANDB_MODE, else online if somebody is logged in and offline if not: it never prompts."""
    mode = flag or os.environ.get("WANDB_MODE")
    if mode in ("online", "offline", "disabled"):
        return mode
    if mode:
        raise UserError(f"WANDB_MODE={mode}: use online, offline or disabled")
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether W&B finds an API key, without asking for one, and takes it."""
    try:
        return wandb.login(prompt=False)
    except wandb.errors.Error as error:
        print(f"W&B: {error}")
        return False


def git_commit() -> str | None:
    """The commit of this code, with "+changes" if the tree differs from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout
        return run("rev-parse", "HEAD").strip() + ("+changes" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Run:
    """One training run: runs/<dataset>-<time>-<id>/ with config.yaml, metrics.jsonl, summary.json and model.pt."""

    def __init__(self, dataset: str, config: Config, mode: str, root: Path):
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.name = f"{dataset}-{stamp}-{secrets.token_hex(3)}"
        self.folder = root / self.name
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"the run's folder {self.folder} could not be made ({error.strerror}): name another place with --runs") from None
        write_text(self.folder / "config.yaml", config_yaml(config))
        self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        settings = dict(project=PROJECT, name=self.name, dir=str(self.folder), config=dataclasses.asdict(config) | {"dataset": dataset})
        try:
            self.wandb = wandb.init(mode=mode, **settings)
        except wandb.errors.Error as error:
            print(f"W&B could not be reached ({error}): logging offline")
            self.wandb = wandb.init(mode="offline", **settings)

    def log(self, stage: str, values: dict):
        """One line of metrics.jsonl, and the same values to W&B."""
        self.metrics.write(json.dumps({"stage": stage} | values) + "\n")
        self.wandb.log(values)

    def save_weights(self, state: dict):
        """model.pt: tensors, numbers and texts only, so that torch.load(weights_only=True) reads it."""
        with atomic_path(self.folder / "model.pt") as temporary:
            torch.save(state, temporary)

    def finish(self, summary: dict):
        """summary.json, W&B's summary, and the end of both."""
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.wandb.summary.update(summary)
        self.close(exit_code=0)

    def close(self, exit_code: int):
        self.metrics.close()
        self.wandb.finish(exit_code=exit_code)
