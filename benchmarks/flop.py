"""The arithmetic that a stage cannot do without, by its dimensions.

A multiply-add counts 2 FLOP. Source: docs/method.md, sections 4 to 6 and 10.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions of a dataset's training."""

    B: int  # images of a batch
    K: int  # attributes
    C: int  # classes
    Cs: int  # seen classes
    D: int = 2048  # channels
    side: int = 14  # h = w of a feature map
    d_v: int = 300  # length of a word vector
    trainval: int = 0  # images
    test: int = 0  # images, seen and unseen


SIZES = {
    "CUB": Size(64, 312, 200, 150, trainval=7057, test=4731),
    "SUN": Size(64, 102, 717, 645, trainval=10320, test=4020),
    "AWA2": Size(40, 85, 50, 40, trainval=23527, test=13795),
}


def linear_flop(rows: int, inputs: int, outputs: int, passes: float) -> float:
    """FLOP of a linear layer.

    One pass is forward, one the weights' gradient, and one the input's.
    """
    return 2.0 * rows * inputs * outputs * passes


def scen_flop(s: Size) -> float:
    """One step of stage 1 by section 10; no gradient with respect to the maps."""
    R = s.side**2
    weights = linear_flop(2 * s.K, s.d_v, s.D, 3)  # V W1, V W2
    attention_and_score = linear_flop(s.B * R, s.D, 2 * s.K, 2)
    mixed = linear_flop(s.B * R, s.K, s.K // 2, 3)  # M A
    composed = linear_flop(s.B * s.D, R, s.K // 2, 2)  # (M A) F^T
    classified = linear_flop(s.B, s.D, s.C, 3)
    return attention_and_score + mixed + composed + weights + classified


def embedding_flop(s: Size) -> float:
    """Dense-semantic features and local logits of a batch."""
    R = s.side**2
    return linear_flop(s.B * R, s.D, 2 * s.K, 1) + linear_flop(s.B, R, s.D, 1)


def distillation_flop(s: Size, config) -> float:
    """One step of stage 2."""
    hidden = config.distill_hidden
    return linear_flop(s.B, s.D, hidden, 2) + linear_flop(s.B, hidden, s.C, 3)


def critic_flop(s: Size, config) -> float:
    """One decoder and one critic step with its share of the fakes, penalty included."""
    X, ndh, ngh = s.D + s.K, config.ndh, config.ngh
    critic = linear_flop(2 * s.B, X, ndh, 2) + linear_flop(s.B, s.D, ndh, 3)
    decoder = linear_flop(s.B, s.D, ngh, 2) + linear_flop(s.B, ngh, s.K, 3)
    encoded = linear_flop(s.B, X, ngh, 1)
    generated = linear_flop(s.B, 2 * s.K, ngh, 1) + linear_flop(s.B, ngh, s.D, 1)
    return critic + decoder + (encoded + generated)


def generator_flop(s: Size, config) -> float:
    """One generator step without feedback: E, G twice, global classifier twice, D and Dec."""
    X, ndh, ngh, hidden = s.D + s.K, config.ndh, config.ngh, config.distill_hidden
    encoder = linear_flop(s.B, X, ngh, 2) + linear_flop(s.B, ngh, 2 * s.K, 3)
    generator = linear_flop(2 * s.B, 2 * s.K, ngh, 2.5) + linear_flop(2 * s.B, ngh, s.D, 3)
    guidance = linear_flop(2 * s.B, s.D, hidden, 2) + linear_flop(2 * s.B, hidden, s.C, 2)
    critic = linear_flop(s.B, X, ndh, 2)
    decoder = linear_flop(s.B, s.D, ngh, 3) + linear_flop(s.B, ngh, s.K, 3)
    return encoder + generator + guidance + critic + decoder


def evaluation_flop(s: Size, config) -> float:
    """Both softmax classifiers over all of their epochs, synthesis included."""
    unseen = s.C - s.Cs
    synthetic = unseen * config.syn_num
    everything = s.trainval + s.test + synthetic
    d = s.D + s.K + config.ngh

    gzsl = linear_flop(s.trainval + synthetic, d, s.C, 2)
    scores = linear_flop(s.test, d, s.C, 1)
    czsl = linear_flop(synthetic, d, unseen, 2)
    flop = config.classifier_epochs * (gzsl + scores + czsl)
    flop += linear_flop(synthetic, 2 * s.K, config.ngh, 1)
    flop += linear_flop(synthetic, config.ngh, s.D, 1)
    flop += linear_flop(everything, s.D, config.ngh, 1)
    flop += linear_flop(everything, config.ngh, s.K, 1)
    return flop
