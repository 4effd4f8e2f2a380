"""Dense-semantic features: every image passes through the trained SCEN once (docs/method.md,
section 5)."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from model import SCEN
from scegg.features.storage import FeatureMaps

SPLITS = ("trainval", "test_seen", "test_unseen")


class Embedding(NamedTuple):
    """What EGGN sees of a set of images, computed once.

    x (n, D) scaled features; local_logits S (n, C); y (n,) labels.
    """

    x: Tensor
    local_logits: Tensor
    y: Tensor


class Embeddings(dict):
    """Split name -> Embedding, on a device; a part of checkpoints."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def state_dict(self) -> dict:
        """For checkpoints."""
        return {name: list(embedding) for name, embedding in self.items()}

    def load_state_dict(self, state: dict):
        """From a checkpoint."""
        for name, tensors in state.items():
            self[name] = Embedding(*(tensor.to(self.device) for tensor in tensors))


def embed_images(scen: SCEN, maps: FeatureMaps, progress) -> tuple[Tensor, Tensor]:
    """Unscaled g (n, D) and local logits S (n, C) of all images of `maps`, in order."""
    features, logits = [], []
    for batch in maps.in_order():
        g, S = scen.embed(batch)
        features.append(g)
        logits.append(S)
        progress.update(len(batch))

    return torch.cat(features), torch.cat(logits)


def embed_splits(scen: SCEN, splits: dict[str, tuple[FeatureMaps, Tensor]]) -> dict[str, Embedding]:
    """Fit the scaler on trainval and embed every split.

    This is the only pass over feature maps once SCEN is frozen.
    splits: name -> (feature maps, labels), with trainval among them.
    """
    total = sum(len(maps) for maps, _ in splits.values())
    with tqdm(
        total=total, desc="dense-semantic features", unit="image", disable=None, leave=False
    ) as progress:
        unscaled = {name: embed_images(scen, maps, progress) for name, (maps, _) in splits.items()}

    scen.gen.scaler.fit(unscaled["trainval"][0])
    return {
        name: Embedding(scen.gen.scaler(g), S, splits[name][1]) for name, (g, S) in unscaled.items()
    }
