"""Figures of finished runs: t-SNE of the visual spaces, attention maps, the seen-unseen curve (section 8).

    python visualize.py tsne --run runs/X --cnn_run runs/Y         six panels; Y is a run with visual_features: cnn
    python visualize.py attention --run runs/X --count 4           test images of the run's dataset
    python visualize.py attention --run runs/X --images a.jpg      any images
    python visualize.py curve --run runs/X

Each writes a PDF and a PNG into the run's folder. `tsne_figure`, `attention_figure` and `curve_figure` return the matplotlib
Figure alone and touch neither pyplot, nor torch's random state, nor the run.
"""
import csv
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from scegg.features.backbones import build_backbone
from scegg.features.images import PixelNormalization, image_transform, read_image
from scegg.config import Config, read_config
from scegg.features.reader import READ_AT_ONCE, Features, normalize_positions, open_features
from scegg.method.eggn import EGGN
from scegg.method.evaluation import area_under
from model import SCEN
from util import FlagParser, UserError, atomic_path, exit_on_user_error
from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.xlsa17 import image_tail
from scegg.features.feature_file import feature_file

PAGE = 7.0  # inches, a paper's text width
CLASSES, PER_CLASS = 10, 60  # of a t-SNE panel: classes, and at most so many images (synthetic features) of each
TOP = 8  # attributes of an attention row
# type 42 embeds the letters as letters, which publishers ask for
STYLE = {"font.size": 6.5, "axes.titlesize": 6.5, "axes.linewidth": 0.5, "pdf.fonttype": 42, "savefig.dpi": 300}


class Trained(NamedTuple):
    """A run to draw: its name, dataset, config, features, and weights as model.pt holds them."""
    name: str
    dataset: str
    config: Config
    features: Features
    weights: dict

    @property
    def is_baseline(self) -> bool:
        """Whether it is a run of the CNN-feature baseline, which has no SCEN."""
        return "scen" not in self.weights


def load_run(folder: Path, features: Path | None = None) -> Trained:
    """A finished run's folder, with its feature file (default: where preprocessing puts it).

    Raises UserError for a folder that is no finished run, and for features of another split, backbone or image size.
    """
    for name, remedy in (("config.yaml", "name a run's folder"), ("summary.json", "the run is not finished"),
                         ("model.pt", "the run is not finished")):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {remedy}")
    config = read_config(folder / "config.yaml", {})
    try:
        dataset = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["dataset"]
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        fingerprint = weights["split_fingerprint"]
    except Exception as error:  # whatever json and torch raise over damaged files
        raise UserError(f"{folder}: summary.json or model.pt is damaged ({UserError(error)})") from None
    if dataset not in list(LAYOUTS):
        raise UserError(f"{folder / 'summary.json'}: there is no dataset {dataset}")
    opened = open_features(features or feature_file(dataset, config.backbone), config.backbone, config.img_size, dataset)
    if opened.split.fingerprint != fingerprint:
        raise UserError(f"{folder} was trained on split {fingerprint}, but {opened.path} holds split {opened.split.fingerprint}: "
                        "name the run's own file with --features")
    return Trained(folder.name, dataset, config, opened, weights)


def restore(module: nn.Module, run: Trained, part: str) -> nn.Module:
    """The module with the run's weights, frozen."""
    try:
        module.load_state_dict(run.weights[part])
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{run.name}: its {part} weights do not fit; were they made with other features or another version?") from None
    return module.requires_grad_(False).eval()


def restore_scen(run: Trained) -> SCEN:
    """SCEN (sections 4 and 5) of a run. Raises UserError for a run of the baseline."""
    if run.is_baseline:
        raise UserError(f"{run.name} is a run of the CNN-feature baseline, it has no SCEN: name a run with visual_features dense")
    features = run.features
    with torch.random.fork_rng(devices=[]):  # its weights are drawn before they are read
        scen = SCEN(torch.from_numpy(features.w2v), torch.from_numpy(features.split.att), features.shape[0], run.config.compose_runtime)
    return restore(scen, run, "scen")


# ---- t-SNE

class Panel(NamedTuple):
    """points (n, 2) with classes (n,), or none and the reason why."""
    title: str
    points: np.ndarray | None
    classes: np.ndarray | None
    reason: str = ""


def choose_images(split, seed: int) -> dict[str, np.ndarray]:
    """Indices of the "seen" and "unseen" images to show: of ten seeded classes each, at most PER_CLASS images a class.

    All are test images: SCEN was trained on the others, and would show them tidier than it can show a new one.
    """
    rng = np.random.default_rng(seed)
    chosen = {}
    for name, candidates in (("seen", split.test_seen), ("unseen", split.test_unseen)):
        present = np.unique(split.labels[candidates])
        classes = np.sort(rng.choice(present, min(CLASSES, len(present)), replace=False))
        of_class = (rng.permutation(candidates[split.labels[candidates] == label])[:PER_CLASS] for label in classes)
        chosen[name] = np.concatenate([np.sort(images) for images in of_class])
    return chosen


def visual_features(run: Trained, scen: SCEN, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images in the CNN's visual space and in the dense-semantic one: mean-pooled maps and SCEN's features, (n, D) each."""
    pooled, dense = [], []
    for start in range(0, len(indices), READ_AT_ONCE):
        maps = run.features.raw(indices[start:start + READ_AT_ONCE])
        pooled.append(maps.mean(dim=(2, 3)))
        dense.append(scen.gen.scaler(scen.embed(normalize_positions(maps))[0]))
    return torch.cat(pooled).numpy(), torch.cat(dense).numpy()


def synthesize(run: Trained, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PER_CLASS features of each class (n, D) from the run's generator (section 6), and their classes (n,)."""
    att = torch.from_numpy(run.features.split.att)
    eggn = restore(EGGN(run.features.shape[0], att, None, run.config), run, "eggn")  # synthesis asks no guide
    x, y = eggn.synthesize_classes(torch.from_numpy(classes), PER_CLASS)
    if run.is_baseline:  # its generator makes scaled features; the space shown is that of the pooled maps themselves
        minimum, maximum = (run.weights["scaler"][name].cpu() for name in ("minimum", "maximum"))
        x = minimum + x * (maximum - minimum)
    return x.numpy(), y.numpy()


def embed_jointly(groups: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """One t-SNE of all groups (n_i, D), so that they share coordinates; returned apart, (n_i, 2)."""
    together = np.concatenate(groups)
    tsne = TSNE(init="pca", perplexity=min(30, (len(together) - 1) / 3), random_state=seed)
    with threadpool_limits(1):  # a seed's picture then is the same on any number of cores; so few points need no more
        points = tsne.fit_transform(together)
    return np.split(points, np.cumsum([len(group) for group in groups])[:-1])


def tsne_panels(run: Trained, cnn: Trained | None, seed: int) -> list[Panel]:
    """The six panels: real seen, real unseen, synthetic unseen, first in the CNN's visual space, then in the dense-semantic one."""
    scen, chosen = restore_scen(run), choose_images(run.features.split, seed)
    labels = {name: run.features.split.labels[images] for name, images in chosen.items()}
    spaces = zip(*(visual_features(run, scen, images) for images in chosen.values()))
    panels = []
    for source, real in zip((cnn, run), spaces):
        reason = ("needs a run with\nvisual_features: cnn\n(--cnn_run)" if source is None
                  else "the run has no\ntrained EGGN\n(nepoch 0)" if source.config.nepoch == 0 else "")
        if reason:
            points, fake_classes = [*embed_jointly(real, seed), None], None
        else:
            fake, fake_classes = synthesize(source, np.unique(labels["unseen"]))
            points = embed_jointly([*real, fake], seed)
        panels += [Panel("real seen (held out)", points[0], labels["seen"]), Panel("real unseen", points[1], labels["unseen"]),
                   Panel("synthetic unseen", points[2], fake_classes, reason)]
    return panels


def tsne_figure(run: Trained, cnn: Trained | None = None, seed: int = 0) -> Figure:
    """Section 8's picture of the two visual spaces; cnn: a run of the CNN-feature baseline on the same features.

    Without one, its panel says what it lacks. Raises UserError if `run` is of the baseline or `cnn` is not.
    """
    if cnn is not None and not cnn.is_baseline:
        raise UserError(f"{cnn.name} is not a run of the CNN-feature baseline (visual_features cnn): leave --cnn_run out, or name one")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        panels = tsne_panels(run, cnn, seed)
    with matplotlib.rc_context(STYLE):
        return draw_tsne(panels, run)


def draw_tsne(panels: list[Panel], run: Trained) -> Figure:
    """Six square panels, three a space on the same scale, over the names of the seen and of the unseen classes."""
    side, gap, margin, legend, head = 1.11, 0.04, 0.03, 0.66, 0.34  # inches
    height = legend + side + head
    figure = Figure(figsize=(PAGE, height))
    colors = matplotlib.colormaps["tab10"].colors
    backbone = run.features.provenance.get("backbone", run.config.backbone)
    for group, space in enumerate((f"CNN visual space ({backbone})", "dense-semantic visual space (SC-EGG)")):
        three, left = panels[3 * group:3 * group + 3], margin + group * PAGE / 2
        figure.text((left + 1.5 * side + gap) / PAGE, 1 - 0.1 / height, space, ha="center", va="center", fontsize=7.5, fontweight="bold")
        shown = np.concatenate([panel.points for panel in three if panel.points is not None])
        low, high = shown.min(axis=0), shown.max(axis=0)
        window = (low + high) / 2 + np.array([[-0.53], [0.53]]) * (high - low).max()
        for column, panel in enumerate(three):
            corner = (left + column * (side + gap)) / PAGE, legend / height
            axes = figure.add_axes((*corner, side / PAGE, side / height), xticks=[], yticks=[], xlim=window[:, 0], ylim=window[:, 1])
            axes.set_title(panel.title, pad=2.5)
            if panel.points is None:
                axes.set_facecolor("0.95")
                axes.text(0.5, 0.5, panel.reason, transform=axes.transAxes, ha="center", va="center", color="0.3")
            else:
                axes.scatter(*panel.points.T, c=[colors[rank] for rank in np.unique(panel.classes, return_inverse=True)[1]], s=3.5, linewidths=0)
    for group, (title, panel) in enumerate((("Seen classes", panels[0]), ("Unseen classes", panels[1]))):
        names = [class_title(run.features.class_names[label]) for label in np.unique(panel.classes)]
        dots = [Line2D([], [], marker="o", linestyle="", markersize=3, markeredgewidth=0, color=color) for color in colors[:len(names)]]
        figure.legend(dots, names, title=title, title_fontproperties={"weight": "bold", "size": 6.5}, fontsize=6, ncols=2,
                      loc="upper left", bbox_to_anchor=((margin + group * PAGE / 2) / PAGE, (legend - 0.04) / height), frameon=False,
                      borderaxespad=0, borderpad=0, labelspacing=0.2, handletextpad=0.1, columnspacing=1, alignment="left")
    figure.text(1 - margin / PAGE, margin / height, dataset_title(run), ha="right", va="bottom", fontsize=5.5, color="0.3")
    return figure


def dataset_title(run: Trained) -> str:
    """The dataset in small print, saying so where it is not the paper's."""
    split, published = run.features.split, LAYOUTS[run.dataset].published
    return f"{run.dataset}, {len(split.att)} classes" + ("" if split.is_published(run.dataset) or not published
                                                          else "\n(not the paper's\nfull dataset)")


def class_title(name: str) -> str:
    """001.Black_footed_Albatross -> Black footed Albatross; grizzly+bear -> grizzly bear."""
    return re.sub(r"^\d+\.", "", name).replace("_", " ").replace("+", " ")


# ---- attention maps

class Shown(NamedTuple):
    """An image as the network saw it: title, pixels (3, S, S) uint8, normalised feature map (R, D)."""
    title: str
    pixels: Tensor
    maps: Tensor


def read_crop(path: Path, img_size: int) -> Tensor:
    """The crop of an image that the backbone sees (section 3), (3, S, S) uint8. Raises UserError if it cannot be read."""
    return read_image(path, image_transform(img_size))


def dataset_images(run: Trained, data_root: Path, count: int, seed: int) -> list[Shown]:
    """`count` seeded test images of the run's dataset, seen and unseen classes in turn, with their maps from the feature file."""
    split, rng = run.features.split, np.random.default_rng(seed)
    seen, unseen = rng.permutation(split.test_seen), rng.permutation(split.test_unseen)
    short = min(len(seen), len(unseen))
    order = np.concatenate([np.stack([unseen[:short], seen[:short]], axis=1).ravel(), unseen[short:], seen[short:]])[:count]
    if run.features.image_files is None:
        raise UserError(f"{run.features.path} does not say which images it was made from: name images with --images")
    tails = [image_tail(run.features.image_files[index], LAYOUTS[run.dataset].anchor, run.features.path) for index in order]
    kinds = ["unseen" if index in split.test_unseen else "seen" for index in order]
    return [Shown(f"{class_title(run.features.class_names[split.labels[index]])} ({kind})",
                  read_crop(data_root / run.dataset / tail, run.config.img_size), maps)
            for index, kind, tail, maps in zip(order, kinds, tails, run.features.read(order))]


def image_files(run: Trained, paths: list[Path], weights: Path | None = None) -> list[Shown]:
    """Any images, through the run's backbone; weights: those the features were made with, if not the pretrained ones."""
    config, provenance = run.config, run.features.provenance
    crops = [read_crop(path, config.img_size) for path in paths]
    backbone, made = build_backbone(config.backbone, weights, config.img_size)
    if provenance.get("weights_sha256", made["weights_sha256"]) != made["weights_sha256"]:
        raise UserError(f"{run.features.path} was made with the weights {provenance.get('weights')}, not {made['weights']}: "
                        "give that file as --weights")
    pixels = PixelNormalization(config.backbone, provenance.get("normalization", "backbone"))
    with torch.inference_mode():
        return [Shown(path.stem, crop, normalize_positions(backbone(pixels(crop[None])))[0]) for path, crop in zip(paths, crops)]


class Attention(NamedTuple):
    """Global map (R,), summing to 1; the top attributes (8,), best first, with their maps (8, R) and all scores (K,)."""
    overall: Tensor
    top: Tensor
    local: Tensor
    scores: Tensor


@torch.no_grad()
def attend(scen: SCEN, maps: Tensor) -> Attention:
    """What SCEN looks at in a normalised feature map (R, D): A's mean over attributes, its rows of the 8 largest s_k."""
    output = scen(maps[None])
    A, scores = output.attention[0].T, output.scores[0]
    top = scores.topk(min(TOP, len(scores))).indices
    return Attention(A.mean(dim=0), top, A[top], scores)


def heat_over(pixels: Tensor, weights: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Attention (R,) on a grid (h, w) as a warm glow over the darkened pixels (3, S, S): an image (S, S, 3) in [0, 1].

    A map is stretched from its smallest to its largest weight, however far apart they are; the bicubic overshoot is cut.
    """
    extent = weights.max() - weights.min()
    stretched = (weights - weights.min()) / extent.where(extent > 0, 1)
    heat = F.interpolate(stretched.view(1, 1, *grid), size=pixels.shape[1:], mode="bicubic")[0, 0].clamp(0, 1).numpy()
    glow = matplotlib.colormaps["afmhot"](0.8 * heat)[:, :, :3]
    opacity = 0.65 * heat[:, :, None]
    return (1 - opacity) * 0.5 * image_array(pixels) / 255 + opacity * glow


def image_array(pixels: Tensor) -> np.ndarray:
    """(3, S, S) -> (S, S, 3)."""
    return pixels.permute(1, 2, 0).numpy()


def attribute_title(name: str) -> str:
    """has_wing_color::red -> "wing color: red", in lines that fit over a small picture."""
    part, _, value = re.sub(r"\(.*", "", name).removeprefix("has_").replace("_", " ").strip().partition("::")
    return "\n".join(textwrap.wrap(part + (":" if value else ""), 17) + textwrap.wrap(value, 17))


def attention_figure(run: Trained, images: list[Shown]) -> Figure:
    """Section 8's attention picture: a row an image; input, GEN's global map, LEN's maps of the eight best attributes.

    Beside an attribute's name stands how many times the uniform weight 1/R its map's peak is: stretched maps all glow alike.
    """
    scen, grid = restore_scen(run), run.features.shape[1:]
    attentions = [attend(scen, shown.maps) for shown in images]
    columns = 2 + len(attentions[0].top)
    side, head = PAGE / columns, 0.34  # inches
    height = len(images) * (side + head)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, height))
        for row, (shown, attention) in enumerate(zip(images, attentions)):
            pictures = [("\n".join(textwrap.wrap(shown.title, 17)), image_array(shown.pixels))]
            for name, weights in [("GEN: global", attention.overall)] + [
                    (attribute_title(run.features.attribute_names[k]), map_k) for k, map_k in zip(attention.top, attention.local)]:
                peak = weights.max() * len(weights)
                pictures.append((f"{name}\n{peak:.1f}×", heat_over(shown.pixels, weights, grid)))
            for column, (title, picture) in enumerate(pictures):
                bottom = 1 - (row + 1) * (side + head) / height
                axes = figure.add_axes(((column + 0.02) / columns, bottom, 0.96 / columns, 0.96 * side / height))
                axes.imshow(picture)
                axes.set_axis_off()
                axes.set_title(title, fontsize=5.3, pad=1.5, linespacing=1.05)
    return figure


# ---- the seen-unseen curve

def read_curve(path: Path) -> np.ndarray:
    """Rows (seen_bias, S, U) of a run's seen_unseen_curve.csv, by rising bias, S and U in %."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [[float(row[name]) for name in ("seen_bias", "acc_seen", "acc_unseen")] for row in csv.DictReader(file)]
    except OSError:
        raise UserError(f"{path} is missing: the run is not finished, or has no GZSL (gzsl: false, or nepoch 0)") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a seen-unseen curve (seen_bias,acc_seen,acc_unseen): {error!r}") from None
    if not np.isfinite([row[1:] for row in rows]).all():
        raise UserError(f"{path} holds NaN or infinity")
    if len(rows) < 2:
        raise UserError(f"{path} holds {len(rows)} points, a curve needs two")
    return np.array(sorted(rows, key=lambda row: row[0]))


def curve_figure(curve: np.ndarray, name: str) -> Figure:
    """Accuracy on seen over that on unseen classes as the seen classes' logits are lowered; curve as `read_curve` gives it."""
    bias, S, U = curve.T
    at_zero = max(np.searchsorted(bias, 0, side="right") - 1, 0)  # the last operating point that a bias of 0 has reached
    with matplotlib.rc_context(STYLE | {"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(PAGE / 2, PAGE / 2), layout="constrained")
        axes = figure.add_subplot(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel="accuracy on unseen classes, U (%)",
                                  ylabel="accuracy on seen classes, S (%)", title=f"{name}: AUSUC {area_under(torch.from_numpy(curve / 100)):.3f}")
        axes.fill_between(U, S, color="tab:blue", alpha=0.12, linewidth=0)
        axes.plot(U, S, color="tab:blue", linewidth=1.2)
        axes.plot(U[at_zero], S[at_zero], "o", color="tab:red", markersize=4,
                  label=f"seen_bias = 0: U {U[at_zero]:.1f}, S {S[at_zero]:.1f}")
        axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", handlelength=1)
    return figure


# ---- command line

def save(figure: Figure, base: Path):
    """Write base.pdf and base.png, each atomically and without a date: the same figure is the same file."""
    base = base.with_suffix("") if base.suffix in (".pdf", ".png") else base
    for kind, undated in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        with atomic_path(base.with_name(f"{base.name}.{kind}")) as temporary, matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format=kind, metadata=undated)
    print(f"wrote {base}.pdf and {base.name}.png")


def parse_arguments(argv=None):
    parser = FlagParser("Draw figures of a finished run, as PDF and PNG.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=command_parser)
    tsne, attention, curve = (commands.add_parser(name, help=text, description=text) for name, text in (
        ("tsne", "t-SNE of real and synthetic features in the CNN's and the dense-semantic visual space"),
        ("attention", "attention maps over images"), ("curve", "accuracy on seen over accuracy on unseen classes")))
    for command in (tsne, attention, curve):
        command.add_argument("--run", type=Path, required=True, help="the run's folder")
        command.add_argument("--output", type=Path, default=None, help="file name less .pdf (default: in the run's folder)")
    for command in (tsne, attention):
        command.add_argument("--features", type=Path, default=None, help="HDF5 feature file (default: where preprocessing.py puts it)")
        command.add_argument("--seed", type=int, default=0, help="of the choice of classes and images, and of t-SNE")
    tsne.add_argument("--cnn_run", type=Path, default=None, help="run of the CNN-feature baseline, for its synthetic features")
    attention.add_argument("--images", type=Path, nargs="+", default=None, help="image files (default: test images of the dataset)")
    attention.add_argument("--count", type=int, default=4, help="so many test images")
    attention.add_argument("--data_root", type=Path, default=Path("data"), help="where the dataset's images are")
    attention.add_argument("--weights", type=Path, default=None, help="the backbone's state dict, if the features were made with one")
    options = parser.parse_args(argv)
    for name, least in (("seed", 0), ("count", 1)):
        if not least <= getattr(options, name, least) < 2**32:
            raise UserError(f"--{name} {getattr(options, name)}: must be from {least} to {2**32 - 1}")
    for folder in (options.run, getattr(options, "cnn_run", None)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: there is no such run")
    return options


def command_parser(prog: str, description: str) -> FlagParser:
    """A sub-command's parser, which argparse names itself."""
    parser = FlagParser(description)
    parser.prog = prog
    return parser


def draw(options) -> Figure:
    """The figure that the command line asks for."""
    if options.command == "curve":
        return curve_figure(read_curve(options.run / "seen_unseen_curve.csv"), options.run.resolve().name)
    run = load_run(options.run, options.features)
    print(run.features.split.describe(run.dataset))
    if options.command == "tsne":
        return tsne_figure(run, options.cnn_run and load_run(options.cnn_run, options.features), options.seed)
    return attention_figure(run, image_files(run, options.images, options.weights) if options.images
                            else dataset_images(run, options.data_root, options.count, options.seed))


def main(argv=None):
    options = parse_arguments(argv)
    save(draw(options), options.output or options.run / options.command)


if __name__ == "__main__":
    exit_on_user_error(main)
