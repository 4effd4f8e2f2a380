"""Word vectors of the attributes (K x 300): read from the files the community passes around, or built from a model.

No file is ever given a chance to run code: pickles are read by an unpickler that knows numpy arrays and nothing else.
"""
import hashlib
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scegg.datasets.pickled_array import read_pickle
from util import UserError

# words of CUB that word2vec-google-news-300 lacks, and what stands for them (section 2)
REPLACEMENTS = {"spatulate": "broad", "upperparts": "upper parts", "grey": "gray"}
GAUSSIAN_LENGTH = 300
LONGEST = 10_000  # numbers of a vector, bytes of a word


def attribute_words(name: str) -> list[str]:
    """The words of an attribute: "has_bill_shape::curved_(up_or_down)" -> ["bill", "shape", "curved"]."""
    words = re.sub(r"[-_/:]+", " ", name.split("(")[0]).split()
    if words[:1] == ["has"]:
        words = words[1:]
    return [part for word in words for part in REPLACEMENTS.get(word.lower(), word).split()]





def read_vectors(path: Path, names: list[str] | None) -> np.ndarray:
    """(K, d) float32 word vectors of a .pkl or .npy table, or summed from a word2vec .bin/.txt or GloVe .txt model.

    A model needs the attribute names. Raises UserError for anything else than a finite table, and for missing words.
    """
    if not path.is_file():
        raise UserError(f"--w2v {path}: no such file")
    try:
        if path.suffix == ".pkl":
            table = read_pickle(path)
        elif path.suffix == ".npy":
            table = np.load(path, allow_pickle=False)
        elif path.suffix in (".bin", ".txt"):
            if names is None:
                raise UserError(f"{path} holds words, but there is no file of attribute names to look up in it")
            return sum_words(path, names)
        else:
            raise UserError(f"--w2v {path}: expected .pkl, .npy, .bin or .txt")
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything
        raise UserError(f"{path} was refused: {error}") from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind not in "fiu":
        raise UserError(f"{path} does not hold a table of numbers (attributes x vector length)")
    return check_table(table, path)


def check_table(table: np.ndarray, where) -> np.ndarray:
    """The table as float32; raises UserError for NaN and infinity, and says which rows are zero.

    The SUN table that the community shares has such a row (its word was in no vocabulary): V starts at 0 there, and learns.
    """
    with np.errstate(over="ignore"):  # what is too large becomes infinity
        table = table.astype(np.float32)
    if not table.size or not np.isfinite(table).all():
        raise UserError(f"{where} " + ("holds NaN or infinity" if table.size else "holds no numbers"))
    zero = np.flatnonzero(~table.any(axis=1)).tolist()
    if zero:
        print(f"{where}: the attributes in rows {zero} (from 0) have no vector, theirs start at zero")
    return table


def sum_words(path: Path, names: list[str]) -> np.ndarray:
    """(K, d) sums of the model's vectors of every attribute's words, looked up as written, then in lower case."""
    words = [attribute_words(name) for name in names]
    wanted = {form for parts in words for word in parts for form in (word, word.lower())}
    found = dict(word2vec_binary(path, wanted) if path.suffix == ".bin" else vector_text(path, wanted))
    vectors = [[found.get(word, found.get(word.lower())) for word in parts] for parts in words]
    missing = sorted({word for parts, row in zip(words, vectors) for word, vector in zip(parts, row) if vector is None})
    if missing:
        print(f"{path}: no vector for {', '.join(missing)}; left out of the sums")
    rows = [[vector for vector in row if vector is not None] for row in vectors]
    empty = [name for name, row in zip(names, rows) if not row]
    if empty:
        raise UserError(f"{path} knows no word of {len(empty)} attributes, the first is {empty[0]}")
    return check_table(np.stack([np.sum(row, axis=0, dtype=np.float64) for row in rows]), path)


def check_length(length: int, path: Path):
    if not 1 <= length <= LONGEST:
        raise UserError(f"{path} says that its vectors hold {length} numbers: it is no file of word vectors")


def word2vec_binary(path: Path, wanted: set[str]):
    """Yield (word, float32 vector) of the wanted words of a word2vec .bin file."""
    with open(path, "rb") as file:
        count, length = map(int, file.readline(LONGEST).split())
        check_length(length, path)
        for _ in tqdm(range(count), "word vectors", disable=None, unit="word", leave=False):
            word = bytearray()
            while (byte := file.read(1)) != b" ":
                if not byte or len(word) > LONGEST:
                    raise UserError(f"{path} ends in the middle of a word: it is truncated, or no word2vec file")
                word += byte
            data = file.read(4 * length)
            if len(data) < 4 * length:
                raise UserError(f"{path} ends in the middle of a vector: it is truncated")
            text = word.strip().decode("utf-8", errors="replace")
            if text in wanted:
                yield text, np.frombuffer(data, "<f4")


def vector_text(path: Path, wanted: set[str]):
    """Yield (word, float64 vector) of the wanted words of a word2vec .txt (with its header line) or GloVe .txt file."""
    length = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(tqdm(file, "word vectors", disable=None, unit="word", leave=False), start=1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:
                length = int(fields[1])
                continue
            length = length or len(fields) - 1
            check_length(length, path)
            word = " ".join(fields[:-length])
            if word in wanted:
                if len(fields) <= length:
                    raise UserError(f"{path}, line {number}: fewer than {length} numbers")
                yield word, np.array(fields[-length:], dtype=np.float64)


def gaussian_vectors(names: list[str]) -> np.ndarray:
    """(K, 300) sums of one deterministic Gaussian vector a word: related attributes still share words."""
    def vector(word):
        seed = int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(GAUSSIAN_LENGTH)

    words = [attribute_words(name) for name in names]
    if not all(words):
        raise UserError(f"the attribute name {names[words.index([])]!r} holds no word: correct the dataset's attribute file")
    return np.stack([sum(map(vector, parts)) for parts in words]).astype(np.float32)


def attribute_vectors(path: Path | None, data_root: Path, dataset: str, names: list[str] | None,
                      count: int) -> tuple[np.ndarray, str]:
    """(K, d) word vectors and where they come from: `path`, else data_root/w2v, else Gaussian ones, said so.

    Raises UserError if they are not `count` rows, or if there is nothing to make them from.
    """
    if path is None:
        folder = data_root / "w2v"
        tables = [folder / f"{dataset}_attribute{suffix}" for suffix in (".pkl", ".npy")]
        models = sorted([*folder.glob("*.bin"), *folder.glob("*.txt")])
        path = next((candidate for candidate in [*tables, *models] if candidate.is_file()), None)
    if path is not None:
        vectors, source = read_vectors(path, names), path.name
    elif names is not None:
        vectors, source = gaussian_vectors(names), "gaussian"
        print(f"no word vectors in {data_root / 'w2v'}: using one deterministic Gaussian vector a word, summed. "
              "The paper's numbers need word2vec's; see the README")
    else:
        raise UserError(f"no word vectors and no attribute names for {dataset}: put {dataset}_attribute.pkl into "
                        f"{data_root / 'w2v'}, or the dataset's attribute file into {data_root / dataset}")
    if len(vectors) != count:
        raise UserError(f"{path or 'attribute names'}: {len(vectors)} word vectors, but {dataset} has {count} attributes")
    return vectors, source
