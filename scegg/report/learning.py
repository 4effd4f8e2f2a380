"""Learning curves of runs: losses of each stage, the critic's terms and lambda1, accuracies."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scegg.config import read_config
from scegg.method.selection import TARGETS
from scegg.report.style import PAGE, STYLE
from util import UserError, text_encoding

COLUMNS, HEIGHT = 3, 1.9  # panels in a row, inches of a panel
FEW = 30  # points of a line, fewer of which are marked
LOGARITHMIC = 100  # so far apart are losses that are drawn on a logarithmic axis
VALIDATION = "validation "
ACCURACIES = {"acc_zs": "acc_zs", "acc_unseen": "U", "acc_seen": "S", "H": "H"}


class PanelKind(NamedTuple):
    """A panel: its title, the stage and the x axis of its values, and which values these are."""

    title: str
    stage: str
    x: str
    names: tuple[str, ...]


KINDS = (
    PanelKind("stage 1: SCEN's losses", "scen", "iteration", ("loss_LEN", "loss_GEN")),
    PanelKind("stage 2: distillation", "distill", "iteration", ("loss_distill",)),
    PanelKind("EGGN: the critic", "eggn", "epoch", ("critic_real", "critic_fake", "penalty")),
    PanelKind("EGGN: lambda1", "eggn", "epoch", ("lambda1",)),
    PanelKind("EGGN: the generator", "eggn", "epoch", ("loss_vae", "loss_G")),
    PanelKind(
        "EGGN: guidance and adversary",
        "eggn",
        "epoch",
        ("loss_rec_cls", "loss_unseen_cls", "loss_adv"),
    ),
    PanelKind("EGGN: the decoder", "eggn", "epoch", ("loss_Dec", "loss_Dec_fake")),
    PanelKind(
        "joint schedule",
        "joint",
        "iteration",
        ("joint_loss_LEN", "joint_loss_GEN", "joint_loss_distill"),
    ),
    PanelKind("accuracies (%)", "eggn", "epoch", tuple(ACCURACIES)),
)


class LoggedRun(NamedTuple):
    """A run's folder, config, data (of its summary, if it has one) and lines of metrics.jsonl."""

    folder: Path
    config: dict
    data: dict
    lines: list[dict]

    def series(self, stage: str, x: str, name: str) -> dict[int, float]:
        """A value by iteration or epoch."""
        return {
            line[x]: line[name]
            for line in self.lines
            if line["stage"] == stage and x in line and name in line
        }

    def picked(self, accuracy: str) -> tuple[int, float] | None:
        """The epoch that this accuracy picked, and what it was there on the test set.

        It is the first one with the highest: on the test set, or with protocol validated on the
        held-out classes. None where there is no such epoch.
        """
        on_test = self.series("eggn", "epoch", accuracy)
        judged = on_test
        if self.config["protocol"] == "validated":
            judged = self.series(f"{VALIDATION}eggn", "epoch", f"val_{accuracy}")
        epoch = max(judged, key=judged.get, default=None)
        return (epoch, on_test[epoch]) if epoch in on_test else None


class Line(NamedTuple):
    """A value of all runs: its x (n,), mean (n,) and sample standard deviation (n,), 0 of one run.

    picked: the picked epoch of each run, and the run's own value there.
    """

    name: str
    x: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    picked: list[tuple[int, float]]


class Panel(NamedTuple):
    """A panel that has something to show."""

    title: str
    x: str
    lines: list[Line]


# ---- what runs logged


def read_logs(folders: list[Path]) -> list[LoggedRun]:
    """Runs that differ in nothing but the seed.

    Raises UserError for other ones, and for a folder without the config or the log of a run.
    """
    runs = [read_log(folder) for folder in folders]
    for number, run in enumerate(runs):
        for other in runs[:number]:
            differs = different_keys(run.config, other.config) | different_keys(
                run.data, other.data
            )
            if differs != {"seed"}:
                what = ", ".join(sorted(differs - {"seed"})) or "nothing, not even in the seed"
                raise UserError(
                    f"{other.folder} and {run.folder} are not two seeds of one config: they differ "
                    f"in {what}; draw them one by one"
                )
    return runs


def different_keys(one: dict, other: dict) -> set[str]:
    """The keys that both have and in which they differ."""
    return {name for name in one.keys() & other.keys() if one[name] != other[name]}


def read_log(folder: Path) -> LoggedRun:
    """A run's log, also while it is training. Raises UserError where there is none."""
    path = folder / "metrics.jsonl"
    config = dataclasses.asdict(read_config(folder / "config.yaml", {}))
    try:
        # behind the last line's end a line is being written
        text, _, _ = path.read_text(text_encoding(path)).rpartition("\n")
        lines = [dict(json.loads(line)) for line in text.splitlines()]
        if not all("stage" in line for line in lines):
            raise ValueError("a line without its stage")
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror}): name a run's folder"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not the log of a run ({error})") from None
    return LoggedRun(folder, config, read_data(folder / "summary.json"), lines)


def read_data(path: Path) -> dict:
    """What a run was trained on, as its summary says; nothing of an unfinished run."""
    try:
        summary = json.loads(path.read_text(text_encoding(path)))
        return {name: summary[name] for name in ("dataset", "features") if name in summary}
    except (OSError, ValueError, TypeError):
        return {}


# ---- what is drawn


def panels_of(runs: list[LoggedRun]) -> list[Panel]:
    """The panels that have something to show; those of a validation run come first."""
    panels = []
    for phase, prefix in ((VALIDATION, "val_"), ("", "")):
        for kind in KINDS:
            lines = []
            for name in kind.names:
                line = line_of(runs, phase + kind.stage, kind.x, prefix + name)
                if line is not None:
                    lines.append(line)
            if lines:
                panels.append(Panel(phase + kind.title, kind.x, lines))
    return panels


def line_of(runs: list[LoggedRun], stage: str, x: str, name: str) -> Line | None:
    """A value where all runs have it; None where they have not, or for a loss that is always 0."""
    series = [run.series(stage, x, name) for run in runs]
    shared = sorted(set.intersection(*map(set, series)))
    values = np.array([[of_run[point] for point in shared] for of_run in series], dtype=float)
    if not shared or ("loss_" in name and not values.any()):
        return None

    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(shared))
    picked = []
    if name in TARGETS.values():
        picked = [run.picked(name) for run in runs if run.picked(name)]
    return Line(name, np.array(shared), values.mean(axis=0), deviation, picked)


def learning_figure(runs: list[LoggedRun]) -> Figure:
    """The learning curves of runs of one config: of several, mean and band of one deviation.

    Raises UserError for runs that have logged nothing to draw.
    """
    panels = panels_of(runs)
    if not panels:
        raise UserError(f"{runs[0].folder / 'metrics.jsonl'} has nothing to draw yet")

    rows = -(-len(panels) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, rows * HEIGHT + 0.2), layout="constrained")
        figure.suptitle(title_of(runs), fontsize=7.5, parse_math=False)
        for number, panel in enumerate(panels, 1):
            draw_panel(figure.add_subplot(rows, COLUMNS, number), panel)
    return figure


def title_of(runs: list[LoggedRun]) -> str:
    """The run's name; of several runs the method, and their seeds."""
    if len(runs) == 1:
        return runs[0].folder.resolve().name
    config = runs[0].config
    dataset = runs[0].data.get("dataset", "")
    seeds = ", ".join(str(run.config["seed"]) for run in runs)
    return f"{dataset} {config['method']}: mean ± standard deviation of seeds {seeds}".strip()


def draw_panel(axes: Axes, panel: Panel):
    """The lines of a panel with their bands; a star is what a run reports."""
    axes.set(title=panel.title, xlabel=panel.x)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(linewidth=0.3, alpha=0.5)

    for line in panel.lines:
        few = {"marker": "o", "markersize": 2} if len(line.x) < FEW else {}
        label = ACCURACIES.get(line.name.removeprefix("val_"), line.name.removeprefix("val_"))
        (drawn,) = axes.plot(line.x, line.mean, linewidth=1, label=label, **few)
        band = line.mean - line.deviation, line.mean + line.deviation
        axes.fill_between(line.x, *band, color=drawn.get_color(), alpha=0.2, linewidth=0)
        for epoch, value in line.picked:
            axes.plot(epoch, value, "*", color=drawn.get_color(), markersize=7, zorder=3)

    if any(line.picked for line in panel.lines):
        axes.plot([], [], "*", color="0.4", markersize=7, linestyle="", label="picked")
    if is_wide([value for line in panel.lines for value in line.mean]):
        axes.set_yscale("log")
    axes.legend(fontsize=5.5, frameon=False, handlelength=1.2, labelspacing=0.3)


def is_wide(values: list[float]) -> bool:
    """Whether values lie so far apart that only a logarithmic axis shows all of them."""
    return min(values) > 0 and max(values) / min(values) > LOGARITHMIC
