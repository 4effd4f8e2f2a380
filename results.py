"""The comparison table: the published methods, and under them our runs' means over their seeds.

    python results.py                                  every finished run below runs/, as text
    python results.py docs/records --format markdown   from the committed records
    python results.py --format latex --output table.tex --figure figs/results.png
    python results.py runs/X --against docs/records    row by row: do the runs reproduce these?
    python results.py --compare runs/X runs/Y          differences of means, paired over seeds

A group of runs has a row for each way in which its epochs were picked. *Best on test* is how the
paper picks them. *Last epoch* and *validated* never look at the test set.
"""

import glob
import sys
from pathlib import Path

from scegg.datasets.layouts import LAYOUTS, add_own_layouts
from scegg.report.comparison import build_table, group_runs, record
from scegg.report.differences import build_differences
from scegg.report.formats import FORMATS
from scegg.report.reproduction import compare
from scegg.report.summaries import FinishedRun, gather, newest_of_each_seed, warn
from scegg.report.table import Table
from util import FlagParser, UserError, exit_on_user_error, write_text


def main(argv=None):
    """Make the table, and what else the flags ask for."""
    add_own_layouts(Path("data"))
    options = parse_arguments(argv)
    if options.compare:
        text = FORMATS[options.format](differences_of(options))
    else:
        text = make_table(options)

    if options.output:
        write_text(options.output, text)
    else:
        show(text)


def make_table(options) -> str:
    """The comparison table in its format; the figure and the records, if they are asked for."""
    runs = read_runs(options.paths or [Path("runs")], options.dataset or list(LAYOUTS))
    groups = group_runs(runs)
    table = build_table(groups, columns_of(runs, options.dataset))
    text = FORMATS[options.format](table)
    if options.against:
        records = group_runs(read_runs(options.against, list(LAYOUTS)))
        text += "\n" + compare(groups, records, options.against)

    if options.figure:
        from scegg.report.table_picture import save_picture  # matplotlib takes its time to load

        save_picture(table, options.figure)
    if options.record:
        record(groups, options.record)
    return text


def differences_of(options) -> Table:
    """The table of differences of --compare. Raises UserError where nothing can be compared."""
    others = (options.paths, options.against, options.figure, options.record)
    if any(others):
        raise UserError(
            "--compare takes two places and prints their differences alone: leave out other "
            'paths, --against, --figure and --record; put quotes around a pattern ("runs/A*")'
        )

    datasets = options.dataset or list(LAYOUTS)
    ours, theirs = (group_runs(read_runs(matching(name), datasets)) for name in options.compare)
    return build_differences(ours, theirs)


def matching(name: str) -> list[Path]:
    """The path of this name, or else those that match it as a pattern; itself if none does."""
    found = [] if Path(name).exists() else sorted(glob.glob(name))
    return [Path(path) for path in found or [name]]


def parse_arguments(argv=None):
    """The flags. Raises UserError for wrong ones."""
    parser = FlagParser(__doc__.splitlines()[0])
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="folders with runs or records somewhere in them, or summaries (default: runs)",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        choices=list(LAYOUTS),
        default=None,
        help="columns (default: the paper's three, and TOY if it was run)",
    )
    parser.add_argument("--format", choices=list(FORMATS), default="text")
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=None,
        metavar="RECORDS",
        help="under the table: whether each row's means agree with these records",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="print A's means minus B's instead, with paired standard errors over the seeds that "
        "both have; each is a folder, a summary, or a pattern in quotes",
    )

    for flag, help in (
        ("--output", "write the table there instead of printing it"),
        ("--figure", "draw it, too: a .png, .pdf or .svg file, e.g. figs/results.png"),
        ("--record", "copy the summaries used into that folder, e.g. docs/records"),
    ):
        parser.add_argument(flag, type=Path, default=None, help=help)
    return parser.parse_intermixed_args(argv)


def read_runs(paths: list[Path], datasets: list[str]) -> list[FinishedRun]:
    """The finished runs of these datasets. Raises UserError if there is none."""
    runs, unfinished = gather(paths)
    if unfinished:
        warn(f"runs left out for they are unfinished (no summary.json): {unfinished}")

    runs = newest_of_each_seed([run for run in runs if run.summary["dataset"] in datasets])
    if not runs:
        raise UserError(
            f"no finished run of {' or '.join(datasets)} in {', '.join(map(str, paths))}: "
            "train one with train_joint.py, or name another place"
        )
    return runs


def columns_of(runs: list[FinishedRun], asked_for: list[str] | None) -> list[str]:
    """The datasets that the table shows, in their usual order.

    They are those asked for; by default the paper's, and those that were run.
    """
    if asked_for is not None:
        return [name for name in LAYOUTS if name in asked_for]

    measured = {run.summary["dataset"] for run in runs}
    papers = {name for name, layout in LAYOUTS.items() if layout.paper}
    return [name for name in LAYOUTS if name in measured or name in papers]


def show(text: str):
    """Print UTF-8 whatever the locale. Raises UserError if nobody reads it or the disk is full."""
    if sys.stdout is None:
        raise UserError("the table could not be printed (stdout is closed): use --output FILE")
    try:
        sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # else Python tries once more at its end, and complains
        raise UserError(f"the table could not be printed ({error.strerror})") from None


if __name__ == "__main__":
    exit_on_user_error(main)
