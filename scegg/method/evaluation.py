"""The field's metrics, and the softmax classifiers that turn synthetic features into CZSL and GZSL accuracies."""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scegg.config import Config
from scegg.method.eggn import EGGN
from scegg.speed.cuda_graphs import graphed
from scegg.method.scen import Embedding, LossMeter, classifier_step


def per_class_accuracy(target: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Mean over the classes that occur in `target` of the top-1 accuracy inside each (section 1).

    target, predicted (n,) integer labels below `classes`. Returns a scalar in [0, 1] on their device, 0 when empty.
    """
    total = torch.zeros(classes, device=target.device).index_add_(0, target, torch.ones_like(target, dtype=torch.float))
    hits = torch.zeros(classes, device=target.device).index_add_(0, target, (target == predicted).float())
    return (hits / total.clamp(min=1)).sum() / (total > 0).sum().clamp(min=1)


def harmonic_mean(unseen, seen):
    """H = 2US / (U + S), 0 when both are 0; of floats or tensors."""
    total = unseen + seen
    return 2 * unseen * seen / (total + (total == 0))


class Metrics(NamedTuple):
    """Accuracies in per cent; the GZSL three are None in a run that evaluates CZSL alone."""
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


class Scores(NamedTuple):
    """What the softmax classifiers reach after each of their E epochs, as fractions. czsl (E,); gzsl (E, 2) holds U and S,
    or is None; linear: the GZSL classifier after its last epoch, to draw the seen-unseen curve from."""
    czsl: Tensor
    gzsl: Tensor | None
    linear: nn.Linear | None

    def best_epochs(self) -> tuple[int, int]:
        """The classifier epochs (from 0) with the best acc_zs and with the best H (0 without GZSL)."""
        return int(self.czsl.argmax()), 0 if self.gzsl is None else int(harmonic_mean(*self.gzsl.T).argmax())

    def metrics(self, czsl_epoch: int = -1, gzsl_epoch: int = -1) -> Metrics:
        """The metrics after given classifier epochs, by default the last ones."""
        return in_percent(self.czsl[czsl_epoch], None if self.gzsl is None else self.gzsl[gzsl_epoch])


def logits_metrics(test_unseen: Tensor, y_unseen: Tensor, test_seen: Tensor, y_seen: Tensor, unseen: Tensor) -> Metrics:
    """CZSL and GZSL accuracies of plain class logits (n, C): SCEN's local ones, or the distilled classifier's."""
    C = test_unseen.shape[1]
    czsl = unseen[test_unseen[:, unseen].argmax(dim=1)]
    return in_percent(per_class_accuracy(y_unseen, czsl, C),
                      (per_class_accuracy(y_unseen, test_unseen.argmax(dim=1), C),
                       per_class_accuracy(y_seen, test_seen.argmax(dim=1), C)))


def fit_softmax(x: Tensor, y: Tensor, classes: int, config: Config, score) -> tuple[Tensor, nn.Linear]:
    """Train a linear softmax classifier on x (n, d), y (n,) < classes; score it after every epoch.

    Weights N(0, 0.02), Adam(classifier_lr, betas (0.5, 0.999)), batches of syn_num (section 6). score(linear) returns
    a tensor. Returns those of all epochs, stacked, still on the device, and the classifier.
    """
    linear = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.normal_(linear.weight, 0.0, 0.02)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=config.classifier_lr, betas=(0.5, 0.999), fused=True, capturable=x.is_cuda)
    step = graphed(lambda batch: classifier_step(linear, optimizer, x.index_select(0, batch), y[batch]), linear, [optimizer])
    meter, scores = LossMeter("the softmax classifier", "loss"), []
    for _ in range(config.classifier_epochs):
        for batch in torch.randperm(len(x), device=x.device).split(config.syn_num):
            meter.add(step(batch))
        with torch.no_grad():
            scores.append(score(linear))
    meter.read()
    return torch.stack(scores), linear


def evaluate(eggn: EGGN, embeddings: dict[str, Embedding], unseen: Tensor, config: Config) -> Scores:
    """Synthesise unseen features, train the classifiers on them and score these after every epoch (section 6).

    CZSL: synthetic features, unseen classes only. GZSL: real seen trainval and synthetic unseen, all classes.
    """
    trainval, test_seen, test_unseen = (embeddings[name] for name in ("trainval", "test_seen", "test_unseen"))
    C = len(eggn.att)
    fake, fake_y = eggn.synthesize_classes(unseen, config.syn_num)
    fake, real_unseen = eggn.classifier_input(fake), eggn.classifier_input(test_unseen.x)
    unseen_target = torch.searchsorted(unseen, test_unseen.y)

    def czsl(linear):
        return per_class_accuracy(unseen_target, linear(real_unseen).argmax(dim=1), len(unseen))

    acc_zs, _ = fit_softmax(fake, torch.searchsorted(unseen, fake_y), len(unseen), config, czsl)
    if not config.gzsl:
        return Scores(acc_zs, None, None)

    real_seen = eggn.classifier_input(test_seen.x)
    bias = config.seen_bias * seen_columns(C, unseen)

    def gzsl(linear):
        return torch.stack([per_class_accuracy(test_unseen.y, (linear(real_unseen) - bias).argmax(dim=1), C),
                            per_class_accuracy(test_seen.y, (linear(real_seen) - bias).argmax(dim=1), C)])

    train_x = torch.cat([eggn.classifier_input(trainval.x), fake])
    return Scores(acc_zs, *fit_softmax(train_x, torch.cat([trainval.y, fake_y]), C, config, gzsl))


def seen_columns(classes: int, unseen: Tensor) -> Tensor:
    """1 at the seen classes and 0 at the unseen ones (C,)."""
    return torch.ones(classes, device=unseen.device).index_fill_(0, unseen, 0.0)


@torch.no_grad()
def seen_unseen_curve(eggn: EGGN, linear: nn.Linear, embeddings: dict[str, Embedding], unseen: Tensor) -> Tensor:
    """Calibrated stacking's curve: (seen_bias, S, U) for every bias at which an image changes sides (n + 1, 3).

    Taking a bias from the seen classes' logits sends an image to the best unseen class as soon as the bias passes its
    margin, best seen logit - best unseen logit. So each image adds its share to S, if its best seen class is right, for
    biases below its margin, and to U above it; sorting the margins gives all operating points at once. The first row is
    a bias of -infinity, where nothing is unseen; S and U are fractions.
    """
    is_seen = seen_columns(len(eggn.att), unseen) > 0

    def margins_and_shares(split: Embedding, group: Tensor):
        """Of each image: margin, and 1 / (images of its class x classes) if its best class of `group` is right, else 0."""
        logits = linear(eggn.classifier_input(split.x))
        outside = lambda mask: logits.masked_fill(mask, -torch.inf)
        margin = outside(~is_seen).amax(dim=1) - outside(is_seen).amax(dim=1)
        counts = torch.bincount(split.y, minlength=logits.shape[1])
        hit = outside(~group).argmax(dim=1) == split.y
        return margin.double(), hit.double() / counts[split.y] / (counts > 0).sum()

    seen_margin, seen_share = margins_and_shares(embeddings["test_seen"], is_seen)
    unseen_margin, unseen_share = margins_and_shares(embeddings["test_unseen"], ~is_seen)
    margin, order = torch.cat([seen_margin, unseen_margin]).sort()
    start = torch.stack([margin.new_tensor(-torch.inf), seen_share.sum(), margin.new_zeros(())])
    S = start[1] - torch.cat([seen_share, torch.zeros_like(unseen_share)])[order].cumsum(0)
    U = torch.cat([torch.zeros_like(seen_share), unseen_share])[order].cumsum(0)
    return torch.cat([start[None], torch.stack([margin, S.clamp(min=0), U], dim=1)]).cpu()


def area_under(curve: Tensor) -> float:
    """AUSUC of a seen-unseen curve (n, 3): the integral of S over U, in [0, 1] (Chao et al., 2016)."""
    return torch.trapezoid(curve[:, 1], curve[:, 2]).item()
