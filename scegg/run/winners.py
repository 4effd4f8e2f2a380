"""The networks and classifiers behind a run's numbers: `winners` in model.pt.

Each number of summary.json can be computed from them again (`scegg.report.evaluation`).
"""

import dataclasses

import torch
from torch import Tensor, nn

from scegg.config import Config
from scegg.features.reader import Features
from scegg.method.evaluation import Scores, copy_of
from scegg.method.selection import Selection


class Winners:
    """What the numbers of a run came from; a part of checkpoints.

    embedder: the weights that made the embeddings which EGGN sees now: "scen", or "scaler" in the
    CNN-feature baseline. In the joint schedule SCEN itself is ahead of them.
    kept, by the numbers that they gave: "local" and "global", embedder and `global_cls`. "picked",
    "last_epoch" and "nothing_picked": a winner for "czsl" and, if it is evaluated, "gzsl".
    A winner is the embedder with its `epoch`, the softmax classifier (`linear`), and the decoder
    (`Dec`) if the run has one.
    """

    def __init__(self):
        self.embedder, self.kept = {}, {}

    def embed_with(self, name: str, network: nn.Module):
        """Remember the network as it is now: it has just made the embeddings."""
        self.embedder = {name: copy_of(network)}

    def keep_stage(self, name: str, **networks: nn.Module):
        """Keep what the numbers `name` after stage 1 or 2 came from."""
        copies = {part: copy_of(network) for part, network in networks.items()}
        self.kept[name] = self.embedder | copies

    def keep_epoch(
        self,
        epoch: int,
        selection: Selection,
        scores: Scores,
        decoder: nn.Module | None,
        last: bool,
    ):
        """Keep what an evaluation's numbers came from, if they are the ones to report so far.

        selection: it has taken the scores. last: whether this is EGGN's last epoch.
        """
        picked = [
            kind for kind, entry in selection.picked.items() if entry and entry["epoch"] == epoch
        ]
        if not picked and not last:
            return

        networks = self.embedder | {"epoch": epoch}
        if decoder is not None:
            networks["Dec"] = copy_of(decoder)
        best, final = (
            {kind: networks | {"linear": linear} for kind, linear in scores.kept[name].items()}
            for name in ("picked", "last")
        )

        for kind in picked:
            self.kept.setdefault("picked", {})[kind] = best[kind]
        if last:
            self.kept["nothing_picked"] = final
        if last and not selection.choice:
            self.kept["last_epoch"] = best

    def state_dict(self) -> dict:
        """For checkpoints."""
        return {"embedder": self.embedder, "kept": self.kept}

    def load_state_dict(self, state: dict):
        """From a checkpoint."""
        self.embedder, self.kept = dict(state["embedder"]), dict(state["kept"])


def share_equal_tensors(state: dict) -> dict:
    """The same nested dict on the CPU, in which equal tensors are one.

    torch.save writes that one once. Winners share many: SCEN in the frozen schedule, the decoder
    where the last epoch is the picked one.
    """
    known = {}

    def shared(value):
        if isinstance(value, dict):
            return {name: shared(item) for name, item in value.items()}
        if not isinstance(value, Tensor):
            return value

        value = value.detach().cpu()
        of_its_shape = known.setdefault((value.dtype, value.shape), [])
        for other in of_its_shape:
            if torch.equal(value, other):
                return other
        of_its_shape.append(value)
        return value

    return shared(state)


# ---- what model.pt has to hold

NETWORKS = {"scen", "scaler", "global_cls", "Dec", "linear"}
OF_STAGES = {"local": set(), "global": {"global_cls"}}  # what they have beside the embedder
OF_EPOCHS = ("picked", "last_epoch", "nothing_picked", "validation")


def check_model(model: dict):
    """Raises an error for what no run writes: winners, and what `description` says.

    It is a ValueError, KeyError, TypeError or AttributeError. Sizes are not looked at.
    """
    for name, kept in model["winners"].items():
        if name in OF_STAGES:
            check_winner(kept, OF_STAGES[name])
            continue
        if name not in OF_EPOCHS or not {"czsl"} <= set(kept) <= {"czsl", "gzsl"}:
            raise ValueError(f"winners {name}")
        for winner in kept.values():
            check_winner(winner, {"linear"})
            if type(winner["epoch"]) is not int:
                raise TypeError("epoch")

    names, unseen = [*model["class_names"], *model["attribute_names"]], model["unseen"]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("names")
    if not all(isinstance(value, (str, int, float)) for value in model["features"].values()):
        raise TypeError("features")
    if not unseen or not set(unseen) <= set(range(len(model["class_names"]))):
        raise ValueError("unseen")


def check_winner(winner: dict, parts: set[str]):
    """Raises an error as check_model does; parts: networks that the winner must have."""
    networks = {name: weights for name, weights in winner.items() if name != "epoch"}
    embedders = {"scen", "scaler"} & set(networks)
    if not parts <= set(networks) <= NETWORKS or len(embedders) != 1:
        raise ValueError("networks")
    for weights in networks.values():
        if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise TypeError("weights")


def description(dataset: str, features: Features, config: Config) -> dict:
    """What else model.pt says, so that it can be used where no feature file is.

    features: how the maps were made: backbone, hash of its weights, image size, transform.
    """
    split = features.split
    return {
        "dataset": dataset,
        "config": dataclasses.asdict(config),
        "split_fingerprint": split.fingerprint,
        "class_names": features.class_names,
        "attribute_names": features.attribute_names,
        "seen": split.seen.tolist(),
        "unseen": split.unseen.tolist(),
        "features": features.provenance,
    }
