"""The stage of evaluation: both softmax classifiers, synthesis included."""

from functools import partial

import torch

from benchmarks.flop import evaluation_cost
from benchmarks.stages import Stage, Workbench, draw_labels
from scegg.method import plain
from scegg.method.embeddings import Embedding
from scegg.method.evaluation import Evaluation


def evaluation_stage(bench: Workbench, against_plain: bool) -> Stage:
    """Synthesis and all epochs of both classifiers; against_plain: with the transcription's way."""
    s, config = bench.s, bench.config
    splits = {
        "trainval": random_embedding(bench, s.trainval, bench.seen),
        "test_seen": random_embedding(bench, s.test // 2, bench.seen),
        "test_unseen": random_embedding(bench, s.test // 2, bench.unseen),
    }
    inputs = (bench.eggn, splits, bench.unseen, config)

    cost = evaluation_cost(s, config)
    return Stage(
        "evaluation, both classifiers",
        partial(Evaluation(*inputs).scores, splits),
        "epoch",
        config.classifier_epochs,
        cost.flop,
        cost.bytes,
        partial(plain.evaluate, *inputs) if against_plain else None,
    )


def random_embedding(bench: Workbench, images: int, classes: torch.Tensor) -> Embedding:
    """Features and labels of a split; its local logits are not looked at."""
    x = torch.rand(images, bench.s.D, device=bench.device)
    return Embedding(x, torch.empty(0), draw_labels(classes, images))
