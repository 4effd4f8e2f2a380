"""A run's folder: config, log, summary, weights; Weights & Biases is told of what is logged."""

import contextlib
import datetime
import json
import os
import secrets
from pathlib import Path

from scegg.config import Config, config_yaml
from scegg.processes import locked
from scegg.run.wandb_mirror import Mirror
from scegg.run.winners import share_equal_tensors
from util import UserError, save_tensors, sha256, write_text


class RunFolder:
    """One run: runs/<dataset>-<time>-<id>/ with config.yaml, metrics.jsonl, summary.json, model.pt.

    path: of a new run (`new_folder`), or of one to continue. mirror: the run in W&B. logged: bytes
    of its metrics.jsonl that belong to the checkpoint it continues from; what stands behind them is
    cut off and will be logged again, to W&B only if it has it not.
    Raises UserError for a metrics.jsonl that is shorter than `logged`.
    """

    def __init__(self, path: Path, config: Config, mirror: Mirror, logged: int = 0):
        self.path, self.mirror = path, mirror
        if not (path / "config.yaml").is_file():
            write_text(path / "config.yaml", config_yaml(config))

        self.metrics = open(path / "metrics.jsonl", "ab+")  # noqa: SIM115, open for the run
        if self.metrics.tell() < logged:
            raise UserError(
                f"{path / 'metrics.jsonl'} is shorter than when the checkpoint was made: it was "
                "changed; start the run anew"
            )
        self.metrics.truncate(logged)
        self.metrics.seek(0)
        kept = self.read_lines()
        self.lines = len(kept)
        mirror.start(kept)

    def read_lines(self) -> list[dict]:
        """The lines from here on. Raises UserError for what no run writes."""
        try:
            return [dict(json.loads(line)) for line in self.metrics]
        except (ValueError, TypeError):
            raise UserError(
                f"{self.path / 'metrics.jsonl'} was changed since the checkpoint was made; start "
                "the run anew"
            ) from None

    def log(self, stage: str, values: dict):
        """One line of metrics.jsonl, and the same values to W&B."""
        self.metrics.write((json.dumps({"stage": stage} | values) + "\n").encode())
        self.metrics.flush()
        self.lines += 1
        self.mirror.log(self.lines, stage, values)

    def sync(self) -> int:
        """Make what is logged durable; returns its length in bytes."""
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def save_weights(self, state: dict) -> str:
        """model.pt: tensors, numbers and texts, which torch.load(weights_only=True) reads.

        Returns the file's SHA-256.
        """
        save_tensors(self.path / "model.pt", share_equal_tensors(state))
        return sha256(self.path / "model.pt")

    def finish(self, summary: dict):
        """summary.json and W&B's summary; the checkpoint has done its work."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        (self.path / "checkpoint.pt").unlink(missing_ok=True)
        self.mirror.summarise(summary)

    def close(self, exit_code: int):
        """The end of the logs; exit_code 0 where the run is finished."""
        with contextlib.suppress(OSError):  # a full disk was told of when it was written to
            self.metrics.close()
        self.mirror.close(exit_code)


def new_folder(root: Path, dataset: str) -> Path:
    """Make the folder of a new run. Raises UserError where it cannot be made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = root / f"{dataset}-{stamp}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} could not be made ({error.strerror}): name another place "
            "with --runs"
        ) from None
    return folder


def folder_to_resume(root: Path, dataset: str, name: str) -> Path:
    """The folder of the run `name`: a path, or a folder in root.

    "" means the last unfinished run of a dataset.
    Raises UserError when there is none, or when it is finished.
    """
    if not name:
        return last_unfinished(root, dataset)

    folder = Path(name) if Path(name).is_dir() else root / name
    if not folder.is_dir():
        raise UserError(f"--resume {name}: there is no such run, here or in {root}")
    if (folder / "summary.json").is_file():
        raise UserError(
            f"--resume {name}: this run is finished, its numbers are in {folder / 'summary.json'}"
        )
    return folder


def last_unfinished(root: Path, dataset: str) -> Path:
    """The unfinished run of a dataset that was saved last, and that no process is training."""
    checkpoints = list(root.glob(f"{dataset}-*/checkpoint.pt"))
    checkpoints.sort(key=lambda path: path.stat().st_mtime, reverse=True)

    for folder in (path.parent for path in checkpoints):
        if (folder / "summary.json").exists():
            continue
        with contextlib.suppress(UserError), locked(folder / ".lock", "training it"):
            return folder
    raise UserError(f"{root} has no unfinished run of {dataset} to resume")
