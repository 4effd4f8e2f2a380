"""The arithmetic and the traffic that a stage cannot do without, by its dimensions.

A multiply-add counts 2 FLOP. Numbers have four bytes. Source: docs/method.md, sections 4 to 6 and
10.

The traffic is that of the matrix products and of the optimisers. A linear layer y = x W has up to
three products, and each reads two matrices and writes the third: forward x W, W's gradient x^T dy,
and x's gradient dy W^T. So weights are read forward and again for x's gradient, and their own
gradient is written once. The optimiser then moves its bytes for each weight, reading the gradient
among them. Nothing else is counted: activations and losses can be computed as a product's matrices
pass by. The critic's last layer and the encoder's last two are left out, as under 1 %.

An EGGN iteration with CUB's sizes and settings, in GB:

                         first pass    second pass, with feedback
    5 critic steps          2.13           2.13    three products read the weights
    5 decoder steps         1.80           1.80
    the 5 steps' fakes      0.10           1.15    feedback waits for each decoder step
    generator step          1.40           2.76    feedback's 34 million weights learn here
    all                     5.44           7.84    on average 6.64

A GPU's cache may still hold weights that were used just before. An H100's has 50 MB, and the
largest layers have 39 and 67 MB. So this is the traffic asked for, and memory may see less of it.
"""

import dataclasses
import math


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

# Bytes that an optimiser moves for each weight of four bytes. Adam reads the weight, its gradient
# and two moments, and writes all but the gradient. RMSprop's weight decay adds a pass.
ADAM_BYTES = 28.0
RMSPROP_BYTES = 36.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOP, and bytes read and written."""

    flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "Cost":
        return Cost(times * self.flop, times * self.bytes)


def linear(rows: int, inputs: int, outputs: int, passes: float) -> Cost:
    """The products of a linear layer (inputs, outputs) on so many rows.

    One pass is forward, one the weights' gradient, and one the input's.
    """
    flop = 2.0 * rows * inputs * outputs * passes
    return Cost(flop, passes * product_bytes(rows, inputs, outputs))


def product_bytes(rows: int, inner: int, columns: int) -> float:
    """Bytes of a matrix product (rows, inner) x (inner, columns): two are read, one is written."""
    return 4.0 * (rows * inner + inner * columns + rows * columns)


def adam(*layers: tuple[int, int]) -> Cost:
    """A step of Adam on the weights and biases of linear layers (inputs, outputs)."""
    weights = sum((inputs + 1) * outputs for inputs, outputs in layers)
    return Cost(bytes=ADAM_BYTES * weights)


# ---- SCEN and distillation


def scen_flop(s: Size) -> float:
    """FLOP of one step of stage 1 by section 10; no gradient with respect to the maps."""
    R = s.side**2
    weights = linear(2 * s.K, s.d_v, s.D, 3)  # V W1, V W2
    attention_and_score = linear(s.B * R, s.D, 2 * s.K, 2)
    mixed = linear(s.B * R, s.K, s.K // 2, 3)  # M A
    composed = linear(s.B * s.D, R, s.K // 2, 2)  # (M A) F^T
    classified = linear(s.B, s.D, s.C, 3)
    return (attention_and_score + mixed + composed + weights + classified).flop


def embedding_flop(s: Size) -> float:
    """FLOP of dense-semantic features and local logits of a batch."""
    R = s.side**2
    return (linear(s.B * R, s.D, 2 * s.K, 1) + linear(s.B, R, s.D, 1)).flop


def distillation_flop(s: Size, config) -> float:
    """FLOP of one step of stage 2."""
    hidden = config.distill_hidden
    return (linear(s.B, s.D, hidden, 2) + linear(s.B, hidden, s.C, 3)).flop


# ---- EGGN


def critic_cost(s: Size, config, feedback: bool = False) -> Cost:
    """One decoder and one critic step with its share of the fakes, penalty included."""
    ngh, T = config.ngh, config.critic_iter
    decoder = linear(s.B, s.D, ngh, 2) + linear(s.B, ngh, s.K, 3) + adam((s.D, ngh), (ngh, s.K))

    # encoder and generator make the fakes of all T steps at once
    fakes = linear(T * s.B, s.D + s.K, ngh, 1)
    fakes += linear(T * s.B, 2 * s.K, ngh, 1) + linear(T * s.B, ngh, s.D, 1)

    cost = critic_products(s, config.ndh) + adam((s.D + s.K, config.ndh)) + decoder
    cost += (1 / T) * fakes
    return cost + feedback_cost(s.B, s, ngh) if feedback else cost


def critic_products(s: Size, ndh: int) -> Cost:
    """Those of a critic step by section 10.

    Three read the weights: forward of x and fake, the penalty's gradient, and back through that.
    A single one writes the weights' gradient, over the rows of all three; of the penalty's rows,
    the attributes' columns are zero and count as no arithmetic.
    """
    X = s.D + s.K
    gradient = Cost(2.0 * ndh * (2 * s.B * X + s.B * s.D), product_bytes(X, 3 * s.B, ndh))
    return linear(2 * s.B, X, ndh, 1) + linear(s.B, s.D, ndh, 2) + gradient


def feedback_cost(rows: int, s: Size, ngh: int) -> Cost:
    """Forward of decoder's hidden layer, of feedback and of the generator's output once more."""
    return linear(rows, s.D, ngh, 1) + 2 * linear(rows, ngh, ngh, 1) + linear(rows, ngh, s.D, 1)


def generator_cost(s: Size, config, feedback: bool = False) -> Cost:
    """One generator step: E, G twice, global classifier twice, D and Dec."""
    X, ndh, ngh, hidden = s.D + s.K, config.ndh, config.ngh, config.distill_hidden
    encoder = linear(s.B, X, ngh, 2) + linear(s.B, ngh, 2 * s.K, 3)
    generator = linear(2 * s.B, 2 * s.K, ngh, 2.5) + linear(2 * s.B, ngh, s.D, 3)
    guidance = linear(2 * s.B, s.D, hidden, 2) + linear(2 * s.B, hidden, s.C, 2)
    critic = linear(s.B, X, ndh, 2)

    passes = 2 if config.freeze_dec else 3
    decoder = linear(s.B, s.D, ngh, passes) + linear(s.B, ngh, s.K, passes)
    if not config.freeze_dec:
        decoder += adam((s.D, ngh), (ngh, s.K))

    cost = encoder + generator + guidance + critic + decoder
    cost += adam((X, ngh), (ngh, 2 * s.K), (2 * s.K, ngh), (ngh, s.D))
    if feedback:  # its forward, then its gradients; the decoder before it has none
        cost += feedback_cost(s.B, s, ngh)
        cost += linear(s.B, ngh, ngh, 1) + linear(s.B, ngh, ngh, 2) + adam((ngh, ngh), (ngh, ngh))
    return cost


def iteration_cost(s: Size, config, feedback: bool = False) -> Cost:
    """One EGGN iteration: critic_iter critic steps and a generator step."""
    critic = config.critic_iter * critic_cost(s, config, feedback)
    return critic + generator_cost(s, config, feedback)


# ---- evaluation, and a whole run


def evaluation_cost(s: Size, config) -> Cost:
    """Both softmax classifiers over all of their epochs, synthesis included."""
    unseen, ngh = s.C - s.Cs, config.ngh
    synthetic = unseen * config.syn_num
    everything = s.trainval + s.test + synthetic
    d = s.D + s.K + ngh

    gzsl = softmax_epoch(s.trainval + synthetic, config.syn_num, d, s.C)
    scores = linear(s.test, d, s.C, 1)
    czsl = softmax_epoch(synthetic, config.syn_num, d, unseen)
    cost = config.classifier_epochs * (gzsl + scores + czsl)

    cost += linear(synthetic, 2 * s.K, ngh, 1) + linear(synthetic, ngh, s.D, 1)
    cost += linear(everything, s.D, ngh, 1) + linear(everything, ngh, s.K, 1)
    return cost + feedback_cost(synthetic, s, ngh) if config.a2 > 0 else cost


def softmax_epoch(rows: int, batch: int, inputs: int, classes: int) -> Cost:
    """An epoch of a softmax classifier on so many rows, in batches."""
    whole, rest = divmod(rows, batch)
    cost = whole * linear(batch, inputs, classes, 2)
    if rest:
        cost += linear(rest, inputs, classes, 2)
    return cost + math.ceil(rows / batch) * adam((inputs, classes))


@dataclasses.dataclass(frozen=True)
class RunCost:
    """What stage 3 of a run needs: its iterations and its evaluations, and how many of each."""

    iterations: int
    training: Cost
    evaluations: int
    evaluating: Cost

    def floor(self, flops: float, bytes_per_second: float) -> dict[str, float]:
        """The least seconds at these rates, by arithmetic and by traffic, of each."""
        parts = {"training": self.training, "evaluating": self.evaluating}
        seconds = {}
        for name, cost in parts.items():
            seconds[f"{name}, arithmetic"] = cost.flop / flops
            seconds[f"{name}, traffic"] = cost.bytes / bytes_per_second
        return seconds


def run_cost(s: Size, config) -> RunCost:
    """Stage 3 of a whole run: nepoch epochs, each of feedback_loop passes and an evaluation."""
    a_pass = math.ceil(s.trainval / s.B)
    costs = [
        iteration_cost(s, config, feedback=number == 1 and config.a1 > 0)
        for number in range(config.feedback_loop)
    ]
    epoch = a_pass * sum(costs, start=Cost())
    evaluations = config.nepoch // config.test_freq_epoch

    return RunCost(
        iterations=config.nepoch * config.feedback_loop * a_pass,
        training=config.nepoch * epoch,
        evaluations=evaluations,
        evaluating=evaluations * evaluation_cost(s, config),
    )
