"""The comparison table: the published methods, and under them the means of our runs over their seeds.

    python results.py                                    every finished run below runs/, as text
    python results.py docs/records --format markdown     from the committed records
    python results.py --format latex --output table.tex --figure figs/results.png --record docs/records

A configuration of a method has a row for each way its epochs were picked, under that name: *best on test* is how the paper
picks them; *last epoch* and *validated* (picked on held-out validation classes) never look at the test set.
"""
import collections
import csv
import dataclasses
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from scegg.config import keys_of_stage
from scegg.report.formats import FORMATS, METRICS, Row, Table, draw
from util import FlagParser, UserError, exit_on_user_error, write_text
from scegg.datasets.layouts import LAYOUTS

PUBLISHED = Path(__file__).resolve().parent / "figs" / "published.csv"
# how a row's epochs were picked, and the prefix of its metrics in a summary, by the run's protocol
SELECTIONS = {"paper": {"best on test": "best_", "last epoch": "last_"}, "validated": {"validated": "", "validated, last epoch": "last_"}}
WITH_SCEN = ("SC-EGG", "SCEN alone")  # methods whose runs speak for SCEN alone
OF_SCEN = keys_of_stage(1, 2)
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
        keys = sorted(set().union(*known))
        for same_config in same_kind.values():
            first = same_config[0]
            differs = differences(first.config, known, keys) if first.config is not None else ["config unknown"]
            if first.ranked and len(releases[first.summary["dataset"]]) > 1:
                differs.append(f"split={first.summary['split_fingerprint']}")
            groups.append(Group(first.summary["method"] + (f" ({', '.join(differs)})" if differs else ""), same_config))
    return sorted(groups, key=lambda each: (each.runs[0].summary["method"] == "SC-EGG", each.label))


# ---- the table: blocks of rows of cells

def differences(config: dict, others: list[dict], keys) -> list[str]:
    """What sets `config` apart: key=value for each of `keys` in which `others` are not all alike."""
    return [f"{key}={canonical(config.get(key, 'absent'))}".replace('"', "") for key in keys
            if len({canonical(other.get(key, "absent")) for other in others}) > 1]


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

    # whatever EGGN makes of it, SCEN is the same where its own keys are: the SC-EGG group with most seeds stands for all of them
    by_seeds = sorted(groups, key=lambda each: (each.runs[0].summary["protocol"] == "paper", len(each.runs)))
    scen = collections.defaultdict(dict)
    for runs in (each.runs for each in by_seeds if each.runs[0].summary["method"] in WITH_SCEN):
        config = runs[0].config or {}
        scen[runs[0].summary["dataset"], marks.get(runs[0].place)][canonical([config.get(key) for key in OF_SCEN])] = runs
    for alternatives in scen.values():
        configs = [runs[0].config or {} for runs in alternatives.values()]
        for runs, config in zip(alternatives.values(), configs):
            differs = ", ".join(differences(config, configs, OF_SCEN))
            for method, prefix in SCEN_ALONE.items():
                add(method + (f" ({differs})" if differs else ""), runs, prefix)
    for each in (each for each in groups if each.runs[0].summary["method"] != "SCEN alone"):
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


# ---- the command

def record(groups: list[Group], folder: Path):
    """Copy the groups' summaries to `folder`/<dataset>_<method and what sets its group apart>_seed<seed>.json."""
    for each in groups:
        dataset, split, backbone, _, _, protocol = each.runs[0].kind
        words = [each.label] + [protocol] * (protocol != "paper") + [backbone, split] * (not each.runs[0].ranked)
        method = re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")[:200]
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
    parser.add_argument("--record", type=Path, default=None, help="copy the summaries used into that folder, e.g. docs/records")
    options = parser.parse_intermixed_args(argv)
    runs, unfinished = gather(options.paths)
    if unfinished:
        warn(f"runs left out for they are unfinished (no summary.json): {unfinished}")
    runs = newest_of_each_seed([run for run in runs if run.summary["dataset"] in (options.dataset or LAYOUTS)])
    if not runs:
        raise UserError(f"no finished run of {' or '.join(options.dataset or LAYOUTS)} in {', '.join(map(str, options.paths))}: "
                        "train one with train_joint.py, or name another place")
    measured = {run.summary["dataset"] for run in runs}
    datasets = [name for name, layout in LAYOUTS.items() if name in (options.dataset or {*measured, *(layout.published and [name] or [])})]
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
