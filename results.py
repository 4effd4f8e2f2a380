"""The comparison table: the published methods, and under them the means of our runs over their seeds.

    python results.py                                    every finished run below runs/, as text
    python results.py figs/records --format markdown     from the committed records
    python results.py --format latex --output table.tex --figure figs/results.png --record figs/records

A configuration of a method has a row for each way its epochs were picked, under that name: *best on test* is how the paper
picks them; *last epoch* and *validated* (picked on held-out validation classes) never look at the test set.
"""
import collections
import csv
import dataclasses
import io
import itertools
import json
import re
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from util import FlagParser, UserError, atomic_path, exit_on_user_error, write_text
from xlsa17 import LAYOUTS

PUBLISHED = Path(__file__).resolve().parent / "figs" / "published.csv"
METRICS = {"acc_zs": "acc", "acc_unseen": "U", "acc_seen": "S", "H": "H"}  # a summary's name: the tables' name
# how a row's epochs were picked, and the prefix of its metrics in a summary, by the run's protocol
SELECTIONS = {"paper": {"best on test": "best_", "last epoch": "last_"}, "validated": {"validated": ""}}
SCEN_ALONE = {"SCEN alone: local classifier": "local_", "SCEN alone: distilled classifier": "global_"}
PREFIXES = ("", "best_", "last_", *SCEN_ALONE.values())
GCM_CF = "GCM-CF's H on AWA2 is as published; it does not follow from its U and S."
ABOUT_RUNS = ("Means over seeds ± sample standard deviation; runs: their number on {datasets}. "
              "Best on test: epochs picked on the test set, as in the paper; last epoch, "
              "validated (epochs picked on held-out classes) and SCEN alone: nothing picked on the test set.")


# ---- runs: from files to groups that differ in nothing but the seed

@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: where its summary is, the file's text, and its content with defaults for what older ones lack."""
    path: Path
    text: str
    summary: dict

    @property
    def place(self) -> tuple:
        """(dataset, split, backbone, whether it is the full published split): runs of one place measure the same thing."""
        return tuple(self.summary[name] for name in ("dataset", "split_fingerprint", "backbone", "full_published_split"))

    @property
    def ranked(self) -> bool:
        """Whether it was measured on what the published methods were: the full split and ResNet-101."""
        return self.summary["full_published_split"] and self.summary["backbone"] == "resnet101"

    @property
    def kind(self) -> tuple:
        """What runs of one method in one place share."""
        return *self.place, self.summary["method"], self.summary["protocol"]

    @property
    def config(self) -> dict | None:
        """Every hyperparameter but the seed; None for a summary older than that key."""
        config = self.summary["config"]
        return None if config is None else {name: value for name, value in config.items() if name != "seed"}

    @property
    def age(self) -> str:
        """When it began, by its folder's name (train_joint.py's), else when its file was last written; later ones sort last."""
        stamp = re.search(r"-(\d{8}-\d{6})-", self.path.absolute().parent.name)
        return stamp[1] if stamp else time.strftime("%Y%m%d-%H%M%S", time.localtime(self.path.stat().st_mtime))


class Group(NamedTuple):
    """Runs of one method and config in one place, a seed each; `label` says what sets it apart from its like."""
    label: str
    runs: list[Run]


def warn(text: str):
    """One line on stderr, so that a table on stdout stays a table."""
    print(f"warning: {text}", file=sys.stderr)


def gather(paths: list[Path]) -> tuple[list[Run], int]:
    """The finished runs below `paths` (folders, or summaries by name), and how many run folders have no summary.json.

    A file that is no run's summary is skipped with a warning. Raises UserError for a path that does not exist.
    """
    files, unfinished = [], 0
    for path in paths:
        if path.is_dir():
            files += sorted([*path.rglob("summary.json"), *path.glob("*_seed*.json")])  # run folders; --record's names
            unfinished += sum(not (log.parent / "summary.json").exists() for log in path.rglob("metrics.jsonl"))
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path} does not exist: name folders of runs, or summaries")
    runs = []
    for file in files:
        try:
            runs.append(read_run(file))
        except OSError as error:
            warn(f"{file} is left out: {error.strerror}")
        except (ValueError, RecursionError) as error:
            warn(f"{file} is left out: it is no run's summary ({error})")
    return runs, unfinished


def read_run(path: Path) -> Run:
    """The run of a summary file. Raises OSError, or ValueError naming the first key that is not what a run writes."""
    text = path.read_text(encoding="utf-8")
    summary = json.loads(text)
    if not isinstance(summary, dict):
        raise ValueError("not a mapping")
    summary = {"method": "SC-EGG", "protocol": "paper", "config": None} | summary
    expected = {"dataset": lambda value: value in list(LAYOUTS), "protocol": lambda value: value in list(SELECTIONS),
                "seed": lambda value: type(value) is int, "full_published_split": lambda value: type(value) is bool,
                "config": lambda value: value is None or isinstance(value, dict)}
    expected |= dict.fromkeys(("method", "backbone", "split_fingerprint"),
                              lambda value: isinstance(value, str) and value.isprintable() and value.strip())
    expected |= dict.fromkeys((prefix + name for prefix in PREFIXES for name in METRICS),
                              lambda value: value is None or type(value) in (int, float) and 0 <= value <= 100)
    for name, fits in expected.items():
        if not fits(summary.get(name)):
            raise ValueError(f"its {name} is {summary.get(name, 'missing')!r:.40}")
    return Run(path, text, summary)


def newest_of_each_seed(runs: list[Run]) -> list[Run]:
    """`runs` without the older of two that have kind, config and seed in common; copies of one summary go without a word."""
    newest = {}
    for run in sorted(runs, key=lambda run: run.age):
        identity = (run.kind, canonical(run.config), run.summary["seed"])
        if identity in newest and newest[identity].text != run.text:
            warn(f"{newest[identity].path} is left out: {run.path} is a newer run of the same config and seed")
        newest[identity] = run
    return list(newest.values())


def canonical(value) -> str:
    """A JSON value as text that is equal for equal values."""
    return json.dumps(value, sort_keys=True)


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs by kind and config. Where configs of a kind differ, the label names the keys in which they do, and so it does
    with a split of which two releases count as the published one."""
    kinds, releases = collections.defaultdict(lambda: collections.defaultdict(list)), collections.defaultdict(set)
    for run in runs:
        kinds[run.kind][canonical(run.config)].append(run)
        if run.ranked:
            releases[run.summary["dataset"]].add(run.summary["split_fingerprint"])
    groups = []
    for same_kind in kinds.values():
        known = [some[0].config for some in same_kind.values() if some[0].config is not None]
        keys = [key for key in sorted(set().union(*known)) if len({canonical(config.get(key, "absent")) for config in known}) > 1]
        for same_config in same_kind.values():
            first = same_config[0]
            differs = ([f"{key}={canonical(first.config.get(key, 'absent'))}".replace('"', "") for key in keys]
                       if first.config is not None else ["config unknown"])
            if first.ranked and len(releases[first.summary["dataset"]]) > 1:
                differs.append(f"split={first.summary['split_fingerprint']}")
            groups.append(Group(first.summary["method"] + (f" ({', '.join(differs)})" if differs else ""), same_config))
    return sorted(groups, key=lambda each: (each.runs[0].summary["method"] == "SC-EGG", each.label))


# ---- the table: blocks of rows of cells

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


def published_rows(datasets: list[str]) -> dict[str, list[Row]]:
    """The published methods that have a number on one of `datasets`, by family (figs/published.csv, the paper's table)."""
    families = collections.defaultdict(list)
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            cells = {(dataset, metric): (float(line[f"{dataset} {short}"]), None) for dataset in datasets
                     for metric, short in METRICS.items() if line.get(f"{dataset} {short}")}
            if cells:
                families[line["family"]].append(Row(line["method"], line["year"], cells=cells))
    return families


def our_rows(groups: list[Group], marks: dict[tuple, str]) -> list[Row]:
    """Rows of our runs, SCEN alone first; groups of one label on several datasets share a row. `marks`: by place, where any."""
    rows = {}

    def add(method: str, runs: list[Run], prefix: str):
        dataset, mark = runs[0].summary["dataset"], marks.get(runs[0].place, "")
        cells = {(dataset, metric): mean_and_deviation([run.summary.get(prefix + metric) for run in runs]) for metric in METRICS}
        cells = {column: cell for column, cell in cells.items() if cell}
        if not cells:
            return warn(f"there is no row {method!r} of {dataset}: summaries of its runs lack {prefix}acc_zs and the like")
        row = rows.setdefault((mark, method), Row(method, mark=mark))
        row.cells |= cells
        row.runs[dataset] = len(runs)

    # whatever EGGN makes of it, there is one SCEN: the SC-EGG group with most seeds stands for all on its data
    by_seeds = sorted(groups, key=lambda each: (each.runs[0].summary["protocol"] == "paper", len(each.runs)))
    scen = {(each.runs[0].summary["dataset"], marks.get(each.runs[0].place)): each.runs
            for each in by_seeds if each.runs[0].summary["method"] == "SC-EGG"}
    for runs in scen.values():
        for method, prefix in SCEN_ALONE.items():
            add(method, runs, prefix)
    for each in groups:
        for selection, prefix in SELECTIONS[each.runs[0].summary["protocol"]].items():
            add(f"{each.label}, {selection}", each.runs, prefix)
    return sorted(rows.values(), key=lambda row: (len(row.mark), row.mark))


def mean_and_deviation(values: list[float | None]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (n - 1; None of a single value); None if a run lacks the value."""
    if None in values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def build_table(groups: list[Group], datasets: list[str]) -> Table:
    """The whole table. Groups on anything but the published benchmarks are marked and stand in a block of their own."""
    strange = sorted({each.runs[0].place for each in groups if not each.runs[0].ranked})
    marks = {place: f"†{number}" for number, place in enumerate(strange, 1)}
    rows = our_rows(groups, marks)
    blocks = [(f"{family.capitalize()} methods, published", rows) for family, rows in published_rows(datasets).items()]
    blocks += [("This code", [row for row in rows if not row.mark]),
               ("This code, measured on other data: not comparable", [row for row in rows if row.mark])]
    notes = [ABOUT_RUNS.format(datasets="/".join(datasets))] + [GCM_CF] * ("AWA2" in datasets)
    meanings = {mark: f"{mark} {dataset}, split {split} ({'' if full else 'not '}the full published one), features of {backbone}"
                for (dataset, split, backbone, full), mark in marks.items()}
    return Table(datasets, [block for block in blocks if block[1]], notes, meanings)


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


# ---- the command

def record(groups: list[Group], folder: Path):
    """Copy the groups' summaries to `folder`/<dataset>_<method and what sets its group apart>_seed<seed>.json."""
    for each in groups:
        dataset, split, backbone, _, _, protocol = each.runs[0].kind
        words = [each.label] + [protocol] * (protocol != "paper") + [backbone, split] * (not each.runs[0].ranked)
        method = re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")
        for run in each.runs:
            write_text(folder / f"{dataset.lower()}_{method}_seed{run.summary['seed']}.json", run.text)


def main(argv=None):
    parser = FlagParser(__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("runs")], metavar="PATH",
                        help="folders with runs or records somewhere in them, or summaries (default: runs)")
    parser.add_argument("--dataset", nargs="+", choices=list(LAYOUTS), default=None,
                        help="columns (default: the paper's three, and TOY if it was run)")
    parser.add_argument("--format", choices=list(FORMATS), default="text")
    parser.add_argument("--output", type=Path, default=None, help="write the table there instead of printing it")
    parser.add_argument("--figure", type=Path, default=None, help="draw it, too: a .png, .pdf or .svg file, e.g. figs/results.png")
    parser.add_argument("--record", type=Path, default=None, help="copy the summaries used into that folder, e.g. figs/records")
    options = parser.parse_intermixed_args(argv)
    runs, unfinished = gather(options.paths)
    if unfinished:
        warn(f"runs left out for they are unfinished (no summary.json): {unfinished}")
    runs = newest_of_each_seed([run for run in runs if run.summary["dataset"] in (options.dataset or LAYOUTS)])
    if not runs:
        raise UserError(f"no finished run of {' or '.join(options.dataset or LAYOUTS)} in {', '.join(map(str, options.paths))}: "
                        "train one with train_joint.py, or name another place")
    measured = {run.summary["dataset"] for run in runs}
    datasets = [name for name, layout in LAYOUTS.items() if name in (options.dataset or {*measured, *(layout.scegg and [name] or [])})]
    groups = group_runs(runs)
    table = build_table(groups, datasets)
    text = FORMATS[options.format](table)
    if options.figure:
        draw(table, options.figure)
    if options.record:
        record(groups, options.record)
    if options.output:
        write_text(options.output, text)
    else:
        show(text)


def show(text: str):
    """Print UTF-8 whatever the locale. Raises UserError if nobody reads it or the disk is full."""
    try:
        sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # else Python tries once more at its end, and complains
        raise UserError(f"the table could not be printed ({error.strerror})") from None


if __name__ == "__main__":
    exit_on_user_error(main)
