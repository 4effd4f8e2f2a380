"""A stage beside another program: what is compared, who takes turns, and that all of them end."""

import contextlib
import io
import math
import os
import signal
import sys
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import preprocessing, shared_machine, table
from benchmarks.files import backbone_stage
from benchmarks.stages import Stage
from helpers import feature_arrays, write_features
from util import UserError

OPENMPS = shared_machine.OPENMPS
ANSWER_ONCE = "print(input(), flush=True); "

# in the place of the benchmark's process: as fast as it spins, and half as fast beside a neighbour
SLICES = """
import os, sys
spins = int(os.environ["GOMP_SPINCOUNT"])
for line in sys.stdin:
    with open("turns", "a") as turns:
        print(spins, line.strip(), file=turns)
    print(spins / (2 if os.path.exists("neighbour") else 1), flush=True)
"""

# torch of the neighbour's process, without its start of seconds
TORCH = """
import os, time
class Matrix:
    def __matmul__(self, other):
        if not os.path.exists("neighbour"):
            with open("neighbour", "w") as file:
                file.write(os.environ.get("GOMP_SPINCOUNT", "OpenMP's own"))
        time.sleep(0.001)
def rand(*shape):
    return Matrix()
"""


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(FileNotFoundError):  # one that nobody waits for stays as a zombie
        return open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A working directory with a torch of its own for the neighbour."""
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_spin_count_is_compared_with_openmps_own():
    alone = {1000: [90.0, 80.0, 110.0], OPENMPS: [100.0, 100.0, 100.0]}
    beside = {1000: [40.0, 60.0], OPENMPS: [10.0, 50.0]}
    compared = shared_machine.compared(alone, beside)

    ours = compared[1000]
    assert ours["alone"] == 90 and ours["beside"] == 50
    assert ours["kept"] == pytest.approx(100 / 2 / (280 / 3))
    losses = [-math.log(0.9), -math.log(0.8), -math.log(1.1)]
    assert ours["cost_alone"] == pytest.approx(sum(losses) / 3)
    squares = sum((loss - sum(losses) / 3) ** 2 for loss in losses)
    assert ours["cost_alone_error"] == pytest.approx(math.sqrt(squares / 2 / 3))

    openmps = compared[OPENMPS]
    assert openmps["cost_alone"] == openmps["cost_alone_error"] == 0
    assert openmps["kept"] == pytest.approx(0.3)


def test_drift_that_meets_all_of_them_costs_nothing():
    speeds = [100.0, 70.0, 130.0]
    alone = {1000: [0.95 * speed for speed in speeds], OPENMPS: speeds}
    ours = shared_machine.compared(alone, alone)[1000]
    assert ours["cost_alone"] == pytest.approx(-math.log(0.95))
    assert ours["cost_alone_error"] == pytest.approx(0, abs=1e-9)


def test_processes_take_turns_alone_and_then_beside_the_neighbour(in_folder, monkeypatch):
    monkeypatch.setattr(shared_machine, "ALONE", {"rounds": 5, "seconds": 0.1})
    monkeypatch.setattr(shared_machine, "BESIDE", {"rounds": 3, "seconds": 0.2})
    (in_folder / "benchmarks.py").write_text(SLICES)
    record = shared_machine.shared_machine_run(["--stages", "SCEN step"], in_folder)

    assert record["stage"] == "beside another program: --stages SCEN step"
    assert list(record["spins"]) == [1000, 3000, 10_000, OPENMPS]
    for spins, figures in record["spins"].items():
        assert figures["alone"] == spins and figures["beside"] == spins / 2
        assert figures["kept"] == 0.5
        assert figures["cost_alone"] == pytest.approx(math.log(OPENMPS / spins))
    assert (in_folder / "neighbour").read_text() == "OpenMP's own"

    turns = [line.split() for line in (in_folder / "turns").read_text().splitlines()]
    seconds = [float(second) for _, second in turns]
    assert seconds == [0] * 4 + [0.1] * 20 + [0.2] * 12
    rounds = [[int(spins) for spins, _ in turns[at : at + 4]] for at in range(0, len(turns), 4)]
    assert all(sorted(order) == list(record["spins"]) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_benchmark_that_fails_ends_the_command_with_its_status(in_folder):
    (in_folder / "benchmarks.py").write_text("raise SystemExit(2)")
    with pytest.raises(SystemExit) as ended:
        shared_machine.shared_machine_run([], in_folder)
    assert ended.value.code == 2


def test_a_process_that_was_killed_while_it_waited_is_told_of():
    program = [sys.executable, "-c", ANSWER_ONCE + "input()"]
    with shared_machine.started(program, os.environ) as process:
        assert shared_machine.speed(process, 3) == 3
        process.kill()
        process.wait()
        with pytest.raises(UserError, match="was killed by SIGKILL"):
            shared_machine.speed(process, 3)


def test_an_interrupted_command_ends_its_processes_at_once():
    program = [sys.executable, "-c", ANSWER_ONCE + "import time; time.sleep(100)"]
    with pytest.raises(KeyboardInterrupt):
        with shared_machine.started(program, os.environ) as process:
            shared_machine.speed(process, 1)
            assert os.getpgid(process.pid) != os.getpgid(0)  # the terminal interrupts us alone
            raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_a_command_that_was_killed(in_folder, killed_by):
    slices = [sys.executable, "-c", SLICES]
    started = in_folder / "started"
    parent = os.fork()
    if not parent:
        with contextlib.suppress(BaseException):  # this is no other pytest
            with shared_machine.started(slices, os.environ) as one:
                with shared_machine.neighbour() as other:
                    shared_machine.speed(one, 1)
                    started.write_text(f"{one.pid} {other.pid}")
                    os.kill(os.getpid(), killed_by)
        os._exit(1)

    assert os.WTERMSIG(os.waitpid(parent, 0)[1]) == killed_by
    for process in started.read_text().split():
        wait_until(lambda: has_ended(int(process)))


def test_another_system_than_linux_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="run it on Linux"):
        shared_machine.shared_machine_run(["--stages", "SCEN step"], tmp_path)


# ---- inside such a process


def test_a_stage_runs_for_the_seconds_of_each_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "backbone_stage", lambda device, _: backbone_stage(device, 64))
    path = write_features(tmp_path / "features.hdf5", feature_arrays())
    chosen = ["--features", str(path), "--batch_size", "4", "--device", "cpu"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n0.05\n"))
    command.main(["--slices", *chosen, "--stages", "dense-feature"])
    ready, speed = capsys.readouterr().out.splitlines()
    assert float(ready) == 0 and float(speed) > 0


def test_exactly_one_stage_is_asked_for():
    stages = [Stage(name, print, "step") for name in ("EGGN iteration, a", "EGGN iteration, b")]
    assert shared_machine.the_stage(stages[:1]) is stages[0]
    with pytest.raises(UserError, match="'EGGN iteration, a', 'EGGN iteration, b': name one"):
        shared_machine.the_stage(stages)
    with pytest.raises(UserError, match="--stages chooses none"):
        shared_machine.the_stage([])


def test_runs_are_counted_by_the_clock_and_not_the_first(monkeypatch):
    now = [0.0]
    costs = iter([100.0, 0.4, 0.4, 0.4])  # the first warms up

    def run():
        now[0] += next(costs)

    monkeypatch.setattr(shared_machine.time, "perf_counter", lambda: now[0])
    assert shared_machine.runs_a_second(run, 1) == pytest.approx(3 / 1.2)


def test_a_part_that_preprocessing_lacks_is_named(real_data, tmp_path):
    arguments = ["--preprocess", str(real_data), "--images", "1", "--stages", "x"]
    options = command.parse_arguments(arguments)
    with pytest.raises(UserError, match="--stages x: there are packaged_backbone, "):
        preprocessing.preprocessing_run(options, torch.device("cpu"), tmp_path)
