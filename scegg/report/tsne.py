"""t-SNE of a run's visual spaces (docs/method.md, section 8).

Six panels: real seen, real unseen and synthetic unseen features, first in the CNN's visual space,
then in the dense-semantic one.
"""

from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from model import SCEN
from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.splits import Split
from scegg.features.reader import READ_AT_ONCE, normalize_positions
from scegg.report.style import NAMES_STYLE, PAGE, class_title
from scegg.run.trained import TrainedRun, restore_eggn, restore_scen
from util import UserError

CLASSES = 10  # seen classes, and unseen classes, that are shown
PER_CLASS = 60  # images of each at most, and synthetic features of each
COLORS = matplotlib.colormaps["tab10"].colors
NEEDS_BASELINE = "needs a run with\nvisual_features: cnn\n(--cnn_run)"
NEEDS_EGGN = "the run has no\ntrained EGGN\n(nepoch 0)"

# the figure's measures, in inches
SIDE, GAP, MARGIN = 1.11, 0.04, 0.03  # of a panel
LEGEND, HEAD = 0.66, 0.34  # below and above the panels
HEIGHT = LEGEND + SIDE + HEAD


class Panel(NamedTuple):
    """Points (n, 2) and their classes (n,); None in a blank panel, which says the reason why."""

    title: str
    points: np.ndarray | None
    classes: np.ndarray | None
    reason: str = ""


# ---- what is shown


def tsne_figure(run: TrainedRun, cnn: TrainedRun | None = None, seed: int = 0) -> Figure:
    """The picture of both visual spaces; cnn: a baseline's run on the same features.

    Without one, the panel of its synthetic features says what it needs. The figure touches
    neither pyplot nor torch's random state. Raises UserError if `run` is a baseline's run or `cnn`
    is not.
    """
    if cnn is not None and not cnn.is_baseline:
        raise UserError(
            f"{cnn.name} is not a run of the CNN-feature baseline (visual_features cnn): leave "
            "--cnn_run out, or name one"
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        panels = tsne_panels(run, cnn, seed)
    with matplotlib.rc_context(NAMES_STYLE):
        return draw_tsne(panels, run)


def tsne_panels(run: TrainedRun, cnn: TrainedRun | None, seed: int) -> list[Panel]:
    """The six panels: three of the CNN's visual space, then three of the dense-semantic one."""
    scen = restore_scen(run)
    split = run.features.split
    images = choose_images(split, seed)
    seen, unseen = split.labels[images.seen], split.labels[images.unseen]
    pooled_seen, dense_seen = visual_features(run, scen, images.seen)
    pooled_unseen, dense_unseen = visual_features(run, scen, images.unseen)

    panels = []
    for source, real in ((cnn, [pooled_seen, pooled_unseen]), (run, [dense_seen, dense_unseen])):
        reason = missing(source)
        if reason:
            points_seen, points_unseen = embed_jointly(real, seed)
            synthetic = Panel("synthetic unseen", None, None, reason)
        else:
            fake, fake_classes = synthesize(source, np.unique(unseen))
            points_seen, points_unseen, points_fake = embed_jointly([*real, fake], seed)
            synthetic = Panel("synthetic unseen", points_fake, fake_classes)

        panels.append(Panel("real seen (held out)", points_seen, seen))
        panels.append(Panel("real unseen", points_unseen, unseen))
        panels.append(synthetic)
    return panels


def missing(source: TrainedRun | None) -> str:
    """Why a run has no synthetic features to show; "" if it has some."""
    if source is None:
        return NEEDS_BASELINE
    return NEEDS_EGGN if source.config.nepoch == 0 else ""


class ChosenImages(NamedTuple):
    """Indices of test images of seen and of unseen classes."""

    seen: np.ndarray
    unseen: np.ndarray


def choose_images(split: Split, seed: int) -> ChosenImages:
    """The test images to show: at most PER_CLASS of each of CLASSES classes, drawn by the seed.

    SCEN has not seen them. It would show trainval tidier than it can show a new image.
    """
    rng = np.random.default_rng(seed)
    seen = choose_of_part(split, split.test_seen, rng)
    unseen = choose_of_part(split, split.test_unseen, rng)
    return ChosenImages(seen, unseen)


def choose_of_part(split: Split, part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The chosen ones among the images `part` (indices), class by class."""
    labels = split.labels[part]
    in_part = np.unique(labels)
    classes = np.sort(rng.choice(in_part, min(CLASSES, len(in_part)), replace=False))

    chosen = []
    for label in classes:
        shuffled = rng.permutation(part[labels == label])
        chosen.append(np.sort(shuffled[:PER_CLASS]))
    return np.concatenate(chosen)


def visual_features(
    run: TrainedRun, scen: SCEN, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The images in both visual spaces: mean-pooled maps and SCEN's features, (n, D) each."""
    pooled, dense = [], []
    for start in range(0, len(indices), READ_AT_ONCE):
        maps = run.features.raw(indices[start : start + READ_AT_ONCE])
        pooled.append(maps.mean(dim=(2, 3)))
        dense_semantic, *_ = scen.embed(normalize_positions(maps))
        dense.append(scen.gen.scaler(dense_semantic))
    return torch.cat(pooled).numpy(), torch.cat(dense).numpy()


def synthesize(run: TrainedRun, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PER_CLASS features of each class (n, D) from the run's generator, and their classes (n,)."""
    eggn = restore_eggn(run)
    x, y = eggn.synthesize_classes(torch.from_numpy(classes), PER_CLASS)
    if run.is_baseline:
        # its generator makes scaled features, the figure shows the pooled maps themselves
        scaler = run.weights["scaler"]
        minimum, maximum = scaler["minimum"].cpu(), scaler["maximum"].cpu()
        x = minimum + x * (maximum - minimum)
    return x.numpy(), y.numpy()


def embed_jointly(groups: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """One t-SNE of all groups (n_i, D), so that they share coordinates; (n_i, 2) of each."""
    together = np.concatenate(groups)
    perplexity = min(30, (len(together) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed)
    # one thread: a seed makes the same picture on any number of cores
    with threadpool_limits(1):
        points = tsne.fit_transform(together)

    ends = np.cumsum([len(group) for group in groups])
    return np.split(points, ends[:-1])


# ---- how it is drawn


def draw_tsne(panels: list[Panel], run: TrainedRun) -> Figure:
    """Six square panels, over the names of the seen and of the unseen classes."""
    figure = Figure(figsize=(PAGE, HEIGHT))
    backbone = run.features.provenance.get("backbone", run.config.backbone)
    draw_space(figure, panels[:3], left_of(0), f"CNN visual space ({backbone})")
    draw_space(figure, panels[3:], left_of(1), "dense-semantic visual space (SC-EGG)")

    real_seen, real_unseen = panels[:2]
    draw_legend(figure, real_seen, left_of(0), "Seen classes", run.features.class_names)
    draw_legend(figure, real_unseen, left_of(1), "Unseen classes", run.features.class_names)

    right, bottom = 1 - MARGIN / PAGE, MARGIN / HEIGHT
    style = {"ha": "right", "va": "bottom", "fontsize": 5.5, "color": "0.3"}
    figure.text(right, bottom, dataset_title(run), **style)
    return figure


def left_of(half: int) -> float:
    """Where a half of the figure begins, the left (0) or the right one (1), in inches."""
    return MARGIN + half * PAGE / 2


def draw_space(figure: Figure, panels: list[Panel], left: float, title: str):
    """The three panels of a visual space, all on the same scale; left: in inches."""
    middle, top = (left + 1.5 * SIDE + GAP) / PAGE, 1 - 0.1 / HEIGHT
    style = {"ha": "center", "va": "center", "fontsize": 7.5, "fontweight": "bold"}
    figure.text(middle, top, title, **style)

    shown = [panel.points for panel in panels if panel.points is not None]
    low, high = np.concatenate(shown).min(axis=0), np.concatenate(shown).max(axis=0)
    window = (low + high) / 2 + np.array([[-0.53], [0.53]]) * (high - low).max()

    for column, panel in enumerate(panels):
        corner = ((left + column * (SIDE + GAP)) / PAGE, LEGEND / HEIGHT)
        axes = figure.add_axes(
            (*corner, SIDE / PAGE, SIDE / HEIGHT),
            xticks=[],
            yticks=[],
            xlim=window[:, 0],
            ylim=window[:, 1],
        )
        axes.set_title(panel.title, pad=2.5)
        draw_panel(axes, panel)


def draw_panel(axes: Axes, panel: Panel):
    """The points of a panel, a colour for each class, or why there are none."""
    if panel.points is None:
        axes.set_facecolor("0.95")
        style = {"ha": "center", "va": "center", "color": "0.3"}
        axes.text(0.5, 0.5, panel.reason, transform=axes.transAxes, **style)
        return

    _, ranks = np.unique(panel.classes, return_inverse=True)
    colors = [COLORS[rank] for rank in ranks]
    axes.scatter(*panel.points.T, c=colors, s=3.5, linewidths=0)


def draw_legend(figure: Figure, panel: Panel, left: float, title: str, class_names: list[str]):
    """The names of a panel's classes beside their colours; left: in inches."""
    names = [class_title(class_names[label]) for label in np.unique(panel.classes)]
    marker = {"marker": "o", "linestyle": "", "markersize": 3, "markeredgewidth": 0}
    dots = [Line2D([], [], color=color, **marker) for color in COLORS[: len(names)]]

    figure.legend(
        dots,
        names,
        title=title,
        title_fontproperties={"weight": "bold", "size": 6.5},
        fontsize=6,
        ncols=2,
        loc="upper left",
        bbox_to_anchor=(left / PAGE, (LEGEND - 0.04) / HEIGHT),
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        labelspacing=0.2,
        handletextpad=0.1,
        columnspacing=1,
        alignment="left",
    )


def dataset_title(run: TrainedRun) -> str:
    """The dataset and its number of classes; it says so if that is not the paper's dataset."""
    split = run.features.split
    title = f"{run.dataset}, {len(split.att)} classes"
    if not LAYOUTS[run.dataset].paper or split.is_published(run.dataset):
        return title
    return title + "\n(not the paper's\nfull dataset)"
