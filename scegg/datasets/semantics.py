"""Class vectors of a user's own, in the place of the class attributes.

A .csv file has a line a class: its name, then its numbers. A first line without numbers names the
columns. A .npy file is a table (C, K), its rows in the order of the classes.
"""

import csv
import unicodedata
from pathlib import Path

import numpy as np

from util import UserError, is_of_disk, text_encoding, unreadable

LARGEST = 1 << 27  # numbers of a table


def read_semantics(path: Path, classes: list[str]) -> tuple[np.ndarray, list[str] | None]:
    """Class vectors (C, K) float32 in the order of `classes`, and the columns' names (K), if any.

    Raises UserError for a missing or unreadable file, a class without a row, and for anything else
    than finite numbers.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: it should hold the class vectors (.csv or .npy)")
    try:
        if path.suffix == ".npy":
            table, names = np.load(path, allow_pickle=False, mmap_mode="r"), None
        elif path.suffix == ".csv":
            table, names = read_csv(path, classes)
        else:
            raise UserError(f"{path}: class vectors must be a .csv or .npy file")
        return checked(table, path, len(classes)), names
    except UserError:
        raise
    except UnicodeError as error:
        raise UserError(f"{path} is no UTF-8 ({error}): save it as UTF-8") from None
    except Exception as error:  # a damaged or hostile file can raise anything
        if is_of_disk(error):
            raise unreadable(path, error) from None
        raise UserError(f"{path} was refused: {error}") from None


def checked(table: np.ndarray, path: Path, classes: int) -> np.ndarray:
    """The table as float32. Raises UserError unless it is one row a class of finite numbers."""
    if table.dtype.kind not in "fiu" or table.ndim != 2 or not 0 < table.size < LARGEST:
        raise UserError(f"{path}: {table.dtype} {table.shape} is no table, classes x numbers")
    if len(table) != classes:
        raise UserError(f"{path} has {len(table)} rows, but there are {classes} classes")

    with np.errstate(over="ignore"):  # too large a number becomes infinity
        table = np.array(table, np.float32)
    if not np.isfinite(table).all():
        raise UserError(f"{path} holds NaN or infinity")
    return table


def read_csv(path: Path, classes: list[str]) -> tuple[np.ndarray, list[str] | None]:
    """The rows of `classes` in a .csv file, and the names in its first line, if it has any.

    Classes that are in the file alone are left out, and a line says so.
    """
    with open(path, encoding=text_encoding(path), newline="") as file:
        reader = csv.reader(file)
        lines = [(reader.line_num, row) for row in map(without_empty_end, reader) if row]
    if not lines:
        raise UserError(f"{path} is empty")

    names = None
    if numbers_of(lines[0][1]) is None:
        names = [" ".join(name.split()) for name in lines.pop(0)[1][1:]]  # in one line each
    length = len(names or lines[0][1][1:])
    if not length:
        raise UserError(f"{path}: commas must divide each line into a class and its numbers")
    rows = {}
    for number, row in lines:
        name, values = composed(row[0].strip()), numbers_of(row)
        if values is None or len(values) != length:
            raise UserError(f"{path}, line {number}: expected a class and {length} numbers")
        if name in rows:
            raise UserError(f"{path}, line {number}: the class {name} stands twice")
        rows[name] = values

    wanted = [composed(name) for name in classes]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise UserError(
            f"{path} has no line for {len(missing)} of {len(classes)} classes, the first is "
            f"{missing[0]}; its own first is {next(iter(rows), 'none')}"
        )
    if len(rows) > len(classes):
        print(f"{path}: {len(rows) - len(classes)} classes without pictures are left out")
    return np.array([rows[name] for name in wanted]), names


def composed(name: str) -> str:
    """A name in its letters' usual form: macOS writes é in names of files as e and an accent."""
    return unicodedata.normalize("NFC", name)


def without_empty_end(row: list[str]) -> list[str]:
    """A row without the empty cells at its end: spreadsheets make all rows equally long."""
    while row and not row[-1].strip():
        row = row[:-1]
    return row


def numbers_of(row: list[str]) -> list[float] | None:
    """The numbers behind a class's name; None where one is no number."""
    try:
        return [float(text) for text in row[1:]]
    except ValueError:
        return None
