"""What every other module leans on: errors for people, safe files, locks, seeds, devices.

Upstream of everything: this module imports nothing of the project.
"""

import argparse
import contextlib
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

# ---- errors for people


class UserError(Exception):
    """Something that the user can put right: what was wrong, where, and what to do.

    Its text is one line of printable characters, whatever a stranger's file or a library put in.
    """

    def __str__(self):
        line = re.sub(r"\s*[\r\n]\s*", " ", super().__str__().strip())
        return "".join(character if character.isprintable() else "?" for character in line)


class FlagParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a UserError like every mistake, and no flag is abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        """Raises UserError in the place of argparse's exit."""
        raise UserError(f"{message} (--help lists the flags)")


def exit_on_user_error(main):
    """Run `main()`; mistakes end in one line on stderr and exit status 2, Ctrl-C in 130.

    An OSError counts as a mistake: it is a disk's or a folder's.
    """
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {UserError(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def without_none(values: dict) -> dict:
    """The entries that are not None."""
    return {name: value for name, value in values.items() if value is not None}


# ---- files


def make_folder(folder: Path):
    """Make the folder and those above it. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} could not be made ({error.strerror}): name another place"
        ) from None


@contextlib.contextmanager
def atomic_path(path: Path, advice: str = "free some disk space or name another place"):
    """Yield a temporary path beside `path`; on success it takes that name, else it is removed.

    Whoever looks at `path` sees the old file or the whole new one, never a part.
    Raises UserError, with the advice, when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    make_folder(path.parent)

    try:
        yield temporary
        make_durable(temporary)
        os.replace(temporary, path)
        make_durable(path.parent)
    except OSError as error:
        ours = (temporary, path, path.parent)
        if error.filename is not None and Path(error.filename) not in ours:
            raise
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}): {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def make_durable(path: Path):
    """Wait until what is written of a file, or a rename inside a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(folder: Path, name: str | None = None):
    """Remove what killed processes left of the file `name` in `folder`, or of every file.

    Call it only with the lock held under which that file is written.
    """
    if not folder.is_dir():
        return

    for file in folder.iterdir():
        final, found, _ = file.name.rpartition(".partial-")
        if found and final.startswith(".") and name in (None, final[1:]):
            file.unlink(missing_ok=True)


def require_space(folder: Path, needed: float, what: str):
    """Raises UserError if the disk of `folder` has fewer than `needed` bytes free."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{what} will take {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are "
            "free: free some disk space or name another place"
        )


def write_text(path: Path, text: str):
    """Write `text` to `path` atomically. Raises UserError as atomic_path does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: Path, state: dict):
    """torch.save to `path`, atomically. Raises UserError as atomic_path does."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # what torch's writer makes of a full disk while it closes its archive
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None


# ---- locks and child processes

HELD = set()  # the open lock files of this process


def close_held_locks():
    """Let go of the locks in a forked helper.

    A DataLoader's worker would otherwise hold them for seconds after its parent was killed.
    """
    for file in HELD:
        file.close()


os.register_at_fork(after_in_child=close_held_locks)


@contextlib.contextmanager
def locked(path: Path, doing: str, wait: bool = False):
    """Hold the lock file `path` for a block; the holder removes it.

    Whoever else wants it waits, or gets a UserError that says what is being done (`doing`). The
    lock is the system's (flock): it ends with its process, however that dies.
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
    """The open file of a lock that is ours. Raises UserError as `locked` does."""
    while True:
        file = open_lock(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                raise UserError(
                    f"another process is {doing} (it holds {path}): wait for it, or stop it"
                ) from None
            print(f"another process is {doing}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(
                f"the disk of {path.parent} has no locks: "
                "let no other process work on the same file"
            )
            return file

        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder was done and removed it: take a new one


def open_lock(path: Path):
    """The file of a lock, open. Raises UserError where it cannot be made."""
    try:
        return open(path, "a", encoding="utf-8")  # noqa: SIM115, the lock is held by it
    except OSError as error:
        raise UserError(
            f"{path} could not be made ({error.strerror}): name another place"
        ) from None


def survives(action, seconds: int) -> bool:
    """Whether `action()` ends within `seconds` without killing its process.

    It is tried in a forked process. What it raises there does not matter.
    """
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            faulthandler.disable()  # we report the crash
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang in C hears no Python handler
            signal.alarm(seconds)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            action()
        os._exit(0)

    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 0


# ---- seeds and devices


def seed_everything(seed: int):
    """Seed Python, numpy and torch (every device): one number repeats a run on a CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_stream(seed: int, name: str, step: int = 0):
    """Let torch draw, on every device, from the stream of the run's seed, a stage and its step."""
    key = hashlib.blake2b(f"{seed} {name} {step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)


def pick_device(name: str | None) -> torch.device:
    """`name` as a torch device; None means CUDA where there is some, else the CPU.

    Raises UserError for a name torch does not know, and for CUDA where torch finds none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")

    if device.type == "cuda":
        require_cuda(device)
        torch.cuda.set_device(device)  # streams, pinned memory and CUDA graphs go by it
    return device


def require_cuda(device: torch.device):
    """Raises UserError unless torch can use this CUDA device."""
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: this machine has no CUDA device that torch {torch.__version__} "
            "can use; leave the flag out to run on the CPU"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices"
        )


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Peak resident memory of this process and, on CUDA, of its tensors, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        peak["peak_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak
