"""Which numbers of a run are reported: the paper's protocol and the honest one (section 9).

paper: the best epoch, and the best epoch of the softmax classifiers, *on the test set*, as published.
validated: both are picked on classes held out of trainval, in a run of their own; then the whole of trainval is trained
on, and the test set says how good the epochs picked before are. Nothing is chosen by it.
"""
from scegg.config import Config
from scegg.method.evaluation import Metrics, Scores


def present(values: dict) -> dict:
    """The entries that are not None."""
    return {name: value for name, value in values.items() if value is not None}


class Selection:
    """The evaluations that count, for CZSL and for GZSL apart, as the published code has it; a part of checkpoints.

    choice: {"czsl": (epoch, classifier epoch), "gzsl": ...} picked elsewhere (protocol validated). None: whatever is best
    on the images evaluated, which are the test set's in the paper's protocol and held-out ones in validation.
    """

    def __init__(self, gzsl: bool, choice: dict | None = None):
        self.choice = choice
        self.picked = {"czsl": None} | ({"gzsl": None} if gzsl else {})
        self.last = None  # the last epoch's metrics, at its best (or chosen) classifier epoch
        self.unselected = None  # the last epoch's metrics after the last classifier epoch: nothing was picked

    def wants(self, epoch: int, config: Config) -> bool:
        """Whether to evaluate after this epoch."""
        if self.choice:
            return epoch == config.nepoch or epoch in (epoch for epoch, _ in self.choice.values())
        return epoch == config.nepoch or epoch % config.test_freq_epoch == 0

    def update(self, epoch: int, scores: Scores) -> dict:
        """Take an evaluation; returns what is logged of it."""
        best = dict(zip(("czsl", "gzsl"), scores.best_epochs()))
        best |= {kind: classifier_epoch for kind, (_, classifier_epoch) in (self.choice or {}).items()}
        metrics = scores.metrics(best["czsl"], best["gzsl"])
        self.last, self.unselected = metrics._asdict(), scores.metrics()._asdict()
        for kind, target in (("czsl", "acc_zs"), ("gzsl", "H")):
            if kind not in self.picked:
                continue
            before = self.picked[kind]
            if epoch == self.choice[kind][0] if self.choice else before is None or self.last[target] > before["metrics"][target]:
                self.picked[kind] = {"epoch": epoch, "classifier_epoch": best[kind], "metrics": self.last}
        return {"epoch": epoch} | present(self.last) | ({} if self.choice else self.best())

    def metrics(self) -> Metrics:
        """What was picked: acc_zs of CZSL's epoch; U, S and H of GZSL's."""
        gzsl = self.picked["gzsl"]["metrics"] if "gzsl" in self.picked else dict.fromkeys(("acc_unseen", "acc_seen", "H"))
        return Metrics(**gzsl | {"acc_zs": self.picked["czsl"]["metrics"]["acc_zs"]})

    def best(self) -> dict:
        """The same as best_acc_zs, best_acc_unseen, best_acc_seen and best_H."""
        return {f"best_{name}": value for name, value in present(self.metrics()._asdict()).items()} if self.last else {}

    @property
    def epoch(self) -> int:
        """The epoch picked: GZSL's, if it is evaluated."""
        return list(self.picked.values())[-1]["epoch"]

    def pick(self) -> dict:
        """The choice for the run on all of trainval."""
        return {kind: (entry["epoch"], entry["classifier_epoch"]) for kind, entry in self.picked.items() if entry}

    def state_dict(self) -> dict:
        return {"picked": self.picked, "last": self.last, "unselected": self.unselected}

    def load_state_dict(self, state: dict):
        self.picked, self.last, self.unselected = state["picked"], state["last"], state["unselected"]
