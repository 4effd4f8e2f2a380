"""Part a: the tests that need CUDA, and parity with the published implementation's numbers."""

import sys

import pytest
import torch

from benchmarks.gpu.parts import ROOT, Job
from util import pick_device

NEEDS_CUDA = "no CUDA device"  # the reason for which such a test is skipped elsewhere


class CudaTests:
    """A plugin of pytest: keeps the tests that need CUDA, and adds a row for each."""

    def __init__(self, job: Job):
        self.job = job

    def pytest_collection_modifyitems(self, items: list[pytest.Item]):
        """Drop all other tests."""
        items[:] = [item for item in items if needs_cuda(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        """Add a row once a test has been called, or was not because of its setup."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            seconds = round(report.duration, 2)
            self.job.add(test=report.nodeid, outcome=report.outcome, seconds=seconds)


def needs_cuda(item: pytest.Item) -> bool:
    """Whether a test is skipped where there is no CUDA."""
    return any(mark.kwargs.get("reason") == NEEDS_CUDA for mark in item.iter_markers(name="skipif"))


def run_tests(job: Job):
    """Run the tests that need CUDA. Raises RuntimeError if one fails, or is skipped beside CUDA."""
    files = [
        str(file)
        for file in sorted((ROOT / "tests").glob("*/test_*.py"))
        if NEEDS_CUDA in file.read_text(encoding="utf-8")
    ]
    folder = f"--basetemp={job.folder / 'pytest'}"
    status = pytest.main([*files, "-q", "-p", "no:cacheprovider", folder], [CudaTests(job)])

    outcomes = [row["outcome"] for row in job.rows]
    expected = "passed" if torch.cuda.is_available() else "skipped"
    if status or set(outcomes) != {expected}:
        raise RuntimeError(
            f"{outcomes.count('passed')} of {len(outcomes)} tests passed, "
            f"{outcomes.count('failed')} failed, {outcomes.count('skipped')} were skipped "
            f"(pytest's status {int(status)})"
        )


def run_parity(job: Job):
    """Hold float32 to the published numbers, and say how far TF32 is from them.

    Raises RuntimeError if float32 is off by more than tests/parity.py allows.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import parity

    device = pick_device(None)
    errors = {}
    for name, precision in (("float32", "highest"), ("TF32", "high")):
        torch.set_float32_matmul_precision(precision)
        errors[name], _ = parity.measure(parity.GOLDEN, device)

    for group, error in errors["float32"].items():
        job.add(
            computation=group,
            **{"float32, relative error": error, "TF32, relative error": errors["TF32"][group]},
        )
    worst = max(errors["float32"].values())
    if not worst <= parity.TOLERANCE:  # also where it is NaN
        raise RuntimeError(f"float32 is off by {worst:.2e}, more than {parity.TOLERANCE}")
