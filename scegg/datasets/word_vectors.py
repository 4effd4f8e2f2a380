"""Word vectors of the attributes (K, d): read from a table, or summed from a model's words.

docs/method.md, section 2. No file is given a chance to run code.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scegg.datasets.pickled_array import read_pickle
from util import UserError, is_of_disk, one_line, text_encoding, unchanged, unreadable

# words of CUB that word2vec-google-news-300 lacks, and what is looked up for them in every model
REPLACEMENTS = {"spatulate": "broad", "upperparts": "upper parts", "grey": "gray"}
# the same of AWA2; where a model knows the word itself, that is taken
REPLACED_WHERE_MISSING = {
    "quadrapedal": "quadrupedal",
    "flys": "flies",
    "toughskin": "tough skin",
    "longleg": "long leg",
    "chewteeth": "chew teeth",
    "meatteeth": "meat teeth",
    "strainteeth": "strain teeth",
    "newworld": "new world",
    "oldworld": "old world",
    "nestspot": "nest spot",
}
MODELS = (".bin", ".txt", ".vec")  # word2vec; word2vec or GloVe as text; fastText as text
GAUSSIAN_LENGTH = 300
LONGEST = 10_000  # numbers of a vector, bytes of a word


def attribute_vectors(
    path: Path | None,
    data_root: Path,
    dataset: str,
    names: list[str] | None,
    count: int,
    units: str = "percent",
    semantics: str | None = None,
) -> tuple[np.ndarray, str]:
    """Word vectors (K, d) float32, and the name of their source.

    They come from `path` if it is given, else from data_root/w2v, else they are Gaussian.
    units: "vector" where no words name the numbers of the class vectors. semantics: the file of
    these, if they are not the dataset's own; its table in data_root/w2v is not of them, then.
    Raises UserError if they are not `count`, or if there is nothing to make them from.
    """
    is_own = semantics is None
    wordless = names is None and (units == "vector" or not is_own)
    path = path or find_vectors(data_root / "w2v", dataset if is_own else None, not wordless)
    if path is None and wordless:
        return dimension_vectors(count, dataset), "gaussian"
    if path is not None:
        vectors, source = read_vectors(path, names), one_line(path.name)
    elif names is not None:
        vectors, source = gaussian_vectors(names), "gaussian"
        print(
            f"no word vectors in {data_root / 'w2v'}: using one deterministic Gaussian vector "
            "a word, summed. The paper's numbers need word2vec's; see docs/data.md"
        )
    else:
        raise UserError(
            f"no word vectors and no attribute names for {dataset}: "
            f"put {dataset}_attribute.pkl into {data_root / 'w2v'}, "
            f"or the dataset's attribute file into {data_root / dataset}"
        )

    if len(vectors) != count:
        raise UserError(
            f"{path or 'attribute names'}: {len(vectors)} word vectors, "
            f"but {dataset} has {count} attributes"
        )
    return vectors, source


def dimension_vectors(count: int, dataset: str) -> np.ndarray:
    """A Gaussian vector (300,) for each number of class vectors that no words name; says so."""
    print(
        f"no words name the {count} numbers of {dataset}'s class vectors: V starts from one "
        "Gaussian vector a number. The baseline needs no V: wandb_config/ablations/tf_vaegan.yaml"
    )
    vectors = [gaussian_vector(f"dimension {number}") for number in range(count)]
    return np.stack(vectors).astype(np.float32)


def find_vectors(folder: Path, dataset: str | None, models: bool = True) -> Path | None:
    """The dataset's own table in the folder, else a model of words, else None.

    dataset: None where no table belongs to its class vectors. models: whether there are words.
    """
    candidates = []
    if dataset is not None:
        candidates += [folder / f"{dataset}_attribute{suffix}" for suffix in (".pkl", ".npy")]
    if models:
        # macOS puts a hidden file ._x beside x on disks of other systems
        candidates += sorted(path for path in folder.glob("[!.]*") if path.suffix in MODELS)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_vectors(path: Path, names: list[str] | None) -> np.ndarray:
    """Word vectors (K, d) float32 of one file, chosen by its suffix.

    A .pkl or .npy file holds the table itself. One of MODELS holds words: then the vectors of each
    attribute's words are summed, which needs the names.
    Raises UserError for anything else than a finite table, for missing words, and for a file that
    is written to meanwhile.
    """
    if not path.is_file():
        raise UserError(f"--w2v {path}: no such file")
    try:
        with unchanged(path):
            table = read_by_suffix(path, names)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything
        if is_of_disk(error):
            raise unreadable(path, error) from None
        raise UserError(f"{path} was refused: {error}") from None

    is_array = isinstance(table, np.ndarray)
    if not is_array or table.ndim != 2 or table.dtype.kind not in "fiu":
        raise UserError(f"{path} does not hold a table of numbers (attributes x vector length)")
    return check_table(table, path)


def read_by_suffix(path: Path, names: list[str] | None) -> np.ndarray:
    """What a file of word vectors holds, not yet checked. Raises whatever its reader raises."""
    if path.suffix == ".pkl":
        return read_pickle(path)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix not in MODELS:
        raise UserError(f"--w2v {path}: expected .pkl, .npy, {', '.join(MODELS)}")
    if names is None:
        raise UserError(
            f"{path} holds words, but there is no file of attribute names to look up in it"
        )
    return sum_words(path, names)


def check_table(table: np.ndarray, where) -> np.ndarray:
    """The table as float32, with a line about rows that are zero.

    The SUN table of the community has a zero row: its word was in no vocabulary. The learnable
    attribute vector V then starts at 0. Raises UserError for NaN, infinity and an empty table.
    """
    with np.errstate(over="ignore"):  # too large a number becomes infinity
        table = table.astype(np.float32)
    if not table.size:
        raise UserError(f"{where} holds no numbers")
    if not np.isfinite(table).all():
        raise UserError(f"{where} holds NaN or infinity")

    zero = np.flatnonzero(~table.any(axis=1)).tolist()
    if zero:
        print(
            f"{where}: the attributes in rows {zero} (from 0) have no vector, theirs start at zero"
        )
    return table


def attribute_words(name: str) -> list[str]:
    """The words of an attribute: "has_bill_shape::curved_(up_or_down)" -> [bill, shape, curved]."""
    before_bracket = name.split("(")[0]
    words = re.sub(r"[-_/:]+", " ", before_bracket).split()
    if words[:1] == ["has"]:
        words = words[1:]
    return [part for word in words for part in REPLACEMENTS.get(word.lower(), word).split()]


def sum_words(path: Path, names: list[str]) -> np.ndarray:
    """Sums (K, d) of a model's vectors over each attribute's words.

    A word is looked up in the ways of `readings`. One without a vector is left out, and an
    attribute of which no word is known gets a row of zeros. What is not read as it is written is
    printed. Raises UserError if the model knows no word of any attribute.
    """
    words = [attribute_words(name) for name in names]
    distinct = sorted({word for row in words for word in row})
    wanted = {piece for word in distinct for reading in readings(word) for piece in reading}
    found = dict(read_model(path, wanted))

    known = read_words(distinct, found, path)
    rows = [[vector for word in row for vector in known[word]] for row in words]
    unknown = [name for name, row in zip(names, rows, strict=True) if not row]
    if len(unknown) == len(names):
        raise UserError(f"{path} knows no word of {len(names)} attributes, the first is {names[0]}")
    if unknown:
        print(
            f"WARNING: {path} knows no word of {len(unknown)} of {len(names)} attributes: "
            f"{', '.join(unknown)}. Their vectors are zero; a larger model may know them (--w2v)"
        )

    zero = np.zeros_like(next(row[0] for row in rows if row))
    sums = [np.sum(row or [zero], axis=0, dtype=np.float64) for row in rows]
    return check_table(np.stack(sums), path)


def read_words(
    words: list[str], found: dict[str, np.ndarray], path: Path
) -> dict[str, list[np.ndarray]]:
    """The vectors that stand for each word: one, or those of its parts, or none.

    found: the model's vectors, in its order. Prints a line for each word that is missing or read
    as others.
    """
    rank = {word: place for place, word in enumerate(found)}
    known, missing = {}, []
    for word in words:
        reading = best_reading(word, rank)
        known[word] = [found[piece] for piece in reading]
        if not reading:
            missing.append(word)
        elif reading not in ((word,), (word.lower(),)):
            print(f"{path}: no vector for {word}, read as {' + '.join(reading)}")

    if missing:
        print(f"{path}: no vector for {', '.join(missing)}; left out of the sums")
    return known


def best_reading(word: str, rank: dict[str, int]) -> tuple[str, ...]:
    """The pieces that stand for a word in a model; none if it knows no reading of the word.

    rank: the places of the words that the model knows; models begin with their commonest words.
    A word itself, or what is known to replace it, comes before a division in two. Of the divisions,
    that with the commoner words is taken: toughskin is tough + skin, not toughs + kin.
    """
    whole = (reading for reading in spellings(word) if all(piece in rank for piece in reading))
    reading = next(whole, None)
    if reading:
        return reading

    pairs = [pair for pair in divisions(word) if all(piece in rank for piece in pair)]
    pairs.sort(key=lambda pair: max(rank[piece] for piece in pair))
    joined = ((piece,) for piece in joinings(word) if piece in rank)
    return pairs[0] if pairs else next(joined, ())


def readings(word: str) -> list[tuple[str, ...]]:
    """Everything that is looked up for a word."""
    return [*spellings(word), *divisions(word), *((piece,) for piece in joinings(word))]


def spellings(word: str) -> list[tuple[str, ...]]:
    """A word as it is written, in lower case and capitalised, and what is known to replace it."""
    lower = word.lower()
    written = [(word,), (lower,), (lower.capitalize(),)]
    replaced = REPLACED_WHERE_MISSING.get(lower)
    return [*written, tuple(replaced.split())] if replaced else written


def divisions(word: str) -> list[tuple[str, str]]:
    """The ways to divide a word in two, in lower case.

    Two letters are no part: models know nearly every pair of letters.
    """
    lower = word.lower()
    return [(lower[:at], lower[at:]) for at in range(3, len(lower) - 2)]


def joinings(word: str) -> list[str]:
    """A word with a hyphen or an underscore inside, as some models write a compound."""
    pairs = [*divisions(word), *((a.capitalize(), b.capitalize()) for a, b in divisions(word))]
    return [sign.join(pair) for sign in "-_" for pair in pairs]


def read_model(path: Path, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (word, vector) for the wanted words of a model, chosen by its suffix."""
    return word2vec_binary(path, wanted) if path.suffix == ".bin" else vector_text(path, wanted)


def word2vec_binary(path: Path, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (word, float32 vector) for the wanted words of a word2vec .bin file.

    Raises UserError for a truncated file.
    """
    with open(path, "rb") as file:
        count, length = map(int, file.readline(LONGEST).split())
        check_length(length, path)

        for _ in tqdm(range(count), "word vectors", disable=None, unit="word", leave=False):
            word = read_word(file, path)
            data = file.read(4 * length)
            if len(data) < 4 * length:
                raise UserError(f"{path} ends in the middle of a vector: it is truncated")
            if word in wanted:
                yield word, np.frombuffer(data, "<f4")


def read_word(file, path: Path) -> str:
    """The word at the current place of a word2vec .bin file; it ends with a space."""
    word = bytearray()
    while (byte := file.read(1)) != b" ":
        if not byte or len(word) > LONGEST:
            raise UserError(
                f"{path} ends in the middle of a word: it is truncated, or no word2vec file"
            )
        word += byte
    return word.strip().decode("utf-8", errors="replace")


def vector_text(path: Path, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (word, float64 vector) for the wanted words of a model as text.

    A word2vec file begins with a line "words length"; a GloVe file begins with its first word.
    Raises UserError for a line with too few numbers.
    """
    length = None
    with open(path, encoding=text_encoding(path), errors="replace") as file:
        lines = tqdm(file, "word vectors", disable=None, unit="word", leave=False)
        for number, line in enumerate(lines, start=1):
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


def check_length(length: int, path: Path):
    """Raises UserError for a vector length that no file of word vectors has."""
    if not 1 <= length <= LONGEST:
        raise UserError(
            f"{path} says that its vectors hold {length} numbers: it is no file of word vectors"
        )


def gaussian_vectors(names: list[str]) -> np.ndarray:
    """Sums (K, 300) float32 of one deterministic Gaussian vector a word.

    Related attributes still share words. Raises UserError for a name without a word.
    """
    words = [attribute_words(name) for name in names]
    if not all(words):
        raise UserError(
            f"the attribute name {names[words.index([])]!r} holds no word: "
            "correct the dataset's attribute file"
        )
    sums = [sum(gaussian_vector(word) for word in row) for row in words]
    return np.stack(sums).astype(np.float32)


def gaussian_vector(word: str) -> np.ndarray:
    """The Gaussian vector (300,) of a word, always the same."""
    digest = hashlib.sha256(word.lower().encode()).digest()
    seed = int.from_bytes(digest[:8], "little")
    return np.random.default_rng(seed).standard_normal(GAUSSIAN_LENGTH)
