"""Read, check and copy the summaries of finished runs."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from scegg.config import FIELDS
from scegg.datasets.layouts import NAME, require_known
from scegg.report.table import METRICS
from util import UserError, text_encoding

# by protocol: how the epochs of a row were picked, and the prefix of its metrics in summary.json
SELECTIONS = {
    "paper": {"best on test": "best_", "last epoch": "last_"},
    "validated": {"validated": "", "validated, last epoch": "last_"},
}
# rows of SCEN alone, and the prefixes of their metrics
SCEN_ALONE = {
    "SCEN alone: local classifier": "local_",
    "SCEN alone: distilled classifier": "global_",
}

ACCURACIES = [
    prefix + name for prefix in ("", "best_", "last_", *SCEN_ALONE.values()) for name in METRICS
]
CHECKED = [
    "dataset",
    "protocol",
    "seed",
    "full_published_split",
    "config",
    "method",
    "backbone",
    "split_fingerprint",
    "w2v",
    "dtype",
    *ACCURACIES,
]
# what the summaries of older versions lack
DEFAULTS = {
    "method": "SC-EGG",
    "protocol": "paper",
    "config": None,
    "w2v": None,
    "dtype": "float32",
}
# of keys that a run's version had not yet
KEYS_DEFAULTS = {
    name: field.default
    for name, field in FIELDS.items()
    if field.default is not dataclasses.MISSING
}


class MeasuredOn(NamedTuple):
    """What a run was measured on; runs that share it measure the same thing."""

    dataset: str
    split: str
    backbone: str
    full_published_split: bool
    gaussian_words: bool  # of the attributes, in the place of word2vec's vectors
    dtype: str  # in which the maps are stored

    @property
    def is_benchmark(self) -> bool:
        """Whether published methods were measured so.

        That is on the full split, on ResNet-101's maps as float32, with vectors of words.
        """
        on_its_maps = (self.backbone, self.dtype) == ("resnet101", "float32")
        return self.full_published_split and on_its_maps and not self.gaussian_words


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run: where its summary lies, the file's text, and what it says.

    Keys that an older version did not write have their default in `summary`.
    """

    path: Path
    text: str
    summary: dict

    @property
    def measured_on(self) -> MeasuredOn:
        """Its dataset, split and backbone."""
        names = ("dataset", "split_fingerprint", "backbone", "full_published_split")
        data = (self.summary[name] for name in names)
        return MeasuredOn(*data, self.summary["w2v"] == "gaussian", self.summary["dtype"])

    @property
    def kind(self) -> tuple[MeasuredOn, str, str]:
        """What runs of one method on the same data share."""
        return self.measured_on, self.summary["method"], self.summary["protocol"]

    @property
    def config(self) -> dict | None:
        """Every hyperparameter but the seed; None for a summary older than that key."""
        config = self.summary["config"]
        if config is None:
            return None
        config = KEYS_DEFAULTS | config
        return {name: value for name, value in config.items() if name != "seed"}

    @property
    def features(self) -> str | None:
        """The digest of its feature file; None for a summary older than that key."""
        return self.summary.get("features")

    @property
    def age(self) -> str:
        """When the run began, as its folder's name says; later runs sort last.

        A file in another folder has the time at which it was last written.
        """
        stamp = re.search(r"-(\d{8}-\d{6})-", self.path.absolute().parent.name)
        if stamp:
            return stamp[1]
        return time.strftime("%Y%m%d-%H%M%S", time.localtime(self.path.stat().st_mtime))


def warn(text: str):
    """Print one line to stderr, so that a table on stdout stays a table."""
    print(f"warning: {text}", file=sys.stderr)


def canonical(value) -> str:
    """A JSON value as text that is equal for equal values."""
    return json.dumps(value, sort_keys=True)


def gather(paths: list[Path]) -> tuple[list[FinishedRun], int]:
    """The finished runs below `paths`, and the number of run folders without a summary.json.

    A path is a folder or a summary. A file that is no run's summary is skipped with a warning.
    Raises UserError for a path that does not exist.
    """
    files, unfinished = [], 0
    for path in paths:
        if path.is_dir():
            files += summary_files(path)
            unfinished += count_unfinished(path)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path} does not exist: name folders of runs, or summaries")

    runs = []
    for file in files:
        try:
            runs.append(read_run(file))
        except OSError as error:
            warn(f"{file} is left out: {error.strerror}")
        except UserError as error:
            warn(f"{file} is left out: {error}")
        except (ValueError, RecursionError) as error:
            warn(f"{file} is left out: it is no run's summary ({error})")
    return runs, unfinished


def summary_files(folder: Path) -> list[Path]:
    """The summaries in the run folders below a folder, and those that `record` copied into it."""
    return sorted([*folder.rglob("summary.json"), *folder.glob("[!.]*_seed*.json")])


def count_unfinished(folder: Path) -> int:
    """How many run folders below a folder have no summary yet."""
    logs = folder.rglob("metrics.jsonl")
    return sum(not (log.parent / "summary.json").exists() for log in logs)


def read_run(path: Path) -> FinishedRun:
    """The run of a summary file.

    Raises OSError, ValueError that names the first key whose value no run writes, or UserError for
    a dataset that nothing here describes.
    """
    text = path.read_text(text_encoding(path))
    summary = json.loads(text)
    if not isinstance(summary, dict):
        raise ValueError("not a mapping")

    summary = DEFAULTS | summary
    for name in CHECKED:
        if not is_possible(name, summary.get(name)):
            raise ValueError(f"its {name} is {summary.get(name, 'missing')!r:.40}")
    require_known(summary["dataset"])
    return FinishedRun(path, text, summary)


def is_possible(name: str, value) -> bool:
    """Whether a run can have written this value (None: nothing) under a key of its summary."""
    if name in ACCURACIES:
        return value is None or (type(value) in (int, float) and 0 <= value <= 100)

    # in lists: a value that cannot be hashed is no error of its own
    match name:
        case "dataset":
            return isinstance(value, str) and NAME.fullmatch(value) is not None
        case "protocol":
            return value in list(SELECTIONS)
        case "seed":
            return type(value) is int
        case "full_published_split":
            return type(value) is bool
        case "config":
            return value is None or isinstance(value, dict)
        case "w2v":
            return value is None or isinstance(value, str)
    return isinstance(value, str) and value.isprintable() and value.strip() != ""


def newest_of_each_seed(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The runs without the older of two that share kind, config and seed.

    It warns of each one left out, but not of a copy of the same summary.
    """
    newest = {}
    for run in sorted(runs, key=lambda run: run.age):
        identity = (run.kind, canonical(run.config), run.summary["seed"])
        older = newest.get(identity)
        if older is not None and older.text != run.text:
            reason = "a newer run of the same config and seed"
            if None not in (older.features, run.features) and older.features != run.features:
                reason += ", on another feature file"
            warn(f"{older.path} is left out: {run.path} is {reason}")
        newest[identity] = run
    return list(newest.values())
