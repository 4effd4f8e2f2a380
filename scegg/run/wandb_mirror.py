"""A run's mirror in Weights & Biases: its config, log, summary, pictures, artifacts."""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import wandb

from scegg.config import Config
from scegg.run.wandb_file import last_step
from util import UserError

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

# the x axis of a stage
AXES = {"scen": "iteration", "distill": "iteration", "eggn": "epoch", "joint": "iteration"}
ACCURACIES = ("acc_zs", "acc_seen", "acc_unseen", "H")
# what the paper's code logs, without a stage
PAPERS_NAMES = ("epoch", *ACCURACIES, *(f"best_{name}" for name in ACCURACIES))

# ---- whether, and where


def wandb_mode(flag: str | None) -> str:
    """The flag, else WANDB_MODE, else online if somebody is logged in and offline if not.

    It never prompts. An empty variable of W&B's is unset from now on: W&B itself refuses some.
    Raises UserError for a WANDB_MODE that W&B does not have.
    """
    for name, value in list(os.environ.items()):
        if name.startswith("WANDB_") and not value.strip():
            del os.environ[name]

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


def start_wandb(mode: str, **settings):
    """W&B's run; offline without a login, and where W&B cannot be reached.

    settings: those of `wandb.init`. Where W&B cannot start offline either, the run goes on without
    it. Nobody is asked. Raises UserError as set_up_wandb.
    """
    set_up_wandb(mode=mode)
    if mode == "online" and not logged_in():
        mode = "offline"

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


def unless_set(variable: str, value: str) -> str | None:
    """The value, or None where W&B's own variable says another."""
    return None if os.environ.get(variable) else value


def group_of(config: Config, facts: dict) -> str:
    """A name that runs share which differ in nothing but the seed."""
    data = facts["provenance"].get("features"), facts["dataset"]
    settings = dataclasses.asdict(config) | {"seed": None}
    digest = hashlib.sha256(json.dumps([data, settings], sort_keys=True).encode()).hexdigest()
    return f"{facts['dataset']} {config.method[:80]} {config.protocol} {digest[:8]}"


def job_type_of(config: Config) -> str:
    """SC-EGG itself is trained; what `method` calls otherwise is a baseline or an ablation."""
    if config.method == "SC-EGG":
        return "train"
    return "baseline" if config.visual_features == "cnn" else "ablation"


# ---- the mirror


class Mirror:
    """One run in W&B. `start` begins it.

    facts: dataset and provenance (`RUN_FACTS` of the config). wandb_id: its id there, which a
    sweep's agent gives and a resumed run keeps. project, name, group: the user's, which stand above
    W&B's variables.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        facts: dict,
        mode: str,
        wandb_id: str,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
    ):
        own_tags = filter(None, os.environ.get("WANDB_TAGS", "").split(","))
        in_sweep = "WANDB_SWEEP_ID" in os.environ  # the sweep says project and id

        self.validated = config.protocol == "validated"
        self.mode, self.sent = mode, 0
        self.settings = {
            "project": project or (None if in_sweep else unless_set("WANDB_PROJECT", PROJECT)),
            "name": name or unless_set("WANDB_NAME", folder.name),
            "group": group or unless_set("WANDB_RUN_GROUP", group_of(config, facts)),
            "job_type": unless_set("WANDB_JOB_TYPE", job_type_of(config)),
            "dir": unless_set("WANDB_DIR", str(folder)),
            "tags": list(dict.fromkeys([facts["dataset"], *own_tags])),
            "id": None if in_sweep else wandb_id,
            "resume": "allow",
            "config": dataclasses.asdict(config) | facts,
        }

    def start(self, kept: list[dict]):
        """Begin, or go on. kept: the lines of metrics.jsonl that a resumed run begins with.

        What W&B has is not sent again, and what it lacks of them is: its server says which steps
        it has, else its files do. Raises UserError as set_up_wandb.
        """
        self.run = start_wandb(self.mode, **self.settings)
        self.define_axes()

        if self.run.resumed:
            self.sent = self.run.starting_step - 1
        else:
            self.sent = last_step(Path(self.run.settings.wandb_dir), self.run.id)
        for number, line in enumerate(kept, 1):
            self.log(number, line.pop("stage", ""), line)

    def define_axes(self):
        """Every stage over its own iterations or epochs; of accuracies the summary has the highest.

        Not of the test set's with protocol validated: nothing is chosen on it there.
        """
        define = self.run.define_metric
        for phase in ("", "val_"):
            for stage, counter in AXES.items():
                section = f"{phase}{stage}"
                define(f"{section}/*", step_metric=f"{section}/{counter}")

            summary = None if self.validated and not phase else "max"
            for name in ACCURACIES:
                define(f"{phase}{name}", step_metric="epoch", summary=summary)
                define(f"{phase}best_{name}", step_metric="epoch")
                define(f"{phase}eggn/{name}", step_metric=f"{phase}eggn/epoch", summary=summary)

    def log(self, number: int, stage: str, values: dict):
        """A line of metrics.jsonl by its number, from 1, unless W&B has it."""
        if number > self.sent:
            self.run.log(names_in_wandb(stage, values), step=number)

    def log_picture(self, name: str, path: Path, caption: str):
        """A picture of the run's folder."""
        self.run.log({name: wandb.Image(str(path), caption=caption)})

    def log_table(self, name: str, columns: tuple[str, ...], rows: list[tuple]):
        """A table with named columns."""
        self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def summarise(self, summary: dict):
        """The content of summary.json, but for accuracies whose highest the summary has already."""
        taken = () if self.validated else ACCURACIES
        self.run.summary.update({k: value for k, value in summary.items() if k not in taken})

    def log_artifacts(self, folder: Path, features: Path, summary: dict):
        """The finished run's model with its numbers, and a reference to its feature file."""
        numbers = {
            name: value for name, value in summary.items() if isinstance(value, (int, float))
        }
        model = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=numbers)
        for path in (folder / "model.pt", folder / "summary.json", folder / "config.yaml"):
            model.add_file(str(path), policy="immutable")  # as it lies: no copy is made
        self.run.log_artifact(model)

        identity = {name: summary[name] for name in ("dataset", "split_fingerprint", "features")}
        data = wandb.Artifact(f"features-{summary['features']}", type="dataset", metadata=identity)
        data.add_reference(features.resolve().as_uri(), checksum=False)
        self.run.log_artifact(data)

    def close(self, exit_code: int):
        """The end; exit_code 0 where the run is finished."""
        self.run.finish(exit_code=exit_code)


def names_in_wandb(stage: str, values: dict) -> dict:
    """Values of a stage under names that carry it, and beside them those of the paper's code.

    eggn, H -> eggn/H and H; validation scen, val_loss_LEN -> val_scen/loss_LEN.
    """
    phase = "val_" if stage.startswith("validation ") else ""
    own = stage.removeprefix("validation ")

    names = {}
    for name, value in values.items():
        short = name.removeprefix(phase)
        names[f"{phase}{own}/{short.removeprefix(f'{own}_')}"] = value
        if short in PAPERS_NAMES:
            names[name] = value
    return names
