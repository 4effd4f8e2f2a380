"""The comparison table as data: rows of accuracies in blocks, with ranks, marks and footnotes."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

# a metric's name in summary.json: its name in tables
METRICS = {"acc_zs": "acc", "acc_unseen": "U", "acc_seen": "S", "H": "H"}


class Cell(NamedTuple):
    """A mean in %, and the standard deviation over the seeds (None for a single number)."""

    mean: float
    deviation: float | None = None


class Column(NamedTuple):
    """A column of numbers: the dataset, and the metric by its name in summary.json."""

    dataset: str
    metric: str


@dataclasses.dataclass
class Row:
    """The numbers of a method: its cells by column, and how many runs it has by dataset.

    mark: of a footnote. ranked: whether it was measured as the published methods were, and so can
    be the best of a column.
    """

    method: str
    year: str = ""
    mark: str = ""
    ranked: bool = True
    runs: dict[str, int] = dataclasses.field(default_factory=dict)
    cells: dict[Column, Cell] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method, year and mark."""
        return " ".join(filter(None, (self.method, self.year, self.mark)))

    def printed(self, column: Column) -> float:
        """The mean of a cell, rounded as every format prints it."""
        return float(f"{self.cells[column].mean:.1f}")


class Block(NamedTuple):
    """Rows under a title."""

    title: str
    rows: list[Row]


@dataclasses.dataclass
class Table:
    """Blocks of rows over the metrics of some datasets.

    notes: sentences under the table. marks: what each mark of a row means.
    """

    # what the numbers and the deviations of cells are; a table of differences has others
    unit = "in %"
    spread, spread_suffix = "standard deviation", "_std"

    datasets: list[str]
    blocks: list[Block]
    notes: list[str]
    marks: dict[str, str]

    @property
    def columns(self) -> list[Column]:
        """All columns, dataset by dataset."""
        return [Column(dataset, metric) for dataset in self.datasets for metric in METRICS]

    def rank(self, row: Row, column: Column) -> int | None:
        """1 for the best number of a column, 2 for the second, else None.

        Numbers are compared as they are printed, so that equal ones share a rank.
        """
        if not row.ranked or column not in row.cells:
            return None

        rows = [other for block in self.blocks for other in block.rows]
        ranked = [other for other in rows if other.ranked and column in other.cells]
        values = {other.printed(column) for other in ranked}
        best_two = sorted(values, reverse=True)[:2]

        value = row.printed(column)
        return best_two.index(value) + 1 if value in best_two else None

    def legend(self, best: str, second: str) -> str:
        """What a format's templates for the ranks mean."""
        return f"{best.format('Best')} and {second.format('second')} of a column"

    def runs_of(self, row: Row) -> str:
        """The number of runs of a row, dataset by dataset: 3/3/-."""
        if not row.runs:
            return ""
        return "/".join(str(row.runs.get(dataset, "-")) for dataset in self.datasets)

    def footnotes(self, legend: str, escape: Callable[[str], str] = str) -> list[str]:
        """What the marks mean, how the format shows ranks (`legend`), and the notes.

        escape: applied to every text but the legend, which the format itself wrote.
        """
        return [*map(escape, self.marks.values()), legend, *map(escape, self.notes)]
