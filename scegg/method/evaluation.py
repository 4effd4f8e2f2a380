"""Accuracies: the field's metrics, and the softmax classifiers behind CZSL and GZSL.

Sections are those of docs/method.md: 1 the metrics, 6 the classifiers.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scegg.config import Config
from scegg.method.by_class import ByClass, accuracy_by_class
from scegg.method.calibration import ShareChoice, calibrated, seen_columns
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


class Validated(NamedTuple):
    """What protocol validated reports of an evaluation: the classifiers after their last epoch.

    The one of GZSL is calibrated: its bias sends `unseen_share` of trainval to unseen classes.
    """

    metrics: Metrics
    unseen_share: float | None  # None without such a bias, and where CZSL alone is evaluated
    by_class: dict[str, ByClass]  # of "czsl" and, if it was evaluated, "gzsl"


class Scores(NamedTuple):
    """What the softmax classifiers reach after each of their E epochs, as fractions.

    czsl (E,); gzsl (E, 2) holds U and S, or is None; linear: the GZSL classifier after its last
    epoch, to draw the seen-unseen curve from before the next evaluation.
    kept: "picked" -> the classifiers that are reported, "last" -> those of the last epoch, as they
    are; each kind ("czsl" and, if it was evaluated, "gzsl") -> {"weight": (C, d), "bias": (C,)}.
    validated: what that protocol reports in place of the best epochs.
    """

    czsl: Tensor
    gzsl: Tensor | None
    linear: nn.Linear | None
    kept: dict | None = None
    validated: Validated | None = None

    def best_epochs(self) -> tuple[int, int]:
        """The classifier epochs, from 0, of the best acc_zs and of the best H (0 without GZSL)."""
        best_gzsl = 0 if self.gzsl is None else int(harmonic_mean(*self.gzsl.T).argmax())
        return int(self.czsl.argmax()), best_gzsl

    def reported(self) -> Metrics:
        """What the run's protocol reports: the best epochs on the images evaluated, or validated's.

        In the paper's protocol those images are the test set's.
        """
        return self.validated.metrics if self.validated else self.metrics(*self.best_epochs())

    def metrics(self, czsl_epoch: int = -1, gzsl_epoch: int = -1) -> Metrics:
        """The metrics after given classifier epochs, by default the last ones."""
        gzsl = None if self.gzsl is None else self.gzsl[gzsl_epoch]
        return in_percent(self.czsl[czsl_epoch], gzsl)


# ---- the softmax classifiers


class Kept:
    """A copy of a classifier at its best epoch, the first of equals.

    Which epoch that is stays on the device: nothing waits for it.
    """

    def __init__(self, linear: nn.Linear):
        self.linear, self.best, self.picked = linear, -1.0, copy_of(linear)

    def look(self, accuracy: Tensor):
        """Take the classifier, if it is the best so far by `accuracy`."""
        better = accuracy > self.best
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

    def fit(self, score) -> tuple[Tensor, dict[str, Tensor]]:
        """Train from first weights N(0, 0.02); score after every epoch.

        score(linear) returns acc_zs, or U and S. Returns those of all epochs, stacked, on the
        device, and the weights of the best epoch.
        Raises UserError for a loss that is not finite.
        """
        self.start_anew()
        meter, scores = LossMeter("the softmax classifier", "loss"), []
        kept = Kept(self.linear)

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
    chosen: {"unseen_share": ...} to report in protocol validated; None: each evaluation chooses.
    """

    def __init__(
        self,
        eggn: EGGN,
        embeddings: dict[str, Embedding],
        unseen: Tensor,
        config: Config,
        chosen: dict | None = None,
    ):
        self.eggn, self.unseen, self.config = eggn, unseen, config
        self.chosen = chosen
        self.is_seen = seen_columns(len(eggn.att), unseen)
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

    def scores(self, embeddings: dict[str, Embedding]) -> Scores:
        """Train and score anew. Raises UserError for a loss that is not finite."""
        self.fill(embeddings["trainval"].x)
        tests = {
            name: (self.eggn.classifier_input(embeddings[name].x), embeddings[name].y)
            for name in ("test_unseen", "test_seen")
            if self.config.gzsl or name == "test_unseen"
        }
        czsl, picked = self.czsl.fit(self.score_czsl(*tests["test_unseen"]))
        kept = {"picked": {"czsl": picked}, "last": {"czsl": copy_of(self.czsl.linear)}}
        scores, choice = Scores(czsl, None, None, kept), None
        is_validated = self.config.protocol == "validated"

        if self.config.gzsl:
            if is_validated and self.chosen is None:
                (_, unseen_y), (_, seen_y) = tests["test_unseen"], tests["test_seen"]
                choice = ShareChoice(unseen_y, seen_y, self.is_seen)
            gzsl, picked = self.gzsl.fit(self.score_gzsl(tests, choice))
            kept["picked"]["gzsl"], kept["last"]["gzsl"] = picked, copy_of(self.gzsl.linear)
            scores = Scores(czsl, gzsl, self.gzsl.linear, kept)
        return self.validate(scores, tests, choice) if is_validated else scores

    def validate(
        self,
        scores: Scores,
        tests: dict[str, tuple[Tensor, Tensor]],
        choice: ShareChoice | None,
    ) -> Scores:
        """The scores with what protocol validated reports: last classifiers, GZSL's calibrated."""
        share, gzsl, kept = None, None, dict(scores.kept, picked=dict(scores.kept["last"]))
        real, y = tests["test_unseen"]
        predicted = self.unseen[self.czsl.linear(real).argmax(dim=1)]
        by_class = {"czsl": [accuracy_by_class(y, predicted)]}

        if scores.gzsl is not None:
            share = choice.best() if choice else self.chosen["unseen_share"]
            weights = calibrated(scores.linear, self.x[: self.real], self.is_seen, share)
            kept["picked"]["gzsl"] = weights
            linear = partial(nn.functional.linear, **weights)
            predicted = [
                (y, linear(real).argmax(dim=1))
                for real, y in (tests["test_unseen"], tests["test_seen"])
            ]
            gzsl = [per_class_accuracy(*pair, len(self.is_seen)) for pair in predicted]
            by_class["gzsl"] = [accuracy_by_class(*pair) for pair in predicted]

        metrics = in_percent(scores.czsl[-1], gzsl)
        return scores._replace(kept=kept, validated=Validated(metrics, share, by_class))

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

    def score_gzsl(
        self, tests: dict[str, tuple[Tensor, Tensor]], choice: ShareChoice | None = None
    ):
        """What gives a classifier's (U, S) on the test images (n, d) and labels (n,) by split.

        choice: what looks at each of them as well.
        """
        classes = len(self.eggn.att)
        bias = self.config.seen_bias * self.is_seen
        inputs, labels = zip(tests["test_unseen"], tests["test_seen"], strict=True)

        def score(linear) -> Tensor:
            logits = list(map(linear, inputs))
            if choice:
                choice.look(linear(self.x[: self.real]), *logits)
            accuracies = [
                per_class_accuracy(y, (found - bias).argmax(dim=1), classes)
                for found, y in zip(logits, labels, strict=True)
            ]
            return torch.stack(accuracies)

        return score
