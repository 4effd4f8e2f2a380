"""The comparison table, or one of differences, as text, Markdown, CSV or LaTeX."""

import csv
import io
import re
from collections.abc import Callable
from typing import NamedTuple

from scegg.report.table import METRICS, Cell, Column, Row, Table

LATEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "§": r"\S{}",
}


class Look(NamedTuple):
    """How a format shows numbers, as templates, and how it escapes a text."""

    plain: str = "{}"
    best: str = "{}"
    second: str = "{}"
    with_deviation: str = "{:z.1f}±{:.1f}"  # z: no -0.0
    escape: Callable[[str], str] = str

    def number(self, cell: Cell | None, rank: int | None) -> str:
        """A cell to one decimal: 68.0±1.1, 68.0 without a deviation, - where there is none."""
        if cell is None:
            text = "-"
        elif cell.deviation is None:
            text = f"{cell.mean:.1f}"
        else:
            text = self.with_deviation.format(*cell)

        template = {None: self.plain, 1: self.best, 2: self.second}[rank]
        return template.format(text)


class PrintedBlock(NamedTuple):
    """A block as texts: the title, and a line for each row (name, runs, numbers)."""

    title: str
    lines: list[list[str]]


def printed_blocks(table: Table, look: Look) -> list[PrintedBlock]:
    """The blocks of a table as texts."""
    blocks = []
    for title, rows in table.blocks:
        lines = []
        for row in rows:
            line = [look.escape(row.name), table.runs_of(row)]
            for column in table.columns:
                line.append(look.number(row.cells.get(column), table.rank(row, column)))
            lines.append(line)
        blocks.append(PrintedBlock(look.escape(title), lines))
    return blocks


def heads(table: Table) -> list[str]:
    """The column heads in one line: in %, runs, CUB acc, U, S, H, SUN acc, ..."""
    texts = [table.unit, "runs"]
    for dataset, metric in table.columns:
        is_first = metric == "acc_zs"
        texts.append(f"{dataset} {METRICS[metric]}" if is_first else METRICS[metric])
    return texts


def as_text(table: Table) -> str:
    """For a terminal: the best number in square brackets, the second in round ones."""
    look = Look(plain="{} ", best="[{}]", second="({})")
    blocks = printed_blocks(table, look)
    name, runs, *metrics = heads(table)
    head = [name, runs, *(f"{text} " for text in metrics)]

    all_lines = [head, *(line for block in blocks for line in block.lines)]
    widths = [max(map(len, column)) for column in zip(*all_lines, strict=True)]

    def aligned(line: list[str]) -> str:
        """The name at the left of its column, everything else at the right."""
        first, *others = zip(line, widths, strict=True)
        cells = [f"{text:>{width + 1}}" for text, width in others]
        return "".join([first[0].ljust(first[1]), *cells])

    lines = [aligned(head)]
    for title, rows in blocks:
        lines += ["", title, *map(aligned, rows)]
    notes = table.footnotes(f"{table.legend(look.best, look.second)}.")
    return "\n".join([*lines, "", *notes, ""])


def escape_markdown(text: str) -> str:
    r"""a|b -> a\|b, and so on."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def markdown_line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def as_markdown(table: Table) -> str:
    """The best number in bold, the second underlined."""
    look = Look(best="**{}**", second="<u>{}</u>", escape=escape_markdown)
    head = heads(table)
    numbers = len(head) - 1

    lines = [markdown_line(head), markdown_line(["---"] + ["---:"] * numbers)]
    for title, rows in printed_blocks(table, look):
        lines.append(markdown_line([f"*{title}*"] + [" "] * numbers))
        lines += map(markdown_line, rows)

    notes = table.footnotes(f"{table.legend(look.best, look.second)}.", escape_markdown)
    return "\n".join([*lines, "", "  \n".join(notes), ""])


def escape_latex(text: str) -> str:
    r"""a_b -> a\_b, and so on."""
    return text.translate(str.maketrans(LATEX))


def latex_line(cells: list[str]) -> str:
    """A row of a LaTeX tabular."""
    return " & ".join(cells) + r" \\"


def latex_head(table: Table) -> list[str]:
    """The tabular's first lines: the datasets over their metrics."""
    span = len(METRICS)
    datasets = [rf"\multicolumn{{{span}}}{{c}}{{{dataset}}}" for dataset in table.datasets]
    metrics = [METRICS[metric] for _, metric in table.columns]
    starts = range(3, len(table.columns) + 2, span)
    rules = [rf"\cmidrule(lr){{{start}-{start + span - 1}}}" for start in starts]

    return [
        r"\begingroup\scriptsize\setlength{\tabcolsep}{1pt}",
        rf"\begin{{tabular}}{{lc{'c' * len(table.columns)}}}",
        r"\toprule",
        latex_line(["", "", *datasets]),
        "".join(rules),
        latex_line([escape_latex(table.unit), "runs", *metrics]),
    ]


def as_latex(table: Table) -> str:
    r"""A tabular for \usepackage{booktabs}: the best number bold, the second underlined.

    Deviations are indices, so that three datasets fit into 17 cm.
    """
    look = Look(
        best=r"\textbf{{{}}}",
        second=r"\underline{{{}}}",
        with_deviation=r"{:z.1f}$_{{{:.1f}}}$",
        escape=escape_latex,
    )
    width = len(table.columns) + 2

    lines = latex_head(table)
    for title, rows in printed_blocks(table, look):
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{title}}}}} \\"]
        lines += map(latex_line, rows)
    lines += [r"\bottomrule", r"\end{tabular}"]

    legend = f"{table.legend(look.best, look.second)}; {table.spread}s are indices."
    lines += [rf"\par {note}" for note in table.footnotes(legend, escape_latex)]
    return "\n".join([*lines, r"\par\endgroup", ""])


def as_csv(table: Table) -> str:
    """For machines: a line for each row and dataset, means and deviations to four decimals."""
    names = [name + end for name in METRICS for end in ("", table.spread_suffix)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["block", "method", "year", "dataset", "runs", *names, "measured_on"])

    for title, rows in table.blocks:
        for row in rows:
            for dataset in table.datasets:
                numbers = csv_numbers(row, dataset)
                if any(numbers):
                    runs, mark = row.runs.get(dataset, ""), table.marks.get(row.mark, "")
                    writer.writerow([title, row.method, row.year, dataset, runs, *numbers, mark])
    return file.getvalue()


def csv_numbers(row: Row, dataset: str) -> list[str]:
    """Mean and deviation of each metric of a dataset, "" where there is none."""
    texts = []
    for metric in METRICS:
        for value in row.cells.get(Column(dataset, metric), (None, None)):
            texts.append("" if value is None else f"{value:.4f}")
    return texts


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}
