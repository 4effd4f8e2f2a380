"""The seen-unseen curve of a run, as its folder's seen_unseen_curve.csv has it."""

import csv
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from scegg.method.calibration import area_under
from scegg.report.style import NAMES_STYLE, PAGE
from util import UserError, text_encoding

COLUMNS = ("seen_bias", "acc_seen", "acc_unseen")


def read_curve(path: Path) -> np.ndarray:
    """The points (n, 3) of a seen_unseen_curve.csv by rising bias: seen_bias, S, U (in %).

    Raises UserError if the file is missing or is no such curve.
    """
    try:
        with open(path, encoding=text_encoding(path), newline="") as file:
            points = [[float(row[name]) for name in COLUMNS] for row in csv.DictReader(file)]
    except OSError:
        raise UserError(
            f"{path} is missing: the run is not finished, or has no GZSL (gzsl: false, or nepoch 0)"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a seen-unseen curve ({','.join(COLUMNS)}): {error!r}"
        ) from None

    accuracies = [point[1:] for point in points]
    if not np.isfinite(accuracies).all():
        raise UserError(f"{path} holds NaN or infinity")
    if len(points) < 2:
        raise UserError(f"{path} holds {len(points)} points, a curve needs two")
    return np.array(sorted(points, key=lambda point: point[0]))


def curve_figure(curve: np.ndarray, name: str) -> Figure:
    """Accuracy on seen classes over that on unseen ones, as seen_bias rises.

    curve (n, 3) as `read_curve` gives it; name: the run's, for the title.
    """
    bias, S, U = curve.T
    ausuc = area_under(torch.from_numpy(curve / 100))
    # the last point that a bias of 0 has reached
    at_zero = max(np.searchsorted(bias, 0, side="right") - 1, 0)
    label = f"seen_bias = 0: U {U[at_zero]:.1f}, S {S[at_zero]:.1f}"

    with matplotlib.rc_context(NAMES_STYLE | {"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(PAGE / 2, PAGE / 2), layout="constrained")
        axes = figure.add_subplot(
            title=f"{name}: AUSUC {ausuc:.3f}",
            xlabel="accuracy on unseen classes, U (%)",
            ylabel="accuracy on seen classes, S (%)",
            xlim=(0, 100),
            ylim=(0, 100),
            aspect="equal",
        )
        axes.fill_between(U, S, color="tab:blue", alpha=0.12, linewidth=0)
        axes.plot(U, S, color="tab:blue", linewidth=1.2)
        axes.plot(U[at_zero], S[at_zero], "o", color="tab:red", markersize=4, label=label)
        axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", handlelength=1)
    return figure
