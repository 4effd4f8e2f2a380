"""What every other module leans on: errors for people, safe files, seeds, devices, memory.

Upstream of everything: this module imports nothing of the project.
"""
import argparse
import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """Something the user can put right; the message says what was wrong, where, and what to do.

    It is one line of printable characters, whatever a stranger's file or a library put into it.
    """

    def __str__(self):
        line = re.sub(r"\s*[\r\n]\s*", " ", super().__str__().strip())
        return "".join(character if character.isprintable() else "?" for character in line)


class FlagParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is a UserError as every other mistake, and flags are not abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def exit_on_user_error(main):
    """Run `main()`; a UserError (or a disk's, a folder's own error) becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {UserError(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def make_folder(folder: Path):
    """The folder and those above it; raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} could not be made ({error.strerror}): name another place") from None


@contextlib.contextmanager
def atomic_path(path: Path, advice: str = "free some disk space or name another place"):
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on failure remove it.

    Whoever looks at `path` sees the old file, or the whole new one, never a part.
    Raises UserError, with the advice, when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    make_folder(path.parent)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (temporary, path, path.parent):
            raise
        raise UserError(f"{path} could not be written ({error.strerror or error}): {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_partials(folder: Path, name: str | None = None):
    """Remove what killed processes left of the file `name` in `folder` (of every file). Hold the lock under which alone it is written."""
    for file in folder.iterdir() if folder.is_dir() else ():
        final, found, _ = file.name.rpartition(".partial-")
        if found and final.startswith(".") and name in (None, final[1:]):
            file.unlink(missing_ok=True)


def require_space(folder: Path, needed: float, what: str):
    """Raises UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
    if needed > free:
        raise UserError(f"{what} will take {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: "
                        "free some disk space or name another place")


HELD = set()  # lock files of this process
# a forked helper (a DataLoader's worker) would hold a lock for seconds after its parent was killed
os.register_at_fork(after_in_child=lambda: [file.close() for file in HELD])


@contextlib.contextmanager
def locked(path: Path, doing: str, wait: bool = False):
    """Hold the lock file `path` for a block. Whoever else wants it waits, or gets a UserError that says what is being done.

    The lock is the system's (flock): it ends with its process however that dies. The file is removed by who holds it.
    """
    make_folder(path.parent)
    file = take_lock(path, doing, wait)
    HELD.add(file)
    try:
        yield
    finally:
        HELD.discard(file)
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go: nobody else can hold it
        file.close()


def take_lock(path: Path, doing: str, wait: bool):
    """The open file of a lock that is ours."""
    while True:
        try:
            file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} could not be made ({error.strerror}): name another place") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                raise UserError(f"another process is {doing} (it holds {path}): wait for it, or stop it") from None
            print(f"another process is {doing}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(f"the disk of {path.parent} has no locks: let no other process work on the same file")
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder was done and removed it: take a new one


def survives(action, seconds: int) -> bool:
    """Whether `action()` ends within `seconds` without killing its process, tried in a forked one; what it raises does not matter."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            faulthandler.disable()  # the crash is reported by us
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang in a C library hears no Python handler
            signal.alarm(seconds)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 0


def sync(path: Path):
    """Make what is written of a file, or a rename inside a folder, durable (a rename lives in the folder, not in the file)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str):
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: Path, state: dict):
    """torch.save to `path`, atomically. Raises UserError as atomic_path does."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's writer makes of a full disk while it closes its archive
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def seed_everything(seed: int):
    """Seed Python, numpy and torch (every device), so that one number repeats a CPU run bit for bit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_stream(seed: int, name: str, step: int = 0):
    """Let torch draw (on every device) from the stream that belongs to the run's seed, a stage and a step of it."""
    key = hashlib.blake2b(f"{seed} {name} {step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)


def pick_device(name: str | None) -> torch.device:
    """`name` as a torch device; None means CUDA where there is some, else the CPU.

    Raises UserError for a name torch does not know and for CUDA on a machine (or a torch) without it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.isdigit():
        name = f"cuda:{name}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no CUDA device that torch {torch.__version__} "
                            "can use; leave the flag out to run on the CPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)  # streams, pinned memory and CUDA graphs go by the current device
    elif device.type != "cpu":
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    return device


def keep_freed_memory():
    """Let glibc keep large freed blocks for the next allocation instead of unmapping them.

    A training step frees and allocates the same tens of megabytes again and again; with glibc's default every
    such block is mapped anew, and its page faults cost more than the arithmetic on it (a batch of feature maps
    is gathered 30 times faster with this). Numbers are untouched; elsewhere than on glibc this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Peak resident memory of this process and, on CUDA, of its tensors, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        peak["peak_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak
