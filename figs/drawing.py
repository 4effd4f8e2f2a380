"""Boxes, arrows, points and pictures on a page: what draw_method.py draws with.

Blue is data, amber a network, crimson a loss. Shapes differ as well, for prints without colour.
"""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch, Polygon
from PIL import Image

HERE = Path(__file__).resolve().parent
UNITS = 240  # a page's width in the units that everything below is measured in
INCHES = 8
DPI = 300

INK = "#1f2933"
GREY = "#5b6672"
PANEL = "#eef1f5"
BLUE = "#d6e6f8", "#2866ac"  # data: fill, edge
AMBER = "#fde3b5", "#b86e00"  # networks
CRIMSON = "#fbdbe3", "#b3174a"  # losses

HUGE, MAIN, SMALL = 16, 13.5, 8.4  # points on a page 8 inches wide

TILE, STEP = 160, 168  # px of a bird in toy.png, and from one to the next


class Box(NamedTuple):
    """A box on the page: its centre, width and height. The sides' middles are where arrows end."""

    x: float
    y: float
    w: float
    h: float

    @property
    def left(self):
        return self.x - self.w / 2, self.y

    @property
    def right(self):
        return self.x + self.w / 2, self.y

    @property
    def top(self):
        return self.x, self.y + self.h / 2

    @property
    def bottom(self):
        return self.x, self.y - self.h / 2


class Page:
    """A white page, UNITS wide and `height` high, with (0, 0) at the lower left.

    stroke: the width of lines in points; arrow heads and outlines follow it.
    """

    def __init__(self, height: float, stroke: float = 1.5):
        self.height, self.stroke = height, stroke
        self.figure = Figure(figsize=(INCHES, INCHES * height / UNITS))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, UNITS), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x, y, words, size=SMALL, color=INK, **options):
        """Words, centred on (x, y) unless ha says otherwise."""
        placed = {"ha": "center", "va": "center_baseline", **options}
        return self.axes.text(x, y, words, fontsize=size, color=color, zorder=5, **placed)

    def title(self, x, y, name, what=""):
        """A part's name from (x, y) on, and behind it what the part does."""
        name = self.text(x, y, name, HUGE, ha="left", weight="bold")
        self.text(x + self.width(name) + 3, y - 0.4, what, 11, GREY, ha="left")

    def width(self, text) -> float:
        """How wide a text is."""
        return text.get_window_extent().width / self.figure.dpi * UNITS / INCHES

    def area(self, left, bottom, right, top, color=PANEL):
        """A tinted background without an outline."""
        box = Box((left + right) / 2, (bottom + top) / 2, right - left, top - bottom)
        self._rounded(box, 3, color, "none", zorder=0)

    def data(self, x, y, words, w=13, h=12, size=MAIN):
        """Something computed or given."""
        return self._labelled(Box(x, y, w, h), 2.5, BLUE, words, size)

    def parts(self, x, y, words, widths, h=9, size=10):
        """Data put together of several: a box with a field for each of the words."""
        box = Box(x, y, sum(widths), h)
        self._rounded(box, 2.5, *BLUE)

        left = box.left[0]
        for word, width in zip(words, widths, strict=True):
            self.text(left + width / 2, y, word, size)
            left += width
            if left < box.right[0]:
                self.line((left, y - h / 2), (left, y + h / 2), color=BLUE[1], zorder=4)
        return box

    def network(self, x, y, words, caption="", w=20, h=16, size=MAIN):
        """Something learnt; its name stands in small letters below its symbol."""
        box = Box(x, y, w, h)
        self._rounded(box, 0.8, *AMBER)

        self.text(x, y + 0.16 * h if caption else y, words, size, weight="bold")
        if caption:
            self.text(x, y - 0.25 * h, caption)
        return box

    def loss(self, x, y, words, w=20, h=10, size=10):
        """A loss."""
        return self._labelled(Box(x, y, w, h), h / 2, CRIMSON, words, size)

    def dot(self, x, y, words):
        """A small circle of data that enters from elsewhere: attributes, noise, features."""
        fill, edge = BLUE
        circle = Ellipse((x, y), 8.4, 8.4, facecolor=fill, edgecolor=edge, zorder=4)
        circle.set_linewidth(0.87 * self.stroke)
        self.axes.add_patch(circle)
        self.text(x, y, words, 10.5)
        return Box(x, y, 8.4, 8.4)

    def arrow(self, *points, color=INK, dashed=False):
        """A line through the points whose head's tip is exactly the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = np.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length

        head, half = 2.3 * self.stroke, self.stroke
        x, y = x1 - head * ux, y1 - head * uy
        triangle = [(x1, y1), (x - half * uy, y + half * ux), (x + half * uy, y - half * ux)]
        self.axes.add_patch(Polygon(triangle, facecolor=color, edgecolor="none", zorder=3))
        self.line(*points[:-1], (x + 0.5 * ux, y + 0.5 * uy), color=color, dashed=dashed)

    def line(self, *points, color=INK, dashed=False, zorder=2):
        """A line without a head."""
        x, y = np.transpose(points)
        line = self.axes.plot(x, y, color=color, linewidth=self.stroke, zorder=zorder)[0]
        line.set(solid_capstyle="butt", solid_joinstyle="miter")
        if dashed:
            line.set(linestyle=(0, (1.7, 0.9)), dash_capstyle="butt")

    def joint(self, x, y, color=INK):
        """Where a line branches."""
        size = 1.5 * self.stroke
        dot = Ellipse((x, y), size, size, facecolor=color, edgecolor="none", zorder=3)
        self.axes.add_patch(dot)

    def picture(self, image, x, y, side, edge=INK):
        """A square picture centred on (x, y): an array (n, n, 3)."""
        box = Box(x, y, side, side)
        extent = box.left[0], box.right[0], box.bottom[1], box.top[1]
        shown = self.axes.imshow(image, extent=extent, aspect="auto", zorder=4)
        shown.set_interpolation("nearest" if len(image) < 20 else "bicubic")
        self.axes.set(xlim=(0, UNITS), ylim=(0, self.height))  # imshow moves them

        self._rounded(box, 0.01, "none", edge, zorder=4)
        return box

    def stack(self, images, x, y, side, shift, edge=INK):
        """Pictures lying on each other, the first on top; (x, y) is the middle of them all."""
        spread = shift * (len(images) - 1)
        for depth in reversed(range(len(images))):
            offset = shift * depth - spread / 2
            self.picture(images[depth], x + offset, y + offset, side, edge)
        return Box(x, y, side + spread, side + spread)

    def cells(self, x, y, side, colors) -> Box:
        """A feature: a column of square cells, the first on top; (x, y) is its middle."""
        box = Box(x, y, side, side * len(colors))
        for i, color in enumerate(colors):
            middle = box.top[1] - side * (i + 0.5)
            self._rounded(Box(x, middle, side, side), 0.01, color, "white")
        self._rounded(box, 0.01, "none", INK)
        return box

    def point(self, x, y, marker, color, hollow=False):
        """An image's or a generated feature's place in a space."""
        fill, edge, line = ("white", color, 2.4) if hollow else (color, "white", 1)
        shown = self.axes.scatter(x, y, 130, marker=marker, zorder=4)
        shown.set(facecolor=fill, edgecolor=edge, linewidth=line)

    def save(self, path: Path):
        """Write the page as a PNG of few colours, which keeps it small."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, dpi=DPI, format="png")
        image = Image.open(buffer).convert("RGB")
        palette = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3)
        image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        try:
            image.save(path, optimize=True, dpi=(DPI, DPI))
        except OSError as error:
            sys.exit(f"error: {path} could not be written ({error.strerror or error})")

    def _labelled(self, box, radius, colors, words, size):
        self._rounded(box, radius, *colors)
        self.text(box.x, box.y, words, size)
        return box

    def _rounded(self, box, radius, fill, edge, zorder=4):
        rounding = f"round,pad=0,rounding_size={radius}"
        corner = box.x - box.w / 2, box.y - box.h / 2
        patch = FancyBboxPatch(corner, box.w, box.h, boxstyle=rounding, facecolor=fill)
        patch.set(edgecolor=edge, linewidth=0.87 * self.stroke, zorder=zorder)
        self.axes.add_patch(patch)


# ---------------------------------------------------------------- birds and grids


def bird(row: int, column: int) -> np.ndarray:
    """One bird of toy.png, (TILE, TILE, 3) in 0 to 255."""
    path = HERE / "toy.png"
    try:
        with Image.open(path) as picture:
            sheet = np.asarray(picture.convert("RGB"))
    except OSError as error:
        sys.exit(f"error: {path} could not be read ({error.strerror or error})")

    top, left = row * STEP, column * STEP
    tile = sheet[top : top + TILE, left : left + TILE]
    if tile.shape != (TILE, TILE, 3):
        sys.exit(f"error: {path} is not the built-in dataset's sheet of 6 x 2 birds")
    return tile


def blend(low: str, high: str, weight: np.ndarray) -> np.ndarray:
    """Colours between two, by weights (n, n) in 0 to 1: (n, n, 3) in 0 to 255."""
    low, high = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (low, high))
    return (low + weight[..., None] * (high - low)).astype(np.uint8)


def feature_grids(count: int, side: int = 6) -> list[np.ndarray]:
    """Channels of a feature map, as blue grids."""
    rng = np.random.default_rng(3)
    return [blend("#f2f7fd", BLUE[1], rng.random((side, side)) ** 1.6) for _ in range(count)]


def attention_tile(tile: np.ndarray, x: float, y: float, cells: int = 10) -> np.ndarray:
    """A darkened bird with a warm spot of square cells at (x, y), fractions from its upper left."""
    centres = (np.arange(cells) + 0.5) / cells
    distance = (centres[None, :] - x) ** 2 + (centres[:, None] - y) ** 2
    weight = np.exp(-distance / 0.025)

    pixels = len(tile) // cells
    weight = np.kron(weight, np.ones((pixels, pixels)))[..., None]
    warm = np.array([255, 120, 0]) + weight * np.array([0, 110, 60])
    return (0.7 * tile * (1 - weight) + warm * weight).clip(0, 255).astype(np.uint8)
