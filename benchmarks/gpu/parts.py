"""The parts of the command, and how one is run: in a process of its own, with a time limit.

So a part that raises, hangs, crashes or fills the memory does not take the others with it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0  # that all parts may take together
# threads would only wait for each other at a rehearsal's sizes
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WHOLE_RUN = "whole run"  # how the row begins that says what a whole run would take
LOOK_EVERY = 1.0  # seconds from one look at a part's rows to the next


class Part(NamedTuple):
    """Something to measure.

    name: for --parts. title: its heading. function: `module:function`, called with a Job.
    seconds: its limit when the whole command has MINUTES. settings: keywords of the function.
    """

    name: str
    title: str
    function: str
    seconds: float
    settings: dict = {}


CHECKS, PRECISIONS = "benchmarks.gpu.checks", "benchmarks.gpu.precisions"
REHEARSAL, PHOTOGRAPHS, TOY = (
    f"benchmarks.gpu.{name}" for name in ("rehearsal", "photographs", "toy")
)
PARTS = [
    Part("tests", "a. Tests that need CUDA", f"{CHECKS}:run_tests", 30),
    Part("parity", "a. The published implementation's numbers", f"{CHECKS}:run_parity", 15),
    Part("stages", "b. Stages at CUB's sizes", f"{PRECISIONS}:run", 60),
    Part("cub", "c. Rehearsal of CUB", f"{REHEARSAL}:run", 50, {"dataset": "CUB"}),
    Part(
        "cub_tf32",
        "c. Rehearsal of CUB in TF32",
        f"{REHEARSAL}:run",
        35,
        {"dataset": "CUB", "precision": "high"},
    ),
    Part("sun", "c. Rehearsal of SUN", f"{REHEARSAL}:run", 30, {"dataset": "SUN"}),
    Part("awa2", "c. Rehearsal of AWA2", f"{REHEARSAL}:run", 35, {"dataset": "AWA2"}),
    Part("awa2_24gb", "d. AWA2 inside 24 GB", f"{REHEARSAL}:run_inside", 25, {"gigabytes": 24}),
    Part("preprocessing", "e. Preprocessing by ResNet-101", f"{PHOTOGRAPHS}:run", 55),
    Part("toy", "f. TOY's whole run on CPU and CUDA", f"{TOY}:run", 145),
]


@dataclasses.dataclass
class Job:
    """What a part is told, and where it puts its rows.

    folder: for its files. until: its end by the clock (time.time()). small: at the sizes of a
    rehearsal without a GPU. photographs: a folder of them, or None.
    """

    folder: Path
    until: float
    small: bool = False
    photographs: Path | None = None
    rows: list[dict] = dataclasses.field(default_factory=list)

    def add(self, **row):
        """Print a row of the result, and save it with the rows before it."""
        self.rows.append(row)
        print("  " + ", ".join(f"{name} {shown(row[name])}" for name in row), flush=True)
        self.save()

    def save(self, error: str | None = None):
        """Write the rows, and what went wrong, for the process that waits for this one."""
        path = rows_path(self.folder)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({"rows": self.rows, "error": error}))
        os.replace(draft, path)

    @property
    def seconds_left(self) -> float:
        """How long the part may still take."""
        return self.until - time.time()


def shown(value) -> str:
    """A value as people read it; nothing is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def rows_path(folder: Path) -> Path:
    """The file of a part's rows."""
    return folder / "rows.json"


class Outcome(NamedTuple):
    """How a part stands. state: running, done or failed. error: what went wrong."""

    state: str
    seconds: float
    rows: list[dict]
    error: str | None = None


def run_part(part: Part, limit: float, job: Job, tell: Callable[[Outcome], None]) -> Outcome:
    """Run a part for at most `limit` seconds; tell(outcome) is called when it has new rows."""
    began = time.monotonic()
    job = dataclasses.replace(job, until=time.time() + limit)
    told = {"function": part.function, "settings": part.settings} | dataclasses.asdict(job)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.part", json.dumps(told, default=str)],
        cwd=ROOT,
        env=os.environ | (ONE_THREAD if job.small else {}),
        process_group=0,  # whatever it starts ends with it
    )

    try:
        ended = wait_for(process, began + limit, job.folder, began, tell)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    seconds = time.monotonic() - began
    saved = read_rows(job.folder)
    error = None
    if not ended:
        error = f"it did not end within its limit of {limit:.0f} s"
    elif process.returncode < 0:
        error = f"it was killed by {signal.Signals(-process.returncode).name}"
    elif process.returncode:
        error = saved["error"] or f"it ended with exit status {process.returncode}"
    return Outcome("failed" if error else "done", seconds, saved["rows"], error)


def wait_for(process, deadline: float, folder: Path, began: float, tell) -> bool:
    """Whether the process ended before the deadline (time.monotonic())."""
    count = 0
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(LOOK_EVERY, left))
            return True

        rows = read_rows(folder)["rows"]
        if len(rows) > count:
            count = len(rows)
            tell(Outcome("running", time.monotonic() - began, rows))
    return False


def read_rows(folder: Path) -> dict:
    """What a part has saved so far."""
    path = rows_path(folder)
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "error": None}
