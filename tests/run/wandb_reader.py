"""W&B's offline files, read back as what they say of a run."""

import json
from pathlib import Path

from scegg.run.wandb_file import records


class OfflineRun:
    """What W&B's file of a run holds.

    run: its first record. config; history, rows of values by name; metrics, definitions by name;
    summary; artifacts by type.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.history, self.metrics = {}, [], {}
        self.summary, self.artifacts, self.said = {}, {}, ""
        for record in records(Path(path)):
            take = getattr(self, f"take_{record.WhichOneof('record_type')}", None)
            if take:
                take(record)

    def take_run(self, record):
        self.run = record.run
        for item in record.run.config.update:
            self.config[item.key] = json.loads(item.value_json)

    def take_history(self, record):
        self.history.append(
            {name_of(item): json.loads(item.value_json) for item in record.history.item}
        )

    def take_metric(self, record):
        self.metrics[record.metric.name or record.metric.glob_name] = record.metric

    def take_summary(self, record):
        for item in record.summary.update:
            self.summary[name_of(item)] = json.loads(item.value_json)

    def take_artifact(self, record):
        self.artifacts[record.artifact.type] = record.artifact

    def take_output_raw(self, record):
        self.said += record.output_raw.line

    @property
    def steps(self):
        """The steps of the history, in order."""
        return [row["_step"] for row in self.history]


def name_of(item):
    """The name of an entry."""
    return ".".join(item.nested_key) or item.key


def offline_runs(folder):
    """The files below a folder, in the order in which they were begun."""
    return [OfflineRun(path) for path in sorted(Path(folder).rglob("offline-run-*/*.wandb"))]
