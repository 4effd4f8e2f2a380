"""Images through the backbone into the parts of the feature file."""

import contextlib
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from queue import Full, Queue

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from scegg.features.images import Images, PixelNormalization, Unreadable, collate
from scegg.features.parts import Parts
from scegg.features.ranks import rank_of_ranks
from util import UserError

DECODED_AT_ONCE = 8  # batches, by a CPU's own threads: after each forward pass the backbone's hold the cores for a while
AHEAD = 6  # batches of maps that wait to be written, while a part is made safe on the disk (at least a load's)


class Backbone:
    """Images (B, 3, S, S) uint8 -> maps (B, D, h, w) float32 on the device, in fewer images at once where its memory is too small."""

    def __init__(self, pixels: PixelNormalization, network, device: torch.device, precision: torch.dtype, at_once: int):
        self.pixels, self.network = pixels.to(device), network.to(device, memory_format=torch.channels_last)
        self.device, self.precision, self.at_once = device, precision, at_once
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: cuDNN would use TF32 unasked

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        while True:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                pieces = [self.maps(piece) for piece in images.split(self.at_once)]
                return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            if self.at_once == 1:
                raise UserError("the GPU's memory is too small for one image: use a smaller --img_size, or --device cpu")
            self.at_once = (min(self.at_once, len(images)) + 1) // 2
            torch.cuda.empty_cache()
            print(f"the GPU's memory is full: going on with {self.at_once} images at once", flush=True)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        images = self.pixels(images.to(self.device, non_blocking=True, memory_format=torch.channels_last))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.network(images).float().contiguous()  # in the file's order, of which a GPU makes less work than the host


class Sent:
    """Maps (B, D, h, w) on their way from the device to the host: the copy begins when the backbone is done with them."""

    def __init__(self, maps: torch.Tensor):
        finite = torch.isfinite(maps.sum())  # a sum is finite only where every term is
        self.maps, self.finite = (tensor.to("cpu", non_blocking=True) for tensor in (maps, finite))
        self.arrival = torch.cuda.Event() if maps.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def arrived(self) -> np.ndarray:
        """The maps, once they are there; raises UserError if one is not finite."""
        if self.arrival:
            self.arrival.synchronize()
        if not self.finite:
            raise UserError("the backbone gave NaN or infinity: are --weights the right ones?")
        return self.maps.numpy()


@torch.inference_mode()
def forward(backbone, loaded, batch_size: int):
    """For each load of images its maps on the host, a list of (batch_size, D, h, w) float32.

    A GPU has its work on the next load by then. On a CPU that decodes by itself the next load is decoded meanwhile, so that whatever
    is made of the maps runs beside that and not beside the backbone, each of whose layers would wait for the thread that lost its core.
    """
    waiting = []
    for images in loaded:
        if isinstance(images, Unreadable):
            if waiting:  # perhaps the last of a part
                yield [maps.arrived() for maps in waiting]
            raise UserError(images)
        sent = [Sent(backbone(batch)) for batch in images.split(batch_size)]
        if waiting:
            yield [maps.arrived() for maps in waiting]
        waiting = sent
    if waiting:
        yield [maps.arrived() for maps in waiting]


def hand_over(loads, ahead: int, make, writer: ThreadPoolExecutor) -> Future:
    """Have `make(iterator)` use up the batches of `loads` in the thread of `writer`, at most `ahead` behind: the backbone does not wait for the disk.

    Returns what becomes of `make`, which may still be at work. Raises what it raised, if it ended early.
    """
    handed = Queue(ahead)

    def received():
        while (load := handed.get()) is not None:
            yield from load

    made = writer.submit(make, received())

    def put(item):
        while not made.done():
            with contextlib.suppress(Full):
                return handed.put(item, timeout=1)
        made.result()

    try:
        for load in loads:
            put(load)
    finally:
        put(None)
    return made


def extract(backbone: Backbone, images: Images, parts: Parts, options) -> float:
    """Run this rank's share of the images through the backbone into parts. Returns images per second."""
    todo = parts.missing(*rank_of_ranks())
    at_once = options.batch_size * (1 if options.num_workers or backbone.device.type == "cuda" else DECODED_AT_ONCE)
    ahead = max(1, AHEAD * options.batch_size // at_once)
    loads = [list(parts.rows(start))[at:at + at_once] for start in todo for at in range(0, len(parts.rows(start)), at_once)]
    loader = DataLoader(images, batch_sampler=loads, num_workers=options.num_workers, collate_fn=collate,
                        pin_memory=backbone.device.type == "cuda", prefetch_factor=4 if options.num_workers else None)
    count, began = sum(map(len, loads)), time.perf_counter()
    if count < len(images):
        print(f"{len(images) - count} of {len(images)} images are done already"
              + (", or another rank's" if rank_of_ranks()[1] > 1 else ""))
    with tqdm(total=count, desc="feature maps", unit="image", disable=None) as bar, ThreadPoolExecutor(max_workers=1) as writer:
        maps, made = forward(backbone, loader, options.batch_size), deque()
        try:
            for start in todo:
                while made and (len(made) > 1 or made[0].done()):
                    made.popleft().result()
                loads_of_part = -(-len(parts.rows(start)) // at_once)
                made.append(hand_over(progressing(bar, maps, loads_of_part), ahead, partial(parts.make, start), writer))
            while made:
                made.popleft().result()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(f"a decoding process was killed ({error}): is memory short? Run again with fewer --num_workers") from None
    return count / (time.perf_counter() - began)


def progressing(bar: tqdm, maps, loads: int):
    """The maps of the next `loads` loads, counted on the bar."""
    for load in islice(maps, loads):
        yield load
        bar.update(sum(map(len, load)))


def default_workers(device: torch.device) -> int:
    """Decoding processes: up to 8 beside a GPU, a fourth of the cores beside a CPU, which needs them itself.

    The ranks of a `torchrun` on one machine share its cores.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(cores, 1) if device.type == "cuda" else cores // 4)
