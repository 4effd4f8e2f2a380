"""What the fuzz tests share: cases, damaged bytes, impossible arrays, and what is right.

`SCEGG_FUZZ=20 pytest tests/robustness` tries twenty times as many cases, others every time.
"""

import contextlib
import os
import signal

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from util import UserError

TIMES = int(os.environ.get("SCEGG_FUZZ", 1))
SECONDS = 20  # that one case may take on a busy machine


def cases(count):
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def time_limit():
    def stop(signum, frame):
        raise AssertionError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def right_or_refused(read, is_right):
    """Either `read()` gives what `is_right` holds true, or a UserError of one line."""
    with time_limit():
        try:
            result = read()
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
        else:
            assert is_right(result)


def in_a_child(action):
    """Run `action` in a forked process, for HDF5 may crash over damaged bytes.

    Returns (exit status, what it wrote to stderr).
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(writer, repr(error).encode()[:2000])
        os._exit(status)

    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        text = said.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@st.composite
def damages(draw):
    """A function from whole bytes to damaged ones."""
    where = st.floats(0, 1, exclude_max=True)
    flips = draw(st.lists(st.tuples(where, st.integers(0, 255)), min_size=0, max_size=6))
    keep = draw(st.one_of(st.just(1.0), where))
    zeros = draw(st.one_of(st.none(), st.tuples(where, st.integers(1, 200))))

    def damage(whole: bytes) -> bytes:
        content = bytearray(whole)
        for at, value in flips:
            content[int(at * len(content))] = value
        if zeros:
            start = int(zeros[0] * len(content))
            end = min(start + zeros[1], len(content))
            content[start:end] = bytes(end - start)
        return bytes(content[: round(keep * len(content))])

    return damage


# what a stranger can put in place of an array
EDITS = {
    "nan": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a),
    "inf": lambda a: a * np.inf,
    "negative": lambda a: -a,
    "one more": lambda a: a + 1,
    "huge": lambda a: a + 2**40,
    "empty": lambda a: a[:0],
    "one": lambda a: a[:1],
    "short": lambda a: a[:-1],
    "twice": lambda a: np.concatenate([a, a]),
    "flat": lambda a: a.ravel(),
    "deep": lambda a: a[..., None],
    "scalar": lambda a: a.ravel()[0],
    "floats": lambda a: a + 0.5,
    "text": lambda a: "text",
    "bytes": lambda a: np.array([b"\xff\xfe"] * 4),
    "complex": lambda a: a + 1j,
    "zero": lambda a: a * 0,
    "double": lambda a: a * 1e300,
    "same": lambda a: a,
    "int8": lambda a: a.astype(np.int8),
    "uint64": lambda a: a.astype(np.uint64),
    "reversed": lambda a: a[::-1],
    "moved": lambda a: np.roll(a, 1, axis=0),
    "booleans": lambda a: a > 0,
}


def edits_of(names):
    """One or two of the arrays `names`, and what is put in place of each."""
    return st.dictionaries(
        st.sampled_from(names), st.sampled_from([*EDITS]), min_size=1, max_size=2
    )
