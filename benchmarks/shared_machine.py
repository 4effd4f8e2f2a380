"""What another program on the same cores costs, and what the setting of waiting threads changes."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scegg.speed.threads import SPINS

ROUNDS = 3
SETTINGS = {"ours": SPINS, "openmp": 300_000}  # the latter is libgomp's own
NEIGHBOUR = "import torch; a = torch.rand(1024, 1024)\nwhile True: a @ a"


def shared_machine_run(arguments: list[str]) -> dict:
    """Run a benchmark of one stage alone and beside a program with as many threads; its record.

    arguments: of `python -m benchmarks`. Its speeds are medians of runs that take turns: with our
    setting and with OpenMP's own. Beside the other program the latter is run once: it takes long.
    A benchmark that fails ends this process with its exit status.
    """
    alone = {name: [] for name in SETTINGS}
    beside = []
    for _ in range(ROUNDS):
        for name, spins in SETTINGS.items():
            alone[name].append(speed(arguments, spins))
        with neighbour():
            beside.append(speed(arguments, SETTINGS["ours"]))
    with neighbour():
        openmp_beside = speed(arguments, SETTINGS["openmp"])

    medians = {f"{name}_alone": statistics.median(speeds) for name, speeds in alone.items()}
    medians["ours_beside"] = statistics.median(beside)
    return {
        "stage": "beside another program: " + " ".join(arguments),
        **medians,
        "openmp_beside": openmp_beside,
        "kept": medians["ours_beside"] / medians["ours_alone"],
        "cost_alone": 1 - medians["ours_alone"] / medians["openmp_alone"],
        "alone": alone,
        "beside": beside,
    }


def speed(arguments: list[str], spins: int) -> float:
    """Units a second of the last stage that a benchmark measures, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, "-m", "benchmarks", *arguments, "--json", str(path)]
        environment = os.environ | {"GOMP_SPINCOUNT": str(spins)}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)
        return json.loads(path.read_text())[-1]["rate"]


@contextlib.contextmanager
def neighbour() -> Iterator[subprocess.Popen]:
    """Another program, which multiplies matrices for a block with OpenMP's own setting."""
    environment = {name: os.environ[name] for name in os.environ if name != "GOMP_SPINCOUNT"}
    program = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env=environment)
    try:
        yield program
    finally:
        program.kill()
        program.wait()
