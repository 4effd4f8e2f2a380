"""The comparison table as text, Markdown, CSV, LaTeX and a picture; results.py fills it."""
import csv
import dataclasses
import io
import itertools
import re
import textwrap
from pathlib import Path

from util import UserError, atomic_path

METRICS = {"acc_zs": "acc", "acc_unseen": "U", "acc_seen": "S", "H": "H"}  # a summary's name: the tables' name


@dataclasses.dataclass
class Row:
    """A method's numbers: cells by (dataset, metric), each (mean in %, standard deviation or None); runs by dataset.

    `mark` is empty for what was measured on the published benchmarks, and only such rows are ranked.
    """
    method: str
    year: str = ""
    mark: str = ""
    runs: dict[str, int] = dataclasses.field(default_factory=dict)
    cells: dict[tuple[str, str], tuple[float, float | None]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.method, self.year, self.mark)))


@dataclasses.dataclass
class Table:
    """Blocks (title, rows) over the metrics of some datasets; notes are sentences, `marks` those of the marked rows."""
    datasets: list[str]
    blocks: list[tuple[str, list[Row]]]
    notes: list[str]
    marks: dict[str, str]

    @property
    def columns(self) -> list[tuple[str, str]]:
        return [(dataset, metric) for dataset in self.datasets for metric in METRICS]

    def rank(self, row: Row, column: tuple[str, str]) -> int | None:
        """0 for the best of a column, 1 for the second, among the rows without a mark, as printed (to 0.1); else None."""
        printed = lambda row: float(f"{row.cells[column][0]:.1f}")
        values = {printed(other) for _, rows in self.blocks for other in rows if not other.mark and column in other.cells}
        if row.mark or column not in row.cells:
            return None
        return {value: place for place, value in enumerate(sorted(values, reverse=True)[:2])}.get(printed(row))

    def runs_of(self, row: Row) -> str:
        """Number of runs, dataset by dataset: 3/3/-."""
        return "/".join(str(row.runs.get(dataset, "-")) for dataset in self.datasets) if row.runs else ""

    def footnotes(self, legend: str, escape=str) -> list[str]:
        """What the marks mean, a format's legend (as it is), and the notes."""
        return [*map(escape, self.marks.values()), legend, *map(escape, self.notes)]


# ---- formats: how a number looks (plain, best, second) and how rows become text

def number(cell: tuple[float, float | None] | None, deviation: str = "{:.1f}±{:.1f}") -> str:
    """A cell to one decimal: 68.0±1.1, 68.0 for a single run, - for none."""
    if cell is None:
        return "-"
    return f"{cell[0]:.1f}" if cell[1] is None else deviation.format(*cell)


def body(table: Table, looks: dict, deviation: str = "{:.1f}±{:.1f}", escape=str) -> list[tuple[str, list[list[str]]]]:
    """The blocks with every row as texts: name, runs, numbers. `looks`: templates of a number by rank (None, 0, 1)."""
    return [(escape(title), [[escape(row.name), table.runs_of(row)]
                             + [looks[table.rank(row, column)].format(number(row.cells.get(column), deviation)) for column in table.columns]
                             for row in rows]) for title, rows in table.blocks]


def heads(table: Table) -> list[str]:
    """One line of column heads: method, runs, CUB acc, U, S, H, SUN acc, ..."""
    return ["in %", "runs"] + [f"{dataset} acc" if metric == "acc_zs" else METRICS[metric] for dataset, metric in table.columns]


def as_text(table: Table) -> str:
    """For a terminal: best in square brackets, second best in round ones."""
    blocks = body(table, {None: "{} ", 0: "[{}]", 1: "({})"})
    head = heads(table)[:2] + [f"{text} " for text in heads(table)[2:]]
    widths = [max(map(len, column)) for column in zip(head, *(line for _, lines in blocks for line in lines))]
    join = lambda line: f"{line[0]:<{widths[0]}}" + "".join(f"{text:>{width + 1}}" for text, width in zip(line[1:], widths[1:]))
    lines = [join(head)]
    for title, rows in blocks:
        lines += ["", title, *map(join, rows)]
    return "\n".join([*lines, "", *table.footnotes("[Best] and (second) of a column."), ""])


def as_markdown(table: Table) -> str:
    """Best in bold, second best underlined."""
    escape = lambda text: re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)
    line = lambda cells: f"| {' | '.join(cells)} |"
    blocks = body(table, {None: "{}", 0: "**{}**", 1: "<u>{}</u>"}, escape=escape)
    lines = [line(heads(table)), line(["---"] + ["---:"] * (len(heads(table)) - 1))]
    for title, rows in blocks:
        lines += [line([f"*{title}*"] + [" "] * (len(heads(table)) - 1)), *map(line, rows)]
    notes = table.footnotes("**Best** and <u>second</u> of a column.", escape)
    return "\n".join([*lines, "", "  \n".join(notes), ""])


LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "†": r"$\dagger$"}


def as_latex(table: Table) -> str:
    r"""A tabular for \usepackage{booktabs}; best bold, second underlined. Deviations are indices: so three datasets take 17 cm."""
    escape = lambda text: text.translate(str.maketrans(LATEX))
    blocks = body(table, {None: "{}", 0: r"\textbf{{{}}}", 1: r"\underline{{{}}}"}, r"{:.1f}$_{{{:.1f}}}$", escape)
    line = lambda cells: " & ".join(cells) + r" \\"
    width, span = len(table.columns) + 2, len(METRICS)
    starts = range(3, width, span)
    lines = [r"\begingroup\scriptsize\setlength{\tabcolsep}{1pt}", rf"\begin{{tabular}}{{lc{'c' * len(table.columns)}}}", r"\toprule",
             line(["", ""] + [rf"\multicolumn{{{span}}}{{c}}{{{dataset}}}" for dataset in table.datasets]),
             "".join(rf"\cmidrule(lr){{{start}-{start + span - 1}}}" for start in starts),
             line([r"in \%", "runs"] + [METRICS[metric] for _, metric in table.columns])]
    for title, rows in blocks:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{title}}}}} \\", *map(line, rows)]
    notes = table.footnotes(r"\textbf{Best} and \underline{second} of a column; standard deviations are indices.", escape)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(rf"\par {note}" for note in notes), r"\par\endgroup", ""])


def as_csv(table: Table) -> str:
    """One line a row and dataset, for machines: means and deviations apart, to four decimals."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    values = [name + end for name in METRICS for end in ("", "_std")]
    writer.writerow(["block", "method", "year", "dataset", "runs", *values, "measured_on"])
    for title, rows in table.blocks:
        for row in rows:
            for dataset in table.datasets:
                cells = [row.cells.get((dataset, metric), (None, None)) for metric in METRICS]
                if any(cell[0] is not None for cell in cells):
                    writer.writerow([title, row.method, row.year, dataset, row.runs.get(dataset, ""),
                                     *("" if value is None else f"{value:.4f}" for cell in cells for value in cell),
                                     table.marks.get(row.mark, "")])
    return file.getvalue()


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def draw(table: Table, path: Path):
    """The table as a picture in the paper's layout, 6.5 pt: best red, second best blue. Raises UserError if it cannot be."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{path}: a picture's name ends in .png, .pdf or .svg")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    blocks = body(table, dict.fromkeys((None, 0, 1), "{}"))
    lines = [line for _, lines in blocks for line in lines]
    inches = lambda texts: 0.049 * max(map(len, texts)) + 0.1  # a column's width, DejaVu Sans at 6.5 pt
    left, runs = inches([line[0] for line in lines]), inches([line[1] for line in lines] + ["runs"])
    each = inches([text for line in lines for text in line[2:]])
    places = [0, left + runs / 2, *(left + runs + each * (index + 0.5) for index in range(len(table.columns)))]
    starts = places[2::len(METRICS)]
    width = places[-1] + each / 2
    figure = plt.figure(figsize=(width, 1), dpi=300)  # the file will be as high as what is drawn
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(1, 0))
    axes.axis("off")
    y = 0.0  # of the last line, in inches

    def write(texts, step, colors=itertools.repeat("black"), at=places, **style):
        nonlocal y
        y += step
        for x, text, color in zip(at, texts, colors):
            axes.text(x, y, text, size=6.5, color=color, ha="center" if x else "left", va="center", parse_math=False, **style)

    def rule(step, weight=0.5, spans=((0, width),)):
        nonlocal y
        y += step
        for span in spans:
            axes.plot(span, (y, y), color="black", linewidth=weight, clip_on=False)

    rule(0, weight=1)
    write(table.datasets, 0.12, at=[start + 1.5 * each for start in starts], weight="bold")
    rule(0.09, spans=[(start - 0.4 * each, start + 3.4 * each) for start in starts])
    write(["in %", "runs", *(METRICS[metric] for _, metric in table.columns)], 0.09)
    for (title, lines), (_, rows) in zip(blocks, table.blocks):
        rule(0.11)
        write([title], 0.11, style="italic")
        for row, line in zip(rows, lines):
            ranks = [None, None, *(table.rank(row, column) for column in table.columns)]
            write(line, 0.13, [{None: "black", 0: "red", 1: "blue"}[rank] for rank in ranks])
    rule(0.11, weight=1)
    for note in table.footnotes("Red: best of a column; blue: second."):
        for part in textwrap.wrap(note, int(width / 0.047)):
            write([part], 0.12)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
