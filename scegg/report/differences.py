"""Two sets of runs compared: differences of means with paired standard errors over seeds."""

import itertools
import math

from scegg.datasets.layouts import LAYOUTS
from scegg.report.comparison import Group, differences, in_words, labelled, mean_and_deviation
from scegg.report.reproduction import SILENT_KEYS, is_within, rows_of
from scegg.report.summaries import FinishedRun, warn
from scegg.report.table import METRICS, Block, Cell, Column, Row, Table
from util import UserError

ABOUT = (
    "Mean of the first minus mean of the second ± paired standard error: the deviation of the "
    "differences, one for each seed that both have, over the root of their number (runs)."
)
ABOUT_CHANCE = (
    "By chance alone, 30 of 100 differences lie beyond two standard errors with two seeds, "
    "18 with three and 12 with five."
)

SeedPair = tuple[FinishedRun, FinishedRun]  # two runs of one seed


class DifferenceTable(Table):
    """Differences of means with their standard errors; the best rank marks the large ones."""

    unit = "in points"
    spread, spread_suffix = "standard error", "_se"

    def rank(self, row: Row, column: Column) -> int | None:
        """1 for a difference beyond two standard errors, else None."""
        cell = row.cells.get(column)
        return None if cell is None or is_within(*cell) else 1

    def legend(self, best: str, second: str) -> str:
        """What the template of the best rank means here."""
        return f"{best.format('Marked')} differences lie beyond two standard errors"


def build_differences(ours: list[Group], theirs: list[Group]) -> Table:
    """A block for each pair of groups, one of ours and one of theirs, on one split of a dataset.

    A line on stderr names each pair on two splits, or with fewer than two seeds in common. Raises
    UserError if no pair is left.
    """
    blocks, marks = [], {}
    for pair in itertools.product(ours, theirs):
        first, second = (group.measured_on for group in pair)
        if first.dataset != second.dataset:
            continue

        runs = runs_of_shared_seeds(*pair)
        reason = reason_against(*pair, runs)
        if reason:
            warn(f"{title_of(*pair)}, {first.dataset}: not compared: {reason}")
            continue
        data = in_words_of_both(runs)
        mark = marks.setdefault(data, f"†{len(marks) + 1}") if data else ""
        rows = [difference_row(*ways, runs, mark) for ways in pairs_of_rows(*pair)]
        blocks.append(Block(title_of(*pair), [row for row in rows if row.cells]))

    blocks = [block for block in blocks if block.rows]
    if not blocks:
        raise UserError(
            "nothing to compare: give --compare two places with runs on the same split of the same "
            "dataset, and with two or more seeds in common"
        )
    measured = {column.dataset for block in blocks for row in block.rows for column in row.cells}
    datasets = [name for name in LAYOUTS if name in measured]
    meanings = {mark: f"{mark} {data}" for data, mark in marks.items()}
    return DifferenceTable(datasets, blocks, [ABOUT, ABOUT_CHANCE], meanings)


def runs_of_shared_seeds(first: Group, second: Group) -> list[SeedPair]:
    """The runs of both groups, seed by seed, of the seeds that both have."""
    by_seed = {run.summary["seed"]: run for run in second.runs}
    pairs = [(run, by_seed.get(run.summary["seed"])) for run in first.runs]
    return [(run, twin) for run, twin in pairs if twin is not None]


def reason_against(first: Group, second: Group, runs: list[SeedPair]) -> str:
    """Why two groups on one dataset cannot be compared; "" if they can."""
    splits = [group.measured_on.split for group in (first, second)]
    if splits[0] != splits[1]:
        # other images are tested, so that the difference is not the methods'
        return f"their splits differ ({splits[0]}, {splits[1]})"
    if len(runs) < 2:
        shared = ("no seed", "one seed")[len(runs)]
        return f"they share {shared}, and two are needed"
    return ""


def title_of(first: Group, second: Group) -> str:
    """Both groups' names; one method's two groups are named by what sets them apart."""
    if first.method != second.method:
        return f"{first.label} minus {second.label}"

    configs = [group.runs[0].config for group in (first, second)]
    if None in configs:  # of older summaries
        return f"{first.label} minus {second.label}"
    keys = sorted(set().union(*configs) - SILENT_KEYS)
    names = [labelled(first.method, differences(config, configs, keys)) for config in configs]
    return " minus ".join(names)


def in_words_of_both(runs: list[SeedPair]) -> str:
    """What both were measured on, in words; "" for one feature file of a published benchmark."""
    first, second = (run.measured_on for run in runs[0])
    words = in_words(first)
    if first != second:
        words += f", minus {in_words(second)}"

    files = [tuple(str(run.features) for run in pair) for pair in runs]
    if all(ours == theirs for ours, theirs in files):
        return "" if first.is_benchmark and second.is_benchmark else words
    names = " minus ".join("/".join(sorted(set(side))) for side in zip(*files, strict=True))
    return f"{words}. Not on the same feature files ({names}): part of the difference may be theirs"


def pairs_of_rows(first: Group, second: Group) -> list[tuple]:
    """The rows to compare, as two (name, prefix of metrics).

    They are those of one name. Without any, and of a group and itself, all rows are compared.
    """
    rows = [list(rows_of(group).items()) for group in (first, second)]
    if {run.text for run in first.runs} == {run.text for run in second.runs}:
        return list(itertools.combinations(rows[0], 2))
    shared = [(row, row) for row in rows[0] if row in rows[1]]
    return shared or list(itertools.product(*rows))


def difference_row(first: tuple, second: tuple, runs: list[SeedPair], mark: str) -> Row:
    """The row of two rows' differences, less the metrics that a run lacks."""
    name = first[0] if first == second else f"{first[0]} minus {second[0]}"
    dataset = runs[0][0].measured_on.dataset
    row = Row(name, mark=mark, ranked=False, runs={dataset: len(runs)})

    for metric in METRICS:
        values = []
        for run, twin in runs:
            ours, theirs = run.summary.get(first[1] + metric), twin.summary.get(second[1] + metric)
            values.append(None if ours is None or theirs is None else ours - theirs)
        cell = mean_and_deviation(values)
        if cell is not None:
            standard_error = cell.deviation / math.sqrt(len(runs))
            row.cells[Column(dataset, metric)] = Cell(cell.mean, standard_error)
    return row
