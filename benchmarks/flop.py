"""The arithmetic that a training stage cannot do without, by its dimensions: 2 FLOP a multiply-add (sections 4 to 6 and 10)."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions of a dataset's training: batch B, K attributes, C classes (Cs seen), D channels, h = w, word length d_v."""
    B: int
    K: int
    C: int
    Cs: int
    D: int = 2048
    side: int = 14
    d_v: int = 300
    trainval: int = 0
    test: int = 0


SIZES = {"CUB": Size(64, 312, 200, 150, trainval=7057, test=4731), "SUN": Size(64, 102, 717, 645, trainval=10320, test=4020),
         "AWA2": Size(40, 85, 50, 40, trainval=23527, test=13795)}


def linear_flop(rows: int, inputs: int, outputs: int, passes: int) -> float:
    """FLOP of a linear layer: one pass forward, one for the weights' gradient, one for the input's."""
    return 2.0 * rows * inputs * outputs * passes


def scen_flop(s: Size) -> float:
    """A step of stage 1 by section 10: attention and score maps, (M A) F^T, their gradients; none with respect to F."""
    R = s.side**2
    attention_and_score = linear_flop(s.B * R, s.D, 2 * s.K, 2)
    mixed = linear_flop(s.B * R, s.K, s.K // 2, 3)
    composed = linear_flop(s.B * s.D, R, s.K // 2, 2)
    return attention_and_score + mixed + composed + linear_flop(2 * s.K, s.d_v, s.D, 3) + linear_flop(s.B, s.D, s.C, 3)


def critic_flop(s: Size, config) -> float:
    """One decoder and one critic step with its share of the fakes: forward, penalty, and gradients."""
    h, X = config.ndh, s.D + s.K
    critic = linear_flop(2 * s.B, X, h, 2) + linear_flop(s.B, s.D, h, 3)
    decoder = linear_flop(s.B, s.D, config.ngh, 2) + linear_flop(s.B, config.ngh, s.K, 3)
    fakes = linear_flop(s.B, X, config.ngh, 1) + linear_flop(s.B, 2 * s.K, config.ngh, 1) + linear_flop(s.B, config.ngh, s.D, 1)
    return critic + decoder + fakes


def generator_flop(s: Size, config) -> float:
    """One generator step without feedback: E, G twice, guide twice, D and Dec."""
    g, X = config.ngh, s.D + s.K
    encoder = linear_flop(s.B, X, g, 2) + linear_flop(s.B, g, 2 * s.K, 3)
    generator = linear_flop(2 * s.B, 2 * s.K, g, 2.5) + linear_flop(2 * s.B, g, s.D, 3)
    guide = linear_flop(2 * s.B, s.D, config.distill_hidden, 2) + linear_flop(2 * s.B, config.distill_hidden, s.C, 2)
    judges = linear_flop(s.B, X, config.ndh, 2) + linear_flop(s.B, s.D, g, 3) + linear_flop(s.B, g, s.K, 3)
    return encoder + generator + guide + judges
