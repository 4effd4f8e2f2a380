"""Batches of pictures from decoding processes, also where these have next to no shared memory."""

import contextlib
import math
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scegg.features.images import Images, Unreadable, collate
from scegg.features.ranks import ranks_on_this_machine
from util import UserError, free_space

SHARED_MEMORY = Path("/dev/shm")  # Linux's; Docker gives a container 64 MB of it
PREFETCHED = 4  # batches for each process
PATIENCE = 300  # seconds that a batch may take: a mount that is gone never answers


def load_batches(
    images: Images, batches: list[list[int]], workers: int, pinned: bool
) -> Iterator[Tensor | Unreadable]:
    """Yield the batches (B, 3, S, S) uint8 of these images, or an Unreadable in a batch's place.

    workers: decoding processes, as `usable_workers` gives them. pinned: whether a GPU fetches the
    batches. `told_of_lost_workers` tells of a process that is killed or does not answer.
    """
    if workers == 0:
        yield from DataLoader(images, batch_sampler=batches, collate_fn=collate, pin_memory=pinned)
        return

    batch_bytes = max(map(len, batches), default=0) * images.image_bytes
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=ToMainProcess(workers, batch_bytes),
        pin_memory=pinned,
        prefetch_factor=PREFETCHED,
        timeout=PATIENCE,
    )
    for batch in loader:
        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(batch).permute(0, 3, 1, 2)
            batch = batch.pin_memory() if pinned else batch
        yield batch


def usable_workers(workers: int) -> int:
    """As many decoding processes as asked for; none, and a line, where the system has no locks."""
    if workers == 0:
        return 0
    try:
        multiprocessing.Lock()
    except (ImportError, OSError) as error:
        print(
            f"pictures are decoded in threads: processes cannot be had here ({UserError(error)}; "
            f"is there a {SHARED_MEMORY}?)"
        )
        return 0
    return workers


class ToMainProcess:
    """Collates a batch in a decoding process, and chooses how it travels to the main process.

    That is in shared memory, which costs no copy. Where there is too little of it, batches go
    through a pipe as arrays (B, S, S, 3). A tensor that finds no shared memory would be lost on its
    way, and the main process would wait for it forever.
    """

    def __init__(self, workers: int, batch_bytes: int):
        # those that wait, the one in use, and the one that is being pinned
        needed = (PREFETCHED * workers + 2) * batch_bytes
        needed *= ranks_on_this_machine()
        free = free_space(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else math.inf
        # half is left to other programs
        self.in_shared_memory = 2 * needed < free
        if not self.in_shared_memory:
            print(
                f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and the decoded pictures might "
                f"fill {needed / 1e6:.0f} MB: they go through pipes"
            )

    def __call__(self, items: list[Tensor | Unreadable]) -> Tensor | np.ndarray | Unreadable:
        batch = collate(items)
        if isinstance(batch, Unreadable):
            return batch
        if self.in_shared_memory:
            with contextlib.suppress(RuntimeError):  # others have filled it meanwhile
                return batch.share_memory_()
        return batch.permute(0, 2, 3, 1).numpy()


@contextlib.contextmanager
def told_of_lost_workers():
    """Turn what DataLoader raises over a process that was killed or is stuck into a UserError.

    So it does where the limit of open files is too low.

    Of a killed one it tells at any moment, whatever the main process is doing then.
    """
    try:
        yield
    except RuntimeError as error:
        if "Too many open files" in str(error):  # each batch on its way holds one open
            raise UserError(
                "the decoding processes may not open more files: allow more (ulimit -n), or run "
                "again with fewer --num_workers"
            ) from None
        is_late = "DataLoader timed out" in str(error)
        if not is_late and "DataLoader worker" not in str(error):
            raise
        if is_late:
            kill_processes()
            raise UserError(
                f"the decoding processes gave no batch in {PATIENCE} seconds: "
                "see whether the images' disk or mount is still there, and run again"
            ) from None
        raise UserError(
            f"a decoding process was killed ({error}): is memory short? "
            "Run again with fewer --num_workers"
        ) from None


def kill_processes():
    """End the decoding processes: one that was stopped, or waits for a disk, hears nothing else."""
    processes = multiprocessing.active_children()
    with torchs_handler_off():
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)


@contextlib.contextmanager
def torchs_handler_off():
    """Keep torch from telling, in a block, of processes that were killed."""
    if not hasattr(signal, "SIGCHLD"):  # Windows
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
