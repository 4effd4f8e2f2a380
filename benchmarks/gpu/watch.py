"""When an epoch of a run began and ended, how busy the device was, and when time is up."""

import os
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scegg.features.storage import FeatureMaps
from scegg.run.checkpoint import Checkpoint
from scegg.run.pipeline import SPLITS, Pipeline

PROFILED = 30  # iterations of a pass that the profiler looks at
PROFILE_SECONDS = 10.0  # that it takes beside the epoch


class OutOfTime(Exception):
    """The time of a rehearsal is up, or all of it has been seen."""


def wait_for(device: torch.device):
    """Wait until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TimedCheckpoint(Checkpoint):
    """A run's checkpoint that notes what saving takes, and ends the run when its time is up.

    device: where the run computes. until: by the clock (time.time()). before_step(stage) is called
    before each step.
    """

    def __init__(self, folder, device: torch.device, until: float):
        super().__init__(folder, identity={})
        self.device, self.until = device, until
        self.saves: list[float] = []
        self.before_step = lambda stage: None

    def steps(self, stage: str, total: int, every: int, unit: str):
        """As a checkpoint's. Raises OutOfTime."""
        for step in super().steps(stage, total, every, unit):
            if time.time() > self.until:
                raise OutOfTime(f"the time was up in {stage}, step {step} of {total}")
            self.before_step(stage)
            yield step

    def save(self):
        """Save the state, and note the seconds."""
        wait_for(self.device)
        start = time.perf_counter()
        super().save()
        self.saves.append(time.perf_counter() - start)


class Busy:
    """The device's work between start and stop, by torch's profiler.

    On a CPU, which has no kernels, the operators' time stands for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        on_cuda = device.type == "cuda"
        self.kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
        # torch's own advice where CUDA graphs are profiled: keep the tracer once it is set up
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
        activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
        self.profile = profile(activities=[activity], acc_events=True)

    def start(self):
        """Begin to look."""
        wait_for(self.device)
        self.profile.start()

    def stop(self) -> float | None:
        """Seconds in which the device did something; None if nothing was seen."""
        wait_for(self.device)
        self.profile.stop()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in self.profile.events()
            if event.device_type == self.kind and not event.is_user_annotation
        ]
        return covered(spans) / 1e6 if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that the spans (start, end) cover together."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class WatchedPipeline(Pipeline):
    """A run whose epochs are timed. When its time ends, one more epoch is profiled.

    `watch` comes before `run`, which ends with OutOfTime. Every list holds an entry an epoch.
    """

    def watch(self, tell: Callable, told_epochs: Callable, profiles: bool):
        """What is told. tell(measure, value, unit): of a stage; told_epochs(): of all epochs.

        profiles: whether an epoch is profiled, too.
        """
        self.tell, self.told_epochs, self.profiles = tell, told_epochs, profiles
        self.a_pass = -(-len(self.labels["trainval"]) // self.sampler.batch_size)
        self.passes: list[list[float]] = []  # seconds an iteration in each pass
        self.evaluations: list[float] = []  # seconds
        self.busy: dict[str, float | None] = {}  # seconds an iteration in each pass; an evaluation

        self.count = 0  # steps of this epoch
        self.of_epoch: list[float] = []
        self.began = self.saved_before = 0.0
        self.is_profiled, self.profiler = False, None
        self.checkpoint.before_step = self.before_step

    # ---- the stages before

    def load_maps(self) -> dict[str, FeatureMaps]:
        """The maps of all splits, each in the rehearsal's storage."""
        if self.maps is None:
            with self.checkpoint.timed("read"):
                self.maps = {
                    name: FeatureMaps(
                        self.features, getattr(self.split, name), self.device, self.storage
                    )
                    for name in SPLITS
                }
                wait_for(self.device)
            size = sum(len(maps) for maps in self.maps.values()) * self.features.size(1) / 1e9
            size *= self.storage.dtype.itemsize / 4
            self.tell(f"feature maps, {self.storage}", size, "GB")
            self.tell("making and storing them", self.seconds_of("read"), "s")
        return self.maps

    def fit_scen(self):
        """Stage 1."""
        self.load_maps()
        start, saved = time.perf_counter(), sum(self.checkpoint.saves)
        try:
            super().fit_scen()
        finally:
            wait_for(self.device)
            seconds = time.perf_counter() - start - (sum(self.checkpoint.saves) - saved)
            steps = self.checkpoint.steps_done("scen")
            self.tell(f"stage 1, a step (mean of {steps})", 1e3 * seconds / max(steps, 1), "ms")

    def embed(self):
        """The pass over all images."""
        super().embed()
        self.tell("dense-semantic features of all images", self.seconds_of("embed"), "s")

    def distill(self):
        """Stage 2."""
        super().distill()
        steps = self.config.distill_iterations
        seconds = self.seconds_of("distill")
        self.tell(f"stage 2, a step (mean of {steps})", 1e3 * seconds / max(steps, 1), "ms")

    def seconds_of(self, stage: str) -> float:
        """Seconds of a stage, without its saves."""
        return self.checkpoint.notes["seconds"].get(f"{self.checkpoint.phase}{stage}", 0.0)

    # ---- the epochs of stage 3

    def before_step(self, stage: str):
        """Begin a pass, or end its profile."""
        if not stage.endswith("eggn"):
            return
        within = self.count % self.a_pass
        if within == 0:
            self.end_pass()
            self.begin_profile()
        elif within == PROFILED:
            self.end_profile(f"pass {self.count // self.a_pass + 1}", PROFILED)
        self.count += 1

    def end_pass(self):
        """Note the seconds an iteration of the pass that ends here, and begin the next."""
        wait_for(self.device)
        now, saved = time.perf_counter(), sum(self.checkpoint.saves)
        if self.count:
            self.end_profile(f"pass {self.count // self.a_pass}", self.a_pass)
            seconds = now - self.began - (saved - self.saved_before)
            self.of_epoch.append(seconds / self.a_pass)
        self.began, self.saved_before = now, saved

    def end_epoch(self, epoch: int, losses: dict):
        """Evaluate, and see what there is time for."""
        self.end_pass()
        super().end_epoch(epoch, losses)
        if self.is_profiled:
            raise OutOfTime("all was seen")
        self.passes.append(self.of_epoch)
        self.of_epoch, self.count = [], 0

        an_epoch = self.epoch_seconds()
        left = self.checkpoint.until - time.time() - PROFILE_SECONDS
        if left < 2 * an_epoch or epoch + 1 == self.config.nepoch:
            self.told_epochs()
            if left < an_epoch or not self.profiles:
                raise OutOfTime("no epoch is profiled")
            self.is_profiled = True

    def evaluate(self, epoch: int) -> dict:
        """An evaluation, timed or profiled."""
        wait_for(self.device)
        start = time.perf_counter()
        self.begin_profile()
        values = super().evaluate(epoch)
        wait_for(self.device)

        self.end_profile("evaluation", 1)
        if not self.is_profiled:
            self.evaluations.append(time.perf_counter() - start)
        return values

    def settled(self, values: list) -> list:
        """The values without the first epoch's, in which graphs are captured, if there are more."""
        return values[1:] or values

    def iteration_seconds(self) -> list[float]:
        """Median seconds an iteration, of each pass."""
        return [statistics.median(one) for one in zip(*self.settled(self.passes), strict=True)]

    def evaluation_seconds(self) -> float:
        """Median seconds of an evaluation."""
        return statistics.median(self.settled(self.evaluations))

    def epoch_seconds(self) -> float:
        """Seconds of an epoch and its evaluation, without saves."""
        return self.a_pass * sum(self.iteration_seconds()) + self.evaluation_seconds()

    # ---- the profile

    def begin_profile(self):
        """Look at the device from here on, in the profiled epoch."""
        if self.is_profiled:
            self.profiler = Busy(self.device)
            self.profiler.start()

    def end_profile(self, name: str, times: int):
        """Note how long the device was busy in each of so many repetitions."""
        if self.profiler:
            seconds = self.profiler.stop()
            self.busy[name] = None if seconds is None else seconds / times
            self.profiler = None
