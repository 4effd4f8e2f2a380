"""Finished runs become the rows of the comparison table, under those of the published methods.

Runs that differ in nothing but the seed are a group; a row holds the means over a group's seeds.
A group has a row for each way in which its epochs were picked. *Best on test* is how the paper
picks them. *Last epoch* and *validated* (picked on held-out classes) never look at the test set.
"""

import collections
import csv
import hashlib
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scegg.config import keys_of_stage
from scegg.report.summaries import (
    KEYS_DEFAULTS,
    SCEN_ALONE,
    SELECTIONS,
    FinishedRun,
    MeasuredOn,
    canonical,
    gather,
    warn,
)
from scegg.report.table import METRICS, Block, Cell, Column, Row, Table
from scegg.run.summary import PUBLISHED
from util import UserError, write_text

PUBLISHED_LATER = PUBLISHED.with_name("published_since_2022.csv")
METHODS_WITH_SCEN = ("SC-EGG", "SCEN alone")  # methods whose SCEN is the paper's
SCEN_KEYS = keys_of_stage(1, 2)
ABOUT_RUNS = (
    "Means over seeds ± sample standard deviation; runs: their number on {datasets}. "
    "Best on test: epochs picked on the test set, as in the paper; last epoch, "
    "validated (epochs picked on held-out classes) and SCEN alone: nothing picked on the test set."
)
LONGEST_NAME = 200  # letters of a record's name, without dataset and seed
SEMANTICS_MARK = "‡"
ABOUT_SEMANTICS = (
    f"{SEMANTICS_MARK} On CUB with sentence vectors of 1,024 numbers. With the 312 attributes the "
    "authors report CE-GZSL U 52.4, S 60.9, H 56.4 and SDGZSL H 54.9."
)
LATER = "Published later, with other features, semantics or selection: not ranked"
ABOUT_GCM_CF = "GCM-CF's H on AWA2 is as published; it does not follow from its U and S."


# ---- groups of runs


class Group(NamedTuple):
    """Runs of one method and config on the same data, one for each seed.

    label: the method, and what sets the group apart from others of the same kind.
    """

    label: str
    runs: list[FinishedRun]

    @property
    def measured_on(self) -> MeasuredOn:
        """Dataset, split and backbone of its runs."""
        return self.runs[0].measured_on

    @property
    def method(self) -> str:
        """The method of its runs."""
        return self.runs[0].summary["method"]

    @property
    def protocol(self) -> str:
        """The protocol of its runs, "paper" or "validated"."""
        return self.runs[0].summary["protocol"]


def group_runs(runs: list[FinishedRun]) -> list[Group]:
    """The runs in groups, SC-EGG's last."""
    by_kind = collections.defaultdict(list)
    splits = collections.defaultdict(set)
    for run in runs:
        by_kind[run.kind].append(run)
        if run.measured_on.is_benchmark:
            splits[run.measured_on.dataset].add(run.measured_on.split)

    groups = []
    for same_kind in by_kind.values():
        groups += groups_of_a_kind(same_kind, splits)
    return sorted(groups, key=lambda group: (group.method == "SC-EGG", group.label))


def groups_of_a_kind(runs: list[FinishedRun], splits: dict[str, set[str]]) -> list[Group]:
    """The groups of runs that share their kind: one for each config.

    A label names the keys in which the configs differ. It also names the split if several
    releases count as the published one; splits: the fingerprints of these, by dataset.
    """
    by_config = collections.defaultdict(list)
    for run in runs:
        by_config[canonical(run.config)].append(run)
    firsts = [same_config[0] for same_config in by_config.values()]
    configs = [run.config for run in firsts if run.config is not None]
    keys = sorted(set().union(*configs))

    groups = []
    for same_config, first in zip(by_config.values(), firsts, strict=True):
        if first.config is None:
            differs = ["config unknown"]
        else:
            differs = differences(first.config, configs, keys)
        data = first.measured_on
        if data.is_benchmark and len(splits[data.dataset]) > 1:
            differs.append(f"split={data.split}")
        groups.append(Group(labelled(first.summary["method"], differs), same_config))
        warn_of_feature_files(groups[-1])
    return groups


def warn_of_feature_files(group: Group):
    """Say so if a group's runs read several feature files: their maps may differ."""
    files = {run.features for run in group.runs} - {None}
    if len(files) > 1:
        warn(
            f"{group.label}, protocol {group.protocol}, on {group.measured_on.dataset}: its runs "
            f"read {len(files)} feature files and share a row; if these differ in more than "
            "rounding, give each file's runs a table of their own"
        )


def differences(config: dict, configs: list[dict], keys: Iterable[str]) -> list[str]:
    """What sets `config` apart: key=value for each of `keys` in which not all configs agree."""
    texts = []
    for key in keys:
        values = {canonical(other.get(key, "absent")) for other in configs}
        if len(values) > 1:
            value = canonical(config.get(key, "absent"))
            texts.append(f"{key}={value}".replace('"', ""))
    return texts


def labelled(method: str, differs: list[str]) -> str:
    """A method's name, followed by what sets it apart in brackets."""
    return f"{method} ({', '.join(differs)})" if differs else method


def record(groups: list[Group], folder: Path):
    """Copy the summaries of the groups into a folder, under names that say what they are of.

    The names are <dataset>_<method and what sets its group apart>_seed<seed>.json. Raises
    UserError, before it writes any, if one of them names a record of other settings or two runs.
    """
    named = {}
    for group in groups:
        data = group.measured_on
        words = [group.label]
        if group.protocol != "paper":
            words.append(group.protocol)
        if not data.is_benchmark:
            words += [data.backbone, data.split]
        if data.dtype != "float32":
            words.append(data.dtype)
        if data.gaussian_words:
            words.append("gaussian words")

        method = shortened(re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-"))
        for run in group.runs:
            path = folder / f"{data.dataset.lower()}_{method}_seed{run.summary['seed']}.json"
            refuse_other_settings(path, run)
            if path in named:
                raise UserError(
                    f"{named[path].path} and {run.path} would both be recorded as {path.name}: "
                    "record them one by one, in two folders"
                )
            named[path] = run

    for path, run in named.items():
        write_text(path, run.text)


def shortened(name: str) -> str:
    """A name that a file can have; one that is cut ends in a digest of the whole."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def refuse_other_settings(path: Path, run: FinishedRun):
    """Raises UserError if `path` holds the record of a run with another config."""
    others, _ = gather([path] if path.exists() else [])
    if any(other.config != run.config for other in others):
        raise UserError(
            f"{path} is the record of a run with other settings: give --record another folder, or "
            "name both runs in one command, which then names their records by what differs"
        )


# ---- rows and blocks of the table


class RowSource(NamedTuple):
    """Where numbers of a row come from: the row's method, runs, the prefix of their metrics."""

    method: str
    runs: list[FinishedRun]
    prefix: str


def published_rows(datasets: list[str]) -> dict[str, list[Row]]:
    """The published methods that have a number on one of `datasets`, by family.

    They stand in figs/published.csv, which is the paper's table.
    """
    families = collections.defaultdict(list)
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            row = Row(line["method"], line["year"], cells=published_cells(line, datasets))
            # "CUB: sentence vectors": other semantics on that dataset
            if line["semantics"].partition(":")[0] in datasets:
                row.mark = SEMANTICS_MARK
            if row.cells:
                families[line["family"]].append(row)
    return families


def later_rows(datasets: list[str]) -> tuple[list[Row], dict[str, str]]:
    """Later methods with a number on one of `datasets`, never ranked, and what their marks mean.

    They stand in figs/published_since_2022.csv; rows measured alike share a mark.
    """
    rows, marks = [], {}
    with open(PUBLISHED_LATER, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            cells = published_cells(line, datasets)
            if cells:
                mark = marks.setdefault(conditions_of(line), f"§{len(marks) + 1}")
                rows.append(Row(line["method"], line["year"], mark, ranked=False, cells=cells))
    return rows, {mark: f"{mark} {conditions}" for conditions, mark in marks.items()}


def conditions_of(line: dict[str, str]) -> str:
    """How a published method was measured, in words, as far as it is known."""
    fine_tuned = {"yes": "fine-tuned", "no": "not fine-tuned"}.get(line["fine_tuned"])
    selected = f"picked on the {line['selected_on']} set" if line["selected_on"] else None
    size = f"{line['image_px']} px" if line["image_px"] else None
    known = (line["backbone"], size, fine_tuned, line["semantics"], selected)
    return ", ".join(filter(None, known))


def published_cells(line: dict[str, str], datasets: list[str]) -> dict[Column, Cell]:
    """The cells of a line of figs/published.csv, less the numbers that were not published."""
    cells = {}
    for dataset in datasets:
        for metric, short in METRICS.items():
            text = line.get(f"{dataset} {short}")
            if text:
                cells[Column(dataset, metric)] = Cell(float(text))
    return cells


def our_rows(groups: list[Group], marks: dict[MeasuredOn, str]) -> list[Row]:
    """The rows of our runs, SCEN alone first, unmarked ones before marked ones.

    Groups of one label on several datasets share a row. marks: the mark of whatever is no
    published benchmark.
    """
    rows = {}
    for method, runs, prefix in [*sources_of_scen(groups, marks), *sources_of_selections(groups)]:
        data = runs[0].measured_on
        cells = cells_of(runs, prefix)
        if not cells:
            warn(
                f"there is no row {method!r} of {data.dataset}: summaries of its runs lack "
                f"{prefix}acc_zs and the like"
            )
            continue

        mark = marks.get(data, "")
        row = rows.setdefault((mark, method), Row(method, mark=mark, ranked=not mark))
        row.cells.update(cells)
        row.runs[data.dataset] = len(runs)
    return sorted(rows.values(), key=lambda row: (len(row.mark), row.mark))


def sources_of_scen(groups: list[Group], marks: dict[MeasuredOn, str]) -> list[RowSource]:
    """The sources of the rows of SCEN alone, one pair of rows for each setting of SCEN's keys.

    SCEN is the same in all groups that share these keys, whatever EGGN makes of it. So one group
    stands for all of them: if possible of the paper's protocol, then the one with most seeds.
    """
    alternatives = collections.defaultdict(dict)
    with_scen = [group for group in groups if group.method in METHODS_WITH_SCEN]
    for group in sorted(with_scen, key=lambda group: (group.protocol == "paper", len(group.runs))):
        data, config = group.measured_on, group.runs[0].config or KEYS_DEFAULTS
        settings = canonical([config.get(key) for key in SCEN_KEYS])
        alternatives[data.dataset, marks.get(data)][settings] = group.runs  # a later one is better

    sources = []
    for by_settings in alternatives.values():
        configs = [runs[0].config or KEYS_DEFAULTS for runs in by_settings.values()]
        for runs, config in zip(by_settings.values(), configs, strict=True):
            differs = differences(config, configs, SCEN_KEYS)
            for method, prefix in SCEN_ALONE.items():
                sources.append(RowSource(labelled(method, differs), runs, prefix))
    return sources


def sources_of_selections(groups: list[Group]) -> list[RowSource]:
    """The sources of all other rows: each group's, once for each way of picking epochs."""
    sources = []
    for group in groups:
        if group.method == "SCEN alone":
            continue
        for selection, prefix in SELECTIONS[group.protocol].items():
            sources.append(RowSource(f"{group.label}, {selection}", group.runs, prefix))
    return sources


def cells_of(runs: list[FinishedRun], prefix: str) -> dict[Column, Cell]:
    """The cells of runs on one dataset, less the metrics that one of them lacks."""
    dataset = runs[0].measured_on.dataset
    cells = {}
    for metric in METRICS:
        cell = mean_and_deviation([run.summary.get(prefix + metric) for run in runs])
        if cell is not None:
            cells[Column(dataset, metric)] = cell
    return cells


def mean_and_deviation(values: list[float | None]) -> Cell | None:
    """Mean and sample standard deviation (n - 1); None if a run lacks the value.

    A single value has no deviation.
    """
    if None in values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.fmean(values), deviation)


def build_table(groups: list[Group], datasets: list[str]) -> Table:
    """The whole table: the published methods, later ones, then our groups.

    Groups on anything but the published benchmarks are marked and stand in a block of their own.
    """
    others = sorted({group.measured_on for group in groups if not group.measured_on.is_benchmark})
    marks = {data: f"†{number}" for number, data in enumerate(others, 1)}
    rows = our_rows(groups, marks)
    unmarked = [row for row in rows if not row.mark]
    marked = [row for row in rows if row.mark]

    blocks = []
    for family, published in published_rows(datasets).items():
        blocks.append(Block(f"{family.capitalize()} methods, published", published))
    later, conditions = later_rows(datasets)
    blocks.append(Block(LATER, later))
    blocks.append(Block("This code", unmarked))
    blocks.append(Block("This code, measured on other data: not comparable", marked))

    notes = [ABOUT_RUNS.format(datasets="/".join(datasets))]
    if "AWA2" in datasets:
        notes.append(ABOUT_GCM_CF)
    meanings = {SEMANTICS_MARK: ABOUT_SEMANTICS} if "CUB" in datasets else {}
    meanings |= conditions
    meanings |= {mark: f"{mark} {in_words(data)}" for data, mark in marks.items()}
    return Table(datasets, [block for block in blocks if block.rows], notes, meanings)


def in_words(data: MeasuredOn) -> str:
    """What marked rows were measured on, in words."""
    full = "the full published one" if data.full_published_split else "not the full published one"
    stored = "" if data.dtype == "float32" else f" as {data.dtype}"
    words = ", Gaussian word vectors" if data.gaussian_words else ""
    features = f"features of {data.backbone}{stored}{words}"
    return f"{data.dataset}, split {data.split} ({full}), {features}"
