"""Stages 1 and 2: train LEN + GEN jointly, fit the scaler, embed every image once, distil the global classifier."""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from dataset import BalancedSampler, FeatureMaps
from model import SCEN, global_classifier


def rmsprop(parameters, config: Config) -> torch.optim.Optimizer:
    """The optimiser of stages 1 and 2 (section 5)."""
    return torch.optim.RMSprop(parameters, lr=config.scen_lr, weight_decay=config.scen_weight_decay,
                               momentum=config.scen_momentum, foreach=True)


def scen_step(scen: SCEN, optimizer, maps: Tensor, labels: Tensor, seen: Tensor, config: Config) -> Tensor:
    """One step of stage 1 on maps (B, R, D) with labels (B,). Returns (loss_LEN, loss_GEN) on the device."""
    local, globally = scen.losses(maps, labels, seen)
    optimizer.zero_grad(set_to_none=True)
    (config.lambda_local * local + config.lambda_global * globally).backward()
    optimizer.step()
    return torch.stack([local.detach(), globally.detach()])


def distill_step(classifier: nn.Module, optimizer, x: Tensor, local_logits: Tensor) -> Tensor:
    """One step of stage 2: mean squared error of the classifier on x (B, D) against local logits S (B, C)."""
    loss = F.mse_loss(classifier(x), local_logits)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class LossMeter:
    """Running sums of losses on the device, read (and so waited for) only when they are logged."""

    def __init__(self, *names: str):
        self.names, self.sums, self.count = names, 0.0, 0

    def add(self, losses: Tensor):
        self.sums, self.count = self.sums + losses, self.count + 1

    def read(self) -> dict[str, float]:
        """Means since the last read, by name."""
        means = (self.sums / self.count).reshape(-1).tolist()
        self.sums, self.count = 0.0, 0
        return dict(zip(self.names, means))


def fit_scen(scen: SCEN, maps: FeatureMaps, sampler: BalancedSampler, labels: Tensor, seen: Tensor,
             config: Config, log, progress):
    """Stage 1. maps: trainval's feature maps; labels (n,) of trainval and seen (Cs,) on the device.

    log(iteration, losses) is called every `log_freq_iteration` iterations, progress() every iteration.
    """
    optimizer = rmsprop(scen.parameters(), config)
    meter = LossMeter("loss_LEN", "loss_GEN")
    for iteration, (positions, batch) in enumerate(maps.batches(sampler, config.scen_iterations), start=1):
        meter.add(scen_step(scen, optimizer, batch, labels[positions], seen, config))
        progress()
        if iteration % config.log_freq_iteration == 0 or iteration == config.scen_iterations:
            log(iteration, meter.read())


class Embedding(NamedTuple):
    """What frozen SCEN says of a set of images, computed once. x (n, D) scaled dense-semantic features, S (n, C), y (n,)."""
    x: Tensor
    local_logits: Tensor
    y: Tensor


def embed(scen: SCEN, maps: FeatureMaps, labels: Tensor, progress) -> tuple[Tensor, Tensor]:
    """Unscaled g (n, D) and local logits S (n, C) of all images of `maps`, in order."""
    pieces = []
    for batch in maps.in_order():
        pieces.append(scen.embed(batch))
        progress(len(batch))
    features, logits = zip(*pieces)
    return torch.cat(features), torch.cat(logits)


def embed_splits(scen: SCEN, splits: dict[str, tuple[FeatureMaps, Tensor]], progress) -> dict[str, Embedding]:
    """Fit the scaler on trainval and embed every split: the only pass over feature maps once SCEN is frozen.

    splits: name -> (feature maps, labels), with trainval among them.
    """
    raw = {name: embed(scen, maps, labels, progress) for name, (maps, labels) in splits.items()}
    scen.gen.fit_scaler(raw["trainval"][0])
    return {name: Embedding(scen.gen.scale(g), S, splits[name][1]) for name, (g, S) in raw.items()}


def distill(trainval: Embedding, sampler: BalancedSampler, config: Config, log, progress) -> nn.Module:
    """Stage 2 on cached features: a fresh global classifier learns the local logits of all C classes by MSE."""
    x, S, _ = trainval
    classifier = global_classifier(x.shape[1], config.distill_hidden, S.shape[1]).to(x.device)
    optimizer = rmsprop(classifier.parameters(), config)
    meter = LossMeter("loss_distill")
    for iteration, positions in enumerate(sampler.draw(config.distill_iterations).to(x.device), start=1):
        meter.add(distill_step(classifier, optimizer, x[positions], S[positions]))
        progress()
        if iteration % config.log_freq_iteration == 0 or iteration == config.distill_iterations:
            log(iteration, meter.read())
    return classifier
