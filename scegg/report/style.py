"""What all figures share: the page's width, matplotlib's style, names of classes, the files."""

import functools
import re
import unicodedata
import warnings
from collections.abc import Set
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import (
    FontProperties,
    findfont,
    findSystemFonts,
    fontManager,
    get_font,
)
from matplotlib.text import Text

from util import atomic_path

PAGE = 7.0  # inches, a paper's text width
STYLE = {
    "font.size": 6.5,
    "axes.titlesize": 6.5,
    "axes.linewidth": 0.5,
    "pdf.fonttype": 42,  # letters stay letters in the PDF, which publishers ask for
    "savefig.dpi": 300,
}
# a $ in a name is a $; STYLE alone lets matplotlib write the powers of logarithmic axes
NAMES_STYLE = STYLE | {"text.parse_math": False}
# without a date or a version: the same figure is the same file
METADATA = {"pdf": {"CreationDate": None}, "png": {"Software": None}}


def class_title(name: str) -> str:
    """001.Black_footed_Albatross -> Black footed Albatross; grizzly+bear -> grizzly bear."""
    return re.sub(r"^\d+\.", "", name).replace("_", " ").replace("+", " ")


def save(figure: Figure, base: Path):
    """Write base.pdf and base.png, each whole or not at all.

    Raises UserError if they cannot be written.
    """
    if base.suffix in (".pdf", ".png"):
        base = base.with_suffix("")

    for kind in METADATA:
        write_picture(figure, base.with_name(f"{base.name}.{kind}"))
    print(f"wrote {base}.pdf and {base.name}.png")


def write_picture(figure: Figure, path: Path):
    """Write a figure as .pdf or .png. Raises UserError if it cannot be written."""
    kind = path.suffix.removeprefix(".")
    use_fonts_of_the_system(figure)
    with (
        atomic_path(path) as temporary,
        matplotlib.rc_context(STYLE),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it was said already, in one line
        figure.savefig(temporary, format=kind, metadata=METADATA[kind])


# ---- letters that matplotlib's own font lacks


def use_fonts_of_the_system(figure: Figure):
    """Let a figure's texts use the system's fonts for letters that matplotlib's own font lacks.

    Those are Chinese, Japanese and Korean ones, and others.
    """
    texts = figure.findobj(Text)
    own = get_font(findfont(FontProperties()))
    letters = {letter for text in texts for letter in text.get_text() if letter.isprintable()}
    missing = lacking(own, letters)
    if not missing:
        return

    families = families_with(missing)
    for text in texts:
        text.set_fontfamily(list(dict.fromkeys((*text.get_fontfamily(), *families))))


@functools.cache
def families_with(letters: frozenset[str]) -> tuple[str, ...]:
    """Families of the system's fonts that have these letters; a line on those that none has."""
    families = []
    for path in sorted(findSystemFonts(), key=is_not_regular):
        try:
            font = get_font(path)
            missing = lacking(font, letters)
        except (OSError, RuntimeError):  # damaged, or of a kind that matplotlib does not draw
            continue
        if len(missing) < len(letters):
            fontManager.addfont(path)  # it may be newer than matplotlib's list
            families.append(font.family_name)
            letters = missing

    if letters:
        first = unicodedata.name(min(letters), "a letter without a name")
        print(
            f"letters of this figure are in no font here, such as {first}, and are drawn as boxes: "
            "install Noto Sans CJK for Chinese, Japanese and Korean (Debian, Ubuntu: "
            "fonts-noto-cjk), or Noto's font of another script (fonts-noto-core)"
        )
    return tuple(families)


def lacking(font, letters: Set[str]) -> frozenset[str]:
    """The letters that a font does not have."""
    return frozenset(letter for letter in letters if not font.get_char_index(ord(letter)))


def is_not_regular(path: str) -> tuple[bool, str]:
    """The order in which fonts are looked through: regular ones before bold and thin ones."""
    return "regular" not in Path(path).name.lower(), path
