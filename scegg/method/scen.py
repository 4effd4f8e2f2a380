"""Stages 1 and 2: train LEN + GEN jointly, fit the scaler, embed every image once, distil the global classifier."""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from scegg.run.checkpoint import Checkpoint
from scegg.config import Config
from scegg.features.sampler import BalancedSampler
from scegg.speed.cuda_graphs import graphed
from scegg.features.storage import FeatureMaps
from model import SCEN
from util import UserError, seed_stream


def rmsprop(parameters, lr: float, config: Config) -> torch.optim.Optimizer:
    """The optimiser of SCEN and of the global classifier (section 5)."""
    parameters = list(parameters)
    return torch.optim.RMSprop(parameters, lr=lr, weight_decay=config.scen_weight_decay, momentum=config.scen_momentum,
                               foreach=True, capturable=parameters[0].is_cuda)


def scen_step(scen: SCEN, optimizer, maps: Tensor, labels: Tensor, seen: Tensor, config: Config) -> Tensor:
    """One step of stage 1 on maps (B, R, D) with labels (B,). Returns (loss_LEN, loss_GEN) on the device."""
    local, globally = scen.losses(maps, labels, seen)
    optimizer.zero_grad(set_to_none=True)
    (config.lambda_local * local + config.lambda_global * globally).backward()
    optimizer.step()
    return torch.stack([local.detach(), globally.detach()])


def classifier_step(classifier: nn.Module, optimizer, x: Tensor, target: Tensor) -> Tensor:
    """One step of a classifier on x (B, D): mean squared error against logits (B, C), or cross entropy against labels (B,)."""
    loss = (F.mse_loss if target.is_floating_point() else F.cross_entropy)(classifier(x), target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class LossMeter:
    """Losses of the steps since the last reading, kept on the device: they are waited for only when they are read.

    where: the stage, in words, for the error that names the step and the term of a loss that is not finite.
    """

    def __init__(self, where: str, *names: str):
        self.where, self.names, self.rows, self.first = where, names, [], 1
        self.loaded = torch.empty(0, len(names))  # rows of a resumed run, on the host

    def add(self, losses: Tensor):
        """The next step's losses (len(names),)."""
        self.rows.append(losses.reshape(-1))

    def table(self) -> Tensor:
        """The losses (steps, names) on the host. Raises UserError naming the first that is NaN or infinite."""
        table = torch.cat([self.loaded, torch.stack(self.rows).cpu()]) if self.rows else self.loaded
        if not torch.isfinite(table).all():
            row, column = (~torch.isfinite(table)).nonzero()[0].tolist()
            raise UserError(f"{self.where}, iteration {self.first + row}: {self.names[column]} is {table[row, column].item()}; "
                            "lower the learning rates. The last checkpoint, from before, is kept")
        return table

    def read(self) -> dict[str, float]:
        """Means since the last reading, by name; nothing if there was no step."""
        table = self.table()
        self.rows, self.loaded, self.first = [], table[:0], self.first + len(table)
        if not len(table):
            return {}
        return dict(zip(self.names, table.mean(dim=0).tolist()))

    def state_dict(self) -> dict:
        return {"rows": self.table(), "first": self.first}

    def load_state_dict(self, state: dict):
        self.rows, self.loaded, self.first = [], state["rows"], state["first"]


def fit_scen(scen: SCEN, maps: FeatureMaps, sampler: BalancedSampler, labels: Tensor, seen: Tensor,
             config: Config, checkpoint: Checkpoint, log):
    """Stage 1. maps: trainval's feature maps; labels (n,) of trainval and seen (Cs,) on the device.

    log(iteration, losses) is called every `log_freq_iteration` iterations. Raises UserError for a loss that is not finite.
    """
    optimizer = rmsprop(scen.parameters(), config.scen_lr, config)
    meter = LossMeter(f"{checkpoint.phase}stage 1 (SCEN)", "loss_LEN", "loss_GEN")
    checkpoint.track(scen_optimizer=optimizer, scen_losses=meter)
    seed_stream(config.seed, "scen")
    steps = checkpoint.steps("scen", config.scen_iterations, config.checkpoint_every, "iteration")
    ahead = maps.batches(sampler, config.scen_iterations, skip=checkpoint.steps_done("scen"))
    for iteration, (positions, batch) in zip(steps, ahead):
        meter.add(scen_step(scen, optimizer, batch, labels[positions], seen, config))
        if iteration % config.log_freq_iteration == 0 or iteration == config.scen_iterations:
            log(iteration, meter.read())
    checkpoint.forget("scen_optimizer", "scen_losses")


class Embedding(NamedTuple):
    """What EGGN sees of a set of images, computed once. x (n, D) scaled features, local logits S (n, C), y (n,)."""
    x: Tensor
    local_logits: Tensor
    y: Tensor


class Embeddings(dict):
    """Split name -> Embedding, on a device; a part of checkpoints."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def state_dict(self) -> dict:
        return {name: list(embedding) for name, embedding in self.items()}

    def load_state_dict(self, state: dict):
        self.update({name: Embedding(*(tensor.to(self.device) for tensor in tensors)) for name, tensors in state.items()})


def embed(scen: SCEN, maps: FeatureMaps, progress) -> tuple[Tensor, Tensor]:
    """Unscaled g (n, D) and local logits S (n, C) of all images of `maps`, in order."""
    pieces = []
    for batch in maps.in_order():
        pieces.append(scen.embed(batch))
        progress.update(len(batch))
    g, S = zip(*pieces)
    return torch.cat(g), torch.cat(S)


def embed_splits(scen: SCEN, splits: dict[str, tuple[FeatureMaps, Tensor]]) -> dict[str, Embedding]:
    """Fit the scaler on trainval and embed every split: the only pass over feature maps once SCEN is frozen.

    splits: name -> (feature maps, labels), with trainval among them. Returns the Embedding of each.
    """
    total = sum(len(maps) for maps, _ in splits.values())
    with tqdm(total=total, desc="dense-semantic features", unit="image", disable=None, leave=False) as progress:
        raw = {name: embed(scen, maps, progress) for name, (maps, _) in splits.items()}
    scen.gen.scaler.fit(raw["trainval"][0])
    return {name: Embedding(scen.gen.scaler(g), S, splits[name][1]) for name, (g, S) in raw.items()}


def distill_targets(trainval: Embedding, config: Config) -> Tensor:
    """What the global classifier learns: local logits (n, C) or, in the ablation, labels (n,)."""
    return trainval.local_logits if config.distill_target == "logits" else trainval.y


def distill(classifier: nn.Module, trainval: Embedding, sampler: BalancedSampler, config: Config, checkpoint: Checkpoint, log):
    """Stage 2 on cached features: the global classifier learns the local logits of all C classes by MSE.

    In the ablation distill_target: labels it learns trainval's labels by cross entropy, and so nothing of unseen classes.
    """
    x, targets = trainval.x, distill_targets(trainval, config)
    optimizer = rmsprop(classifier.parameters(), config.scen_lr, config)
    meter = LossMeter(f"{checkpoint.phase}stage 2 (distillation)", "loss_distill")
    checkpoint.track(distill_optimizer=optimizer, distill_losses=meter)
    seed_stream(config.seed, "distill")
    batches = sampler.draw(config.distill_iterations).to(x.device)
    step = graphed(lambda positions: classifier_step(classifier, optimizer, x.index_select(0, positions), targets[positions]), classifier, [optimizer])
    for iteration in checkpoint.steps("distill", config.distill_iterations, config.checkpoint_every, "iteration"):
        meter.add(step(batches[iteration - 1]))
        if iteration % config.log_freq_iteration == 0 or iteration == config.distill_iterations:
            log(iteration, meter.read())
    checkpoint.forget("distill_optimizer", "distill_losses")
