"""Which steps W&B's own files hold of a run.

A killed process takes with it what W&B had not written yet. wandb reads its files in Go alone, so
this is LevelDB's log format around wandb's own messages: blocks of chunks, each with a header.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, BLOCK = 7, 32768
CHUNK_HEADER = struct.Struct("<IHB")  # checksum, size, kind
FULL, LAST = 1, 4  # kinds of a chunk that end a record


def records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file, in order, up to one that a kill cut off."""
    data, position, whole = path.read_bytes(), FILE_HEADER, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER.size:  # a header never stands over a block's end
            position += left
            continue

        _, size, kind = CHUNK_HEADER.unpack_from(data, position)
        start, position = position + CHUNK_HEADER.size, position + CHUNK_HEADER.size + size
        if kind == 0 or position > len(data):
            return
        whole += data[start:position]
        if kind in (FULL, LAST):
            yield Record.FromString(whole)
            whole = b""


def last_step(folder: Path, wandb_id: str) -> int:
    """The last step that the files below W&B's folder hold of a run; 0 where they hold none."""
    last = 0
    for path in folder.glob(f"*run-*/run-{wandb_id}.wandb"):
        with contextlib.suppress(DecodeError):  # what follows is damaged
            for record in records(path):
                last = max(last, record.history.step.num)
    return last
