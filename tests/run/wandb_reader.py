"""Reads W&B's offline files back: LevelDB's log format around W&B's own protobuf records.

wandb itself reads them in its Go core alone; its messages are what it defines them by.
"""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
FULL, LAST = 1, 4  # kinds of a chunk that end a record


def records(path):
    """The records of a .wandb file, in order; one that a kill cut off is left out."""
    data, position, whole = Path(path).read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:  # a header never stands over a block's end
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            return
        position += 7 + size
        whole += data[position - size : position]
        if kind in (FULL, LAST) and position <= len(data):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


class OfflineRun:
    """What W&B's file of a run holds.

    run: its first record. config; history, rows of values by name; metrics, definitions by name;
    summary; artifacts by type.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.history, self.metrics = {}, [], {}
        self.summary, self.artifacts, self.said = {}, {}, ""
        for record in records(path):
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
