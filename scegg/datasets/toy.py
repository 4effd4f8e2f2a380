"""Render TOY: cartoon birds whose parts are drawn from the attributes of their class.

A zero-shot dataset that needs no download. It lies on disk as CUB does (see `render`), and each attribute
is visible at one part of the bird, so that a model which looks at the right place can name it.

    python -m scegg.datasets.toy --data_root data
"""
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import scipy.io
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from util import FlagParser, UserError, exit_on_user_error, make_folder

VERSION = 1  # raise it when the pictures or the files change: `render` then replaces older ones

# How hard the dataset is.
PURITY = 65, 100  # %, range of a class's main value in a group: lower makes the birds of a class differ more
MIN_DIFFERENT = 5  # groups in which the main values of any two classes differ: lower lets classes be closer
BIRD = 0.26  # length of a medium bird's body over the image's side: a smaller bird fills fewer positions
SIZES = {"small": 0.74, "medium": 1.0, "large": 1.3}  # in units of BIRD
SIZE_SPREAD = 0.12  # share by which a size varies: above 0.13 neighbouring sizes overlap
TILT = 0.35  # radians, largest tilt of the body
COLOR_JITTER = 22  # standard deviation, of 255, of a part's colour around the colour it is named after
OCCLUSION = 0.6  # share of the images with leaves before the bird
NOISE = 12  # largest standard deviation, of 255, of the sensor's noise
BLUR = 1.2  # px, largest radius of the lens's blur

SIDE = 224  # px of the images
CANVAS = 2 * SIDE  # px at which they are drawn: halving smooths the edges

COLORS = {
    "black": (38, 36, 42), "white": (240, 238, 230), "grey": (140, 144, 150), "brown": (124, 82, 48),
    "red": (206, 44, 40), "orange": (240, 136, 34), "yellow": (246, 212, 56), "green": (72, 150, 64),
    "blue": (46, 98, 196), "purple": (126, 62, 160), "pink": (238, 150, 170),
}  # fmt: skip
INK = 20, 16, 20  # the outlines are mixed with it
GROUPS = {
    "bill_shape": ("dagger", "hooked", "cone", "spatulate"),
    "bill_length": ("short", "long"),
    "bill_color": ("black", "yellow", "orange", "red"),
    "crown_color": ("red", "yellow", "blue", "black", "white", "green"),
    "head_pattern": ("plain", "crested", "masked", "eyebrow"),
    "eye_color": ("black", "red", "yellow", "white"),
    "wing_color": ("red", "yellow", "blue", "green", "brown", "purple"),
    "wing_pattern": ("solid", "striped", "spotted"),
    "breast_color": ("white", "yellow", "orange", "red", "blue", "grey"),
    "breast_pattern": ("solid", "striped", "spotted"),
    "tail_shape": ("forked", "rounded", "pointed", "squared"),
    "tail_color": ("black", "brown", "red", "blue", "yellow", "white"),
    "leg_color": ("black", "orange", "pink", "grey"),
    "size": tuple(SIZES),
}
ATTRIBUTES = [f"has_{group}::{value}" for group, values in GROUPS.items() for value in values]

FIRST_NAMES = "Amber Ash Bramble Clover Copper Coral Dusk Ember Fern Hazel Ivory Juniper Maple Misty Russet Willow"
LAST_NAMES = "Bulbul Bunting Dipper Finch Grosbeak Lark Linnet Oriole Pipit Plover Robin Swallow Thrush Tit Vireo Wren"


# ---------------------------------------------------------------- classes

def draw_signatures(rng: np.random.Generator, classes: int, unseen: int) -> np.ndarray:
    """Draws what the classes look like, the seen ones first.

    Returns percentages (classes, len(ATTRIBUTES)), which sum to 100 in every group. The main value of an
    unseen class in a group is that of some seen class: only the combination is new.
    """
    seen, groups = classes - unseen, np.arange(len(GROUPS))
    mains = np.empty((0, len(groups)), int)
    while len(mains) < seen:
        # A shuffled deck for each group: every value is the main one of equally many seen classes.
        decks = np.stack([rng.permutation(np.arange(seen) % len(values)) for values in GROUPS.values()], axis=1)
        mains = np.array([row for i, row in enumerate(decks) if is_new(row, decks[:i])])
    while len(mains) < classes:
        row = mains[rng.integers(seen, size=len(groups)), groups]
        if is_new(row, mains):
            mains = np.vstack([mains, row])
    return np.array([np.concatenate([spread(rng, *pair) for pair in zip(row, GROUPS.values())]) for row in mains])


def is_new(row: np.ndarray, rows: np.ndarray) -> bool:
    return bool(((rows != row).sum(axis=1) >= MIN_DIFFERENT).all())


def spread(rng: np.random.Generator, main: int, values: tuple[str, ...]) -> np.ndarray:
    """One group's percentages: most on the main value, the rest on one or two others."""
    percent = np.zeros(len(values))
    percent[main] = rng.integers(PURITY[0], PURITY[1] + 1)
    others = rng.permutation(np.delete(np.arange(len(values)), main))[: rng.integers(1, 3)]
    percent[others[0]] = rng.integers(100 - percent[main] + 1)
    percent[others[-1]] += 100 - percent.sum()
    return percent


# ---------------------------------------------------------------- the bird
#
# Shapes are arrays of complex numbers x + iy, y downwards. The bird looks to the right; its body is about 1
# long and lies around 0. Multiplying a part by exp(i angle) turns it clockwise.


@dataclass(frozen=True)
class Pose:
    x: float  # px on the canvas, the body's centre
    y: float
    length: float  # px on the canvas, the body
    tilt: float = 0.0  # radians, the whole bird
    nod: float = 0.0  # radians, the head against the body
    lift: float = 0.0  # radians, the wing's tip above its rest
    mirror: bool = False  # looks to the left

    def pixels(self, shape: np.ndarray) -> list[tuple[float, float]]:
        z = shape * self.length * np.exp(1j * self.tilt)
        z = complex(self.x, self.y) + (-z.conj() if self.mirror else z)
        return list(zip(z.real.tolist(), z.imag.tolist()))


def points(*xy: float) -> np.ndarray:
    return np.array(xy[::2]) + 1j * np.array(xy[1::2])


def smooth(corners: np.ndarray) -> np.ndarray:
    """The closed Catmull-Rom curve through `corners`."""
    a, b, c, d = (np.roll(corners, -i)[:, None] for i in range(4))
    t = np.linspace(0, 1, 8, endpoint=False)
    return (b + (c - a) * t / 2 + (a - 2.5 * b + 2 * c - d / 2) * t**2 + (1.5 * (b - c) + (d - a) / 2) * t**3).ravel()


def disc(center: complex, radius: float) -> np.ndarray:
    return center + radius * np.exp(2j * np.pi * np.arange(32) / 32)


BODY = smooth(points(-0.56, 0, -0.22, -0.25, 0.2, -0.35, 0.46, -0.3, 0.53, 0, 0.36, 0.27, 0.05, 0.35, -0.3, 0.22))
BREAST = smooth(points(0.4, -0.3, 0.7, 0, 0.45, 0.5, 0, 0.55, -0.35, 0.35, 0, 0.2, 0.27, -0.02))  # cut by BODY
WING = smooth(points(0.12, 0.06, -0.04, -0.12, -0.4, -0.1, -0.86, 0.2, -0.6, 0.21, -0.52, 0.28, -0.24, 0.27))
FEATHERS = [points(-0.46, 0.2, -0.6, 0.21), points(-0.44, 0.11, -0.7, 0.15), points(-0.4, 0.02, -0.62, 0.07)]
CROWN = points(-0.3, 0.03, -0.2, -0.04, 0.3, -0.09, 0.3, -0.3, -0.3, -0.3)  # cut by the head
CREST = points(-0.2, -0.08, -0.46, -0.3, -0.2, -0.22, -0.3, -0.46, -0.08, -0.26, -0.08, -0.46, 0.08, -0.22)
MASK = smooth(points(-0.24, 0, -0.1, -0.06, 0.1, -0.12, 0.26, -0.06, 0.26, 0.07, 0.1, 0.1, -0.1, 0.08))
EYEBROW = smooth(points(-0.24, 0.03, 0, -0.13, 0.2, -0.13, 0.2, -0.07, 0, -0.06))
SHOULDER, NECK, RUMP = 0.18 - 0.12j, 0.42 - 0.42j, -0.46 + 0.0j  # where wing, head and tail turn
HEAD, EYE = disc(0, 0.25), 0.09 - 0.01j  # the eye against the neck
TAILS = {  # backwards from the rump
    "forked": points(0.1, 0.09, -0.66, 0.24, -0.3, 0, -0.66, -0.24, 0.1, -0.09),
    "rounded": smooth(points(0.1, 0.08, -0.34, 0.2, -0.55, 0.14, -0.62, 0, -0.55, -0.14, -0.34, -0.2, 0.1, -0.08)),
    "pointed": points(0.1, 0.09, -0.25, 0.11, -0.76, 0, -0.25, -0.11, 0.1, -0.09),
    "squared": points(0.1, 0.08, -0.58, 0.18, -0.58, -0.18, 0.1, -0.08),
}
BILLS = {  # from the face forwards; 1 is the bill's length
    "dagger": points(-0.2, -0.07, 1, 0, -0.2, 0.07),
    "hooked": smooth(points(-0.2, -0.09, 0.5, -0.1, 0.92, -0.04, 1, 0.17, 0.8, 0.06, 0.4, 0.07, -0.2, 0.09)),
    "cone": points(-0.2, -0.17, 0.2, -0.15, 1, 0.02, 0.2, 0.17, -0.2, 0.18),
    "spatulate": points(-0.2, -0.05, 0.5, -0.04, 0.7, -0.13, 1, -0.11, 1, 0.12, 0.7, 0.14, 0.5, 0.05, -0.2, 0.06),
}
BILL_LENGTHS = {"short": 0.24, "long": 0.5}
LEG = points(-0.02, 0, 0.02, 0, 0.02, 0.26, 0.14, 0.29, 0.14, 0.33, -0.1, 0.33, -0.1, 0.29, -0.02, 0.26)
GRID = np.arange(-0.98, 1, 0.14)
PATTERNS = {
    "solid": [],
    "striped": [x + points(-0.3, -1, -0.24, -1, 0.3, 1, 0.24, 1) for x in GRID],
    "spotted": [disc(complex(x + 0.07 * (i % 2), y), 0.038) for i, y in enumerate(GRID / 1.15) for x in GRID],
}


def draw_bird(values: dict[str, str], pose: Pose, rng: np.random.Generator) -> Image.Image:
    """Draws a bird of `values` {group: value} on a transparent RGBA canvas of CANVAS x CANVAS px.

    The colour of back and cheeks is no attribute: it is drawn at random. The size is the pose's.
    """
    layer = Image.new("RGBA", (CANVAS, CANVAS))
    brush = ImageDraw.Draw(layer)
    line = max(2, round(0.02 * pose.length))
    # One draw a group, whatever the values: a part's value then never changes how another part looks.
    shift = {group: rng.normal(0, COLOR_JITTER, 3) for group in GROUPS}
    back = mix(COLORS["grey"], COLORS["brown"], rng.uniform(0, 1))
    tint = {group: rgb(COLORS[value] + shift[group]) for group, value in values.items() if value in COLORS}

    def fill(shape: np.ndarray, color: tuple[int, ...], within: np.ndarray | None = None, pattern: str = "solid"):
        area = mask(pose.pixels(shape))
        if within is not None:
            area = ImageChops.multiply(area, mask(pose.pixels(within)))
        layer.paste(color, mask=area)
        marks = mask(*[pose.pixels(mark) for mark in PATTERNS[pattern]])
        contrast = mix(color, COLORS["black" if sum(color) > 330 else "white"], 0.65)
        layer.paste(contrast, mask=ImageChops.multiply(area, marks))
        edge = pose.pixels(shape if within is None else within)
        brush.line(edge + edge[:2], mix(color if within is None else back, INK, 0.6), line, joint="curve")

    fill(RUMP + TAILS[values["tail_shape"]] * np.exp(-0.2j), tint["tail_color"])
    for hip in (-0.04 + 0.3j, 0.14 + 0.29j):
        fill(hip + LEG, tint["leg_color"])
    fill(BODY, back)
    fill(BREAST, tint["breast_color"], BODY, values["breast_pattern"])

    def face(shape: np.ndarray) -> np.ndarray:
        return NECK + shape * np.exp(1j * pose.nod)

    if values["head_pattern"] == "crested":
        fill(face(CREST), tint["crown_color"])
    bill = BILLS[values["bill_shape"]]
    fill(face(0.21 + 0.04j + bill.real * BILL_LENGTHS[values["bill_length"]] + 1j * bill.imag), tint["bill_color"])
    fill(face(HEAD), back)
    fill(face(CROWN), tint["crown_color"], face(HEAD))
    if values["head_pattern"] == "masked":
        fill(face(MASK), COLORS["black"], face(HEAD))
    if values["head_pattern"] == "eyebrow":
        fill(face(EYEBROW), COLORS["white"], face(HEAD))
    for radius, shade in (0.092, COLORS["white"]), (0.078, tint["eye_color"]), (0.036, INK):
        brush.polygon(pose.pixels(face(disc(EYE, radius))), shade)

    turn = np.exp(1j * pose.lift)
    fill(SHOULDER + WING * turn, tint["wing_color"], pattern=values["wing_pattern"])
    for feather in FEATHERS:
        brush.line(pose.pixels(SHOULDER + feather * turn), mix(tint["wing_color"], INK, 0.5), line)
    return layer


def mask(*outlines: list[tuple[float, float]]) -> Image.Image:
    area = Image.new("L", (CANVAS, CANVAS))
    for outline in outlines:
        ImageDraw.Draw(area).polygon(outline, fill=255)
    return area


def rgb(color: np.ndarray) -> tuple[int, ...]:
    return tuple(np.clip(np.rint(color), 0, 255).astype(int).tolist())


def mix(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return rgb(np.array(a[:3]) * (1 - share) + np.array(b[:3]) * share)


# ---------------------------------------------------------------- the picture

SCENES = {  # colours at the top and at the bottom
    "sky": ((120, 170, 225), (220, 232, 240)), "water": ((170, 200, 214), (62, 110, 140)),
    "grass": ((168, 196, 150), (88, 132, 58)), "wood": ((70, 92, 66), (120, 104, 74)),
    "dusk": ((120, 98, 140), (236, 176, 130)),
}  # fmt: skip
LEAF_COLORS = (88, 128, 60), (120, 140, 70), (150, 110, 60)
LEAF = smooth(points(0, 0, 0.3, -0.2, 0.7, -0.16, 1, 0, 0.7, 0.16, 0.3, 0.2))


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_background(rng: np.random.Generator) -> Image.Image:
    """An RGB canvas: a gradient with soft blotches and out-of-focus clutter."""
    top, bottom = (np.array(color) for color in list(SCENES.values())[rng.integers(len(SCENES))])
    rows = np.linspace(0, 1, 8)[:, None, None]
    tone = rng.normal(0, 10, 3) + rng.normal(0, 9, (8, 8, 1)) + rng.normal(0, 4, (8, 8, 3))
    image = to_image(top * (1 - rows) + bottom * rows + tone).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    brush = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 16)):
        here = image.getpixel(tuple(rng.integers(SIDE, size=2).tolist()))
        shade = rgb(np.array(here) + rng.normal(0, 30) + rng.normal(0, 12, 3))
        spot = Pose(*rng.uniform(0, SIDE, 2), length=rng.uniform(20, 90), tilt=rng.uniform(0, 6.3))
        brush.polygon(spot.pixels(LEAF if rng.random() < 0.5 else points(0, 0, 2, 0, 2, 0.06, 0, 0.1)), shade)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
    return image.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)


def draw_image(percent: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Photographs one bird of a class of `percent` (len(ATTRIBUTES),): an RGB image of SIDE x SIDE px."""
    shares = np.split(percent / 100, np.cumsum([len(values) for values in GROUPS.values()])[:-1])
    values = {group: str(rng.choice(values, p=p)) for (group, values), p in zip(GROUPS.items(), shares)}
    length = CANVAS * BIRD * SIZES[values["size"]] * rng.uniform(1 - SIZE_SPREAD, 1 + SIZE_SPREAD)
    room = max(0.0, CANVAS / 2 - 1.05 * length)  # px by which the bird may leave the centre, most of it in view
    x, y = CANVAS / 2 + rng.uniform(-room, room), CANVAS / 2 + rng.uniform(-room, room)
    tilt, nod, lift = rng.uniform((-TILT, -0.35, -0.1), (TILT, 0.35, 0.6))
    pose = Pose(x, y, length, tilt, nod, lift, mirror=rng.random() < 0.5)
    image = draw_background(rng)
    brush = ImageDraw.Draw(image)
    if rng.random() < 0.7:  # a branch under the feet
        branch = Pose(x, y + 0.66 * length, CANVAS, rng.uniform(-0.12, 0.12))
        brush.line(branch.pixels(points(-2, 0, 2, 0)), (92, 70, 52), rng.integers(6, 16).item())
    bird = draw_bird(values, pose, rng)
    image.paste(bird, mask=bird.getchannel("A"))
    for _ in range(rng.integers(1, 5) if rng.random() < OCCLUSION else 0):
        tint = rgb(LEAF_COLORS[rng.integers(3)] + rng.normal(0, 14, 3))
        leaf = Pose(*rng.normal((x, y), 0.75 * length), rng.uniform(0.1, 0.22) * CANVAS, tilt=rng.uniform(0, 6.3))
        brush.polygon(leaf.pixels(LEAF), tint)
        brush.line(leaf.pixels(points(-0.15, 0, 0.95, 0)), mix(tint, INK, 0.4), 3)
    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(rng.uniform(0, BLUR)))
    # Light: its strength, its colour, and a side from which it comes.
    across, down = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))
    light = rng.uniform(0.75, 1.15) * (1 + rng.uniform(-0.2, 0.2) * across - rng.uniform(0, 0.2) * down)
    pixels = np.asarray(image) * light[..., None] * rng.normal(1, 0.05, 3)
    pixels += rng.normal(0, rng.uniform(0, NOISE), pixels.shape)
    return to_image(pixels)


# ---------------------------------------------------------------- the dataset

def render_class(seed: int, count: int, label: int, percent: np.ndarray, folder: Path) -> None:
    """Writes `count` images of a class; each draws from its own generator, so workers may come in any order."""
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        image = draw_image(percent, np.random.default_rng([seed, label, number]))
        image.save(folder / f"{folder.name[4:]}_{number:04d}.jpg", quality=90)


def draw_splits(rng: np.random.Generator, labels: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
    """Splits the images of 1-based `labels` (N,), given the labels `seen`; returns 1-based (M, 1) positions.

    trainval has 80 % of each seen class's images, test_seen the rest; a quarter of the seen classes is val.
    """
    in_test = np.zeros(len(labels), bool)
    for label in seen:
        images = np.flatnonzero(labels == label)
        in_test[rng.permutation(images)[: max(1, round(0.2 * len(images)))]] = True
    is_seen = np.isin(labels, seen)
    is_val = np.isin(labels, rng.permutation(seen)[: max(1, len(seen) // 4)])
    splits = {
        "trainval_loc": is_seen & ~in_test,
        "train_loc": is_seen & ~in_test & ~is_val,
        "val_loc": ~in_test & is_val,
        "test_seen_loc": in_test,
        "test_unseen_loc": ~is_seen,
    }
    return {name: np.flatnonzero(chosen)[:, None] + 1 for name, chosen in splits.items()}


def render(data_root: Path, seed: int = 0, classes: int = 50, images_per_class: int = 40, unseen: int = 10) -> None:
    """Renders TOY as a user's dataset lies on disk; the same arguments give the same pictures and arrays.

    data_root/TOY/images/<NNN.Class_Name>/*.jpg   images_per_class of each class, RGB, SIDE x SIDE px
    data_root/TOY/attributes.txt                  a line an attribute, `1 has_bill_shape::dagger`
    data_root/TOY/toy.json                        what was asked for
    data_root/xlsa17/data/TOY/res101.mat          image_files (N, 1) and labels (N, 1), 1-based; no features:
                                                  the pooled baseline takes them from the feature maps
    data_root/xlsa17/data/TOY/att_splits.mat      the splits, 1-based (M, 1); original_att (K, C) in percent;
                                                  att (K, C) with columns of norm 1; allclasses_names (C, 1)

    att_splits.mat appears last, when all else is in place. A complete TOY of the same arguments is kept, any
    other one replaced. Raises UserError for impossible arguments and for a TOY folder that is not ours.
    """
    if seed < 0:
        raise UserError(f"seed must not be negative, not {seed}")
    if unseen < 1 or classes - unseen < 4 or classes > 250:
        raise UserError(f"4 or more classes must be seen, 1 or more unseen, 250 at most: not {unseen} of {classes}")
    if not 5 <= images_per_class <= 9999:
        raise UserError(f"images_per_class must be 5 to 9999, not {images_per_class}")
    start, data_root = time.time(), Path(data_root)
    final, mats = data_root / "TOY", data_root / "xlsa17/data/TOY"
    asked = dict(version=VERSION, seed=seed, classes=classes, images_per_class=images_per_class, unseen=unseen)
    note, count = json.dumps(asked) + "\n", classes * images_per_class
    if final.exists() and not (final / "toy.json").exists():
        raise UserError(f"{final} was not written by toy.py (it has no toy.json): move it away")
    if (mats / "att_splits.mat").exists() and (mats / "res101.mat").exists() and final.exists():
        if (final / "toy.json").read_text() == note and len(list(final.glob("images/*/*.jpg"))) == count:
            print(f"{final} is already there, of the same seed and sizes")
            return

    rng = np.random.default_rng(seed)
    order = rng.permutation(classes)  # unseen classes lie anywhere among the labels
    percents, seen = draw_signatures(rng, classes, unseen)[order], np.flatnonzero(order < classes - unseen) + 1
    # As in CUB, kin are neighbours among the folders, and labels do not follow the folders' order.
    names = [f"{first}_{last}" for last in LAST_NAMES.split() for first in FIRST_NAMES.split()]
    names = [names[i] for i in np.sort(rng.choice(len(names), classes, replace=False))]
    names = rng.permutation([f"{i:03d}.{name}" for i, name in enumerate(names, start=1)]).tolist()
    labels = np.repeat(np.arange(1, classes + 1), images_per_class)
    splits = draw_splits(rng, labels, seen)

    att = percents.T / np.linalg.norm(percents.T, axis=0)
    paths = [f"/toy/TOY/images/{name}/{name[4:]}_{i:04d}.jpg" for name in names for i in range(1, images_per_class + 1)]
    paths, cells = np.array(paths, dtype=object)[:, None], np.array(names, dtype=object)[:, None]
    contents = {  # in this order: att_splits.mat comes last
        "res101.mat": dict(image_files=paths, labels=labels[:, None].astype(np.uint8)),
        "att_splits.mat": dict(att=att, original_att=percents.T, allclasses_names=cells, **splits),
    }
    make_folder(mats)
    # Two drafts, each on the disk of what it replaces, so that files move into place whole.
    draft = partial(TemporaryDirectory, prefix="TOY.partial-")
    with draft(dir=data_root) as work, draft(dir=mats.parent) as work_mats:
        new, new_mats = Path(work, "TOY"), Path(work_mats)
        folders = [new / "images" / name for name in names]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            jobs = pool.map(partial(render_class, seed, images_per_class), range(classes), percents, folders)
            list(tqdm(jobs, total=classes, desc="TOY", unit="class", disable=None))
        (new / "attributes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(ATTRIBUTES, start=1)))
        (new / "toy.json").write_text(note)
        for name, arrays in contents.items():
            scipy.io.savemat(new_mats / name, arrays)
        for name in reversed(contents):  # from here to the last line nothing looks complete
            (mats / name).unlink(missing_ok=True)
        if final.exists():
            final.rename(Path(work, "old"))
        new.rename(final)
        for name in contents:
            os.replace(new_mats / name, mats / name)
    print(f"{final}: {len(labels)} images of {classes} classes ({unseen} unseen) in {time.time() - start:.0f} s")


def main() -> None:
    parser = FlagParser(__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=50, help="seen and unseen ones together")
    parser.add_argument("--unseen", type=int, default=10, help="how many of the classes are unseen")
    parser.add_argument("--images_per_class", type=int, default=40)
    options = parser.parse_args()
    try:
        render(**vars(options))
    except OSError as error:  # a full or read-only disk
        raise UserError(f"TOY could not be written below {options.data_root} ({error.strerror or error}): free some disk space or name "
                        "another --data_root") from error


if __name__ == "__main__":
    exit_on_user_error(main)
