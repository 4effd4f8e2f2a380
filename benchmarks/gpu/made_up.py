"""Features of a dataset's numbers without a file: its maps are made on the device."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scegg.datasets.layouts import Counts
from scegg.datasets.splits import Split, check_split
from scegg.features.reader import Features, normalize_positions

WORD_VECTOR = 300  # its length


def make_split(counts: Counts) -> Split:
    """A split of these numbers, its images dealt to the classes in turn."""
    rng = np.random.default_rng(0)
    classes = rng.permutation(counts.classes)
    seen, unseen = np.sort(classes[: counts.seen]), np.sort(classes[counts.seen :])
    parts = {
        "trainval": (counts.trainval, seen),
        "test_seen": (counts.test_seen, seen),
        "test_unseen": (counts.test_unseen, unseen),
    }

    labels, indices, start = [], {}, 0
    for name, (images, of_classes) in parts.items():
        labels.append(of_classes[np.arange(images) % len(of_classes)])
        indices[name] = np.arange(start, start + images)
        start += images

    att = rng.random((counts.classes, counts.attributes), dtype=np.float32)
    normalized = att / np.linalg.norm(att, axis=1, keepdims=True)
    split = Split(np.concatenate(labels), **indices, att=normalized, original_att=att)
    return check_split(split, "the made-up split")


@dataclasses.dataclass(frozen=True)
class MadeUpFeatures(Features):
    """Stands for a feature file: `read` makes its maps on the device, the same ones each time.

    A map is its class's direction of the channels with noise at every position, rectified.
    """

    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, counts: Counts, shape: tuple[int, int, int], device: torch.device):
        """Features of a split of these numbers, with maps of shape (D, h, w)."""
        rng = np.random.default_rng(1)
        vectors = rng.standard_normal((counts.attributes, WORD_VECTOR), dtype=np.float32)
        return cls(
            path=Path("made-up"),
            file=None,
            disk=None,
            split=make_split(counts),
            w2v=vectors,
            shape=shape,
            compressed=False,
            images_in_chunk=1,
            class_names=[f"class {number}" for number in range(counts.classes)],
            attribute_names=[f"attribute {number}" for number in range(counts.attributes)],
            image_files=None,
            provenance={},
            device=device,
        )

    def raw(self, indices: np.ndarray) -> Tensor:
        """Maps (n, D, h, w) of the images `indices`, on the device."""
        generator = torch.Generator(self.device).manual_seed(int(indices[0]))
        shape = (len(indices), *self.shape)
        noise = torch.randn(shape, generator=generator, device=self.device)
        labels = torch.from_numpy(self.split.labels[indices]).to(self.device)
        return (noise + self.directions()[labels, :, None, None]).relu_()

    def directions(self) -> Tensor:
        """A direction of the channels (C, D) for each class."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (len(self.split.att), self.shape[0])
        return torch.randn(shape, generator=generator, device=self.device)

    def read(self, indices: np.ndarray) -> Tensor:
        """Normalised maps (n, R, D) of the images `indices`, on the device."""
        return normalize_positions(self.raw(indices))
