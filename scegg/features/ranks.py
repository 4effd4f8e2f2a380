"""The processes ("ranks") of a `torchrun`, which share one preprocessing job.

They hear of each other through torch's key-value store on the first rank's machine. While a rank
lives it counts its beats there; so others may wait for it for days, and for a dead one minutes.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from scegg.processes import locked
from util import UserError

REACH = 30  # seconds in which the first rank's machine must answer
PATIENCE = 300  # seconds without a beat after which a rank is given up; the first may come as late
BEAT = 10  # seconds
LINGER = 5  # seconds that the first rank, whose store it is, waits for the others to leave
POLL = 0.05  # seconds, times the ranks

# ---------------------------------------------------------------- what the environment says


def rank_of_ranks() -> tuple[int, int]:
    """(rank, number of ranks) as `torchrun` tells them; (0, 1) without it.

    Raises UserError for an environment that is half set or contradicts itself.
    """
    rank, ranks = number("RANK"), number("WORLD_SIZE")
    if rank is None and ranks in (None, 1):
        return 0, 1

    if rank is None or ranks is None:
        there, lacking = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise UserError(f"{there} is set and {lacking} is not: {HOW_TO_START}")
    if rank >= ranks:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={ranks}: {HOW_TO_START}")
    if ranks > 1:
        store_address()
    return rank, ranks


def require_one_process():
    """Raises UserError where the environment tells of several processes; training is one."""
    rank, ranks = number("RANK"), number("WORLD_SIZE")
    if rank or ranks not in (None, 1):
        raise UserError(
            "RANK and WORLD_SIZE tell of several processes, each of which would train a run of its "
            "own: start one process, without torchrun, and unset both"
        )


HOW_TO_START = "start the ranks with torchrun, or unset RANK and WORLD_SIZE for a single process"


def store_address() -> tuple[str, int]:
    """Machine and port where the ranks meet. Raises UserError for what cannot be one."""
    host, port = os.environ.get("MASTER_ADDR"), number("MASTER_PORT")
    if not host or port is None:
        lacking = "MASTER_PORT" if host else "MASTER_ADDR"
        raise UserError(f"WORLD_SIZE is set and {lacking} is not: {HOW_TO_START}")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port}: must be from 1 to 65535")
    return host, port


def number(name: str) -> int | None:
    """A whole number from the environment, None where it is not set.

    Raises UserError for anything else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text}: must be a whole number")
    return int(text)


def ranks_on_this_machine() -> int:
    """How many ranks share this machine's cores."""
    return number("LOCAL_WORLD_SIZE") or 1


def is_first_rank() -> bool:
    """Whether this process does what only one may do."""
    return rank_of_ranks()[0] == 0


def device_of_rank() -> str | None:
    """The GPU of this rank under `torchrun`, None where there is no choice to make."""
    local_rank = number("LOCAL_RANK")
    if local_rank is None or not torch.cuda.is_available():
        return None
    return f"cuda:{local_rank % torch.cuda.device_count()}"


# ---------------------------------------------------------------- a job of one rank or several


@contextlib.contextmanager
def sole_job(output: Path) -> Iterator["Ranks"]:
    """Hold the output's lock for a block. Under `torchrun`, the first rank holds it for all.

    Raises UserError if another job is making the same file, and where the ranks do not meet.
    """
    rank, count = rank_of_ranks()
    with Ranks(rank, count) if count > 1 else SingleRank() as ranks:
        lock = contextlib.nullcontext()
        if rank == 0:
            lock = locked(output.with_name(f".{output.name}.lock"), f"making {output}")
        with lock:
            yield ranks
            ranks.wait("the end")


class SingleRank:
    """A job of a single process, which waits for nobody."""

    count = 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait(self, point: str):
        """Every rank is here."""

    def first(self, name: str, value):
        """This rank is the first."""
        return value


class Ranks:
    """The ranks of one job, as one of them knows them."""

    def __init__(self, rank: int, count: int):
        self.rank = rank
        self.count = count
        self.others = [other for other in range(count) if other != rank]
        self.over = threading.Event()
        self.heart = threading.Thread(target=self.beat, daemon=True)

    def __enter__(self):
        self.store = meet(self.rank)
        self.heart.start()
        try:
            if self.store.add(f"started/{self.rank}", 1) > 1:
                raise UserError(f"two processes say RANK={self.rank}: give each its own")
            self.wait("the start")
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind, *_):
        self.over.set()
        with contextlib.suppress(RuntimeError, UserError):  # the store may be gone
            if kind is not None:
                self.store.set("failed", str(self.rank))
            self.store.set(f"left/{self.rank}", "")
            deadline = time.monotonic() + LINGER
            while self.rank == 0 and time.monotonic() < deadline and not self.are_all("left"):
                time.sleep(POLL)

    def beat(self):
        """Count, in a thread of its own, so that the others know this process lives."""
        with contextlib.suppress(RuntimeError, UserError):  # whoever waits will say so
            while not self.over.wait(BEAT):
                self.store.add(f"beats/{self.rank}", 1)

    def are_all(self, point: str) -> bool:
        """Whether every other rank has come to `point`."""
        return self.store.check([f"{point}/{other}" for other in self.others])

    def wait(self, point: str):
        """Return once every rank has come to `point`; they may be hours apart.

        Raises UserError if one of them has ended before, or gives no sign of life.
        """
        with self.store_there():
            self.store.set(f"{point}/{self.rank}", "")
            beats = dict.fromkeys(self.others)
            heard = dict.fromkeys(self.others, time.monotonic())
            while not self.are_all(point):
                if self.store.check(["failed"]):
                    raise ended()
                self.listen(point, beats, heard)
                time.sleep(POLL * self.count)

    def listen(self, point: str, beats: dict, heard: dict):
        """Note which ranks gave a sign of life, and when (beats and seconds, by rank)."""
        now = time.monotonic()
        for other in self.others:
            count = self.store.add(f"beats/{other}", 0)
            if count != beats[other] or self.store.check([f"{point}/{other}"]):
                beats[other], heard[other] = count, now

            if now - heard[other] > PATIENCE:
                raise UserError(
                    f"rank {other} of {self.count} gave no sign of life for {PATIENCE} seconds: "
                    "see what became of it, and run again"
                )

    def first(self, name: str, value):
        """The first rank's value (JSON), which every rank calls `name`."""
        with self.store_there():
            if self.rank == 0:
                self.store.set(name, json.dumps(value))
        self.wait(f"{name} is known")
        with self.store_there():
            return json.loads(self.store.get(name))

    @contextlib.contextmanager
    def store_there(self):
        """Within: a store that is gone means that the first rank, whose it is, has ended."""
        try:
            yield
        except RuntimeError:
            raise ended() from None


class PatientStore:
    """A store of torch's whose calls end: its process may have stopped, or its machine be gone.

    Its methods are the store's. Raises UserError once one has taken longer than PATIENCE.
    """

    def __init__(self, store: distributed.Store):
        self.store = store
        self.is_lost = False

    def __getattr__(self, name: str):
        return partial(self.call, getattr(self.store, name))

    def call(self, method: Callable, *arguments):
        """What a method of the store returns."""
        if not self.is_lost:
            with contextlib.suppress(TimeoutError):
                return in_time(PATIENCE, method, *arguments)
            self.is_lost = True
        raise UserError(
            f"the first rank did not answer for {PATIENCE} seconds: see what became of it and its "
            "machine, and run again"
        )


def in_time(seconds: float, action: Callable, *arguments):
    """What an action returns or raises. Raises TimeoutError if it takes longer.

    Its thread may then wait forever, and ends with the process.
    """
    outcome = Future()

    def act():
        try:
            outcome.set_result(action(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    return outcome.result(seconds)


def ended() -> UserError:
    """What a rank is told that has waited in vain."""
    return UserError("another rank ended before its work was done: see what it said, and run again")


def meet(rank: int) -> PatientStore:
    """The store of all ranks. Raises UserError where it cannot be reached."""
    host, port = store_address()
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds it
    is_host = rank == 0 and not is_agents
    if not is_host:
        require_answer(host, port)

    try:
        store = in_time(2 * REACH, open_store, "localhost" if is_host else host, port, is_host)
    except (RuntimeError, ValueError, TimeoutError) as error:
        reason = (str(error) or "no answer").splitlines()[0]
        raise UserError(
            f"the ranks cannot meet at MASTER_ADDR={host}, MASTER_PORT={port} ({reason}): "
            "give the first rank's machine and a free port"
        ) from None
    if is_host:  # as the others will
        require_answer(host, port)
    # a torchrun that starts its ranks again has the same store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PatientStore(distributed.PrefixStore(f"scegg/{attempt}", store))


def open_store(host: str, port: int, is_host: bool) -> distributed.Store:
    """Torch's store at an address, or made there. What listens there may be something else."""
    return distributed.TCPStore(
        host,
        port,
        is_master=is_host,
        timeout=datetime.timedelta(seconds=REACH),
        wait_for_workers=False,
    )


def require_answer(host: str, port: int):
    """Raises UserError unless something listens there within REACH seconds."""
    deadline = time.monotonic() + REACH
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(left, 1)).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or left < 0:
                raise UserError(
                    f"MASTER_ADDR={host}, MASTER_PORT={port} does not answer "
                    f"({error.strerror or error}): give the first rank's machine and its port, and "
                    "start that rank first"
                ) from None
        time.sleep(1)
