"""A benchmark beside another program: what is compared, and that the program ends."""

import os

import pytest
import torch

from benchmarks import preprocessing, shared_machine
from benchmarks.__main__ import parse_arguments
from util import UserError

AS_OPENMP_ITSELF = shared_machine.SETTINGS["openmp"]


def test_speeds_alone_and_beside_are_compared(monkeypatch):
    """The other program makes ours half as fast; OpenMP's own setting is 2 % faster alone."""
    beside = []

    class Neighbour:
        def __enter__(self):
            beside.append(True)

        def __exit__(self, *_):
            beside.clear()

    def speed(arguments, spins):
        assert arguments == ["--stages", "SCEN step"]
        alone = 102.0 if spins == AS_OPENMP_ITSELF else 100.0
        return alone / 2 if beside else alone

    monkeypatch.setattr(shared_machine, "neighbour", Neighbour)
    monkeypatch.setattr(shared_machine, "speed", speed)
    record = shared_machine.shared_machine_run(["--stages", "SCEN step"])
    assert record["ours_alone"] == 100 and record["ours_beside"] == 50
    assert record["openmp_alone"] == 102 and record["openmp_beside"] == 51
    assert record["kept"] == 0.5 and record["cost_alone"] == pytest.approx(2 / 102)


def test_the_other_program_has_openmps_own_setting_and_ends(monkeypatch, tmp_path):
    told = tmp_path / "told"
    program = f"import os, time; open({str(told)!r}, 'w').write(repr(dict(os.environ)))\n"
    monkeypatch.setattr(shared_machine, "NEIGHBOUR", program + "time.sleep(100)")
    monkeypatch.setitem(os.environ, "GOMP_SPINCOUNT", "1000")
    with shared_machine.neighbour() as program:
        while not told.exists() or not told.read_text().endswith("}"):
            assert program.poll() is None
    assert program.poll() is not None
    assert "GOMP_SPINCOUNT" not in told.read_text()


def test_a_part_that_preprocessing_lacks_is_named(real_data, tmp_path):
    options = parse_arguments(["--preprocess", str(real_data), "--images", "1", "--stages", "x"])
    with pytest.raises(UserError, match="--stages x: there are packaged_backbone, "):
        preprocessing.preprocessing_run(options, torch.device("cpu"), tmp_path)
