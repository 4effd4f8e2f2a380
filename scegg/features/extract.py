"""Run images through the backbone and write its maps: memory is bounded by the batch.

Three things go on at the same time: the loader decodes images, the backbone computes maps, and a
thread writes the maps that are done.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from queue import Full, Queue

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scegg.features.images import Images, PixelNormalization, Unreadable
from scegg.features.loading import load_batches, told_of_lost_workers
from scegg.features.parts import Parts
from scegg.features.ranks import rank_of_ranks, ranks_on_this_machine
from scegg.speed.threads import granted_cores
from util import UserError

# batches in a load that a CPU decodes in its own threads: after each forward pass, the backbone's
# threads hold the cores for a while
DECODED_AT_ONCE = 8
AHEAD = 6  # batches of maps that may wait while the disk is slow (at least one load)


class Backbone:
    """Images (B, 3, S, S) uint8 -> maps (B, D, h, w) float32 on the device.

    at_once: images in one forward pass; it is halved where the device's memory is too small.
    """

    def __init__(
        self,
        pixels: PixelNormalization,
        network: torch.nn.Module,
        device: torch.device,
        precision: torch.dtype,
        at_once: int,
    ):
        self.pixels = pixels.to(device)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.device = device
        self.precision = precision
        self.at_once = at_once
        # float32 means float32: cuDNN would use TF32 unasked
        torch.backends.cudnn.allow_tf32 = False

    def __call__(self, images: Tensor) -> Tensor:
        while True:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                pieces = [self.maps(piece) for piece in images.split(self.at_once)]
                return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

            if self.at_once == 1:
                raise UserError(
                    "the GPU's memory is too small for one image: "
                    "use a smaller --img_size, or --device cpu"
                )
            self.at_once = (min(self.at_once, len(images)) + 1) // 2
            torch.cuda.empty_cache()
            print(
                f"the GPU's memory is full: going on with {self.at_once} images at once",
                flush=True,
            )

    def maps(self, images: Tensor) -> Tensor:
        """One forward pass; the maps are in the file's layout, channels first.

        Channels come first already here: changing the layout is less work for a GPU than for the
        host.
        """
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        images = self.pixels(images)
        use_bfloat16 = self.precision == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bfloat16):
            return self.network(images).float().contiguous()


def compiled(backbone: Backbone, img_size: int) -> Backbone:
    """The backbone with its network compiled by torch.

    That is tried at once. Raises UserError where it fails, for instance without a C++ compiler.
    """
    backbone.network = torch.compile(backbone.network)
    images = torch.zeros(backbone.at_once, 3, img_size, img_size, dtype=torch.uint8)
    try:
        with torch.inference_mode():
            backbone(images)
    except UserError:
        raise
    except Exception as error:  # compilers fail in many ways
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"torch cannot compile the backbone here ({first_line}): leave --compile out"
        ) from None
    return backbone


class Waits:
    """The seconds that the main thread spent on, or waited for, each part of the work."""

    NAMES = ("decoding", "copies", "the backbone", "the disk")

    def __init__(self):
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys(self.NAMES, 0.0)

    @contextlib.contextmanager
    def on(self, name: str):
        """Add the seconds spent within."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def __str__(self):
        """One line that names the bound: what took most of the time."""
        total = max(time.perf_counter() - self.began, 1e-9)
        bound = max(self.seconds, key=self.seconds.get)
        shares = [f"{name} {s / total:.0%}" for name, s in self.seconds.items()]
        return f"the bound is {bound}: of {total:.1f} s, {', '.join(shares)}"


class Copies:
    """Copies to the device and back, beside the backbone's work: CUDA streams of their own.

    On a CPU nothing is copied. Batches are pinned by the loader, maps by torch.
    """

    def __init__(self, device: torch.device):
        self.device = device
        on_gpu = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else None

    def to_device(self, images: Tensor) -> tuple[Tensor, list]:
        """The images on the device, and the event of their arrival."""
        if self.streams is None:
            return images, []
        current, to_device = torch.cuda.current_stream(self.device), self.streams[0]
        with torch.cuda.stream(to_device):
            images = images.to(self.device, non_blocking=True)
        current.wait_stream(to_device)
        images.record_stream(current)
        return images, [to_device.record_event()]

    def to_host(self, *tensors: Tensor) -> tuple[list[Tensor], list]:
        """The tensors on the host, and the events: they are made; they are there."""
        if self.streams is None:
            return list(tensors), []
        made, to_host = torch.cuda.current_stream(self.device).record_event(), self.streams[1]
        to_host.wait_event(made)
        with torch.cuda.stream(to_host):
            copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        for tensor in tensors:
            tensor.record_stream(to_host)
        return copies, [made, to_host.record_event()]


class MapsOnTheirWay:
    """Maps (B, D, h, w) whose copy to the host has been asked for, but may not have ended.

    events: of the images' arrival, then those of `Copies.to_host`; none on a CPU.
    """

    def __init__(self, maps: Tensor, copies: Copies, images_there: list, waits: Waits):
        self.waits = waits
        finite = torch.isfinite(maps.sum())  # a sum is finite only where every term is
        (self.maps, self.finite), events = copies.to_host(maps, finite)
        self.events = images_there + events

    def arrived(self) -> np.ndarray:
        """The maps, once they are there. Raises UserError if one is not finite."""
        waited_for = ("copies", "the backbone", "copies")
        for name, event in zip(waited_for, self.events, strict=False):
            with self.waits.on(name):
                event.synchronize()
        if not self.finite:
            raise UserError("the backbone gave NaN or infinity: are --weights the right ones?")
        return self.maps.numpy()


def waited_for(loaded: Iterable, waits: Waits) -> Iterator:
    """The same items; the time until each is there counts as decoding."""
    items = iter(loaded)
    while True:
        with waits.on("decoding"):
            item = next(items, None)
        if item is None:
            return
        yield item


@torch.inference_mode()
def forward(
    backbone: Backbone, loaded: Iterable[Tensor | Unreadable], batch_size: int, waits: Waits
) -> Iterator[list[np.ndarray]]:
    """Yield the maps of each load of images, a list of (batch_size, D, h, w) float32 on the host.

    A load's maps are yielded after the next load was started. So a GPU has work meanwhile. On a
    CPU that decodes in its own threads, writing then runs beside the decoding, not beside the
    backbone: each layer of that would wait for the thread that lost its core.

    Raises UserError for an image that cannot be read, after the maps before it were yielded.
    """
    waiting, copies = [], Copies(backbone.device)
    for images in waited_for(loaded, waits):
        if isinstance(images, Unreadable):
            if waiting:  # they may be the last of a part
                yield [maps.arrived() for maps in waiting]
            raise UserError(images)

        started = []
        for batch in images.split(batch_size):
            batch, there = copies.to_device(batch)
            with waits.on("the backbone"):  # a GPU is only asked here
                maps = backbone(batch)
            started.append(MapsOnTheirWay(maps, copies, there, waits))
        if waiting:
            yield [maps.arrived() for maps in waiting]
        waiting = started
    if waiting:
        yield [maps.arrived() for maps in waiting]


class WriteBehind:
    """Writes parts in a thread of its own, so that the backbone does not wait for the disk.

    ahead: loads of maps that may wait to be written. At most one part is still unfinished when the
    next one begins: the disk makes it safe while the first maps of the next are computed.
    """

    def __init__(self, ahead: int, waits: Waits):
        self.ahead, self.waits = ahead, waits
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.unfinished: deque[Future] = deque()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()

    def write(self, make, loads: Iterable[list[np.ndarray]]):
        """Have `make(batches)` write one part of the file from the batches in `loads`.

        Returns when the last load was handed over; the part may be unfinished then.
        Raises what the writing of this part or of an earlier one has raised.
        """
        while self.unfinished and (len(self.unfinished) > 1 or self.unfinished[0].done()):
            with self.waits.on("the disk"):
                self.unfinished.popleft().result()

        queue = Queue(self.ahead)
        part = self.thread.submit(make, batches_from(queue))
        self.unfinished.append(part)
        try:
            for load in loads:
                with self.waits.on("the disk"):
                    put(queue, load, part)
        finally:
            put(queue, None, part)

    def finish(self):
        """Wait for the unfinished parts. Raises what their writing has raised."""
        while self.unfinished:
            with self.waits.on("the disk"):
                self.unfinished.popleft().result()


def batches_from(queue: Queue) -> Iterator[np.ndarray]:
    """Yield the batches of the loads in the queue, up to a None."""
    while (load := queue.get()) is not None:
        yield from load


def put(queue: Queue, item, part: Future):
    """Put an item into the queue once there is room. Raises what ended the part, if it ended."""
    while not part.done():
        with contextlib.suppress(Full):
            queue.put(item, timeout=1)
            return
    part.result()


def extract(backbone: Backbone, images: Images, parts: Parts, options) -> float:
    """Run this rank's share of the images through the backbone into parts.

    options: batch_size and num_workers. Returns images per second, and prints what they were bound
    by.
    """
    starts = parts.missing(*rank_of_ranks())
    on_gpu = backbone.device.type == "cuda"
    batches_in_load = 1 if options.num_workers or on_gpu else DECODED_AT_ONCE
    at_once = batches_in_load * options.batch_size
    loads = {start: split_rows(parts.rows(start), at_once) for start in starts}
    count = sum(len(parts.rows(start)) for start in starts)
    report_done(count, len(images))

    batches = [rows for start in starts for rows in loads[start]]
    loaded = load_batches(images, batches, options.num_workers, pinned=on_gpu)
    ahead = max(1, AHEAD * options.batch_size // at_once)
    waits = Waits()
    with (
        tqdm(total=count, desc="feature maps", unit="image", disable=None) as bar,
        WriteBehind(ahead, waits) as writer,
        told_of_lost_workers(),
    ):
        maps = forward(backbone, loaded, options.batch_size, waits)
        for start in starts:
            of_part = islice(maps, len(loads[start]))
            writer.write(partial(parts.make, start), counted(of_part, bar))
        writer.finish()

    speed = count / (time.perf_counter() - waits.began)
    if count:
        print(waits)
    return speed


def split_rows(rows: range, at_once: int) -> list[list[int]]:
    """The rows of a part in loads of at most `at_once`; no load has rows of two parts."""
    rows = list(rows)
    return [rows[at : at + at_once] for at in range(0, len(rows), at_once)]


def report_done(todo: int, images: int):
    """Say how many images this run need not process."""
    if todo < images:
        others = ", or another rank's" if rank_of_ranks()[1] > 1 else ""
        print(f"{images - todo} of {images} images are done already{others}")


def counted(loads: Iterable[list[np.ndarray]], bar: tqdm) -> Iterator[list[np.ndarray]]:
    """The same loads, with their images counted on the bar."""
    for load in loads:
        yield load
        bar.update(sum(map(len, load)))


def default_workers(device: torch.device) -> int:
    """Decoding processes: up to 8 beside a GPU, a fourth of the cores beside a CPU.

    A CPU needs its cores itself. The ranks of a `torchrun` on one machine share its cores.
    """
    cores = granted_cores() // ranks_on_this_machine()
    return min(8, max(cores, 1) if device.type == "cuda" else cores // 4)
