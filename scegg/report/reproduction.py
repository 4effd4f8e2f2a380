"""Do runs reproduce records? Row by row: are the means within two standard errors?"""

import statistics
from pathlib import Path
from typing import NamedTuple

from scegg.report.comparison import Group, mean_and_deviation
from scegg.report.formats import Look
from scegg.report.summaries import SCEN_ALONE, SELECTIONS, canonical
from scegg.report.table import METRICS

STANDARD_ERRORS = 2
# keys that change no number
SILENT_KEYS = {"log_freq_iteration", "log_curves", "log_figures", "log_model", "checkpoint_every"}


def is_within(difference: float, standard_error: float) -> bool:
    """Whether a difference lies within two standard errors, and a thousandth for rounding."""
    return abs(difference) <= STANDARD_ERRORS * standard_error + 1e-3


class Comparison(NamedTuple):
    """Runs (n values of a metric) beside those recorded."""

    ours: list[float]
    recorded: list[float]

    @property
    def standard_error(self) -> float:
        """Of the means' difference, from the pooled deviation; 0 of two single runs."""
        squares, freedom = 0.0, 0
        for values in self:
            if len(values) > 1:
                squares += statistics.variance(values) * (len(values) - 1)
                freedom += len(values) - 1
        variance = squares / freedom if freedom else 0.0
        return (variance * (1 / len(self.ours) + 1 / len(self.recorded))) ** 0.5

    @property
    def agrees(self) -> bool:
        """Whether the means lie within two standard errors."""
        difference = statistics.fmean(self.ours) - statistics.fmean(self.recorded)
        return is_within(difference, self.standard_error)


def compare(groups: list[Group], records: list[Group], where: list[Path]) -> str:
    """A line for each row of our groups: its means, those recorded in brackets, the verdict.

    where: the records' places, for groups that these have nothing of.
    """
    recorded = {identity_of(group): group for group in records}
    lines, verdicts = ["Means of these runs (of the records):"], []
    for group in groups:
        twin = recorded.get(identity_of(group))
        name = f"{group.label}, {group.measured_on.dataset}"
        if twin is None:
            lines.append(f"{name}: no record in {', '.join(map(str, where))}")
            continue
        for row, prefix in rows_of(group).items():
            line, agrees = compare_row(group, twin, prefix)
            if line:
                lines.append(f"{name}, {row}: {line}")
                verdicts.append(agrees)
    lines.append(f"{sum(verdicts)} of {len(verdicts)} rows within two standard errors")
    return "\n".join([*lines, ""])


def identity_of(group: Group) -> tuple:
    """What a group shares with its record, whatever the keys are that change no number."""
    config = group.runs[0].config or {}
    settings = {name: value for name, value in config.items() if name not in SILENT_KEYS}
    data = group.measured_on._replace(gaussian_words=False)  # older records do not say it
    return data, group.method, group.protocol, canonical(settings)


def rows_of(group: Group) -> dict[str, str]:
    """The prefixes of a group's metrics by the rows that it has in the table."""
    if group.method == "SCEN alone":
        return SCEN_ALONE
    is_scegg = group.method == "SC-EGG" and group.protocol == "paper"
    return SELECTIONS[group.protocol] | (SCEN_ALONE if is_scegg else {})


def compare_row(group: Group, twin: Group, prefix: str) -> tuple[str, bool]:
    """The numbers of a row with the verdict, and whether it agrees; "" where there are none."""
    texts, differ = [], []
    for metric, short in METRICS.items():
        ours, recorded = (
            [run.summary.get(prefix + metric) for run in runs] for runs in (group.runs, twin.runs)
        )
        if None in ours or None in recorded:
            continue
        numbers = [Look().number(mean_and_deviation(values), None) for values in (ours, recorded)]
        texts.append("{} {} ({})".format(short, *numbers))
        if not Comparison(ours, recorded).agrees:
            differ.append(short)

    verdict = "within two standard errors"
    if differ:
        verdict = f"{', '.join(differ)} NOT within two standard errors"
    runs = f"{len(group.runs)} ({len(twin.runs)}) runs"
    return (f"{'  '.join(texts)}, {runs}: {verdict}" if texts else ""), not differ
