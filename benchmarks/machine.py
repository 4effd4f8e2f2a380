"""Time and memory of a call, and what this machine can do at most."""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from scegg.speed.onednn import fast_matmul


def as_in_training(call: Callable, device: torch.device) -> Callable:
    """The call with the matrix products that training uses on the device."""

    def run():
        with fast_matmul(device):
            call()

    return run


class Timer:
    """Seconds and peak memory of a call on a device.

    On CUDA these are its events and its memory, else the clock and the process's memory.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"

    def seconds(self, call: Callable) -> float:
        """Seconds that one call takes."""
        if not self.on_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_gb(self, call: Callable) -> float | None:
        """Peak memory while `call` runs; None if the system does not tell."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() / 1e9

        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            call()
            return peak_of_process() / 1e9
        call()
        return None

    def medians(self, calls: list[Callable], repeats: int, at_most: float = 30) -> list[float]:
        """Median seconds of each call, after one warm-up.

        The calls take turns, so that drift of the machine meets all of them. If all repeats would
        take longer than `at_most` seconds, there are fewer, and at least one.
        """
        warm_up = sum(self.seconds(call) for call in calls)
        repeats = min(repeats, max(1, int(at_most / warm_up)))
        rounds = [[self.seconds(call) for call in calls] for _ in range(repeats)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def peak_of_process() -> int:
    """Bytes of the process's peak resident memory, from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


class Ceilings(NamedTuple):
    """What the machine does at most, read and written bytes counted."""

    matmul: float  # FLOP/s of a large float32 product
    copy: float  # bytes/s of a large copy


def measure_ceilings(device: torch.device, timer: Timer) -> Ceilings:
    """The machine's ceilings, with the products that training uses."""
    on_cuda = device.type == "cuda"
    n = 8192 if on_cuda else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source = torch.randn(2**28 if on_cuda else 2**26, device=device)
    target = torch.empty_like(source)

    def multiply():
        return a @ b

    def copy():
        return target.copy_(source)

    matmul_s, copy_s = timer.medians([as_in_training(multiply, device), copy], 7)
    return Ceilings(2 * n**3 / matmul_s, 2 * source.numel() * 4 / copy_s)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
