"""Text files as people pass them around."""

import codecs
from pathlib import Path


def text_encoding(path: Path) -> str:
    """The encoding of a text file: UTF-16 where it begins with its mark, else UTF-8.

    Either reads past the byte order mark that Windows writes.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
