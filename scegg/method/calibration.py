"""Calibrated stacking with a bias chosen on held-out classes (docs/method.md, section 9).

A bias, taken from the logits of the seen classes, decides how many images go to unseen classes.
Protocol validated chooses it in a run on held-out classes and carries it over to the run on all of
trainval. Logits of the two runs have other scales. So what is carried over is the share of
trainval's own images, all of seen classes, that the bias sends to unseen ones
(docs/experiments.md).

Source of calibrated stacking: Chao et al., An Empirical Study and Analysis of Generalized
Zero-Shot Learning for Object Recognition in the Wild, ECCV 2016.
"""

from collections import deque

import torch
from torch import Tensor, nn

from scegg.method.by_class import class_weights, is_clear_gain
from scegg.method.eggn import EGGN
from scegg.method.embeddings import Embedding

STEPS = 100  # shares are tried in steps of 1 %
LAST = 5  # epochs of the classifier that count; the first ones send nearly all to unseen classes


class ShareChoice:
    """Finds the share with the best H: on the mean of a softmax classifier's last epochs.

    One epoch alone would leave it to chance.
    unseen_y, seen_y: labels of the held-out images; is_seen (C,) tells the seen classes.
    """

    def __init__(self, unseen_y: Tensor, seen_y: Tensor, is_seen: Tensor):
        self.unseen_y, self.seen_y, self.is_seen = unseen_y, seen_y, is_seen
        self.unseen_weights, self.seen_weights = class_weights(unseen_y), class_weights(seen_y)
        self.candidates = torch.arange(STEPS, device=is_seen.device, dtype=torch.float64) / STEPS
        # of each epoch: accuracies by class (1 + STEPS, C), without a bias and at every share
        self.found = deque(maxlen=LAST)

    def look(self, trainval: Tensor, unseen: Tensor, seen: Tensor):
        """Take a classifier's logits (n, C) after an epoch.

        trainval: of the images whose share is meant; unseen, seen: of the held-out ones.
        """
        biases = margins(trainval, self.is_seen).quantile(self.candidates)
        biases = torch.cat([biases.new_zeros(1), biases])[:, None]
        # an image is called unseen where its margin is below the bias
        called_unseen = (margins(unseen, self.is_seen) < biases).double()
        called_seen = (margins(seen, self.is_seen) >= biases).double()
        right_unseen = is_right(unseen, self.unseen_y, ~self.is_seen)[:, None]
        right_seen = is_right(seen, self.seen_y, self.is_seen)[:, None]
        unseen_accuracies = called_unseen @ (right_unseen * self.unseen_weights)
        seen_accuracies = called_seen @ (right_seen * self.seen_weights)
        self.found.append((unseen_accuracies, seen_accuracies))

    def best(self) -> float | None:
        """The share with the best mean H; None where it is no clear gain over no bias."""
        unseen, seen = (torch.stack(found).mean(0) for found in zip(*self.found, strict=True))
        U, S = unseen.mean(dim=1), seen.mean(dim=1)
        H = 2 * U * S / (U + S).clamp(min=1e-9)
        best = 1 + int(H[1:].argmax())
        if not is_clear_gain([unseen[best], seen[best]], [unseen[0], seen[0]]):
            return None
        return self.candidates[best - 1].item()


@torch.no_grad()
def calibrated(
    linear: nn.Linear, real: Tensor, is_seen: Tensor, unseen_share: float | None
) -> dict[str, Tensor]:
    """The weights of a classifier whose bias sends a share of the images `real` to unseen classes.

    real (n, d): its inputs of trainval; is_seen (C,). unseen_share: None takes no bias.
    Returns {"weight": (C, d), "bias": (C,)}.
    """
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    if unseen_share is not None:
        bias[is_seen] -= margins(linear(real), is_seen).quantile(unseen_share).to(bias.dtype)
    return {"weight": weight, "bias": bias}


def seen_columns(classes: int, unseen: Tensor) -> Tensor:
    """True at the seen classes, false at the unseen ones (C,)."""
    return torch.ones(classes, dtype=torch.bool, device=unseen.device).index_fill_(0, unseen, False)


def margins(logits: Tensor, is_seen: Tensor) -> Tensor:
    """Best seen logit - best unseen logit (n,) of logits (n, C)."""
    best_seen = logits.masked_fill(~is_seen, -torch.inf).amax(dim=1)
    best_unseen = logits.masked_fill(is_seen, -torch.inf).amax(dim=1)
    return (best_seen - best_unseen).double()


def is_right(logits: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """Whether the best class of `group` (C,) is each image's own (n,), of logits (n, C)."""
    return logits.masked_fill(~group, -torch.inf).argmax(dim=1) == y


def shares(logits: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """What each image (n,) adds to the accuracy if its best class of `group` (C,) is right, else 0.

    That is 1 / (images of its class x classes).
    """
    return is_right(logits, y, group) * class_weights(y).mean(dim=1)


# ---- the seen-unseen curve


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
    is_seen = seen_columns(len(eggn.att), unseen)
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


def area_under(curve: Tensor) -> float:
    """AUSUC of a seen-unseen curve (n, 3): the integral of S over U, in [0, 1].

    Source: Chao et al., An Empirical Study and Analysis of Generalized Zero-Shot Learning for
    Object Recognition in the Wild, ECCV 2016.
    """
    return torch.trapezoid(curve[:, 1], curve[:, 2]).item()
