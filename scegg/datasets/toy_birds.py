"""The drawing of TOY's images: cartoon birds on a background, as a photograph shows them.

`draw_image` draws one bird of a class. Every attribute of GROUPS is visible at one part of the
bird, so that a model which looks at the right place can name it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# How hard the images are.
BIRD = 0.26  # length of a medium bird's body over the image's side: smaller birds fill less of it
SIZES = {"small": 0.74, "medium": 1.0, "large": 1.3}  # in units of BIRD
SIZE_SPREAD = 0.12  # share by which a size varies: above 0.13 neighbouring sizes overlap
TILT = 0.35  # radians, largest tilt of the body
COLOR_JITTER = 22  # standard deviation, of 255, of a part's colour around the one in its name
OCCLUSION = 0.6  # share of the images with leaves before the bird
NOISE = 12  # largest standard deviation, of 255, of the sensor's noise
BLUR = 1.2  # px, largest radius of the lens's blur

SIDE = 224  # px of the images
CANVAS = 2 * SIDE  # px at which they are drawn: halving smooths the edges

COLORS = {
    "black": (38, 36, 42), "white": (240, 238, 230), "grey": (140, 144, 150),
    "brown": (124, 82, 48), "red": (206, 44, 40), "orange": (240, 136, 34),
    "yellow": (246, 212, 56), "green": (72, 150, 64), "blue": (46, 98, 196),
    "purple": (126, 62, 160), "pink": (238, 150, 170),
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


# --- Shapes ----------------------------------------------------------------------------------
#
# A shape is an array of complex numbers x + iy, y downwards. The bird looks to the right. Its body
# is about 1 long and lies around 0. Multiplying a part by exp(i angle) turns it clockwise.


@dataclass(frozen=True)
class Pose:
    """Where a shape lies on the canvas, and how a bird holds itself."""

    x: float  # px on the canvas, the body's centre
    y: float
    length: float  # px on the canvas, the body
    tilt: float = 0.0  # radians, the whole bird
    nod: float = 0.0  # radians, the head against the body
    lift: float = 0.0  # radians, the wing's tip above its rest
    mirror: bool = False  # looks to the left

    def pixels(self, shape: np.ndarray) -> list[tuple[float, float]]:
        """The shape's corners in px of the canvas."""
        z = shape * self.length * np.exp(1j * self.tilt)
        z = complex(self.x, self.y) + (-z.conj() if self.mirror else z)
        return list(zip(z.real.tolist(), z.imag.tolist(), strict=True))


def points(*xy: float) -> np.ndarray:
    """The shape with corners x, y, x, y, ..."""
    return np.array(xy[::2]) + 1j * np.array(xy[1::2])


def smooth(corners: np.ndarray) -> np.ndarray:
    """The closed Catmull-Rom curve through `corners`."""
    a, b, c, d = (np.roll(corners, -i)[:, None] for i in range(4))
    t = np.linspace(0, 1, 8, endpoint=False)
    linear = (c - a) * t / 2
    square = (a - 2.5 * b + 2 * c - d / 2) * t**2
    cube = (1.5 * (b - c) + (d - a) / 2) * t**3
    return (b + linear + square + cube).ravel()


def disc(center: complex, radius: float) -> np.ndarray:
    """A circle's outline."""
    return center + radius * np.exp(2j * np.pi * np.arange(32) / 32)


# fmt: off
BODY = smooth(points(
    -0.56, 0, -0.22, -0.25, 0.2, -0.35, 0.46, -0.3, 0.53, 0, 0.36, 0.27, 0.05, 0.35, -0.3, 0.22))
BREAST = smooth(points(  # cut by the body
    0.4, -0.3, 0.7, 0, 0.45, 0.5, 0, 0.55, -0.35, 0.35, 0, 0.2, 0.27, -0.02))
WING = smooth(points(
    0.12, 0.06, -0.04, -0.12, -0.4, -0.1, -0.86, 0.2, -0.6, 0.21, -0.52, 0.28, -0.24, 0.27))
FEATHERS = [
    points(-0.46, 0.2, -0.6, 0.21),
    points(-0.44, 0.11, -0.7, 0.15),
    points(-0.4, 0.02, -0.62, 0.07),
]
CROWN = points(-0.3, 0.03, -0.2, -0.04, 0.3, -0.09, 0.3, -0.3, -0.3, -0.3)  # cut by the head
CREST = points(
    -0.2, -0.08, -0.46, -0.3, -0.2, -0.22, -0.3, -0.46, -0.08, -0.26, -0.08, -0.46, 0.08, -0.22)
MASK = smooth(points(
    -0.24, 0, -0.1, -0.06, 0.1, -0.12, 0.26, -0.06, 0.26, 0.07, 0.1, 0.1, -0.1, 0.08))
EYEBROW = smooth(points(-0.24, 0.03, 0, -0.13, 0.2, -0.13, 0.2, -0.07, 0, -0.06))
SHOULDER, NECK, RUMP = 0.18 - 0.12j, 0.42 - 0.42j, -0.46 + 0.0j  # where wing, head and tail turn
HEAD, EYE = disc(0, 0.25), 0.09 - 0.01j  # the eye against the neck
TAILS = {  # backwards from the rump
    "forked": points(0.1, 0.09, -0.66, 0.24, -0.3, 0, -0.66, -0.24, 0.1, -0.09),
    "rounded": smooth(points(
        0.1, 0.08, -0.34, 0.2, -0.55, 0.14, -0.62, 0, -0.55, -0.14, -0.34, -0.2, 0.1, -0.08)),
    "pointed": points(0.1, 0.09, -0.25, 0.11, -0.76, 0, -0.25, -0.11, 0.1, -0.09),
    "squared": points(0.1, 0.08, -0.58, 0.18, -0.58, -0.18, 0.1, -0.08),
}
BILLS = {  # from the face forwards; 1 is the bill's length
    "dagger": points(-0.2, -0.07, 1, 0, -0.2, 0.07),
    "hooked": smooth(points(
        -0.2, -0.09, 0.5, -0.1, 0.92, -0.04, 1, 0.17, 0.8, 0.06, 0.4, 0.07, -0.2, 0.09)),
    "cone": points(-0.2, -0.17, 0.2, -0.15, 1, 0.02, 0.2, 0.17, -0.2, 0.18),
    "spatulate": points(
        -0.2, -0.05, 0.5, -0.04, 0.7, -0.13, 1, -0.11, 1, 0.12, 0.7, 0.14, 0.5, 0.05, -0.2, 0.06),
}
BILL_LENGTHS = {"short": 0.24, "long": 0.5}
LEG = points(
    -0.02, 0, 0.02, 0, 0.02, 0.26, 0.14, 0.29, 0.14, 0.33, -0.1, 0.33, -0.1, 0.29, -0.02, 0.26)
LEAF = smooth(points(0, 0, 0.3, -0.2, 0.7, -0.16, 1, 0, 0.7, 0.16, 0.3, 0.2))
STICK = points(0, 0, 2, 0, 2, 0.06, 0, 0.1)
# fmt: on


def spots() -> list[np.ndarray]:
    """Discs in rows, every other row shifted."""
    discs = []
    for i, y in enumerate(GRID / 1.15):
        discs += [disc(complex(x + 0.07 * (i % 2), y), 0.038) for x in GRID]
    return discs


GRID = np.arange(-0.98, 1, 0.14)
PATTERNS = {
    "solid": [],
    "striped": [x + points(-0.3, -1, -0.24, -1, 0.3, 1, 0.24, 1) for x in GRID],
    "spotted": spots(),
}

# --- Colours -------------------------------------------------------------------------------------

SCENES = {  # colours at the top and at the bottom
    "sky": ((120, 170, 225), (220, 232, 240)), "water": ((170, 200, 214), (62, 110, 140)),
    "grass": ((168, 196, 150), (88, 132, 58)), "wood": ((70, 92, 66), (120, 104, 74)),
    "dusk": ((120, 98, 140), (236, 176, 130)),
}  # fmt: skip
LEAF_COLORS = (88, 128, 60), (120, 140, 70), (150, 110, 60)
BRANCH_COLOR = 92, 70, 52


def rgb(color: np.ndarray) -> tuple[int, ...]:
    """The nearest colour that an image can have."""
    return tuple(np.clip(np.rint(color), 0, 255).astype(int).tolist())


def mix(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Colour a with a share of colour b in it."""
    return rgb(np.array(a[:3]) * (1 - share) + np.array(b[:3]) * share)


def mask(*outlines: list[tuple[float, float]]) -> Image.Image:
    """A canvas that is white inside the outlines and black elsewhere."""
    area = Image.new("L", (CANVAS, CANVAS))
    for outline in outlines:
        ImageDraw.Draw(area).polygon(outline, fill=255)
    return area


def to_image(pixels: np.ndarray) -> Image.Image:
    """pixels (h, w, 3), of 255, as an image."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# --- The bird ------------------------------------------------------------------------------------


class BirdBrush:
    """Paints the parts of one bird on a transparent RGBA canvas of CANVAS x CANVAS px."""

    def __init__(self, pose: Pose, back: tuple[int, ...]):
        self.pose = pose
        self.back = back  # the colour of back and cheeks
        self.layer = Image.new("RGBA", (CANVAS, CANVAS))
        self.brush = ImageDraw.Draw(self.layer)
        self.line_width = max(2, round(0.02 * pose.length))

    def fill(
        self,
        shape: np.ndarray,
        color: tuple[int, ...],
        within: np.ndarray | None = None,
        pattern: str = "solid",
    ):
        """Paint a shape, or its part within another, with a pattern and an outline."""
        area = mask(self.pose.pixels(shape))
        if within is not None:
            area = ImageChops.multiply(area, mask(self.pose.pixels(within)))
        self.layer.paste(color, mask=area)

        marks = mask(*[self.pose.pixels(mark) for mark in PATTERNS[pattern]])
        contrast = mix(color, COLORS["black" if sum(color) > 330 else "white"], 0.65)
        self.layer.paste(contrast, mask=ImageChops.multiply(area, marks))

        edge = self.pose.pixels(shape if within is None else within)
        ink = mix(color if within is None else self.back, INK, 0.6)
        self.brush.line(edge + edge[:2], ink, self.line_width, joint="curve")

    def face(self, shape: np.ndarray) -> np.ndarray:
        """A shape of the head, where the head is."""
        return NECK + shape * np.exp(1j * self.pose.nod)

    def body(self, values: dict[str, str], tint: dict[str, tuple[int, ...]]):
        """Tail, legs, back and breast."""
        self.fill(RUMP + TAILS[values["tail_shape"]] * np.exp(-0.2j), tint["tail_color"])
        for hip in (-0.04 + 0.3j, 0.14 + 0.29j):
            self.fill(hip + LEG, tint["leg_color"])
        self.fill(BODY, self.back)
        self.fill(BREAST, tint["breast_color"], BODY, values["breast_pattern"])

    def head(self, values: dict[str, str], tint: dict[str, tuple[int, ...]]):
        """Crest, bill, face and eye."""
        if values["head_pattern"] == "crested":
            self.fill(self.face(CREST), tint["crown_color"])

        bill = BILLS[values["bill_shape"]]
        length = BILL_LENGTHS[values["bill_length"]]
        bill = 0.21 + 0.04j + bill.real * length + 1j * bill.imag
        self.fill(self.face(bill), tint["bill_color"])

        self.fill(self.face(HEAD), self.back)
        self.fill(self.face(CROWN), tint["crown_color"], self.face(HEAD))
        if values["head_pattern"] == "masked":
            self.fill(self.face(MASK), COLORS["black"], self.face(HEAD))
        if values["head_pattern"] == "eyebrow":
            self.fill(self.face(EYEBROW), COLORS["white"], self.face(HEAD))

        rings = (0.092, COLORS["white"]), (0.078, tint["eye_color"]), (0.036, INK)
        for radius, shade in rings:
            self.brush.polygon(self.pose.pixels(self.face(disc(EYE, radius))), shade)

    def wing(self, values: dict[str, str], tint: dict[str, tuple[int, ...]]):
        """The wing and its feathers."""
        turn = np.exp(1j * self.pose.lift)
        self.fill(SHOULDER + WING * turn, tint["wing_color"], pattern=values["wing_pattern"])

        ink = mix(tint["wing_color"], INK, 0.5)
        for feather in FEATHERS:
            self.brush.line(self.pose.pixels(SHOULDER + feather * turn), ink, self.line_width)


def draw_bird(values: dict[str, str], pose: Pose, rng: np.random.Generator) -> Image.Image:
    """Draw a bird of `values` {group: value} on a transparent RGBA canvas of CANVAS x CANVAS px.

    The colour of back and cheeks is no attribute: it is drawn at random. The size is the pose's.
    """
    # One draw a group, whatever the values: a part's value never changes how another part looks.
    shift = {group: rng.normal(0, COLOR_JITTER, 3) for group in GROUPS}
    back = mix(COLORS["grey"], COLORS["brown"], rng.uniform(0, 1))
    tint = {}
    for group, value in values.items():
        if value in COLORS:
            tint[group] = rgb(COLORS[value] + shift[group])

    bird = BirdBrush(pose, back)
    bird.body(values, tint)
    bird.head(values, tint)
    bird.wing(values, tint)
    return bird.layer


# --- The image -----------------------------------------------------------------------------------


def draw_image(percent: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Photograph a bird of a class of `percent` (len(ATTRIBUTES),): RGB, SIDE x SIDE px."""
    values = draw_values(percent, rng)
    pose = draw_pose(SIZES[values["size"]], rng)

    image = draw_background(rng)
    draw_branch(image, pose, rng)
    bird = draw_bird(values, pose, rng)
    image.paste(bird, mask=bird.getchannel("A"))
    draw_leaves(image, pose, rng)

    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, BLUR)))
    return expose(image, rng)


def draw_values(percent: np.ndarray, rng: np.random.Generator) -> dict[str, str]:
    """One bird's value in every group, by the percentages of its class."""
    ends = np.cumsum([len(values) for values in GROUPS.values()])
    shares = np.split(percent / 100, ends[:-1])
    drawn = {}
    for (group, values), share in zip(GROUPS.items(), shares, strict=True):
        drawn[group] = str(rng.choice(values, p=share))
    return drawn


def draw_pose(size: float, rng: np.random.Generator) -> Pose:
    """A pose for a bird of this size, most of the bird in view."""
    length = CANVAS * BIRD * size * rng.uniform(1 - SIZE_SPREAD, 1 + SIZE_SPREAD)
    room = max(0.0, CANVAS / 2 - 1.05 * length)  # px by which the bird may leave the centre
    x = CANVAS / 2 + rng.uniform(-room, room)
    y = CANVAS / 2 + rng.uniform(-room, room)
    tilt, nod, lift = rng.uniform((-TILT, -0.35, -0.1), (TILT, 0.35, 0.6))
    return Pose(x, y, length, tilt, nod, lift, mirror=rng.random() < 0.5)


def draw_background(rng: np.random.Generator) -> Image.Image:
    """An RGB canvas: a gradient with soft blotches and clutter out of focus."""
    scenes = list(SCENES.values())
    top, bottom = (np.array(color) for color in scenes[rng.integers(len(scenes))])
    rows = np.linspace(0, 1, 8)[:, None, None]
    tone = rng.normal(0, 10, 3) + rng.normal(0, 9, (8, 8, 1)) + rng.normal(0, 4, (8, 8, 3))
    image = to_image(top * (1 - rows) + bottom * rows + tone)
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    brush = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 16)):
        here = image.getpixel(tuple(rng.integers(SIDE, size=2).tolist()))
        shade = rgb(np.array(here) + rng.normal(0, 30) + rng.normal(0, 12, 3))
        x, y = rng.uniform(0, SIDE, 2)
        spot = Pose(x, y, length=rng.uniform(20, 90), tilt=rng.uniform(0, 6.3))
        brush.polygon(spot.pixels(LEAF if rng.random() < 0.5 else STICK), shade)

    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
    return image.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)


def draw_branch(image: Image.Image, pose: Pose, rng: np.random.Generator):
    """Draw a branch under the feet of most birds."""
    if rng.random() >= 0.7:
        return
    branch = Pose(pose.x, pose.y + 0.66 * pose.length, CANVAS, rng.uniform(-0.12, 0.12))
    ends = branch.pixels(points(-2, 0, 2, 0))
    ImageDraw.Draw(image).line(ends, BRANCH_COLOR, rng.integers(6, 16).item())


def draw_leaves(image: Image.Image, pose: Pose, rng: np.random.Generator):
    """Draw leaves before a share of the birds."""
    brush = ImageDraw.Draw(image)
    count = rng.integers(1, 5) if rng.random() < OCCLUSION else 0
    for _ in range(count):
        tint = rgb(LEAF_COLORS[rng.integers(3)] + rng.normal(0, 14, 3))
        x, y = rng.normal((pose.x, pose.y), 0.75 * pose.length)
        leaf = Pose(x, y, rng.uniform(0.1, 0.22) * CANVAS, tilt=rng.uniform(0, 6.3))
        brush.polygon(leaf.pixels(LEAF), tint)
        brush.line(leaf.pixels(points(-0.15, 0, 0.95, 0)), mix(tint, INK, 0.4), 3)


def expose(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image under a light with a strength, a colour and a direction, and with noise."""
    across, down = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))
    strength = rng.uniform(0.75, 1.15)
    from_side = rng.uniform(-0.2, 0.2) * across
    from_above = rng.uniform(0, 0.2) * down
    light = strength * (1 + from_side - from_above)

    pixels = np.asarray(image) * light[..., None] * rng.normal(1, 0.05, 3)
    pixels += rng.normal(0, rng.uniform(0, NOISE), pixels.shape)
    return to_image(pixels)
