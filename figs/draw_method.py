"""Draw the pictures that explain the method: method.png, motivation_a.png, motivation_b.png.

    python figs/draw_method.py

They are written beside this program. The birds come from toy.png, the built-in dataset. The two
motivation pictures are sketches: their points are drawn at random and measure nothing.

Blue is data, amber a network, crimson a loss. Shapes differ as well, for prints without colour.
"""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import style
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
BACKGROUND = "#c3c8ce"  # the cells of a feature that say nothing of the attributes

HUGE, MAIN, SMALL = 16, 13.5, 8.2  # points on a page 8 inches wide

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
        """A small circle of data that enters from elsewhere: attributes, noise."""
        fill, edge = BLUE
        circle = Ellipse((x, y), 8.4, 8.4, facecolor=fill, edgecolor=edge, zorder=4)
        circle.set_linewidth(0.87 * self.stroke)
        self.axes.add_patch(circle)
        self.text(x, y, words, 10.5)
        return Box(x, y, 8.4, 8.4)

    def arrow(self, *points, color=INK):
        """A line through the points whose head's tip is exactly the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = np.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length

        head, half = 2.3 * self.stroke, self.stroke
        x, y = x1 - head * ux, y1 - head * uy
        triangle = [(x1, y1), (x - half * uy, y + half * ux), (x + half * uy, y - half * ux)]
        self.axes.add_patch(Polygon(triangle, facecolor=color, edgecolor="none", zorder=3))
        self.line(*points[:-1], (x + 0.5 * ux, y + 0.5 * uy), color=color)

    def line(self, *points, color=INK):
        """A line without a head."""
        x, y = np.transpose(points)
        line = self.axes.plot(x, y, color=color, linewidth=self.stroke, zorder=2)[0]
        line.set(solid_capstyle="butt", solid_joinstyle="miter")

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


# ---------------------------------------------------------------- the method

LEN_Y, GEN_Y, BUS_Y, EGGN_Y = 153, 115, 92, 44  # heights of the rows


def draw_method() -> Page:
    """Images to accuracies: SCEN above, EGGN and the softmax classifiers below."""
    page = Page(192)
    page.area(84, 98, 238, 179)
    page.area(2, 2, 170, 86)
    page.area(178, 2, 238, 86)
    page.title(84, 185.5, "SCEN", "compresses")
    page.title(15, 78, "EGGN", "generates")
    page.title(182, 79.5, "softmax")

    feature_map = draw_backbone(page)
    draw_legend(page)
    local_features, local_logits = draw_len(page, feature_map)
    x = draw_gen(page, local_features)
    draw_distillation(page, local_logits, x)

    encoder, reconstruction, critic = draw_vaegan(page)
    gzsl = draw_softmax(page)
    draw_bus(page, x, encoder, reconstruction, critic, gzsl)
    return page


def draw_backbone(page: Page) -> Box:
    """Images, the ImageNet CNN and the feature map F, which is returned."""
    images = page.stack([bird(1, 0), bird(0, 4), bird(0, 1)], 16, LEN_Y, 24, 2)
    cnn = page.network(45, LEN_Y, "CNN", "ImageNet")
    feature_map = page.stack(feature_grids(3), 69, LEN_Y, 14, 1.6, BLUE[1])

    page.text(16, 135, "images")
    page.text(68, 140.6, "feature map $F$")
    page.arrow(images.right, cnn.left)
    page.arrow(cnn.right, feature_map.left)
    return feature_map


def draw_legend(page: Page):
    """What the colours and the round letters mean."""
    page.data(7.5, 122, "", w=8, h=7)
    page.network(30.5, 122, "", w=8, h=7)
    page.loss(60.5, 122, "", w=9, h=7)
    for x, words in ((13.5, "data"), (36.5, "network"), (67, "loss")):
        page.text(x, 122, words, ha="left")

    page.dot(7.5, 112, "$V$")
    page.text(13.5, 112, "word vectors of attributes", ha="left")
    page.dot(7.5, 102, "$Z$")
    page.dot(17.5, 102, "$a$")
    page.text(23.5, 102, "attributes of classes", ha="left")


def draw_len(page: Page, feature_map: Box) -> tuple[Box, Box]:
    """LEN, from F to its loss. Returns the local features and the local logits."""
    page.area(87, 137, 235, 176, "white")
    page.text(90, 169.5, "LEN", MAIN, ha="left", weight="bold")

    spots = (0.86, 0.31), (0.58, 0.14), (0.35, 0.46)  # bill, crest, wing
    tiles = [attention_tile(bird(1, 0)[10:130, 30:150], *spot) for spot in spots]
    attention = page.stack(tiles, 115, LEN_Y, 13.6, 1.5)
    features = page.data(144, LEN_Y, "$h_k$")
    scores = page.data(168, LEN_Y, "$s_k$")
    logits = page.data(192, LEN_Y, "$S$")
    loss = page.loss(221, LEN_Y, r"$L_{\mathrm{LEN}}$", size=12)

    page.arrow(feature_map.right, attention.left)
    page.arrow(attention.right, features.left)
    page.arrow(features.right, scores.left)
    page.arrow(scores.right, logits.left)
    page.arrow(logits.right, loss.left, color=CRIMSON[1])
    for box, letter in ((attention, "V"), (scores, "V"), (logits, "Z")):
        page.arrow(page.dot(box.x, 169.8, f"${letter}$").bottom, box.top)

    page.text(115, 140.6, "attention $A$")
    page.text(144, 163, "local features")
    page.text(168, 140.6, "scores")
    page.text(195, 140.6, "local logits", ha="left")
    return features, logits


def draw_gen(page: Page, local_features: Box) -> Box:
    """GEN, from the local features to the dense-semantic feature x, which is returned."""
    page.area(87, 101, 186, 133, "white")
    page.text(90, 126.5, "GEN", MAIN, ha="left", weight="bold")

    compose = page.network(144, GEN_Y, "compose", w=24, h=12, size=9.5)
    scaler = page.network(174, GEN_Y, "scaler", w=20, h=12, size=9.5)
    loss = page.loss(104, GEN_Y, r"$L_{\mathrm{GEN}}$", size=12)
    x = page.data(200.5, GEN_Y, "$x$")

    page.arrow(local_features.bottom, compose.top)
    page.arrow(compose.right, scaler.left)
    page.arrow(scaler.right, x.left)
    page.arrow(compose.left, loss.right, color=CRIMSON[1])
    page.text(144, 105, "MLP, later mean")
    page.text(104, 105, "global logits")
    page.text(200.5, 124.5, "dense-semantic")
    return x


def draw_distillation(page: Page, local_logits: Box, x: Box):
    """The global classifier learns the local logits from x."""
    classifier = page.network(225, GEN_Y, "global\nclassifier", w=21, h=13, size=SMALL)
    loss = page.loss(225, 131.5, "MSE", w=17, h=9)
    page.arrow(x.right, classifier.left)
    page.arrow(classifier.top, loss.bottom, color=CRIMSON[1])
    page.arrow(local_logits.bottom, (local_logits.x, loss.y), loss.left, color=CRIMSON[1])


def draw_vaegan(page: Page) -> tuple[Box, Box, Box]:
    """EGGN. Returns those who need x: encoder, the reconstruction's loss, and critic."""
    encoder = page.network(26, EGGN_Y, "E", "encoder")
    z = page.data(50, EGGN_Y, "$z$")
    generator = page.network(75, EGGN_Y, "G", "generator")
    fake = page.data(102, EGGN_Y, r"$\hat{x}$")
    for source, target in ((encoder, z), (z, generator), (generator, fake)):
        page.arrow(source.right, target.left)
    for box in (encoder, generator):
        page.arrow(page.dot(box.x, 64, "$a$").bottom, box.top)

    divergence = page.loss(50, 24, "KL", w=17)
    reconstruction = page.loss(102, 64, "BCE", w=17)
    page.arrow(z.bottom, divergence.top, color=CRIMSON[1])
    page.arrow(fake.top, reconstruction.bottom, color=CRIMSON[1])

    critic, decoder = draw_judges(page, fake)
    feedback = page.network(102, 12, "Fb", "feedback", h=14)
    page.arrow(decoder.bottom, (decoder.x, feedback.y), feedback.right)
    page.arrow(feedback.left, (generator.x, feedback.y), generator.bottom)
    return encoder, reconstruction, critic


def draw_judges(page: Page, fake: Box) -> tuple[Box, Box]:
    """Critic, global classifier and decoder, with their losses. Returns critic and decoder."""
    critic = page.network(131, EGGN_Y + 20, "D", "critic", w=22, h=14)
    guide = page.network(131, EGGN_Y, "global\nclassifier", w=22, h=13, size=SMALL)
    decoder = page.network(131, EGGN_Y - 20, "Dec", "decoder", w=22, h=14)

    for box, name in ((critic, "WGAN"), (guide, "CE"), (decoder, "L1")):
        page.arrow(fake.right, (114, EGGN_Y), (114, box.y), box.left)
        loss = page.loss(157, box.y, name)
        page.arrow(box.right, loss.left, color=CRIMSON[1])
    page.joint(114, EGGN_Y)

    page.arrow(page.dot(125.5, 80, "$a$").bottom, (125.5, critic.top[1]))
    page.arrow(page.dot(157, 9, "$a$").top, loss.bottom, color=CRIMSON[1])
    return critic, decoder


def draw_softmax(page: Page) -> Box:
    """Generated features, the two classifiers and what they are measured by. Returns GZSL's."""
    generator = page.network(190.5, 54, "G", w=17, h=13)
    fake = page.data(190.5, 26, r"$\hat{x}$")
    page.arrow((170, 54), generator.left)
    page.arrow(generator.bottom, fake.top)
    for x, letter in ((185.5, "z"), (195.5, "a")):
        page.arrow(page.dot(x, 70, f"${letter}$").bottom, (x, generator.top[1]))
    page.text(190.5, 16.5, "unseen")

    gzsl = page.network(222, 61, "GZSL", "all classes", w=27, h=15, size=11)
    czsl = page.network(222, 26, "CZSL", "unseen only", w=27, h=15, size=11)
    for box in (gzsl, czsl):
        page.arrow(fake.right, (202.5, fake.y), (202.5, box.y), box.left)
    page.joint(202.5, fake.y)

    for box, words in ((gzsl, "$U$  $S$  $H$"), (czsl, r"$acc_{zs}$")):
        measured = page.data(box.x, box.y - 17, words, w=27, h=10, size=11)
        page.arrow(box.bottom, measured.top)
    return gzsl


def draw_bus(page: Page, x: Box, encoder: Box, reconstruction: Box, critic: Box, gzsl: Box):
    """The line that carries x to those below who need it."""
    start = x.x, BUS_Y
    page.line(x.bottom, start)
    page.arrow(start, (8, BUS_Y), (8, encoder.y), encoder.left)
    page.arrow(start, (gzsl.x, BUS_Y), gzsl.top)
    page.text(gzsl.x + 2.5, 75, "seen", ha="left")

    to_critic = critic.x + critic.w / 4
    page.arrow((reconstruction.x, BUS_Y), reconstruction.top, color=CRIMSON[1])
    page.arrow((to_critic, BUS_Y), (to_critic, critic.top[1]))
    for position in (reconstruction.x, to_critic, x.x):
        page.joint(position, BUS_Y)


# ---------------------------------------------------------------- the motivation

TITLE, WORD, LETTER = 25, 15.5, 21  # points: these two pictures are shown half as wide
IMAGE_Y, ATTRIBUTE_Y = 104, 50
SEEN, UNSEEN = ("#1f5fa8", "#7db4ea"), ("#11734b", "#7cc46a")  # a colour a class
USEFUL = BLUE[1]

# the classes' middles in the space, 0 to 1, and their spread: without and with compression
MIXED = ((0.42, 0.58), (0.60, 0.46), (0.44, 0.40), (0.58, 0.62)), 0.16
APART = ((0.25, 0.76), (0.76, 0.74), (0.26, 0.24), (0.74, 0.22)), 0.066


def draw_motivation(compressed: bool) -> Page:
    """Image and attributes to the space in which classes are told apart, with SCEN or without."""
    page = Page(160, stroke=2.2)
    title = "SC-EGG" if compressed else "Existing generative ZSL"
    page.text(4, 149, title, TITLE, ha="left", weight="bold")

    image = page.picture(bird(1, 0), 21, IMAGE_Y, 34)
    cnn = page.network(61, IMAGE_Y, "CNN", w=28, h=24, size=17)
    attributes = page.data(21, ATTRIBUTE_Y, "$a$", w=22, h=18, size=LETTER)
    generator = page.network(98, ATTRIBUTE_Y, "G", w=31, h=24, size=LETTER)
    page.text(21, 34, "attributes", WORD)
    page.arrow(image.right, cnn.left)
    page.arrow(attributes.right, generator.left)

    last = cnn
    if compressed:
        last = page.network(98, IMAGE_Y, "SCEN", w=31, h=24, size=17)
        page.arrow(cnn.right, last.left)
        page.arrow((48, ATTRIBUTE_Y), (48, 77), (last.x, 77), last.bottom)
        page.joint(48, ATTRIBUTE_Y)

    draw_space(page, compressed)
    draw_sketch_legend(page)
    cells = [USEFUL] * 4 if compressed else [USEFUL, *2 * [BACKGROUND, BACKGROUND, USEFUL]]
    for source in (last, generator):
        feature = page.cells(129.5, source.y, 6, cells)
        page.arrow(source.right, feature.left)
        page.arrow(feature.right, (146, source.y))
    return page


def draw_space(page: Page, compressed: bool):
    """The features' space, with two seen and two unseen classes, real and generated."""
    left, bottom, right, top = 146, 20, 238, 138
    page.area(left, bottom, right, top)
    page.text(192, 130, "classes apart" if compressed else "classes overlap", WORD, weight="bold")

    rng = np.random.default_rng(4)
    middles, spread = APART if compressed else MIXED
    distances = rng.normal(0, 1, (9, 2, 4, 2)).clip(-1.6, 1.6)  # point, real or made, class, x or y
    places = (left, bottom) + (np.array(middles) + spread * distances) * (92, 104)

    for real, made in places:
        for place, color in zip(real[:2], SEEN, strict=True):
            page.point(*place, "o", color)
        for place, made_place, color in zip(real[2:], made[2:], UNSEEN, strict=True):
            page.point(*place, "^", color)
            page.point(*made_place, "^", color, hollow=True)


def draw_sketch_legend(page: Page):
    """What points and cells mean."""
    x, y = 3, 8
    for words in ("seen", "unseen", "generated", "attributes", "background"):
        middle = x + 3
        if words in ("seen", "unseen"):
            page.point(middle, y, *("o", SEEN[0]) if words == "seen" else ("^", UNSEEN[0]))
        elif words == "generated":
            page.point(middle, y, "^", UNSEEN[0], hollow=True)
        else:
            page.cells(middle, y, 6, [USEFUL if words == "attributes" else BACKGROUND])
        x += 8
        x += page.width(page.text(x, y, words, WORD, ha="left")) + 11


def main():
    """Write the three pictures."""
    with style.context("default"):
        draw_method().save(HERE / "method.png")
        draw_motivation(compressed=False).save(HERE / "motivation_a.png")
        draw_motivation(compressed=True).save(HERE / "motivation_b.png")


if __name__ == "__main__":
    main()
