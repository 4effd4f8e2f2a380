"""The field's metrics, and the softmax classifiers that turn synthetic features into CZSL and GZSL accuracies."""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from eggn import EGGN
from scen import Embedding


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


def logits_metrics(test_unseen: Tensor, y_unseen: Tensor, test_seen: Tensor, y_seen: Tensor, unseen: Tensor) -> Metrics:
    """CZSL and GZSL accuracies of plain class logits (n, C): SCEN's local ones, or the distilled classifier's."""
    C = test_unseen.shape[1]
    czsl = unseen[test_unseen[:, unseen].argmax(dim=1)]
    return in_percent(per_class_accuracy(y_unseen, czsl, C),
                      (per_class_accuracy(y_unseen, test_unseen.argmax(dim=1), C),
                       per_class_accuracy(y_seen, test_seen.argmax(dim=1), C)))


def fit_softmax(x: Tensor, y: Tensor, classes: int, config: Config, score) -> Tensor:
    """Train a linear softmax classifier on x (n, d), y (n,) < classes; score it after every epoch.

    Weights N(0, 0.02), Adam(classifier_lr, betas (0.5, 0.999)), batches of syn_num (section 6). score(linear) returns
    a tensor; the result stacks those of all epochs, read from the device once at the end by the caller.
    """
    linear = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.normal_(linear.weight, 0.0, 0.02)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=config.classifier_lr, betas=(0.5, 0.999), fused=True)
    scores = []
    for _ in range(config.classifier_epochs):
        for batch in torch.randperm(len(x), device=x.device).split(config.syn_num):
            loss = F.cross_entropy(linear(x[batch]), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores.append(score(linear))
    return torch.stack(scores)


def evaluate(eggn: EGGN, embeddings: dict[str, Embedding], unseen: Tensor, config: Config) -> Metrics:
    """Synthesise unseen features and train the classifiers; the best classifier epoch on the test set (section 6).

    CZSL: synthetic features, unseen classes only. GZSL: real seen trainval and synthetic unseen, all classes; its best
    epoch is the one of the best H.
    """
    trainval, test_seen, test_unseen = (embeddings[name] for name in ("trainval", "test_seen", "test_unseen"))
    C, Dec = len(eggn.att), eggn.Dec
    fake, fake_y = eggn.synthesize_classes(unseen, config.syn_num)
    fake, real_unseen = Dec.classifier_input(fake), Dec.classifier_input(test_unseen.x)
    unseen_target = torch.searchsorted(unseen, test_unseen.y)

    def czsl(linear):
        return per_class_accuracy(unseen_target, linear(real_unseen).argmax(dim=1), len(unseen))

    acc_zs = fit_softmax(fake, torch.searchsorted(unseen, fake_y), len(unseen), config, czsl).max()
    if not config.gzsl:
        return in_percent(acc_zs)

    real_seen = Dec.classifier_input(test_seen.x)

    def gzsl(linear):
        return torch.stack([per_class_accuracy(test_unseen.y, linear(real_unseen).argmax(dim=1), C),
                            per_class_accuracy(test_seen.y, linear(real_seen).argmax(dim=1), C)])

    train_x = torch.cat([Dec.classifier_input(trainval.x), fake])
    epochs = fit_softmax(train_x, torch.cat([trainval.y, fake_y]), C, config, gzsl)
    best = harmonic_mean(*epochs.T).argmax()
    return in_percent(acc_zs, epochs[best])
