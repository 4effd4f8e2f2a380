"""Parts c and d: a run on made-up features of a dataset's numbers, for as long as there is time."""

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.gpu.made_up import MadeUpFeatures
from benchmarks.gpu.parts import WHOLE_RUN, Job
from benchmarks.gpu.small import config_of, counts_of, shape_of
from benchmarks.gpu.watch import OutOfTime, TimedCheckpoint, WatchedPipeline
from scegg.config import Config
from scegg.datasets.splits import Split
from scegg.features.storage import Storage, choose_storage
from scegg.method.embeddings import Embedding
from scegg.run.checkpoint import PAUSE, SLOW
from scegg.run.folder import RunFolder
from scegg.run.pipeline import SPLITS
from scegg.run.wandb_mirror import Mirror
from scegg.speed.allocator import keep_freed_memory
from scegg.speed.onednn import fast_matmul
from util import pick_device, seed_everything

MARGIN = 3.0  # seconds before the part's end in which nothing is begun
GIB = 2**30


def run(job: Job, dataset: str, precision: str = "highest"):
    """Part c: all stages with the dataset's own settings, its maps on the device as float16."""
    device = pick_device(None)
    config = config_of(dataset, job.small, matmul_precision=precision)
    features = MadeUpFeatures.of(counts_of(dataset, job.small), shape_of(job.small), device)

    storage = Storage("device", torch.float16)
    rehearsal = Rehearsal(job, dataset, config, features)
    with rehearsal.checkpoint() as checkpoint:
        rehearsal.go(WatchedPipeline, features.split, storage, checkpoint)


def run_inside(job: Job, gigabytes: int):
    """Part d: AWA2's sizes on a card of so many GiB, by torch's limit for this process.

    Where --cache auto would keep the maps is asked with all of them. Stage 1 then draws from that
    place with a tenth of them; the later stages have embeddings of all images, made up.
    """
    device, dataset = pick_device(None), "AWA2"
    config = config_of(dataset, job.small)
    features = MadeUpFeatures.of(counts_of(dataset, job.small), shape_of(job.small), device)
    rehearsal = Rehearsal(job, dataset, config, features)

    with smaller_card(gigabytes * GIB, device):
        size = features.size(len(features.split.trainval))
        storage = choose_storage(size, device, job.folder, compressed=False)
        rehearsal.tell("trainval's maps in float32", size / 1e9, "GB")
        rehearsal.tell("--cache auto keeps them", str(storage), "")

        if storage.name in ("device", "ram") or device.type == "cpu":
            job_ends, job.until = job.until, job.until - 0.5 * job.seconds_left
            with rehearsal.checkpoint() as checkpoint:
                rehearsal.go(Stage1Pipeline, tenth(features.split), storage, checkpoint)
            job.until = job_ends
        with rehearsal.checkpoint() as checkpoint:
            rehearsal.go(EmbeddedPipeline, features.split, storage, checkpoint)


class Stage1Pipeline(WatchedPipeline):
    """Only what reads feature maps."""

    def run(self):
        """Stage 1 and the pass over all images."""
        self.fit_scen()
        self.embed()


class EmbeddedPipeline(WatchedPipeline):
    """Stages 2 and 3 on embeddings that are made up, too."""

    def run(self):
        """All stages that read no feature maps."""
        for name, labels in self.labels.items():
            x = torch.rand(len(labels), self.features.shape[0], device=self.device)
            logits = torch.rand(len(labels), len(self.att), device=self.device)
            self.embeddings[name] = Embedding(x, logits, labels)
        self.distill()
        self.fit_eggn()


def tenth(split: Split) -> Split:
    """A tenth of the images of each part, and at least two of each class."""
    parts = {}
    for name in SPLITS:
        images = getattr(split, name)
        parts[name] = images[: max(len(images) // 10, 2 * len(split.att))]
    return dataclasses.replace(split, **parts)


@contextlib.contextmanager
def smaller_card(size: int, device: torch.device) -> Iterator[None]:
    """A GPU of `size` bytes within: torch gives this process no more of the real one.

    torch's limit does not show in `mem_get_info`, which asks the driver. So that is made to answer
    as a smaller card would.
    """
    if device.type != "cuda":
        yield
        return

    def memory(*_) -> tuple[int, int]:
        return size - torch.cuda.memory_reserved(device), size

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device)
    with mock.patch.object(torch.cuda, "mem_get_info", memory):
        yield


class Rehearsal:
    """Runs pipelines on made-up features, and adds a row for each thing measured."""

    def __init__(self, job: Job, dataset: str, config: Config, features: MadeUpFeatures):
        self.job, self.dataset, self.config, self.features = job, dataset, config, features
        self.device = features.device
        self.runs = 0
        # it takes most of a small rehearsal's time: there only once
        is_first = dataset == "CUB" and config.matmul_precision == "highest"
        self.profiles = is_first or not job.small
        keep_freed_memory()
        seed_everything(config.seed)
        torch.set_float32_matmul_precision(config.matmul_precision)

    def tell(self, measure: str, value, unit: str):
        """Add a row."""
        self.job.add(measure=measure, value=value, unit=unit)

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[TimedCheckpoint]:
        """The checkpoint of a run in a folder of its own, which ends before the part's time."""
        self.runs += 1
        path = self.job.folder / f"run-{self.runs}"
        path.mkdir()
        facts = {"dataset": self.dataset, "provenance": {}}
        mirror = Mirror(path, self.config, facts, "disabled", path.name)
        folder = RunFolder(path, self.config, mirror)
        try:
            with fast_matmul(self.device):
                yield TimedCheckpoint(folder, self.device, self.job.until - MARGIN)
        finally:
            folder.close(exit_code=0)

    def go(self, kind: type[WatchedPipeline], split: Split, storage: Storage, checkpoint):
        """Run a kind of pipeline until its time is up."""
        log = checkpoint.folder.log
        pipeline = kind(
            self.features, split, self.config, self.device, storage, checkpoint, log, None
        )
        pipeline.watch(self.tell, lambda: self.tell_epochs(pipeline), self.profiles)
        checkpoint.save()
        try:
            pipeline.run()
        except OutOfTime as end:
            print(f"stopped: {end}", flush=True)

        if not pipeline.passes:  # not even the first epoch's end was reached
            self.tell_passes(pipeline.of_epoch)
        self.tell_busy(pipeline)
        if self.device.type == "cuda":
            for name, number in checkpoint.notes["graphs"].items():
                self.tell(f"CUDA graphs: {name.replace('_', ' ')}", number, "")
            self.tell("peak GPU memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
            self.tell("the same with torch's cache", torch.cuda.max_memory_reserved() / 1e9, "GB")

    def tell_epochs(self, pipeline: WatchedPipeline):
        """What the epochs took, and what the whole run would take."""
        config, saves = self.config, pipeline.checkpoint.saves
        self.tell_passes(pipeline.iteration_seconds())
        self.tell("evaluation", pipeline.evaluation_seconds(), "s")
        epochs = len(pipeline.passes)
        kind = "without the first" if epochs > 1 else "with the capturing of graphs"
        self.tell(f"epochs timed, {kind}", max(epochs - 1, 1), "")

        a_save = statistics.median(saves[-3:])
        self.tell("a checkpoint", a_save, "s")
        iterations = config.nepoch * config.feedback_loop * pipeline.a_pass
        eggn = config.nepoch * pipeline.epoch_seconds()
        count = iterations // config.checkpoint_every
        if a_save > SLOW:
            count = min(count, int(eggn / (PAUSE * a_save)))
        count += len(saves)
        stages = sum(pipeline.seconds_of(stage) for stage in ("scen", "embed", "distill"))
        seconds = stages + eggn + count * a_save
        self.tell(f"{WHOLE_RUN} of {config.nepoch} epochs, extrapolated", seconds / 60, "min")
        self.tell(f"in it {count} checkpoints", count * a_save / 60, "min")

    def tell_passes(self, seconds: list[float]):
        """What an iteration takes, in each pass."""
        for number, one in enumerate(seconds, start=1):
            what = "with feedback" if number == 2 and self.config.a1 > 0 else "without feedback"
            self.tell(f"EGGN iteration, pass {number}, {what}", 1e3 * one, "ms")

    def tell_busy(self, pipeline: WatchedPipeline):
        """The share of time in which the device was busy."""
        if not pipeline.busy:
            return
        taken = {"evaluation": pipeline.evaluation_seconds()}
        for number, seconds in enumerate(pipeline.iteration_seconds(), start=1):
            taken[f"pass {number}"] = seconds
        device = "GPU" if self.device.type == "cuda" else "CPU's operators"
        for name, busy in pipeline.busy.items():
            share = None if busy is None else 100 * busy / taken[name]
            self.tell(f"{device} busy, {name}", share, "%")
