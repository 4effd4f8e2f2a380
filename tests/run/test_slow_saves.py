"""A state that takes long to save is saved less often, and still at a stage's end."""

from types import SimpleNamespace

import pytest

from scegg.run import checkpoint as module
from scegg.run.checkpoint import Checkpoint


@pytest.mark.parametrize(
    "seconds, expected",
    [(0.9, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]), (2.0, [8, 16, 21])],
    ids=["fast", "slow"],
)
def test_saving_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch, seconds, expected):
    """Steps of 2.5 seconds; every second one is due."""
    clock, step, saved = [0.0], [0], []

    def save_tensors(path, state):
        clock[0] += seconds
        saved.append(step[0])

    now = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0])
    monkeypatch.setattr(module, "time", now)
    monkeypatch.setattr(module, "save_tensors", save_tensors)
    checkpoint = Checkpoint(SimpleNamespace(path=tmp_path, sync=lambda: 0), {})
    checkpoint.save()
    saved.clear()
    for step[0] in checkpoint.steps("eggn", 21, 2, "iteration"):
        clock[0] += 2.5
    assert saved == expected
