"""Attention maps of a run over images (docs/method.md, section 8)."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from model import SCEN
from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.xlsa17 import image_tail, places_of_images
from scegg.features.images import MEGAPIXELS
from scegg.features.reader import normalize_positions
from scegg.report.pictures import load_backbone, read_crop
from scegg.report.style import NAMES_STYLE, PAGE, class_title
from scegg.run.trained import TrainedRun, restore_scen
from util import UserError

TOP = 8  # attributes that a row shows
TITLE_WIDTH = 17  # letters that fit over a picture
HEAD = 0.34  # inches for the title of a picture


# ---- the images


class ShownImage(NamedTuple):
    """An image as the network saw it.

    pixels (3, S, S) uint8; feature_map (R, D), positions first and normalised.
    """

    title: str
    pixels: Tensor
    feature_map: Tensor


def dataset_images(
    run: TrainedRun, data_root: Path, count: int, seed: int, megapixels: int = MEGAPIXELS
) -> list[ShownImage]:
    """`count` test images of the run's dataset, of unseen and seen classes in turn.

    The seed draws them; their maps come from the feature file. Raises UserError for a feature file
    that does not name its images, and for an image that cannot be read or has more megapixels.
    """
    features, anchor = run.features, LAYOUTS[run.dataset].anchor
    if features.image_files is None:
        raise UserError(
            f"{features.path} does not say which images it was made from: name images with --images"
        )
    indices = choose_test_images(run, count, seed)
    tails = [image_tail(features.image_files[index], anchor, features.path) for index in indices]
    tails = places_of_images(data_root, run.dataset, tails)

    shown = []
    for index, tail, feature_map in zip(indices, tails, features.read(indices), strict=True):
        kind = "unseen" if index in features.split.test_unseen else "seen"
        name = class_title(features.class_names[features.split.labels[index]])
        crop = read_crop(data_root / run.dataset / tail, run.config.img_size, megapixels)
        shown.append(ShownImage(f"{name} ({kind})", crop, feature_map))
    return shown


def choose_test_images(run: TrainedRun, count: int, seed: int) -> np.ndarray:
    """Indices of `count` test images, of unseen and seen classes in turn while both last."""
    split, rng = run.features.split, np.random.default_rng(seed)
    seen = rng.permutation(split.test_seen)
    unseen = rng.permutation(split.test_unseen)

    pairs = min(len(seen), len(unseen))
    in_turn = np.stack([unseen[:pairs], seen[:pairs]], axis=1).ravel()
    return np.concatenate([in_turn, unseen[pairs:], seen[pairs:]])[:count]


def read_images(
    run: TrainedRun,
    paths: list[Path],
    weights: Path | None = None,
    megapixels: int = MEGAPIXELS,
) -> list[ShownImage]:
    """Any images, sent through the run's backbone.

    weights: the file that the features were made with, if not the pretrained one. Raises UserError
    for an image that cannot be read or has more megapixels, and for weights that the features were
    not made with.
    """
    features, device = run.features, torch.device("cpu")
    crops = [read_crop(path, run.config.img_size, megapixels) for path in paths]

    backbone = load_backbone(run.config, features.provenance, features.path, weights, device)
    shown = []
    with torch.inference_mode():
        for path, crop in zip(paths, crops, strict=True):
            maps = backbone(crop[None])
            shown.append(ShownImage(path.stem, crop, normalize_positions(maps)[0]))
    return shown


# ---- their attention


class Attention(NamedTuple):
    """Attention over the R positions of an image.

    global_map (R,) is the mean over all attributes and sums to 1. top (8,) are the attributes to
    show, best first; local_maps (8, R) are theirs. scores (K,) are of all attributes.
    """

    global_map: Tensor
    top: Tensor
    local_maps: Tensor
    scores: Tensor


@torch.no_grad()
def attend(scen: SCEN, feature_map: Tensor) -> Attention:
    """What SCEN looks at in a normalised feature map (R, D): the attributes of largest scores."""
    output = scen(feature_map[None])
    scores = output.scores[0]
    return attention_of(output.attention[0].T, scores, scores)


def attention_of(maps: Tensor, scores: Tensor, worth: Tensor) -> Attention:
    """The attributes that are worth most (K,), of SCEN's maps (K, R) and scores (K,)."""
    top = worth.topk(min(TOP, len(worth))).indices
    return Attention(maps.mean(dim=0), top, maps[top], scores)


def heat_over(pixels: Tensor, weights: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Attention as a warm glow over the darkened image, (S, S, 3) in [0, 1].

    pixels (3, S, S) uint8; weights (R,), attention on a grid (h, w). The weights are stretched
    from the smallest to the largest, however close these are.
    """
    extent = weights.max() - weights.min()
    stretched = (weights - weights.min()) / extent.where(extent > 0, 1)
    as_image = stretched.view(1, 1, *grid)
    enlarged = F.interpolate(as_image, size=pixels.shape[1:], mode="bicubic")[0, 0]
    heat = enlarged.clamp(0, 1).numpy()  # bicubic overshoots

    glow = matplotlib.colormaps["afmhot"](0.8 * heat)[:, :, :3]
    opacity = 0.65 * heat[:, :, None]
    return (1 - opacity) * 0.5 * image_array(pixels) / 255 + opacity * glow


def image_array(pixels: Tensor) -> np.ndarray:
    """(3, S, S) -> (S, S, 3)."""
    return pixels.permute(1, 2, 0).numpy()


# ---- the figure


class Picture(NamedTuple):
    """A small picture (S, S, 3) of the figure, and its title."""

    title: str
    image: np.ndarray


def attention_figure(run: TrainedRun, images: list[ShownImage]) -> Figure:
    """A row for each image: the image, GEN's global map, LEN's maps of the top attributes.

    The number in a title is how many times the uniform weight 1/R the map's peak is. All maps are
    stretched, so that they glow alike. Raises UserError for a run of the baseline.
    """
    scen, names, grid = restore_scen(run), run.features.attribute_names, run.features.shape[1:]
    return figure_of(
        [
            row_of(image.title, image.pixels, attend(scen, image.feature_map), names, grid)
            for image in images
        ]
    )


def figure_of(rows: list[list[Picture]]) -> Figure:
    """Rows of pictures, each with its title above it."""
    columns = len(rows[0])
    side = PAGE / columns  # inches
    height = len(rows) * (side + HEAD)
    width_of_picture, height_of_picture = 0.96 / columns, 0.96 * side / height

    with matplotlib.rc_context(NAMES_STYLE):
        figure = Figure(figsize=(PAGE, height))
        for row, pictures in enumerate(rows):
            bottom = 1 - (row + 1) * (side + HEAD) / height
            for column, picture in enumerate(pictures):
                left = (column + 0.02) / columns
                axes = figure.add_axes((left, bottom, width_of_picture, height_of_picture))
                axes.imshow(picture.image)
                axes.set_axis_off()
                axes.set_title(picture.title, fontsize=5.3, pad=1.5, linespacing=1.05)
    return figure


def row_of(
    title: str, pixels: Tensor, attention: Attention, attributes: list[str], grid: tuple[int, int]
) -> list[Picture]:
    """The pictures of an image: itself, the global map, the maps of its top attributes.

    pixels (3, S, S) uint8; attributes: the names of all K; grid (h, w) of a map.
    """
    pictures = [Picture("\n".join(textwrap.wrap(title, TITLE_WIDTH)), image_array(pixels))]

    maps = [("GEN: global", attention.global_map)]
    for attribute, local_map in zip(attention.top, attention.local_maps, strict=True):
        maps.append((attribute_title(attributes[attribute]), local_map))

    for name, weights in maps:
        peak = weights.max() * len(weights)
        pictures.append(Picture(f"{name}\n{peak:.1f}×", heat_over(pixels, weights, grid)))
    return pictures


def attribute_title(name: str) -> str:
    """has_wing_color::red -> "wing color:" over "red", in lines that fit over a picture."""
    words = re.sub(r"\(.*", "", name).removeprefix("has_").replace("_", " ").strip()
    part, _, value = words.partition("::")
    if value:
        part += ":"
    return "\n".join(textwrap.wrap(part, TITLE_WIDTH) + textwrap.wrap(value, TITLE_WIDTH))
