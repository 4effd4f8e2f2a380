"""What processes owe each other: locks on what they write, and children that try what may crash."""

import contextlib
import errno
import faulthandler
import io
import os
import signal
import time
from pathlib import Path

from util import UserError, codes, make_folder, module_if_there, unwritable

fcntl, resource = module_if_there("fcntl"), module_if_there("resource")  # not on Windows
msvcrt = module_if_there("msvcrt")  # only there

CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGTRAP")

# ---- locks

HELD = set()  # the open lock files of this process


def close_held_locks():
    """Let go of the locks in a forked helper.

    A DataLoader's worker would otherwise hold them for seconds after its parent was killed.
    """
    for file in HELD:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_held_locks)


@contextlib.contextmanager
def locked(path: Path, doing: str, wait: bool = False):
    """Hold the lock file `path` for a block; the holder removes it. Yields whether it is held.

    Whoever else wants it waits, or gets a UserError that says what is being done (`doing`). The
    lock is the system's: it ends with its process, however that dies. On a disk without locks it
    says so in a line, and holds nothing.
    """
    make_folder(path.parent)
    file, is_held = take_lock(path, doing, wait)
    HELD.add(file)
    try:
        yield is_held
    finally:
        HELD.discard(file)
        if fcntl is None:  # Windows removes no open file, nor one that the next holder has open
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()  # elsewhere, before it is let go: nobody else can hold it
        file.close()


def take_lock(path: Path, doing: str, wait: bool) -> tuple[io.TextIOBase, bool]:
    """The open file of a lock, and whether it is ours: a disk may have no locks.

    Raises UserError as `locked` does.
    """
    is_told = False
    while True:
        file = open_lock(path)
        try:
            is_ours = lock_at_once(file)
        except OSError as error:  # which errno, differs from mount to mount
            print(
                f"the disk of {path.parent} has no locks ({error.strerror}): "
                "let no other process work on the same file",
                flush=True,
            )
            return file, False

        if is_ours and is_still_at(file, path):
            return file, True
        file.close()
        if is_ours:  # its holder was done and removed it: take a new one
            continue

        if not wait:
            raise UserError(
                f"another process is {doing} (it holds {path}): wait for it, or stop it"
            )
        if not is_told:
            print(f"another process is {doing}: waiting for it", flush=True)
        is_told = True
        time.sleep(0.1)


def lock_at_once(file) -> bool:
    """Lock an open file; False if another process has it.

    Raises OSError where the system or the disk has no locks.
    """
    if fcntl is None and msvcrt is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        busy = codes("EWOULDBLOCK", "EAGAIN") if fcntl is not None else codes("EACCES", "EDEADLK")
        if error.errno not in busy:
            raise
        return False
    return True


def is_still_at(file, path: Path) -> bool:
    """Whether an open file is the one that lies at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def open_lock(path: Path):
    """The file of a lock, open. Raises UserError where it cannot be made."""
    try:
        return open(path, "a", encoding="utf-8")  # noqa: SIM115, the lock is held by it
    except OSError as error:
        raise unwritable(path, error) from None


# ---- children


def require_survivable(action, path: Path, seconds: int, reader: str, remedy: str):
    """Raises UserError if `action()`, which reads a file, crashes or takes longer than `seconds`.

    It is tried in a forked process. What it raises there does not matter.
    reader: whose code it runs. remedy: what helps against damaged bytes.
    """
    signum = fatal_signal(action, seconds)
    if signum == 0:
        return

    name = signal.Signals(signum).name
    if name == "SIGALRM":
        raise UserError(
            f"{path} could not be opened in {seconds} seconds: either its disk does not answer, "
            f"or {reader} hung over damaged bytes; if the disk is well, {remedy}"
        )
    if name in CRASHES:
        raise UserError(f"{path} is damaged, {reader} crashed over it: {remedy}")
    raise UserError(f"{path}: the process that tried it was killed ({name}): is memory short?")


def fatal_signal(action, seconds: int) -> int:
    """The signal that killed the forked process in which `action()` was tried; 0 if none did.

    SIGALRM: it took more than `seconds`. Without fork (Windows), nothing is tried, nor where the
    system gives no other process: it may count our memory twice, or have a limit of processes.
    """
    if not hasattr(os, "fork"):
        return 0
    try:
        child = os.fork()
    except OSError:
        return 0

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

    return max(0, -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
