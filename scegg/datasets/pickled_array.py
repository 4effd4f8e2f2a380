"""Reads a pickled numpy array without running what a pickle asks for."""

import io
import pickle
import pickletools
import re
from pathlib import Path

import numpy as np


class PickledDtype:
    """Stands for numpy.dtype while a pickle is read: takes note of the type and its byte order, and makes nothing."""

    def __init__(self, kind: str, *flags):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state):
        self.order = state[1]

    def real(self) -> np.dtype:
        if not re.fullmatch(r"[fiu][1248]", self.kind) or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds {self.kind!r}, not numbers")
        return np.dtype(self.order + self.kind)


class PickledArray:
    """Stands for numpy.ndarray while a pickle is read; numpy itself would believe a hostile file's types and sizes."""

    def __init__(self, *arguments):
        self.state = None

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    @classmethod
    def from_buffer(cls, data, dtype, shape, order):
        made = cls()
        made.__setstate__((None, shape, dtype, order == "F", data))
        return made

    def real(self) -> np.ndarray:
        return np.frombuffer(self.data, self.dtype.real()).reshape(self.shape, order="F" if self.fortran else "C")


class ArrayUnpickler(pickle.Unpickler):
    """Reads one pickled numpy array of numbers; any other global in the file, whatever it is, is refused."""

    def find_class(self, module, name):
        allowed = {("multiarray", "_reconstruct"): PickledArray, ("numeric", "_frombuffer"): PickledArray.from_buffer}
        package, _, last = module.rpartition(".")
        if package in ("numpy.core", "numpy._core") and (last, name) in allowed:
            return allowed[last, name]
        stand_ins = {("numpy", "ndarray"): PickledArray, ("numpy", "dtype"): PickledDtype,
                     ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1")}  # how protocol 2 spells bytes
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table of word vectors does not need")
        return stand_ins[module, name]


def read_pickle(path: Path) -> np.ndarray:
    """The array in a pickle. Nothing in the file runs, and it gets no more memory than its own size calls for."""
    data = path.read_bytes()
    for opcode, argument, _ in pickletools.genops(data):  # fails where a length reaches past the end
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise pickle.UnpicklingError(f"it counts {argument} objects in {len(data)} bytes")
    content = ArrayUnpickler(io.BytesIO(data)).load()
    if not isinstance(content, PickledArray):
        raise pickle.UnpicklingError("it does not hold a table of numbers (attributes x vector length)")
    return content.real()
