"""Which epochs of a run are reported (docs/method.md, section 9).

paper: the best epoch, and the best epoch of the softmax classifiers, *on the test set*, as in the
paper.
validated: the epoch, and how far the softmax classifier is calibrated, are chosen on classes held
out of trainval, in a run of their own. A bias must be a clear gain there over none at its epoch,
and an earlier epoch over the last one. The classifiers are those after their last epoch. Then all
of trainval is trained on, and the test set measures what was chosen before: it chooses nothing.
"""

from scegg.config import Config
from scegg.method.by_class import is_clear_gain
from scegg.method.evaluation import Metrics, Scores
from util import without_none

TARGETS = {"czsl": "acc_zs", "gzsl": "H"}  # the metric by which an epoch is picked


class Selection:
    """The evaluations that count, for CZSL and for GZSL apart; a part of checkpoints.

    choice: {"czsl": {"epoch": ...}, "gzsl": {"epoch": ..., "unseen_share": ...}} chosen elsewhere
    (validated). None: whatever is best on the images evaluated, which are the test set's in the
    paper's protocol and held-out ones in validation.
    """

    def __init__(self, config: Config, choice: dict | None = None):
        self.config, self.choice = config, choice or {}
        self.picked = {"czsl": None}
        if config.gzsl:
            self.picked["gzsl"] = None
        self.last = None  # the last epoch's metrics, as the protocol reports them
        self.unselected = None  # the same after the last classifier epoch: nothing was picked

    def wants(self, epoch: int) -> bool:
        """Whether to evaluate after this epoch."""
        if epoch == self.config.nepoch:
            return True
        if self.choice:
            return epoch in (chosen["epoch"] for chosen in self.choice.values())
        return epoch % self.config.test_freq_epoch == 0

    def update(self, epoch: int, scores: Scores) -> dict:
        """Take an evaluation; returns what is logged of it."""
        self.last, self.unselected = scores.reported()._asdict(), scores.metrics()._asdict()
        for kind in self.picked:
            if self.is_picked(kind, epoch, scores):
                self.picked[kind] = {"epoch": epoch, "metrics": self.last}
                if scores.validated:
                    self.picked[kind]["by_class"] = scores.validated.by_class[kind]
                if scores.validated and kind == "gzsl":
                    self.picked[kind]["unseen_share"] = scores.validated.unseen_share

        logged = {"epoch": epoch} | without_none(self.last)
        return logged if self.choice else logged | self.best()

    def is_picked(self, kind: str, epoch: int, scores: Scores) -> bool:
        """Whether the last evaluation, of this epoch, is the one to report."""
        if self.choice:
            return epoch == self.choice[kind]["epoch"]
        before, target = self.picked[kind], TARGETS[kind]
        if before is None or self.last[target] > before["metrics"][target]:
            return True
        if scores.validated and epoch == self.config.nepoch:
            return not is_clear_gain(before["by_class"], scores.validated.by_class[kind])
        return False

    def metrics(self) -> Metrics:
        """What was picked: acc_zs of CZSL's epoch; U, S and H of GZSL's."""
        numbers = dict.fromkeys(Metrics._fields)
        if "gzsl" in self.picked:
            numbers |= self.picked["gzsl"]["metrics"]
        numbers["acc_zs"] = self.picked["czsl"]["metrics"]["acc_zs"]
        return Metrics(**numbers)

    def best(self) -> dict:
        """The same as best_acc_zs, best_acc_unseen, best_acc_seen and best_H."""
        if not self.last:
            return {}
        picked = without_none(self.metrics()._asdict())
        return {f"best_{name}": value for name, value in picked.items()}

    @property
    def epoch(self) -> int:
        """The epoch picked: GZSL's, if it is evaluated."""
        return list(self.picked.values())[-1]["epoch"]

    @property
    def unseen_share(self) -> float | None:
        """The share of trainval's images that the picked classifier of GZSL calls unseen.

        None without such a bias: in the paper's protocol, for CZSL, and where it is no clear gain.
        """
        return (self.picked.get("gzsl") or {}).get("unseen_share")

    def pick(self) -> dict:
        """The choice for the run on all of trainval."""
        return {
            kind: {name: entry[name] for name in ("epoch", "unseen_share") if name in entry}
            for kind, entry in self.picked.items()
            if entry
        }

    def state_dict(self) -> dict:
        """For checkpoints."""
        return {"picked": self.picked, "last": self.last, "unselected": self.unselected}

    def load_state_dict(self, state: dict):
        """From a checkpoint."""
        self.picked = state["picked"]
        self.last, self.unselected = state["last"], state["unselected"]
