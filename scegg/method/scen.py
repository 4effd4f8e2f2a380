"""Stages 1 and 2: train LEN and GEN jointly, then distil the global classifier.

Source: docs/method.md, section 5.

`checkpoint` is a run's `scegg.run.checkpoint.Checkpoint`: it counts the steps of a stage, and saves
and restores what a stage gives it to track.
"""

import torch
from torch import Tensor, nn

from model import SCEN
from scegg.config import Config
from scegg.features.sampler import BalancedSampler
from scegg.features.storage import FeatureMaps
from scegg.method.embeddings import Embedding
from scegg.method.steps import LossMeter, classifier_step
from scegg.speed.cuda_graphs import graphed
from util import seed_stream


def rmsprop(parameters, lr: float, config: Config) -> torch.optim.Optimizer:
    """The optimiser of SCEN and of the global classifier."""
    parameters = list(parameters)
    return torch.optim.RMSprop(
        parameters,
        lr=lr,
        weight_decay=config.scen_weight_decay,
        momentum=config.scen_momentum,
        foreach=True,
        capturable=parameters[0].is_cuda,
    )


# ---- stage 1


def scen_step(
    scen: SCEN, optimizer, maps: Tensor, labels: Tensor, seen: Tensor, config: Config
) -> Tensor:
    """One step of stage 1 on maps (B, R, D) with labels (B,).

    Returns (loss_LEN, loss_GEN), on the device.
    """
    local_loss, global_loss = scen.losses(maps, labels, seen)

    optimizer.zero_grad(set_to_none=True)
    (config.lambda_local * local_loss + config.lambda_global * global_loss).backward()
    optimizer.step()
    return torch.stack([local_loss.detach(), global_loss.detach()])


def fit_scen(
    scen: SCEN,
    maps: FeatureMaps,
    sampler: BalancedSampler,
    labels: Tensor,
    seen: Tensor,
    config: Config,
    checkpoint,
    log,
):
    """Stage 1 on the feature maps of trainval.

    labels (n,) of trainval; seen (Cs,) labels of the seen classes. log(iteration, losses) is called
    every `log_freq_iteration` iterations. Raises UserError for a loss that is not finite.
    """
    optimizer = rmsprop(scen.parameters(), config.scen_lr, config)
    meter = LossMeter(f"{checkpoint.phase}stage 1 (SCEN)", "loss_LEN", "loss_GEN")
    checkpoint.track(scen_optimizer=optimizer, scen_losses=meter)

    # all batches are drawn at the stage's start, also by a resumed run
    seed_stream(config.seed, "scen")
    total = config.scen_iterations
    batches = maps.batches(sampler, total, skip=checkpoint.steps_done("scen"))
    steps = checkpoint.steps("scen", total, config.checkpoint_every, "iteration")

    for iteration, (positions, batch) in zip(steps, batches, strict=False):
        meter.add(scen_step(scen, optimizer, batch, labels[positions], seen, config))
        if iteration % config.log_freq_iteration == 0 or iteration == total:
            log(iteration, meter.read())

    checkpoint.forget("scen_optimizer", "scen_losses")


# ---- stage 2


def distillation_targets(trainval: Embedding, config: Config) -> Tensor:
    """What the global classifier learns: local logits (n, C) or, in the ablation, labels (n,)."""
    return trainval.local_logits if config.distill_target == "logits" else trainval.y


def fit_global_classifier(
    classifier: nn.Module,
    trainval: Embedding,
    sampler: BalancedSampler,
    config: Config,
    checkpoint,
    log,
):
    """Stage 2: semantic distillation, on the features that SCEN made of trainval.

    The global classifier learns the local logits of all C classes by mean squared error. In the
    ablation `distill_target: labels` it learns trainval's labels, and nothing of unseen classes.
    """
    x, targets = trainval.x, distillation_targets(trainval, config)
    optimizer = rmsprop(classifier.parameters(), config.scen_lr, config)
    meter = LossMeter(f"{checkpoint.phase}stage 2 (distillation)", "loss_distill")
    checkpoint.track(distill_optimizer=optimizer, distill_losses=meter)

    def step_on(positions: Tensor) -> Tensor:
        return classifier_step(
            classifier, optimizer, x.index_select(0, positions), targets[positions]
        )

    seed_stream(config.seed, "distill")
    total = config.distill_iterations
    batches = sampler.draw(total).to(x.device)
    step = graphed(step_on, classifier, [optimizer])

    for iteration in checkpoint.steps("distill", total, config.checkpoint_every, "iteration"):
        meter.add(step(batches[iteration - 1]))
        if iteration % config.log_freq_iteration == 0 or iteration == total:
            log(iteration, meter.read())

    checkpoint.forget("distill_optimizer", "distill_losses")
