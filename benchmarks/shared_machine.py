"""What another program on the same cores costs, by how long waiting threads spin.

OpenMP reads its setting once, so a process of its own runs the stage with each. The processes take
turns of a second or two, and sleep between: what slows the machine for longer meets all of them.
"""

import contextlib
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.machine import as_in_training
from benchmarks.stages import Stage
from benchmarks.table import chosen_stages
from scegg.speed.threads import SPINS
from util import UserError

OPENMPS = 300_000  # what libgomp takes by itself
SPIN_COUNTS = (SPINS, 3000, 10_000, OPENMPS)
ALONE = {"rounds": 20, "seconds": 1}
BESIDE = {"rounds": 6, "seconds": 2}

NEIGHBOUR = """
import select, sys, torch
a = torch.rand(1024, 1024)
a @ a
print(flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:  # stdin ends with the benchmark
    a @ a
"""


def shared_machine_run(arguments: list[str], folder: Path) -> dict:
    """Compare spin counts by a stage's speed alone and beside a program with as many threads.

    arguments: of `python -m benchmarks`, which choose one stage; it runs on the CPU. folder: for
    its files. Returns the record. Raises UserError where there is no libgomp. A benchmark that
    fails ends this process with its exit status.
    """
    if sys.platform != "linux":
        raise UserError("--shared compares settings of GNU's OpenMP: run it on Linux")

    command = [sys.executable, "-m", "benchmarks", "--slices", *arguments, "--device", "cpu"]
    with contextlib.ExitStack() as stack:
        programs = {}
        for spins in SPIN_COUNTS:
            # what a killed process leaves in the folder goes with it
            variables = {"GOMP_SPINCOUNT": str(spins), "TMPDIR": str(folder)}
            programs[spins] = stack.enter_context(started(command, os.environ | variables))
            speed(programs[spins], 0)  # until the stage is there

        alone = in_turns(programs, **ALONE)
        with neighbour():
            beside = in_turns(programs, **BESIDE)

    stage = "beside another program: " + " ".join(arguments)
    return {"stage": stage, "unit": "run", "spins": compared(alone, beside)}


def in_turns(programs: dict, rounds: int, seconds: float) -> dict[int, list[float]]:
    """The speeds of each spin count's program; a round is a turn of each, in random order."""
    speeds = {spins: [] for spins in programs}
    order, rng = list(programs), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for spins in order:
            speeds[spins].append(speed(programs[spins], seconds))
    return speeds


def compared(alone: dict[int, list[float]], beside: dict[int, list[float]]) -> dict[int, dict]:
    """What each spin count keeps beside the other program and loses alone.

    alone, beside: runs a second, by rounds. `alone` and `beside` are their medians, `kept` the
    ratio of their means. `cost_alone` is the mean over the rounds of log(OpenMP's own speed / the
    spin count's), which is about the share that is lost, with its standard error.
    """
    spin_counts = {}
    for spins, speeds in alone.items():
        pairs = zip(alone[OPENMPS], speeds, strict=True)
        losses = [math.log(openmps / ours) for openmps, ours in pairs]
        spin_counts[spins] = {
            "alone": statistics.median(speeds),
            "beside": statistics.median(beside[spins]),
            "kept": statistics.fmean(beside[spins]) / statistics.fmean(speeds),
            "cost_alone": statistics.fmean(losses),
            "cost_alone_error": statistics.stdev(losses) / math.sqrt(len(losses)),
        }
    return spin_counts


# ---- other processes, from outside


@contextlib.contextmanager
def started(command: list[str], environment: dict) -> Iterator[subprocess.Popen]:
    """A program for a block. If this process is killed, the end of its stdin tells it to end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    # in a group of its own: Ctrl-C is for this process, which then kills it
    with subprocess.Popen(command, env=environment, process_group=0, **pipes) as program:
        try:
            yield program
        finally:
            program.kill()


def speed(program: subprocess.Popen, seconds: float) -> float:
    """Runs a second of a program's stage, which runs for about so many seconds and then waits."""
    with contextlib.suppress(BrokenPipeError):  # of a program that ended; nor does it answer
        program.stdin.write(f"{seconds}\n".encode())
    return float(answer(program))


def answer(program: subprocess.Popen) -> bytes:
    """The next line of a program's stdout. If it ended, this process ends with its exit status."""
    line = program.stdout.readline()
    if line:
        return line

    status = program.wait()
    if status >= 0:
        sys.exit(status)
    name = signal.Signals(-status).name
    advice = "if memory ran out, give a smaller --batch_size"
    raise UserError(f"a process of the benchmark was killed by {name}: {advice}")


@contextlib.contextmanager
def neighbour() -> Iterator[subprocess.Popen]:
    """Another program, which multiplies matrices for a block with OpenMP's own setting."""
    environment = {name: os.environ[name] for name in os.environ if name != "GOMP_SPINCOUNT"}
    with started([sys.executable, "-c", NEIGHBOUR], environment) as program:
        answer(program)  # it multiplies now
        yield program


# ---- such a process, from inside


def run_slices(options, device: torch.device):
    """Run the chosen stage for as many seconds as each line of stdin says; print runs a second.

    It ends with stdin. Raises UserError unless the command line's options choose one stage.
    """
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # stdout holds speeds alone
            _, stages = chosen_stages(options, device, Path(folder))
        run = as_in_training(the_stage(stages).run, device)
        for line in sys.stdin:
            print(runs_a_second(run, float(line)), flush=True)


def the_stage(stages: list[Stage]) -> Stage:
    """The only one of the stages."""
    if len(stages) != 1:
        names = ", ".join(f"'{stage.name}'" for stage in stages) or "none"
        raise UserError(f"--shared takes one stage, and --stages chooses {names}: name one")
    return stages[0]


def runs_a_second(run: Callable, seconds: float) -> float:
    """How often a call runs in a second, over at least so many seconds and after a warm-up."""
    run()  # the caches held another process's numbers
    start = time.perf_counter()
    runs = 0
    while (passed := time.perf_counter() - start) < seconds:
        run()
        runs += 1
    return runs / passed
