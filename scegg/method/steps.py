"""What the training loops share: a classifier's step, and the meter of a stage's losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from util import UserError


def classifier_step(classifier: nn.Module, optimizer, x: Tensor, target: Tensor) -> Tensor:
    """One step of a classifier on x (B, D); returns its loss, on the device.

    target: logits (B, C), learnt by mean squared error, or labels (B,), by cross entropy.
    """
    loss_function = F.mse_loss if target.is_floating_point() else F.cross_entropy
    loss = loss_function(classifier(x), target)

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class LossMeter:
    """Losses of the steps since the last reading.

    They stay on the device, and are waited for only when they are read. where: the stage, in
    words, for the error that names step and term of a loss that is not finite.
    """

    def __init__(self, where: str, *names: str):
        self.where, self.names, self.rows, self.first = where, names, [], 1
        self.loaded = torch.empty(0, len(names))  # rows of a resumed run, on the host

    def add(self, losses: Tensor):
        """The losses of the next step (len(names),), or of the next few (steps, len(names))."""
        self.rows.append(losses.reshape(-1, len(self.names)))

    def table(self) -> Tensor:
        """The losses (steps, names) on the host. Raises UserError at the first NaN or infinity."""
        table = self.loaded
        if self.rows:
            table = torch.cat([self.loaded, torch.cat(self.rows).cpu()])

        if not torch.isfinite(table).all():
            row, column = (~torch.isfinite(table)).nonzero()[0].tolist()
            raise UserError(
                f"{self.where}, iteration {self.first + row}: {self.names[column]} is "
                f"{table[row, column].item()}; lower the learning rates. The last checkpoint, from "
                "before, is kept"
            )
        return table

    def read(self) -> dict[str, float]:
        """Means since the last reading, by name; nothing if there was no step."""
        table = self.table()
        self.rows, self.loaded, self.first = [], table[:0], self.first + len(table)

        if not len(table):
            return {}
        return dict(zip(self.names, table.mean(dim=0).tolist(), strict=True))

    def state_dict(self) -> dict:
        """For checkpoints."""
        return {"rows": self.table(), "first": self.first}

    def load_state_dict(self, state: dict):
        """From a checkpoint. Raises ValueError for other losses."""
        if state["rows"].shape[1:] != self.loaded.shape[1:]:
            raise ValueError("other losses")
        self.rows, self.loaded, self.first = [], state["rows"], state["first"]
