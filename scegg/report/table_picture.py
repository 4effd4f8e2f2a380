"""The comparison table as a picture, in the paper's layout."""

import textwrap
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from scegg.report.formats import Look, PrintedBlock, printed_blocks
from scegg.report.table import METRICS, Table
from util import UserError, atomic_path

KINDS = (".png", ".pdf", ".svg")
FONT_SIZE = 6.5  # points, DejaVu Sans
COLORS = {None: "black", 1: "red", 2: "blue"}  # of a number, by its rank


class Columns(NamedTuple):
    """Where the columns stand, in inches from the left.

    positions: where each column's texts are centred (the first: where they begin). number: width
    of a column of numbers. total: width of the table.
    """

    positions: list[float]
    number: float
    total: float

    @property
    def datasets(self) -> list[float]:
        """The position of each dataset's first column."""
        return self.positions[2 :: len(METRICS)]


class Page:
    """A figure that is written from top to bottom, in inches."""

    def __init__(self, columns: Columns):
        self.columns = columns
        # its height does not matter: the file gets the height of what is drawn
        self.figure = Figure(figsize=(columns.total, 1), dpi=300)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, columns.total), ylim=(1, 0))
        self.axes.axis("off")
        self.y = 0.0

    def write(self, texts: list[str], step: float, positions=None, colors=None, **style):
        """A line of texts, `step` below what was drawn last, at the columns' positions."""
        self.y += step
        positions = positions or self.columns.positions[: len(texts)]
        colors = colors or ["black"] * len(texts)

        style |= {"size": FONT_SIZE, "va": "center", "parse_math": False}
        for x, text, color in zip(positions, texts, colors, strict=True):
            align = "left" if x == 0 else "center"
            self.axes.text(x, self.y, text, color=color, ha=align, **style)

    def rule(self, step: float, weight: float = 0.5, spans=None):
        """A horizontal line, `step` below what was drawn last: the whole width, or some spans."""
        self.y += step
        for span in spans or [(0, self.columns.total)]:
            self.axes.plot(span, (self.y, self.y), color="black", linewidth=weight, clip_on=False)


def save_picture(table: Table, path: Path):
    """Draw the table into a .png, .pdf or .svg file: the best number red, the second blue.

    Raises UserError for a file of another kind, and if it cannot be written.
    """
    if path.suffix not in KINDS:
        raise UserError(f"{path}: a picture's name ends in .png, .pdf or .svg")

    figure = draw_table(table)
    with atomic_path(path) as temporary:
        kind = path.suffix.removeprefix(".")
        figure.savefig(temporary, format=kind, bbox_inches="tight", pad_inches=0.05)


def draw_table(table: Table) -> Figure:
    """The table as a figure."""
    blocks = printed_blocks(table, Look())
    page = Page(place_columns(table, blocks))

    draw_heads(page, table)
    for block, (_, rows) in zip(blocks, table.blocks, strict=True):
        page.rule(0.11)
        page.write([block.title], 0.11, style="italic")
        for row, line in zip(rows, block.lines, strict=True):
            ranks = [None, None, *(table.rank(row, column) for column in table.columns)]
            page.write(line, 0.13, colors=[COLORS[rank] for rank in ranks])
    page.rule(0.11, weight=1)

    for note in table.footnotes("Red: best of a column; blue: second."):
        for part in textwrap.wrap(note, int(page.columns.total / 0.047)):
            page.write([part], 0.12)
    return page.figure


def draw_heads(page: Page, table: Table):
    """The datasets' names over the names of their metrics."""
    number = page.columns.number
    centres = [first + 1.5 * number for first in page.columns.datasets]
    spans = [(first - 0.4 * number, first + 3.4 * number) for first in page.columns.datasets]
    metrics = [METRICS[metric] for _, metric in table.columns]

    page.rule(0, weight=1)
    page.write(table.datasets, 0.12, positions=centres, weight="bold")
    page.rule(0.09, spans=spans)
    page.write(["in %", "runs", *metrics], 0.09)


def place_columns(table: Table, blocks: list[PrintedBlock]) -> Columns:
    """Where the columns go: each is as wide as its longest text, those of numbers are alike."""
    lines = [line for block in blocks for line in block.lines]
    name = width_of([line[0] for line in lines])
    runs = width_of([line[1] for line in lines] + ["runs"])
    number = width_of([text for line in lines for text in line[2:]])

    positions = [0, name + runs / 2]
    for index in range(len(table.columns)):
        positions.append(name + runs + number * (index + 0.5))
    return Columns(positions, number, positions[-1] + number / 2)


def width_of(texts: list[str]) -> float:
    """The width in inches of a column that holds these texts."""
    return 0.049 * max(map(len, texts)) + 0.1
