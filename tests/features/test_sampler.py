"""Class-balanced batches."""

import pytest
import torch

from scegg.features.sampler import BalancedSampler


@pytest.mark.parametrize(
    "classes, batch_size, held",
    [
        (40, 40, 40),
        (40, 64, 40),
        (40, 100, 80),
        (40, 8, 8),
        (150, 64, 64),
        (3, 64, 63),
    ],
)
def test_balanced_batches(classes, batch_size, held):
    """min(Cs, B) distinct classes, max(B // Cs, 1) images of each.

    AWA2's 40 classes at B = 64 give 40 images.
    """
    torch.manual_seed(0)
    labels = torch.randint(classes, (classes * 20,)) * 2 + 1  # labels need not be dense
    labels[:classes] = torch.arange(classes) * 2 + 1

    sampler = BalancedSampler(labels, batch_size)
    table = sampler.draw(50)
    assert sampler.batch_size == held and table.shape == (50, held)
    for row in labels[table]:
        chosen, counts = row.unique(return_counts=True)
        assert len(chosen) == min(classes, batch_size)
        assert (counts == max(batch_size // classes, 1)).all()


def test_every_image_is_drawn():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 5 + [1] * 50 + [2])
    positions = BalancedSampler(labels, 3).draw(5000).flatten()
    counts = torch.bincount(positions, minlength=56).float()
    assert (counts[:5] / 1000 - 1).abs().max() < 0.2
    assert (counts[5:55] / 100 - 1).abs().max() < 0.5
    assert counts[55] == 5000
