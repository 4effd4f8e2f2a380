"""A run's folder and its mirror in Weights & Biases: config, log, summary, weights."""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
from pathlib import Path

import wandb

from scegg.config import RUN_FACTS, Config, config_yaml
from scegg.run.winners import share_equal_tensors
from util import UserError, locked, save_tensors, sha256, write_text

PROJECT = "SCEGG"
# W&B's modes, its old names among them
MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
# W&B never asks, and waits no longer than these seconds, whatever its variables say
UNATTENDED = {
    "relogin": False,
    "init_timeout": 60,
    "finish_timeout": 300,
    "x_service_wait": 60,
}

# ---- Weights & Biases


def wandb_mode(flag: str | None) -> str:
    """The flag, else WANDB_MODE, else online if somebody is logged in and offline if not.

    It never prompts. Raises UserError for a WANDB_MODE that W&B does not have.
    """
    mode = flag or os.environ.get("WANDB_MODE")
    if mode in MODES:
        return MODES[mode]
    if mode:
        raise UserError(f"WANDB_MODE={mode}: use online, offline or disabled")
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether W&B finds an API key and its server takes it; a line says why not.

    Nobody is asked. Raises UserError as set_up_wandb.
    """
    if set_up_wandb().mode != "online":  # `wandb offline` was said here
        return False

    # that variable bounds W&B's check of the key; without the check, the run's start shows it
    verify = "WANDB_HTTP_TIMEOUT" not in os.environ
    try:
        found = wandb.login(prompt=False, verify=verify)
    except Exception as error:  # W&B has many kinds of them
        print(f"W&B: {reason(error)}: logging offline")
        start_anew("offline")
        return False
    if not found:
        print("W&B: nobody is logged in (`wandb login` does that): logging offline")
    return found


def set_up_wandb(**settings) -> wandb.Settings:
    """W&B's settings in this process. Raises UserError for a WANDB_ variable that cannot be."""
    try:
        return wandb.setup(wandb.Settings(**UNATTENDED, **settings)).settings
    except (ValueError, wandb.errors.Error) as error:  # pydantic's, and W&B's own
        raise UserError(f"W&B: {error}: correct this WANDB_ variable") from None


def start_anew(mode: str):
    """Set W&B up without the process that it had, which may have died."""
    os.environ.pop("WANDB_IDENTITY_TOKEN_FILE", None)  # of which it dies, also offline
    with contextlib.suppress(Exception):
        wandb.teardown()
    set_up_wandb(mode=mode)


def reason(error: Exception) -> str:
    """What an error of W&B's says, in a line; some say nothing but their name."""
    return str(UserError(error)) or type(error).__name__


def start_wandb(folder: Path, config: Config, dataset: str, mode: str, wandb_id: str):
    """W&B's run of a folder; offline without a login, and where W&B cannot be reached.

    Where W&B cannot start offline either, the run goes on without it. Nobody is asked.
    Raises UserError as set_up_wandb.
    """
    set_up_wandb(mode=mode)
    if mode == "online" and not logged_in():
        mode = "offline"

    facts = dict(zip(RUN_FACTS, [dataset], strict=True))
    settings = {
        "project": PROJECT,
        "name": folder.name,
        "id": wandb_id,
        "resume": "allow",
        "dir": str(folder),
        "config": dataclasses.asdict(config) | facts,
    }

    fallbacks = {"online": "offline", "offline": "disabled"}
    while mode in fallbacks:
        try:
            return wandb.init(mode=mode, **settings)
        except Exception as error:
            print(
                f"W&B could not start {mode} ({reason(error)}): its mode is {fallbacks[mode]} now"
            )
            mode = fallbacks[mode]
            start_anew(mode)
    return wandb.init(mode=mode, **settings)


# ---- the folder


class RunFolder:
    """One run: runs/<dataset>-<time>-<id>/ with config.yaml, metrics.jsonl, summary.json, model.pt.

    path: of a new run (`new_folder`), or of one to continue. logged: bytes of its metrics.jsonl
    that belong to the checkpoint it continues from; what stands behind them is cut off and will be
    logged again. wandb_id: its id there, which a sweep's agent gives and a resumed run keeps.
    Raises UserError for a metrics.jsonl that is shorter than `logged`.
    """

    def __init__(
        self, path: Path, config: Config, dataset: str, mode: str, wandb_id: str, logged: int = 0
    ):
        self.path = path
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
        self.lines = sum(1 for _ in self.metrics)

        self.wandb = start_wandb(path, config, dataset, mode, wandb_id)

    def log(self, stage: str, values: dict):
        """One line of metrics.jsonl, and the same values to W&B."""
        self.metrics.write((json.dumps({"stage": stage} | values) + "\n").encode())
        self.metrics.flush()
        self.lines += 1
        self.wandb.log(values, step=self.lines)

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

    def log_picture(self, name: str, path: Path):
        """A picture of the run's folder, to W&B."""
        self.wandb.log({name: wandb.Image(str(path))}, step=self.lines)

    def finish(self, summary: dict):
        """summary.json and W&B's summary; the checkpoint has done its work."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        (self.path / "checkpoint.pt").unlink(missing_ok=True)
        self.wandb.summary.update(summary)

    def close(self, exit_code: int):
        """The end of the logs; exit_code 0 where the run is finished."""
        with contextlib.suppress(OSError):  # a full disk was told of when it was written to
            self.metrics.close()
        self.wandb.finish(exit_code=exit_code)


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
