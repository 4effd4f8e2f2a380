"""What every other module leans on: errors for people, safe files, seeds, devices.

Upstream of everything: this module imports nothing of the project but `scegg` itself, which has to
come before torch.
"""

import scegg  # noqa: F401, first: it sets what torch reads when it is loaded

# isort: split
import argparse
import codecs
import contextlib
import errno
import hashlib
import importlib
import math
import os
import random
import re
import secrets
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch


def module_if_there(name: str):
    """A module of Python's library, None on systems that lack it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


resource = module_if_there("resource")  # not on Windows

# which of a text's first bytes are zeros, where it begins with ASCII and without a mark
WITHOUT_MARK = {
    bytes([0, 1, 1, 1]): "utf-32-le",
    bytes([1, 1, 1, 0]): "utf-32-be",
    bytes([0, 1]): "utf-16-le",
    bytes([1, 0]): "utf-16-be",
}

# ---- errors for people


class UserError(Exception):
    """Something that the user can put right: what was wrong, where, and what to do.

    Its text is one line of printable characters, whatever a stranger's file or a library put in.
    """

    def __str__(self):
        return one_line(super().__str__().strip())


def one_line(text: str) -> str:
    """A text as one line of printable characters."""
    line = re.sub(r"\s*[\r\n]\s*", " ", text)
    return "".join(character if character.isprintable() else "?" for character in line)


class FlagParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a UserError like every mistake, and no flag is abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        """Raises UserError in the place of argparse's exit."""
        raise UserError(f"{message} (--help lists the flags)")


# what Python and torch say where a process gets no more memory or threads
SHORTAGE = re.compile("can't allocate memory|out of memory|can't start new thread")


def exit_on_user_error(main):
    """Run `main()`; mistakes end in one line on stderr and exit status 2, Ctrl-C in 130.

    An OSError counts as a mistake: it is a disk's or a folder's. Letters that stdout cannot take,
    as some in a folder's name, are escaped.
    """
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()  # what is still held can find the pipe broken, too
    except BrokenPipeError:
        sys.stdout = None  # else Python tries once more at its end, and complains
        print("error: nobody reads the output any more", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        print(f"error: {UserError(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        reason = str(UserError(error)) or "the memory is full"
        print(f"error: {reason}: ask for less at once, or stop other programs", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def without_none(values: dict) -> dict:
    """The entries that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def is_shortage(error: Exception) -> bool:
    """Whether an error says that this process gets no more memory or threads."""
    return isinstance(error, MemoryError) or bool(SHORTAGE.search(str(error)))


# ---- what a disk's errors mean


def codes(*names: str) -> set[int]:
    """The errno of these names; not every system has all of them."""
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


REMEDIES = {
    "free some disk space": codes("ENOSPC", "EDQUOT"),
    "take a disk that has larger files, or raise the limit (ulimit -f)": codes("EFBIG"),
    "allow more open files (ulimit -n)": codes("EMFILE", "ENFILE"),
    "free some memory": codes("ENOMEM"),
    "give a shorter name": codes("ENAMETOOLONG"),
    "close the program that holds it open": codes("EBUSY", "ETXTBSY", "EAGAIN"),
    "get the right to use it": codes("EACCES", "EPERM"),
    "let its disk be written to": codes("EROFS"),
    "see whether it is there": codes("ENOENT", "ENOTDIR"),
    "give the name of a file": codes("EISDIR"),
    "see whether its disk or mount is still there": codes(
        "EIO", "ESTALE", "ENOTCONN", "ENXIO", "ENODEV", "EREMOTEIO", "ESHUTDOWN",
        "ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
        "ETIMEDOUT",
    ),
}  # fmt: skip


def remedy(error: OSError) -> str:
    """What helps against an error of the disk."""
    # a folder that took a new file refuses the old one's name: on Windows and over the net,
    # somebody has the old file open
    refused_name = error.filename2 is not None and error.errno in codes("EACCES", "EPERM")
    number = errno.EBUSY if refused_name else error.errno

    for words, numbers in REMEDIES.items():
        if number in numbers:
            return words
    return "see what is the matter with its disk"


def is_of_disk(error: Exception) -> bool:
    """Whether an error is the system's, and says nothing of the bytes of a file.

    EINVAL is not: damaged bytes send a reader to an offset that cannot be.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def unreadable(path: Path, error: OSError) -> UserError:
    """What a user is told of a file that the disk would not give; its bytes may be well."""
    reason = error.strerror or error
    return UserError(f"{path} could not be read ({reason}): {remedy(error)}, and run again")


def too_large(path: Path, error: Exception) -> UserError:
    """What a user is told of a file for which there was too little memory; it may be well."""
    return UserError(
        f"{path} could not be read, the memory is full ({str(error) or 'no more is given'}): free "
        "some and run again; if that does not help, the file is damaged"
    )


def unwritable(path: Path, error: OSError, then: str = " or name another place") -> UserError:
    """What a user is told of a file that the disk would not take; then: behind the remedy."""
    reason = error.strerror or error
    return UserError(f"{path} could not be written ({reason}): {remedy(error)}{then}")


def is_missing(path: Path) -> bool:
    """Whether no file lies there. Raises OSError where the disk does not tell."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True


@contextlib.contextmanager
def unchanged(path: Path):
    """Read the file in a block. Raises UserError if it was written or replaced meanwhile."""
    before = stamp(path.stat())
    yield
    if stamp(path.stat()) != before:
        raise UserError(f"{path} was changed while it was read: run again")


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Size and time of a file, which change when it is written to."""
    return status.st_size, status.st_mtime_ns


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
def atomic_path(path: Path, then: str = " or name another place"):
    """Yield a temporary path beside `path`; on success it takes that name, else it is removed.

    Whoever looks at `path` sees the old file or the whole new one, never a part.
    Raises UserError when the disk does not take the file: what helps, and `then` behind it.
    """
    path = Path(path)
    # on a shared disk, the processes of two containers may have the same id
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    make_folder(path.parent)

    try:
        yield temporary
        make_durable(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (temporary, path):
            raise
        raise unwritable(path, error, then) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

    # the file is there, and whole; not every system and mount can do this for a folder
    with contextlib.suppress(OSError):
        make_durable(path.parent)


def make_durable(path: Path):
    """Wait until what is written of a file, or a rename inside a folder, is on the disk."""
    # Windows makes safe only what is open for writing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
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
            with contextlib.suppress(OSError):  # somebody may hold it open; it harms nobody
                file.unlink()


def free_space(folder: Path) -> float:
    """Bytes that are free on its disk; infinite where that says 0 in all, as many of FUSE do."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def require_space(folder: Path, needed: float, what: str):
    """Raises UserError if the disk of `folder` has fewer than `needed` bytes free."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = free_space(existing)
    if needed > free:
        raise UserError(
            f"{what} will take {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are "
            "free: free some disk space or name another place"
        )


def require_file_size(folder: Path, size: float, what: str):
    """Raises UserError if the disk of `folder` has no files of `size` bytes, as FAT's of 4 GB."""
    if size < 2**32:  # a disk without sparse files would have to write all of it
        return

    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(int(size))
    except OSError as error:
        raise UserError(
            f"{what} will take {size / 1e9:.2f} GB, and the disk of {folder} takes no file of that "
            f"size ({error.strerror}): name another place"
        ) from None


def text_encoding(path: Path) -> str:
    """The encoding of a text file: UTF-16 or UTF-32 where it begins so, else UTF-8.

    All are read past the byte order mark that Windows writes. Without a mark, zeros beside the
    first letter tell: our texts begin with ASCII.
    """
    with open(path, "rb") as file:
        return encoding_of(file.read(4))


def encoding_of(start: bytes) -> str:
    """The same, from the first four bytes of the text."""
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    zeros = bytes(byte == 0 for byte in start)
    return WITHOUT_MARK.get(zeros) or WITHOUT_MARK.get(zeros[:2], "utf-8-sig")


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


def load_tensors(path: Path):
    """torch.load of tensors, numbers and texts; no code runs.

    Raises UserError where the disk fails, and whatever torch raises over damaged bytes.
    """
    try:
        with open(path, "rb") as file:  # so that the disk's errors stay what they are
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if is_of_disk(error):
            raise unreadable(path, error) from None
        if is_shortage(error):
            raise too_large(path, error) from None
        raise


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    One of CUDA has its number, and is torch's current device from then on.
    Raises UserError for a name torch does not know, and for CUDA where torch finds none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"

    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")

    if device.type == "cuda":
        require_cuda(device)
        if device.index is None:  # which torch asks for where it takes a device of CUDA
            device = torch.device("cuda", torch.cuda.current_device())
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
    """Peak resident memory of this process and, on CUDA, of its tensors, in GB (10^9 bytes).

    Windows does not tell the first.
    """
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_ram_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device.type == "cuda":
        peak["peak_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak
