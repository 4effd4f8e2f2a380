"""Draw the pictures that explain the method: method.png, motivation_a.png, motivation_b.png.

    python figs/draw_method.py

They are written beside this program. The birds come from toy.png, the built-in dataset. The two
motivation pictures are sketches: their points are drawn at random and measure nothing.
"""

import numpy as np
from matplotlib import style

from drawing import (
    BLUE,
    CRIMSON,
    HERE,
    HUGE,
    MAIN,
    Box,
    Page,
    attention_tile,
    bird,
    feature_grids,
)

# ---------------------------------------------------------------- the method

LEN_Y, GEN_Y, BUS_Y, EGGN_Y = 156, 120, 97, 45  # heights of the rows
X_HAT, X_UNSEEN = r"$\hat{x}$", r"$\hat{x}_u$"


def draw_method() -> Page:
    """Images to accuracies: SCEN above, EGGN and the softmax classifiers below."""
    page = Page(192)
    page.area(84, 104, 238, 181)
    page.area(2, 2, 158, 92)
    page.area(162, 2, 238, 92)
    page.title(84, 186, "SCEN", "compresses")
    page.title(13, 83, "EGGN", "generates")
    page.text(165, 85.5, "softmax", HUGE, ha="left", weight="bold")

    feature_map = draw_backbone(page)
    draw_legend(page)
    local_features, local_logits = draw_len(page, feature_map)
    x = draw_gen(page, local_features)
    draw_distillation(page, local_logits, x)

    encoder, reconstruction, critic, decoder = draw_vaegan(page)
    seen, test = draw_softmax(page)
    draw_bus(page, x, encoder, reconstruction, critic, decoder)
    page.arrow(x.bottom, seen.top)
    page.arrow((x.x, BUS_Y), (test.x, BUS_Y), test.top, dashed=True)
    return page


def draw_backbone(page: Page) -> Box:
    """Images, the ImageNet CNN and the feature map F, which is returned."""
    images = page.stack([bird(1, 0), bird(0, 4), bird(0, 1)], 16, LEN_Y, 24, 2)
    cnn = page.network(45, LEN_Y, "CNN", "ImageNet")
    feature_map = page.stack(feature_grids(3), 69, LEN_Y, 14, 1.6, BLUE[1])

    page.text(16, 139, "images")
    page.text(68, LEN_Y - 12.4, "feature map $F$")
    page.arrow(images.right, cnn.left)
    page.arrow(cnn.right, feature_map.left)
    return feature_map


def draw_legend(page: Page):
    """What the colours, the round letters and the dashes mean."""
    page.data(7.5, 131.3, "", w=8, h=7)
    page.network(30.5, 131.3, "", w=8, h=7)
    page.loss(60.5, 131.3, "", w=9, h=7)
    for x, words in ((13.5, "data"), (36.5, "network"), (67, "loss")):
        page.text(x, 131.3, words, ha="left")

    page.dot(7.5, 122.3, "$V$")
    page.text(13.5, 122.3, "word vectors of attributes", ha="left")
    page.dot(7.5, 113.3, "$Z$")
    page.dot(17.5, 113.3, "$a$")
    page.text(23.5, 113.3, "attributes of classes", ha="left")

    page.dot(7.5, 104.3, "$z$")
    page.text(13.5, 104.3, "drawn, $N(0, 1)$", ha="left")
    page.line((46.5, 104.3), (55.5, 104.3), dashed=True)
    page.text(57.5, 104.3, "test images", ha="left")


def draw_len(page: Page, feature_map: Box) -> tuple[Box, Box]:
    """LEN, from F to its loss. Returns the local features and the local logits."""
    page.area(87, 140, 235, 178, "white")
    page.text(90, 171.5, "LEN", MAIN, ha="left", weight="bold")

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
        page.arrow(page.dot(box.x, LEN_Y + 16.6, f"${letter}$").bottom, box.top)

    below = LEN_Y - 12.4
    page.text(115, below, "attention $A$")
    page.text(144, LEN_Y + 10, "local features")
    page.text(168, below, "scores")
    page.text(195, below, "local logits", ha="left")
    return features, logits


def draw_gen(page: Page, local_features: Box) -> Box:
    """GEN, from the local features to the dense-semantic feature x, which is returned."""
    page.area(87, 107, 186, 137, "white")
    page.text(90, 131.5, "GEN", MAIN, ha="left", weight="bold")

    compose = page.network(146, GEN_Y, "compose", w=25, h=12, size=10.5)
    scaler = page.network(174, GEN_Y, "scaler", w=19, h=12, size=10.5)
    head = page.network(119.5, GEN_Y, "Linear", w=18.5, h=12, size=10.5)
    loss = page.loss(96.8, GEN_Y, r"$L_{\mathrm{GEN}}$", w=15.5, size=12)
    x = page.data(200.5, GEN_Y, "$x$")

    page.arrow((compose.x, local_features.bottom[1]), compose.top)
    page.arrow(compose.right, scaler.left)
    page.arrow(scaler.right, x.left)
    page.arrow(compose.left, head.right)
    page.arrow(head.left, loss.right, color=CRIMSON[1])
    page.text(146, 110.4, "MLP, later mean")
    page.text(118.5, 110.4, "global head")
    page.text(200.5, GEN_Y + 9.5, "dense-semantic")
    return x


def draw_distillation(page: Page, local_logits: Box, x: Box):
    """The global classifier learns the local logits from x."""
    classifier = page.network(225, GEN_Y - 1, "global", "classifier", w=23, h=14, size=11.5)
    loss = page.loss(225, 135.5, "MSE", w=17, h=8.6, size=11)
    page.arrow(x.right, (classifier.left[0], x.y))
    page.arrow(classifier.top, loss.bottom, color=CRIMSON[1])
    page.arrow(local_logits.bottom, (local_logits.x, loss.y), loss.left, color=CRIMSON[1])


def draw_vaegan(page: Page) -> tuple[Box, Box, Box, Box]:
    """EGGN. Returns those who need x: encoder, the reconstruction's loss, critic and decoder."""
    encoder = page.network(24, EGGN_Y, "E", "encoder")
    z = page.data(45.5, EGGN_Y, "$z$")
    generator = page.network(67.5, EGGN_Y, "G", "generator")
    fake = page.data(90, EGGN_Y, X_HAT)
    for source, target in ((encoder, z), (z, generator), (generator, fake)):
        page.arrow(source.right, target.left)
    for box in (encoder, generator):
        page.arrow(page.dot(box.x, 65, "$a$").bottom, box.top)

    divergence = page.loss(45.5, 25, "KL", w=17, size=11)
    reconstruction = page.loss(90, 67, "BCE", w=17, size=11)
    page.arrow(z.bottom, divergence.top, color=CRIMSON[1])
    page.arrow(fake.top, reconstruction.bottom, color=CRIMSON[1])

    critic, decoder = draw_judges(page, fake)
    feedback = page.network(90, 15.5, "Fb", "feedback", h=14)
    hidden = decoder.x - 6
    page.arrow((hidden, decoder.bottom[1]), (hidden, feedback.y), feedback.right)
    page.arrow(feedback.left, (generator.x, feedback.y), generator.bottom)
    return encoder, reconstruction, critic, decoder


def draw_judges(page: Page, fake: Box) -> tuple[Box, Box]:
    """Critic, global classifier and decoder, with their losses. Returns critic and decoder."""
    critic = page.network(117.5, 72.7, "D", "critic", w=23, h=12)
    guide = page.network(117.5, EGGN_Y, "global", "classifier", w=23, h=13, size=11.5)
    decoder = page.network(117.5, 26, "Dec", "decoder", w=23, h=14)

    rail = 101.5
    for box, name in ((critic, "WGAN"), (guide, "CE"), (decoder, "L1")):
        page.arrow(fake.right, (rail, EGGN_Y), (rail, box.y), box.left)
        loss = page.loss(146, box.y, name, w=19, size=11)
        page.arrow(box.right, loss.left, color=CRIMSON[1])
    page.joint(rail, EGGN_Y)

    page.arrow(page.dot(111.5, 87, "$a$").bottom, (111.5, critic.top[1]))
    page.arrow(page.dot(117.5, 61.3, X_UNSEEN).bottom, guide.top)
    page.text(123.5, 61.3, "of unseen classes", ha="left")
    page.arrow(page.dot(146, 9.5, "$a$").top, loss.bottom, color=CRIMSON[1])
    return critic, decoder


def draw_softmax(page: Page) -> tuple[Box, Box]:
    """Features through Dec to the two classifiers. Returns the real features, seen and test."""
    generator = page.network(173, 41, "G", w=15, h=13)
    fake = page.data(173, 61.5, X_UNSEEN)
    page.arrow((158, 41), generator.left)
    page.arrow(generator.top, fake.bottom)
    for x, letter in ((168, "z"), (178, "a")):
        page.arrow(page.dot(x, 24.5, f"${letter}$").top, (x, generator.bottom[1]))
    page.text(173, 71, "unseen")

    seen = page.data(200.5, 77, "$x$", w=12, h=10)
    test = page.data(225, 77, "$x$", w=12, h=10)
    page.text(203, 87, "seen", ha="left")
    page.text(227.5, 87, "test", ha="left")

    decoder = page.network(211.5, 61.5, "Dec", w=51, h=11)
    together = page.parts(211.5, 46.5, ("$x$", "$Dec(x)$", "hidden"), (13, 19.5, 18.5))
    page.arrow(fake.right, decoder.left)
    page.arrow(seen.bottom, (seen.x, decoder.top[1]))
    page.arrow(test.bottom, (test.x, decoder.top[1]), dashed=True)
    page.arrow(decoder.bottom, together.top)
    draw_classifiers(page, together)
    return seen, test


def draw_classifiers(page: Page, features: Box):
    """The classifiers of the features, and what is measured."""
    gzsl = page.network(198, 26.5, "GZSL", "all classes", w=24, h=13, size=11)
    czsl = page.network(225, 26.5, "CZSL", "unseen only", w=24, h=13, size=11)
    middle, fork = features.x, features.bottom[1] - 3.5
    page.joint(middle, fork)

    for box, words in ((gzsl, "$U$  $S$  $H$"), (czsl, r"$acc_{zs}$")):
        page.arrow(features.bottom, (middle, fork), (box.x, fork), box.top)
        measured = page.data(box.x, 9, words, w=24, h=9, size=11)
        page.arrow(box.bottom, measured.top, dashed=True)


def draw_bus(page: Page, x: Box, encoder: Box, reconstruction: Box, critic: Box, decoder: Box):
    """The line that carries x to those in EGGN who need it."""
    page.arrow((x.x, BUS_Y), (7.5, BUS_Y), (7.5, encoder.y), encoder.left)
    to_critic, to_decoder = critic.x + 6, decoder.x + 5
    page.arrow((reconstruction.x, BUS_Y), reconstruction.top, color=CRIMSON[1])
    page.arrow((to_critic, BUS_Y), (to_critic, critic.top[1]))
    page.arrow((7.5, encoder.y), (7.5, 5), (to_decoder, 5), (to_decoder, decoder.bottom[1]))

    for position in (reconstruction.x, to_critic, x.x):
        page.joint(position, BUS_Y)
    page.joint(7.5, encoder.y)


# ---------------------------------------------------------------- the motivation

TITLE, WORD, LETTER = 25, 15.5, 21  # points: these two pictures are shown half as wide
IMAGE_Y, ATTRIBUTE_Y = 104, 54
SEEN, UNSEEN = ("#1f5fa8", "#7db4ea"), ("#11734b", "#7cc46a")  # a shade a class
USEFUL, BACKGROUND = BLUE[1], "#c3c8ce"  # cells of a feature: do they say something of attributes?

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
    page.text(21, 38, "attributes", WORD)
    page.arrow(image.right, cnn.left)
    page.arrow(attributes.right, generator.left)

    last = cnn
    if compressed:
        last = page.network(98, IMAGE_Y, "SCEN", w=31, h=24, size=17)
        page.arrow(cnn.right, last.left)
        page.arrow((48, ATTRIBUTE_Y), (48, 79), (last.x, 79), last.bottom)
        page.joint(48, ATTRIBUTE_Y)

    draw_space(page, compressed)
    draw_sketch_legend(page, background=not compressed)
    cells = [USEFUL] * 4 if compressed else [USEFUL, *2 * [BACKGROUND, BACKGROUND, USEFUL]]
    for source in (last, generator):
        feature = page.cells(129.5, source.y, 6, cells)
        page.arrow(source.right, feature.left)
        page.arrow(feature.right, (146, source.y))
    return page


def draw_space(page: Page, compressed: bool):
    """The features' space, with two seen and two unseen classes, real and generated."""
    left, bottom, right, top = 146, 28, 238, 138
    page.area(left, bottom, right, top)
    page.text(192, 130, "classes apart" if compressed else "classes overlap", WORD, weight="bold")

    rng = np.random.default_rng(4)
    middles, spread = APART if compressed else MIXED
    distances = rng.normal(0, 1, (9, 2, 4, 2)).clip(-1.6, 1.6)  # point, real or made, class, x or y
    places = (left, bottom) + (np.array(middles) + spread * distances) * (92, 98)

    for real, made in places:
        for place, color in zip(real[:2], SEEN, strict=True):
            page.point(*place, "o", color)
        for place, made_place, color in zip(real[2:], made[2:], UNSEEN, strict=True):
            page.point(*place, "^", color)
            page.point(*made_place, "^", color, hollow=True)


def draw_sketch_legend(page: Page, background: bool):
    """What points, their shades and cells mean. background: whether there are such cells."""
    x, y = 7.5, 19
    for words, marker, shades in (("seen", "o", SEEN), ("unseen", "^", UNSEEN)):
        x = two_points(page, x, y, words, marker, shades)
    two_points(page, x, y, "generated", "^", UNSEEN, hollow=True)

    y = 7
    cells = [("attributes", USEFUL)]
    if background:
        cells.append(("background", BACKGROUND))
    words = page.text(4, y, "two shades: two classes", WORD, ha="left")
    x = 4 + page.width(words) + 14
    for words, color in cells:
        page.cells(x + 3, y, 6, [color])
        x += 8 + page.width(page.text(x + 8, y, words, WORD, ha="left")) + 14


def two_points(page: Page, x, y, words, marker, shades, hollow=False) -> float:
    """A point in both shades, and what it is; returns where the next one starts."""
    for i, color in enumerate(shades):
        page.point(x + 7 * i, y, marker, color, hollow)
    return x + 12 + page.width(page.text(x + 12, y, words, WORD, ha="left")) + 14


def main():
    """Write the three pictures."""
    with style.context("default"):
        draw_method().save(HERE / "method.png")
        draw_motivation(compressed=False).save(HERE / "motivation_a.png")
        draw_motivation(compressed=True).save(HERE / "motivation_b.png")


if __name__ == "__main__":
    main()
