"""What all figures share: the page's width, matplotlib's style, names of classes, the files."""

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

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
    with atomic_path(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format=kind, metadata=METADATA[kind])
