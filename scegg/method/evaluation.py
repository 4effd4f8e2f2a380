"""Accuracies: the field's metrics, and the softmax classifiers behind CZSL and GZSL.

Sections are those of docs/method.md: 1 the metrics, 6 the classifiers.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scegg.config import Config
from scegg.method.eggn import EGGN
from scegg.method.embeddings import Embedding
from scegg.method.steps import LossMeter, classifier_step
from scegg.speed.cuda_graphs import graphed

# ---- metrics (section 1)


def per_class_accuracy(target: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Mean over the classes that occur in `target` of the top-1 accuracy inside each.

    target, predicted (n,) integer labels below `classes`.
    Returns a scalar in [0, 1] on their device, 0 when empty.
    """
    ones = torch.ones_like(target, dtype=torch.float)
    total = torch.zeros(classes, device=target.device).index_add_(0, target, ones)
    hits = torch.zeros(classes, device=target.device)
    hits = hits.index_add_(0, target, (target == predicted).float())
    return (hits / total.clamp(min=1)).sum() / (total > 0).sum().clamp(min=1)


def harmonic_mean(unseen, seen):
    """H = 2US / (U + S), 0 when both are 0; of floats or tensors."""
    total = unseen + seen
    return 2 * unseen * seen / (total + (total == 0))


class Metrics(NamedTuple):
    """Accuracies in per cent; those of GZSL are None in a run that evaluates CZSL alone."""

    acc_zs: float
    acc_unseen: float | None
    acc_seen: float | None
    H: float | None


def in_percent(acc_zs, gzsl=None) -> Metrics:
    """Metrics of fractions: acc_zs and, if GZSL was evaluated, (U, S)."""
    if gzsl is None:
        return Metrics(100 * float(acc_zs), None, None, None)

    U, S = (100 * float(value) for value in gzsl)
    return Metrics(100 * float(acc_zs), U, S, harmonic_mean(U, S))


def logits_metrics(
    test_unseen: Tensor, y_unseen: Tensor, test_seen: Tensor, y_seen: Tensor, unseen: Tensor
) -> Metrics:
    """Metrics of plain class logits: SCEN's local ones, or the distilled classifier's.

    test_unseen, test_seen (n, C) logits with their labels (n,); unseen (Cu,) the unseen labels.
    """
    C = test_unseen.shape[1]
    czsl = unseen[test_unseen[:, unseen].argmax(dim=1)]
    U = per_class_accuracy(y_unseen, test_unseen.argmax(dim=1), C)
    S = per_class_accuracy(y_seen, test_seen.argmax(dim=1), C)
    return in_percent(per_class_accuracy(y_unseen, czsl, C), (U, S))


class Scores(NamedTuple):
    """What the softmax classifiers reach after each of their E epochs, as fractions.

    czsl (E,); gzsl (E, 2) holds U and S, or is None; linear: the GZSL classifier after its last
    epoch, to draw the seen-unseen curve from before the next evaluation.
    kept: "picked" -> the classifiers of the epochs that are reported, "last" -> those of the last
    epoch; each kind ("czsl" and, if it was evaluated, "gzsl") -> {"weight": (C, d), "bias": (C,)}.
    """

    czsl: Tensor
    gzsl: Tensor | None
    linear: nn.Linear | None
    kept: dict | None = None

    def best_epochs(self) -> tuple[int, int]:
        """The classifier epochs, from 0, of the best acc_zs and of the best H (0 without GZSL)."""
        best_gzsl = 0 if self.gzsl is None else int(harmonic_mean(*self.gzsl.T).argmax())
        return int(self.czsl.argmax()), best_gzsl

    def metrics(self, czsl_epoch: int = -1, gzsl_epoch: int = -1) -> Metrics:
        """The metrics after given classifier epochs, by default the last ones."""
        gzsl = None if self.gzsl is None else self.gzsl[gzsl_epoch]
        return in_percent(self.czsl[czsl_epoch], gzsl)


# ---- the softmax classifiers


class Kept:
    """A copy of a classifier at its best epoch, the first of equals, or at a `chosen` one.

    Which epoch that is stays on the device: nothing waits for it.
    """

    def __init__(self, linear: nn.Linear, chosen: int | None = None):
        self.linear, self.chosen, self.epoch = linear, chosen, -1
        self.best, self.picked = -1.0, copy_of(linear)

    def look(self, accuracy: Tensor):
        """Take the classifier, if it is the one; accuracy: the number that it is picked by."""
        self.epoch += 1
        better = accuracy > self.best
        if self.chosen is not None:
            better = torch.full_like(better, self.epoch == self.chosen)

        self.best = accuracy.clamp(min=self.best)
        for name, tensor in self.picked.items():
            now = getattr(self.linear, name).detach()
            self.picked[name] = torch.where(better, now, tensor)


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a network as they are now, on its device."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


class SoftmaxClassifier:
    """A linear softmax classifier that each evaluation of a run trains anew.

    Weights, Adam and, on CUDA, the graph of an epoch are made once, so nothing is captured twice.
    x (n, d) and y (n,) < classes: what it learns. x is filled before each `fit`.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int, config: Config):
        self.x, self.config = x, config
        # its weights are drawn by `fit`
        self.linear = nn.utils.skip_init(nn.Linear, x.shape[1], classes, device=x.device)
        self.optimizer = torch.optim.Adam(
            self.linear.parameters(),
            lr=config.classifier_lr,
            betas=(0.5, 0.999),
            fused=True,
            capturable=x.is_cuda,
        )
        steps = -(-len(x) // config.syn_num)
        # not a method: in a cycle the inputs would outlive the run's evaluations
        epoch = partial(train_epoch, self.linear, self.optimizer, x, y, config.syn_num)
        self.epoch = graphed(epoch, self.linear, [self.optimizer], steps)

    def fit(self, score, chosen: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Train from first weights N(0, 0.02); score after every epoch.

        score(linear) returns acc_zs, or U and S. Returns those of all epochs, stacked, on the
        device, and the weights of the best epoch (of the `chosen` one).
        Raises UserError for a loss that is not finite.
        """
        self.start_anew()
        meter, scores = LossMeter("the softmax classifier", "loss"), []
        kept = Kept(self.linear, chosen)

        for _ in range(self.config.classifier_epochs):
            meter.add(self.epoch())
            with torch.no_grad():
                scores.append(score(self.linear))
            kept.look(harmonic_mean(*scores[-1]) if scores[-1].dim() else scores[-1])

        meter.read()  # raises at a loss that is not finite
        return torch.stack(scores), kept.picked

    def start_anew(self):
        """First weights and Adam's first state, in place: a graph knows them by their addresses."""
        self.linear.reset_parameters()  # not used, but drawn: random streams stay as they were
        nn.init.normal_(self.linear.weight, 0.0, 0.02)
        nn.init.zeros_(self.linear.bias)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def train_epoch(
    linear: nn.Linear, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch_size: int
) -> Tensor:
    """All steps of an epoch on x (n, d) with labels y (n,); returns their losses (steps,)."""
    order = torch.randperm(len(x), device=x.device)
    losses = [
        classifier_step(linear, optimizer, x.index_select(0, batch), y[batch])
        for batch in order.split(batch_size)
    ]
    return torch.stack(losses)


class Evaluation:
    """Synthesises unseen features, trains the softmax classifiers on them, and scores these.

    CZSL: synthetic features, unseen classes only. GZSL: real seen trainval and synthetic unseen,
    all classes. It is made once in a run, so it keeps the classifiers and their inputs.
    embeddings: of trainval, test_seen and test_unseen; unseen (Cu,) the unseen labels.
    """

    def __init__(
        self, eggn: EGGN, embeddings: dict[str, Embedding], unseen: Tensor, config: Config
    ):
        self.eggn, self.unseen, self.config = eggn, unseen, config
        trainval = embeddings["trainval"]
        y = unseen.repeat_interleave(config.syn_num)
        self.real = len(trainval.y) if config.gzsl else 0

        # the real features first: CZSL learns from what comes after them
        d = eggn.classifier_input(trainval.x[:1]).shape[1]
        self.x = trainval.x.new_empty(self.real + len(y), d)
        target = torch.searchsorted(unseen, y)
        self.czsl = SoftmaxClassifier(self.x[self.real :], target, len(unseen), config)
        if config.gzsl:
            y = torch.cat([trainval.y, y])
            self.gzsl = SoftmaxClassifier(self.x, y, len(eggn.att), config)

    def scores(
        self, embeddings: dict[str, Embedding], chosen: dict[str, int] | None = None
    ) -> Scores:
        """Train and score anew. chosen: the epochs to keep of "czsl" and "gzsl", if not the best.

        Raises UserError for a loss that is not finite.
        """
        chosen = chosen or {}
        self.fill(embeddings["trainval"].x)
        tests = {
            name: (self.eggn.classifier_input(embeddings[name].x), embeddings[name].y)
            for name in ("test_unseen", "test_seen")
            if self.config.gzsl or name == "test_unseen"
        }

        czsl, picked = self.czsl.fit(self.score_czsl(*tests["test_unseen"]), chosen.get("czsl"))
        kept = {"picked": {"czsl": picked}, "last": {"czsl": copy_of(self.czsl.linear)}}
        if not self.config.gzsl:
            return Scores(czsl, None, None, kept)

        gzsl, picked = self.gzsl.fit(self.score_gzsl(tests), chosen.get("gzsl"))
        kept["picked"]["gzsl"], kept["last"]["gzsl"] = picked, copy_of(self.gzsl.linear)
        return Scores(czsl, gzsl, self.gzsl.linear, kept)

    def fill(self, trainval_x: Tensor):
        """The classifiers' inputs, by EGGN as it is now."""
        fake, _ = self.eggn.synthesize_classes(self.unseen, self.config.syn_num)
        self.x[self.real :] = self.eggn.classifier_input(fake)
        if self.real:
            self.x[: self.real] = self.eggn.classifier_input(trainval_x)

    def score_czsl(self, real: Tensor, y: Tensor):
        """What gives a classifier's acc_zs on the unseen classes' test images (n, d)."""
        target = torch.searchsorted(self.unseen, y)

        def score(linear: nn.Linear) -> Tensor:
            return per_class_accuracy(target, linear(real).argmax(dim=1), len(self.unseen))

        return score

    def score_gzsl(self, tests: dict[str, tuple[Tensor, Tensor]]):
        """What gives a classifier's (U, S) on the test images (n, d) and labels (n,) by split."""
        classes = len(self.eggn.att)
        bias = self.config.seen_bias * seen_columns(classes, self.unseen)

        def score(linear: nn.Linear) -> Tensor:
            accuracies = [
                per_class_accuracy(y, (linear(x) - bias).argmax(dim=1), classes)
                for x, y in (tests["test_unseen"], tests["test_seen"])
            ]
            return torch.stack(accuracies)

        return score


# ---- the seen-unseen curve


def seen_columns(classes: int, unseen: Tensor) -> Tensor:
    """1 at the seen classes and 0 at the unseen ones (C,)."""
    return torch.ones(classes, device=unseen.device).index_fill_(0, unseen, 0.0)


@torch.no_grad()
def seen_unseen_curve(
    eggn: EGGN, linear: nn.Linear, embeddings: dict[str, Embedding], unseen: Tensor
) -> Tensor:
    """Calibrated stacking's curve: (seen_bias, S, U) at every bias where an image changes sides.

    A bias, taken from the seen classes' logits, sends an image to the best unseen class once it
    passes the image's margin: best seen logit - best unseen logit. So each image adds its share to
    S (if its best seen class is right) for biases below its margin, and to U above it. Sorting the
    margins gives all operating points at once.

    Returns (n + 1, 3) on the host. The first row is a bias of -infinity, where nothing is unseen;
    S and U are fractions.
    """
    is_seen = seen_columns(len(eggn.att), unseen) > 0
    test_seen, test_unseen = embeddings["test_seen"], embeddings["test_unseen"]
    seen_logits = linear(eggn.classifier_input(test_seen.x))
    unseen_logits = linear(eggn.classifier_input(test_unseen.x))

    seen_share = shares(seen_logits, test_seen.y, is_seen)
    unseen_share = shares(unseen_logits, test_unseen.y, ~is_seen)
    margin, order = torch.cat(
        [margins(seen_logits, is_seen), margins(unseen_logits, is_seen)]
    ).sort()

    lost = torch.cat([seen_share, torch.zeros_like(unseen_share)])[order].cumsum(0)
    won = torch.cat([torch.zeros_like(seen_share), unseen_share])[order].cumsum(0)
    S = (seen_share.sum() - lost).clamp(min=0)
    start = torch.stack([margin.new_tensor(-torch.inf), seen_share.sum(), margin.new_zeros(())])
    return torch.cat([start[None], torch.stack([margin, S, won], dim=1)]).cpu()


def margins(logits: Tensor, is_seen: Tensor) -> Tensor:
    """Best seen logit - best unseen logit (n,) of logits (n, C)."""
    best_seen = logits.masked_fill(~is_seen, -torch.inf).amax(dim=1)
    best_unseen = logits.masked_fill(is_seen, -torch.inf).amax(dim=1)
    return (best_seen - best_unseen).double()


def shares(logits: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """What each image (n,) adds to the accuracy if its best class of `group` (C,) is right, else 0.

    That is 1 / (images of its class x classes).
    """
    counts = torch.bincount(y, minlength=logits.shape[1])
    hit = logits.masked_fill(~group, -torch.inf).argmax(dim=1) == y
    return hit.double() / counts[y] / (counts > 0).sum()


def area_under(curve: Tensor) -> float:
    """AUSUC of a seen-unseen curve (n, 3): the integral of S over U, in [0, 1].

    Source: Chao et al., An Empirical Study and Analysis of Generalized Zero-Shot Learning for
    Object Recognition in the Wild, ECCV 2016.
    """
    return torch.trapezoid(curve[:, 1], curve[:, 2]).item()
