"""Draw claim.png: what image size, generator and SCEN give, from records of runs.

    python -m figs.draw_claim docs/records docs/records/px224

It is written beside this program. A small dot is a run, a large one the mean over seeds. What no
record measures stays empty.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scegg.report.style import PAGE, write_picture
from scegg.report.summaries import FinishedRun, gather

HERE = Path(__file__).parent
SIZES = (224, 448)
METRICS = {"acc_zs": "acc_zs, %", "H": "H, %"}
LEFT = {"acc_zs": 54, "H": 52}  # where a panel begins; a mean further left is written as a number


class Way(NamedTuple):
    """A way to come to a number: the protocol of the runs, and the prefix of their metrics."""

    protocol: str
    prefix: str


class Line(NamedTuple):
    """A line of the figure: its name, the method of its runs, and its ways."""

    name: str
    method: str
    ways: dict[str, Way]


PICKED, CHOSEN = "picked on the test set", "chosen on held-out classes"
COLOURS = {PICKED: "#c0392b", CHOSEN: "#2471a3"}
SHIFT = {PICKED: -0.16, CHOSEN: 0.16}
WAYS = {PICKED: Way("paper", "best_"), CHOSEN: Way("validated", "")}
LINES = [
    Line("f-VAEGAN", "f-VAEGAN (CNN features)", WAYS),
    Line("TF-VAEGAN", "TF-VAEGAN (CNN features)", WAYS),
    # its local classifier: there is nothing to choose
    Line("SCEN alone", "SC-EGG", {CHOSEN: Way("paper", "local_")}),
    Line("SC-EGG", "SC-EGG", WAYS),
]


def measured(runs: list[FinishedRun], line: Line, size: int, way: Way, metric: str) -> list[float]:
    """A metric of every run of a line at an image size, in per cent."""
    wanted = (line.method, way.protocol, size)
    summaries = [run.summary for run in runs]
    return [
        summary[way.prefix + metric]
        for summary in summaries
        if (summary["method"], summary["protocol"], summary["config"]["img_size"]) == wanted
    ]


def draw(runs: list[FinishedRun]) -> Figure:
    """A panel for each metric; in it a place for each line and image size."""
    figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
    panels = figure.subplots(1, len(METRICS), sharey=True)
    places = [(line, size) for line in LINES for size in SIZES]

    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for place, (line, size) in enumerate(places):
            for name, way in line.ways.items():
                values = measured(runs, line, size, way, metric)
                draw_values(axes, values, place + SHIFT[name], COLOURS[name], LEFT[metric])
        axes.set_xlim(left=LEFT[metric])
        axes.set_xlabel(title)
        axes.grid(axis="x", lw=0.3)

    panels[0].set_yticks(range(len(places)), [f"{line.name}, {size} px" for line, size in places])
    panels[0].invert_yaxis()
    handles = [Line2D([], [], ls="", marker="o", ms=4.5, color=COLOURS[name]) for name in COLOURS]
    figure.legend(handles, COLOURS, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_values(axes, values: list[float], y: float, colour: str, left: float):
    """The values of runs and their mean at height y; nothing where there are none."""
    if not values:
        return
    if mean(values) < left:
        axes.text(left, y, f" ← {mean(values):.1f}", color=colour, va="center", fontsize=7)
        return
    axes.plot(values, [y] * len(values), ".", color=colour, ms=2.5, alpha=0.5)
    axes.plot(mean(values), y, "o", color=colour, ms=4.5)


if __name__ == "__main__":
    found, _ = gather([Path(path) for path in sys.argv[1:]])
    on_cub = [run for run in found if run.summary["dataset"] == "CUB"]
    write_picture(draw(on_cub), HERE / "claim.png")
