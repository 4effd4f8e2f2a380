"""Read a pickled numpy array without running anything that the pickle asks for.

A pickle is a program: `pickle.load` would run it. The reader here knows numpy arrays of numbers
and refuses everything else. Stand-ins take the place of numpy's own types, because numpy would
believe the types and sizes that a hostile file claims.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
# a pickle that was passed on as a text of Windows: no module's name ends with \r
AS_A_TEXT = re.compile(rb"(\x80[\x02\x03])?c[\w.]+\r\n")


def read_pickle(path: Path) -> np.ndarray:
    """The array in a pickle; it takes no more memory than the file's own size calls for.

    Raises pickle.UnpicklingError for other contents, and whatever `pickle` and numpy raise over
    damaged bytes.
    """
    data = path.read_bytes()
    if AS_A_TEXT.match(data):
        data = data.replace(b"\r\n", b"\n")
    for name, argument in opcodes(data):  # fails where a length passes the end
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise pickle.UnpicklingError(f"it counts {argument} objects in {len(data)} bytes")

    # latin1: each byte of a text of Python 2 becomes one character
    content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    if not isinstance(content, PickledArray):
        raise pickle.UnpicklingError(
            "it does not hold a table of numbers (attributes x vector length)"
        )
    return content.real()


def opcodes(data: bytes) -> Iterator[tuple[str, object]]:
    """Yield each opcode's name and argument, as pickletools.genops does.

    A STRING of Python 2 may hold any bytes, where pickletools expects ASCII: it is passed over.
    Raises pickle.UnpicklingError for an unknown opcode, and ValueError as pickletools does.
    """
    stream = io.BytesIO(data)
    while (code := stream.read(1)) != b".":
        opcode = OPCODES.get(code)
        if opcode is None:
            raise pickle.UnpicklingError(f"it has no opcode {code!r} where one should stand")

        argument = None
        if opcode.name == "STRING":
            stream.readline()
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield opcode.name, argument


class PickledDtype:
    """Stands for numpy.dtype while a pickle is read: it notes the type and its byte order."""

    def __init__(self, kind: str, *flags):
        self.kind = kind
        self.order = "<"

    def __setstate__(self, state):
        self.order = state[1]

    def real(self) -> np.dtype:
        """The dtype. Raises pickle.UnpicklingError unless it is one of numbers."""
        is_number = re.fullmatch(r"[fiu][1248]", self.kind)
        if not is_number or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds {self.kind!r}, not numbers")
        return np.dtype(self.order + self.kind)


class PickledArray:
    """Stands for numpy.ndarray while a pickle is read: it notes the shape, type and bytes."""

    def __init__(self, *arguments):
        self.state = None

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    @classmethod
    def from_buffer(cls, data, dtype, shape, order):
        """An array as pickle protocol 5 describes it."""
        array = cls()
        array.__setstate__((None, shape, dtype, order == "F", data))
        return array

    def real(self) -> np.ndarray:
        """The array. Raises ValueError where the bytes do not fill the shape."""
        order = "F" if self.fortran else "C"
        data = self.data.encode("latin-1") if isinstance(self.data, str) else self.data
        return np.frombuffer(data, self.dtype.real()).reshape(self.shape, order=order)


def encode_latin1(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, with which pickle protocol 2 spells bytes."""
    return text.encode("latin-1")


NUMPY_CORE = {
    ("multiarray", "_reconstruct"): PickledArray,
    ("numeric", "_frombuffer"): PickledArray.from_buffer,
}
STAND_INS = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
    ("_codecs", "encode"): encode_latin1,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads one pickled numpy array of numbers and refuses every other global in the file."""

    def find_class(self, module, name):
        package, _, last = module.rpartition(".")
        if package in ("numpy.core", "numpy._core") and (last, name) in NUMPY_CORE:
            return NUMPY_CORE[last, name]
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which a table of word vectors does not need"
        )
