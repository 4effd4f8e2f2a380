"""The processes ("ranks") of a `torchrun`, which share one preprocessing job."""

import contextlib
import datetime
import os
from pathlib import Path

import torch
from torch import distributed

from util import UserError, locked


def rank_of_ranks() -> tuple[int, int]:
    """(rank, number of ranks) as `torchrun` tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first_rank() -> bool:
    """Whether this process does what only one may do."""
    return rank_of_ranks()[0] == 0


def device_of_rank() -> str | None:
    """The GPU of this rank under `torchrun`, None where there is no choice to make."""
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


@contextlib.contextmanager
def sole_job(output: Path):
    """Hold the output's lock for a block. Under `torchrun`, the first rank holds it for all.

    Raises UserError if another job is making the same file.
    """
    _, ranks = rank_of_ranks()
    if ranks > 1:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    lock = contextlib.nullcontext()
    if is_first_rank():
        lock = locked(output.with_name(f".{output.name}.lock"), f"making {output}")
    with lock:
        yield
    if ranks > 1:
        distributed.destroy_process_group()


def wait_for_all_ranks():
    """Return once every rank has come here; they may be hours apart.

    Raises UserError if one of them has ended before.
    """
    _, ranks = rank_of_ranks()
    if ranks <= 1:
        return
    try:
        distributed.barrier()
    except RuntimeError:
        raise UserError(
            "another rank ended before its work was done: see what it said, and run again"
        ) from None
