"""What is timed, and the tensors and networks that it works on."""

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.flop import Size
from model import SCEN, global_classifier
from scegg.features.reader import normalize_positions
from scegg.method.eggn import EGGN
from scegg.method.scen import rmsprop


@dataclasses.dataclass
class Stage:
    """Something to time.

    `run()` does `units` of `unit`, for which `flop` and `bytes` moved are needed. `plain()` does
    the same by scegg/method/plain.py.
    """

    name: str
    run: Callable
    unit: str
    units: int = 1
    flop: float = 0.0
    bytes: float = 0.0
    plain: Callable | None = None


class Workbench:
    """The tensors and networks that the stages need, of one size, on one device.

    raw (B or more, D, h, w): feature maps; the first B become the batch.
    """

    def __init__(self, s: Size, config, device: torch.device, raw: torch.Tensor):
        torch.manual_seed(0)
        self.s, self.config, self.device = s, config, device
        self.T = config.critic_iter
        self.make_tensors(raw)
        self.make_networks()

    def make_tensors(self, raw: torch.Tensor):
        """Feature maps, classes and attributes, and all that an EGGN iteration draws."""
        s, T, device = self.s, self.T, self.device
        self.raw = raw[: s.B].to(device)
        self.maps = normalize_positions(self.raw)  # (B, R, D)
        self.att = torch.rand(s.C, s.K, device=device)
        self.seen = torch.arange(s.Cs, device=device)
        self.unseen = torch.arange(s.Cs, s.C, device=device)
        self.labels = draw_labels(self.seen, s.B)

        self.x = torch.rand(T + 1, s.B, s.D, device=device)
        self.y = draw_labels(self.seen, T + 1, s.B)
        self.local_logits = torch.rand(s.B, s.C, device=device)
        self.eps = torch.randn(T + 1, s.B, s.K, device=device)
        self.alpha = torch.rand(T, s.B, 1, device=device)
        self.noise = torch.randn(s.B, s.K, device=device)
        self.unseen_y = draw_labels(self.unseen, s.B)

    def critic_draws(self) -> tuple:
        """What an iteration's critic steps take."""
        T = self.T
        return self.x[:T], self.y[:T], self.eps[:T], self.alpha

    def generator_draws(self) -> tuple:
        """What its generator step takes."""
        T = self.T
        return self.x[T], self.y[T], self.eps[T], self.unseen_y, self.noise

    def make_networks(self):
        """SCEN with its scaler, the global classifiers, EGGN, and their optimisers."""
        s, config, device = self.s, self.config, self.device
        self.scen = SCEN(torch.randn(s.K, s.d_v), self.att.cpu(), s.D).to(device)
        self.scen_optimizer = rmsprop(self.scen.parameters(), config.scen_lr, config)
        self.scen.gen.scaler.fit(self.scen.embed(self.maps)[0])

        self.distilled = self.new_classifier()  # the one that stage 2 trains
        self.distill_optimizer = rmsprop(self.distilled.parameters(), config.scen_lr, config)
        self.guide = self.new_classifier()  # the one that guides EGGN
        self.eggn = self.new_eggn()

    def new_classifier(self) -> torch.nn.Module:
        """A fresh global classifier."""
        s, hidden = self.s, self.config.distill_hidden
        return global_classifier(s.D, hidden, s.C).to(self.device)

    def new_eggn(self) -> EGGN:
        """A fresh EGGN with its optimisers."""
        return EGGN(self.s.D, self.att, self.guide, self.config).to(self.device)


def draw_labels(classes: torch.Tensor, *shape: int) -> torch.Tensor:
    """Random labels of these classes."""
    return classes[torch.randint(len(classes), shape, device=classes.device)]
