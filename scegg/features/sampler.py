"""Class-balanced batches of positions in trainval (docs/method.md, section 5)."""

import torch
from torch import Tensor


class BalancedSampler:
    """Draws batches in which every class has the same number of images.

    A batch holds min(Cs, B) distinct seen classes, and max(B // Cs, 1) images of each, drawn with
    replacement. So it need not hold B images (AWA2: 40); `batch_size` is what it does hold.
    labels: (n,), those of trainval; batches are drawn on their device.
    """

    def __init__(self, labels: Tensor, batch_size: int):
        _, counts = labels.unique(return_counts=True)
        self.order = labels.argsort(stable=True)
        self.counts = counts
        self.first = counts.cumsum(0) - counts  # where each class starts in `order`
        self.classes = min(len(counts), batch_size)
        self.images = max(batch_size // len(counts), 1)
        self.batch_size = self.classes * self.images

    def draw(self, batches: int) -> Tensor:
        """Positions (batches, batch_size), all drawn at once from the device's generator."""
        device = self.order.device
        shuffled = torch.rand(batches, len(self.counts), device=device).argsort(dim=1)
        classes = shuffled[:, : self.classes, None]
        uniform = torch.rand(batches, self.classes, self.images, device=device)

        # float32 rounding can carry uniform * count up to the count itself
        within = (uniform * self.counts[classes]).long()
        within = torch.minimum(within, self.counts[classes] - 1)
        return self.order[self.first[classes] + within].flatten(1)
