"""`python -m benchmarks.gpu` without a GPU: its parts, however they end, and what it writes."""

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_forks
import pytest
import torch

from benchmarks.flop import SIZES, run_cost
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import rehearsal, toy
from benchmarks.gpu.made_up import MadeUpFeatures, make_split
from benchmarks.gpu.page import NOMINAL, NOMINAL_BYTES, page_of
from benchmarks.gpu.parts import MINUTES, PARTS, Job, Outcome, Part
from benchmarks.gpu.record import Record
from benchmarks.gpu.rehearsal import GIB, MARGIN, smaller_card, tenth
from benchmarks.gpu.small import SMALL_COUNTS, SMALL_SHAPE, counts_of
from benchmarks.gpu.watch import covered
from helpers import ROOT
from scegg.config import default_config, read_config
from scegg.datasets.layouts import LAYOUTS
from scegg.features import storage
from util import UserError

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """As on a machine without one, also where there is one; SIGTERM ends this process as before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def fakes(monkeypatch):
    """Parts that succeed, raise, hang and are killed, and one more that succeeds."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    limits = {"raises": 60, "hangs": 4, "is_killed": 60, "runs_out_of_memory": 60, "succeeds": 60}
    parts = [
        Part(name, f"It {name}", f"gpu_fakes:{name}", seconds) for name, seconds in limits.items()
    ]
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr("benchmarks.gpu.page.PARTS", parts)
    return parts


def read_record(output: Path) -> dict:
    (path,) = (output / "records").glob("*.json")
    return json.loads(path.read_text())


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that nobody has waited for is dead)."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def becomes_true(condition, seconds=20) -> bool:
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.05)
    return condition()


# ---- how parts end


def test_whatever_a_part_does_the_next_ones_run(fakes, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        command.main(["--small", "--output", str(tmp_path)])
    assert end.value.code == 1

    parts = read_record(tmp_path)["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        "raises": "failed",
        "hangs": "failed",
        "is_killed": "failed",
        "runs_out_of_memory": "failed",
        "succeeds": "done",
    }
    assert parts["raises"]["error"] == "ValueError: the numbers differ"
    assert parts["hangs"]["error"] == "it did not end within its limit of 4 s"
    assert parts["is_killed"]["error"] == "it was killed by SIGKILL"
    assert parts["runs_out_of_memory"]["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert parts["succeeds"]["error"] is None

    # what was measured before is kept, and what a part started ends with it
    assert [len(part["rows"]) for part in parts.values()] == [1, 1, 1, 0, 1]
    assert becomes_true(lambda: not is_alive(parts["hangs"]["rows"][0]["value"]))

    page = (tmp_path / "benchmark_gpu_rehearsal.md").read_text()
    for part in parts.values():
        assert part["error"] is None or f"**Failed:** {part['error']}" in page
    assert "| all is well | 1.5 | ms |" in page
    printed = capfd.readouterr().out
    assert "4 of 5 parts failed: raises, hangs, is_killed, runs_out_of_memory" in printed
    assert "measure all is well, value 1.5, unit ms" in printed


def test_a_command_whose_parts_all_succeed_ends_well(fakes, tmp_path):
    command.main(["--small", "--output", str(tmp_path), "--parts", "succeeds"])
    assert list(read_record(tmp_path)["parts"]) == ["succeeds"]


def test_rows_are_saved_while_a_part_still_runs_and_it_ends_with_the_command(tmp_path):
    """SIGTERM, as a machine sends it whose time is up: no part goes on alone."""
    program = (
        "from benchmarks.gpu import __main__ as command; from benchmarks.gpu.parts import Part;"
        "from util import exit_on_user_error;"
        "command.PARTS = [Part('hangs', 'It hangs', 'gpu_fakes:hangs', 60)];"
        f"exit_on_user_error(lambda: command.main(['--small', '--output', {str(tmp_path)!r}]))"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT)
    try:
        assert becomes_true(lambda: list(tmp_path.glob("records/*.json")), 60)
        part = read_record(tmp_path)["parts"]["hangs"]
        assert part["state"] == "running" and is_alive(part["rows"][0]["value"])
    finally:
        process.terminate()
    assert process.wait(20) == 130
    assert becomes_true(lambda: not is_alive(part["rows"][0]["value"]))


def test_all_parts_together_take_no_longer_than_they_may():
    assert sum(part.seconds for part in PARTS) <= 60 * MINUTES == 480


@pytest.mark.parametrize("minutes, limits", [(4, [2, 10]), (0.05, [0.025, 0.125])])
def test_minutes_scale_the_limit_of_every_part(tmp_path, monkeypatch, minutes, limits):
    given = []

    def run_part(part, limit, job, tell):
        given.append(limit)
        return Outcome("done", 0.0, [])

    monkeypatch.setattr(command, "run_part", run_part)
    parts = [Part("one", "One", "a:b", 4), Part("two", "Two", "a:b", 20)]
    options = argparse.Namespace(minutes=minutes, small=True, photographs=None)
    command.run_parts(parts, options, Record(tmp_path, None, True))
    assert given == pytest.approx(limits)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--small --output FOLDER"),
        (["--small"], "--small --output FOLDER"),
        (["--parts", "cub,cup"], "--parts cup: the parts are tests, parity, stages, cub"),
        (["--minutes", "0"], "--minutes"),
        (["--minute", "3"], "unrecognized"),
    ],
)
def test_wrong_flags_are_user_errors(flags, message):
    with pytest.raises(UserError, match=message):
        command.main(flags)


# ---- everything, small


def rehearse(output: Path, *more: str) -> subprocess.CompletedProcess:
    """The command at small sizes, in a process that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "benchmarks.gpu", "--small", "--output", output, *more]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_runs_a_part_without_a_gpu(tmp_path):
    done = rehearse(tmp_path, "--parts", "tests")
    parts = read_record(tmp_path)["parts"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(parts) == ["tests"] and parts["tests"]["rows"]
    assert {row["outcome"] for row in parts["tests"]["rows"]} == {"skipped"}
    assert "no figures of a GPU" in (tmp_path / "benchmark_gpu_rehearsal.md").read_text()


def run_part_here(part, limit, job, tell):
    """A part in this process, which has imported all that it needs."""
    began = time.time()
    job = dataclasses.replace(job, until=began + limit)
    module, _, function = part.function.partition(":")
    getattr(importlib.import_module(module), function)(job, **part.settings)
    return Outcome("done", time.time() - began, job.rows)


@pytest.mark.slow
def test_every_other_part_runs_without_a_gpu(tmp_path, monkeypatch):
    """In this process, and TOY's commands as forks of one: starting Python takes seconds."""
    monkeypatch.setattr(command, "run_part", run_part_here)
    monkeypatch.setattr(toy.ToyCommands, "start", gpu_forks.start_fork)
    monkeypatch.setattr(sys, "path", [*sys.path])  # parity adds to it
    others = [part.name for part in PARTS if part.name != "tests"]
    try:
        command.main(["--small", "--output", str(tmp_path), "--parts", ",".join(others)])
    finally:
        torch.set_float32_matmul_precision("highest")
    parts = read_record(tmp_path)["parts"]
    assert list(parts) == others and all(part["rows"] for part in parts.values())
    check_rehearsal(tmp_path)


@pytest.mark.long
def test_the_whole_command_runs_without_a_gpu(tmp_path):
    """As it is started by hand."""
    docs = {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*")}
    done = rehearse(tmp_path)
    parts = read_record(tmp_path)["parts"]
    errors = {name: part["error"] for name, part in parts.items() if part["error"]}
    assert done.returncode == 0 and not errors, done.stdout + done.stderr
    assert {row["outcome"] for row in parts["tests"]["rows"]} == {"skipped"}
    assert list(parts) == [part.name for part in PARTS] and all(p["rows"] for p in parts.values())
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*")} == docs
    check_rehearsal(tmp_path)


def check_rehearsal(output):
    """What the page and the record of a rehearsal hold of the parts that measure."""
    parts = read_record(output)["parts"]
    page = (output / "benchmark_gpu_rehearsal.md").read_text()
    assert "no figures of a GPU" in page and "## Targets" not in page
    for name in ("cub", "cub_tf32", "sun", "awa2", "awa2_24gb"):
        measured = {row["measure"] for row in parts[name]["rows"]}
        assert {"evaluation", "whole run of 3 epochs, extrapolated", "a checkpoint"} <= measured
    assert any("busy, pass 2" in row["measure"] for row in parts["cub"]["rows"])
    assert {row["precision"] for row in parts["preprocessing"]["rows"] if "precision" in row} == {
        "float32",
        "bfloat16",
    }
    assert [row["runs"] for row in parts["toy"]["rows"] if "runs" in row] == [
        "cpu: first and again",
        "cpu: first and killed and resumed",
    ]


# ---- the rehearsal


@pytest.mark.parametrize("dataset", ["CUB", "SUN", "AWA2"])
def test_made_up_splits_have_the_published_numbers(dataset):
    split = make_split(counts_of(dataset, small=False))
    assert split.counts() == LAYOUTS[dataset].published
    small = tenth(split)
    assert len(small.seen) == len(split.seen) and len(small.trainval) < len(split.trainval) / 4


def test_made_up_maps_are_the_same_each_time():
    features = MadeUpFeatures.of(SMALL_COUNTS, SMALL_SHAPE, torch.device("cpu"))
    indices = features.split.trainval[3:7]
    maps = features.read(indices)
    assert maps.shape == (4, 9, 24) and torch.equal(maps, features.read(indices))
    torch.testing.assert_close(maps.norm(dim=2), torch.ones(4, 9))
    assert features.raw(indices).shape == (4, *SMALL_SHAPE)


def test_a_rehearsal_without_time_ends_with_what_it_has(tmp_path, capsys):
    job = Job(tmp_path, time.time() + MARGIN, small=True)
    rehearsal.run(job, "SUN")
    assert "the time was up in scen, step 1 of 6" in capsys.readouterr().out
    assert [row["measure"] for row in job.rows] == [
        "feature maps, on the device as float16",
        "making and storing them",
        "stage 1, a step (mean of 0)",
    ]


def test_spans_are_covered_once():
    assert covered([(0, 2), (1, 3), (5, 6), (5.2, 5.5)]) == 4
    assert covered([]) == 0


@pytest.mark.parametrize(
    "card, ram, expected",
    [
        (80, 100e9, storage.Storage("device")),
        (48, 100e9, storage.Storage("device", torch.float16)),
        (24, 100e9, storage.Storage("ram")),
        (24, 50e9, storage.Storage("disk")),
    ],
)
def test_auto_is_asked_on_a_smaller_card(tmp_path, monkeypatch, card, ram, expected):
    """torch's limit does not show in mem_get_info: choose_storage must see the smaller card."""
    fractions = []
    total = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: pytest.fail("the real card"))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share)
    )
    monkeypatch.setattr(storage, "available_ram", lambda: ram)
    usage = SimpleNamespace(total=1e12, free=1e12)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    size = 4 * 23527 * 2048 * 14 * 14
    with smaller_card(card * GIB, CUDA):
        assert storage.choose_storage(size, CUDA, tmp_path, compressed=False) == expected
    assert fractions == [card / 80]


# ---- what is written


def cub_part(minutes: float) -> dict:
    rows = [{"measure": "whole run of 300 epochs, extrapolated", "value": minutes, "unit": "min"}]
    outcome = Outcome("done", 90.0, rows)._asdict()
    return {"title": "c. CUB", "date": "d", "commit": None, "limit": 100} | outcome


def test_a_gpu_has_a_page_with_targets():
    record = {"card": "NVIDIA H100 80GB HBM3", "small": False, "torch": "2.11.0"}
    record["parts"] = {"cub": cub_part(4.2), "cub_tf32": cub_part(3.9)}
    page = page_of(record, "benchmark_gpu_x.json")
    assert "no figures of a GPU" not in page and "# Benchmark on a GPU: NVIDIA H100" in page
    assert "| float32 | 5 | 4.2 | reached | 2.43 | 2.25 |" in page
    assert "| TF32 | 3.5 | 3.9 | missed |" in page

    record["parts"] = {}
    assert "| float32 | 5 | - | not measured |" in page_of(record, "benchmark_gpu_x.json")


def test_a_card_has_files_of_its_own_and_a_rehearsal_others(tmp_path):
    card = Record(tmp_path, "NVIDIA H100 80GB HBM3", small=False)
    assert card.page_path == tmp_path / "benchmark_gpu.md"
    assert card.json_path.name == "benchmark_gpu_nvidia-h100-80gb-hbm3.json"
    for rehearsed in (Record(tmp_path, "NVIDIA H100", small=True), Record(tmp_path, None, False)):
        assert rehearsed.page_path.name == "benchmark_gpu_rehearsal.md"
        assert rehearsed.json_path.name == "benchmark_gpu_rehearsal.json"


def test_parts_that_are_not_redone_stay(tmp_path):
    first, second = PARTS[:2]
    Record(tmp_path, "Card", small=False).note(first, 1.0, Outcome("done", 1.0, []))
    record = Record(tmp_path, "Card", small=False)
    record.note(second, 1.0, Outcome("failed", 1.0, [], "it fell | over"))
    assert list(read_record(tmp_path)["parts"]) == [first.name, second.name]
    assert "failed: it fell \\| over" in record.page_path.read_text()


def test_every_part_is_documented_with_its_limit():
    text = (ROOT / "docs" / "gpu.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for part in PARTS:
        (row,) = [line for line in lines if f"`{part.name}`" in line.partition(" | ")[0]]
        assert f"{part.seconds} s" in row


def test_the_documented_floor_is_the_computed_one():
    text = (ROOT / "docs" / "gpu.md").read_text()
    cost = run_cost(SIZES["CUB"], read_config(default_config("CUB"), {}))
    for products, flops in NOMINAL.items():
        floor = cost.floor(flops, NOMINAL_BYTES)
        for what in ("training", "evaluating"):
            arithmetic, traffic = floor[f"{what}, arithmetic"], floor[f"{what}, traffic"]
            assert f"| {what} | {products} | {arithmetic:.0f} s | {traffic:.0f} s |" in text
