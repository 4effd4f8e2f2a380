"""What is known of a card: a JSON file, saved again whenever a part has something new."""

import datetime
import json
import re
from pathlib import Path

import torch

from benchmarks.gpu.page import page_of
from benchmarks.gpu.parts import Outcome, Part
from scegg.run.identity import git_commit
from util import write_text

REHEARSAL = "rehearsal"  # in the names of its files


class Record:
    """The results of the parts on a card, with those of an earlier command that are not redone.

    output: the folder of the page; the JSON file lies in its folder `records`. card: its name, or
    None for a rehearsal on a CPU. small: whether all sizes are a rehearsal's.
    """

    def __init__(self, output: Path, card: str | None, small: bool):
        if small or card is None:
            name, page = REHEARSAL, f"benchmark_gpu_{REHEARSAL}.md"
        else:
            name, page = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-"), "benchmark_gpu.md"
        self.json_path = output / "records" / f"benchmark_gpu_{name}.json"
        self.page_path = output / page

        self.about = {"card": card, "small": small, "torch": torch.__version__}
        self.parts = {}
        if self.json_path.is_file():
            before = json.loads(self.json_path.read_text())
            if all(before[name] == value for name, value in self.about.items()):
                self.parts = before["parts"]
        self.commit = git_commit()

    def note(self, part: Part, limit: float, outcome: Outcome):
        """Note how a part stands, and save everything."""
        self.parts[part.name] = {
            "title": part.title,
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
            "limit": limit,
        } | outcome._asdict()
        self.save()

    def save(self):
        """Write both files, each whole or not at all."""
        content = self.about | {"parts": self.parts}
        write_text(self.json_path, json.dumps(content, indent=2) + "\n")
        write_text(self.page_path, page_of(content, self.json_path.name))
