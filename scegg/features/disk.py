"""The files below HDF5 files: they tell the errors of a disk from damaged bytes.

HDF5 reads and writes through them, so it asks for no locks of its own, which many mounts lack.
"""

import atexit
import contextlib
import errno
import io
import os
from pathlib import Path

import h5py
from isal import isal_zlib

from util import UserError, is_of_disk, is_shortage, stamp, too_large, unreadable

BEGINNING = 4096  # bytes; HDF5 reads fewer before it knows what the file is

# what h5py and ISA-L raise over damaged bytes
DAMAGE = (
    OSError,
    KeyError,
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
    AttributeError,
    IndexError,
    OverflowError,
    isal_zlib.error,
)


class SourceFile(io.FileIO):
    """The file below an HDF5 file that is being read.

    It stays the file that was opened, whatever takes its name later. Raises OSError if the disk
    does not give it.
    """

    error = None  # the disk's

    def __init__(self, path: Path):
        super().__init__(path, "r")
        self.path = path
        self.stamp = stamp(os.fstat(self.fileno()))

    def __del__(self):
        self.close()

    def seek(self, offset, whence=os.SEEK_SET):
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that would be an offset in damaged bytes
                self.error = error
            raise

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        try:
            while len(view) and (count := super().readinto(view)):
                view = view[count:]
        except OSError as error:
            self.error = error
            raise
        view[:] = bytes(len(view))  # behind the file's end, as HDF5 does
        return len(buffer)

    def read_at(self, count: int, offset: int) -> bytes:
        """So many bytes from an offset on; any thread may ask. Raises ValueError behind the end."""
        if offset + count > self.stamp[0]:
            raise ValueError("it ends too early")
        try:
            content = os.pread(self.fileno(), count, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                self.error = error
            raise
        if len(content) != count:  # it was cut off meanwhile; and one call gives 2 GB at most
            raise ValueError("it gave too few bytes")
        return content

    @contextlib.contextmanager
    def reading(self, problem: str, remedy: str):
        """Read the file in a block, and turn what fails there into a UserError.

        An error of the disk is told as such, and so is a file that was written to since it was
        opened. Only what is left is the bytes' own fault: problem and remedy are for that.
        """
        self.error = None
        try:
            yield
        except DAMAGE as error:
            if self.error is not None:
                raise unreadable(self.path, self.error) from None
            self.require_unchanged()
            if is_shortage(error):
                raise too_large(self.path, error) from None
            if is_of_disk(error):  # that of another file, which is made from this one
                raise unreadable(error.filename or self.path, error) from None
            raise UserError(f"{self.path} {problem} ({error}): {remedy}") from None
        except UserError:
            self.require_unchanged()
            raise
        self.require_unchanged()

    def require_unchanged(self):
        """Raises UserError if the file was written to since it was opened."""
        try:
            now = stamp(os.fstat(self.fileno()))
        except OSError as error:
            raise unreadable(self.path, error) from None
        if now != self.stamp:
            raise UserError(
                f"{self.path} was changed while it was read: let its writer end, and run again"
            )


def open_hdf5(disk: SourceFile) -> h5py.File:
    """The HDF5 file that a file holds, open for reading. Raises OSError if it is none.

    HDF5 crashes when the interpreter ends if the disk did not give it a file's beginning. So the
    disk is asked for that before.
    """
    disk.seek(0)
    disk.readinto(bytearray(BEGINNING))
    return h5py.File(disk, "r")


class PatientFile(io.FileIO):
    """The file below an HDF5 file that is being written; it keeps the first error for later.

    HDF5 crashes the interpreter when it cannot write while it closes. So this file swallows every
    write after an error, HDF5 closes in peace, and `new_hdf5` raises the error afterwards.
    """

    error = None

    def write(self, data):
        view = memoryview(data).cast("B")
        try:
            while len(view) and self.error is None:
                view = view[super().write(view) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size=None):
        # it only frees space; and if not, the next write fails as well
        with contextlib.suppress(OSError):
            super().truncate(size)


@contextlib.contextmanager
def new_hdf5(path: Path):
    """Open a new HDF5 file for a block; yield it, and a function that checks it.

    The function raises an OSError if anything could not be written so far; so does the end.
    """
    with PatientFile(path, "w+") as disk:

        def check():
            if disk.error is not None:
                raise disk.error

        with h5py.File(disk, "w") as file:
            yield file, check
        check()


@atexit.register
def close_hdf5_files():
    """Close every HDF5 file that is still open when the interpreter ends.

    HDF5 would close them itself, but later: then the files of this module are gone, and it crashes.
    """
    for file in h5py.h5f.get_obj_ids(types=h5py.h5f.OBJ_FILE):
        h5py.File(file).close()
