"""Accuracies class by class, and whether one choice is clearly better than another by them.

A few held-out classes make H jump by chance. Protocol validated therefore asks more of a choice
than a higher H (docs/method.md, section 9).
"""

from torch import Tensor, nn

ERRORS = 2  # standard errors by which a choice must beat none

ByClass = list[Tensor]  # the accuracy of each unseen class (Cu,), and of each seen one (Cs,)


def is_clear_gain(chosen: ByClass, default: ByClass) -> bool:
    """Whether H, or acc_zs where there are unseen classes alone, gains by two standard errors.

    The errors are those of a mean over classes, paired, with H linearised (the delta method): as if
    the held-out classes had been drawn from many. One class alone tells nothing: False.

    Source of the delta method: Casella, Berger, Statistical Inference, 2002, section 5.5.4.
    """
    pairs = zip(contributions(chosen), contributions(default), strict=True)
    gains = [(new - old).double() for new, old in pairs]
    if any(len(gain) < 2 for gain in gains):
        return False
    error = sum(gain.var() / len(gain) for gain in gains) ** 0.5
    return bool(sum(gain.mean() for gain in gains) > ERRORS * error)


def contributions(accuracies: ByClass) -> ByClass:
    """What each class adds: their means sum up to H, or are acc_zs."""
    if len(accuracies) == 1:
        return accuracies
    unseen, seen = accuracies
    U, S = unseen.mean(), seen.mean()
    total = (U + S).clamp(min=1e-9) ** 2
    return [2 * S**2 / total * unseen, 2 * U**2 / total * seen]  # dH/dU U_c, dH/dS S_c


def accuracy_by_class(target: Tensor, predicted: Tensor) -> Tensor:
    """Top-1 accuracy of each class that occurs in `target`: labels (n,) to fractions, on the host.

    On the host, as checkpoints are read there.
    """
    return ((target == predicted).double() @ class_weights(target)).cpu()


def class_weights(y: Tensor) -> Tensor:
    """A column for each class that occurs in labels y (n,), with 1 / its images in its rows."""
    _, column, images = y.unique(return_inverse=True, return_counts=True)
    return nn.functional.one_hot(column, len(images)).double() / images
