"""A whole run of the plain transcription (scegg/method/plain.py) on a feature file.

    python -m benchmarks.plain_run FEATURES.hdf5 --seed 1 --json record.json --scen_iterations 800

train_joint.py's accuracies and time are held against it. All maps are in RAM as they are in the
file. Stages 2 and 3 encode their batches anew in every step. The run draws its own random numbers,
so that it agrees with train_joint.py's in distribution, not one by one. Every key of the config is
a flag.
"""

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from model import SCEN, global_classifier
from scegg.config import CONFIG_FOLDER, parse_flags, read_config
from scegg.features.reader import open_features
from scegg.method import plain
from scegg.method.eggn import EGGN
from scegg.method.embeddings import Embedding
from scegg.run.pipeline import SPLITS
from util import FlagParser, exit_on_user_error, peak_memory_gb, write_text

AT_ONCE = 64  # images that are encoded together


class Data:
    """A feature file in RAM: raw maps (N, D, h, w), labels (N,), and batches of trainval."""

    def __init__(self, path: Path, batch_size: int):
        self.features = open_features(path)
        self.split, self.B = self.features.split, batch_size
        self.raw = self.features.raw(np.arange(len(self.split.labels)))
        self.y = torch.from_numpy(self.split.labels)
        self.seen = torch.from_numpy(self.split.seen)
        self.unseen = torch.from_numpy(self.split.unseen)

        trainval = self.split.trainval
        labels = self.split.labels[trainval]
        self.members = {c: trainval[labels == c] for c in self.split.seen}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A class-balanced batch (docs/method.md, section 5): raw maps and labels.

        It has min(Cs, B) distinct seen classes and max(B // Cs, 1) images of each.
        """
        seen = self.split.seen
        classes = np.random.choice(seen, min(len(seen), self.B), replace=False)
        per_class = max(self.B // len(seen), 1)
        rows = [np.random.choice(self.members[c], per_class) for c in classes]
        rows = np.concatenate(rows)
        return self.raw[rows], self.y[rows]


def in_pieces(indices: np.ndarray) -> list[np.ndarray]:
    """The indices in pieces of AT_ONCE."""
    return np.split(indices, range(AT_ONCE, len(indices), AT_ONCE))


def step(optimizer, loss):
    """One step of an optimiser."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit_scen(data: Data, scen: SCEN, config):
    """Stage 1, then the scaler on all of trainval."""
    optimizer = plain.rmsprop(scen, config)
    for _ in range(config.scen_iterations):
        raw, y = data.batch()
        loss_LEN, loss_GEN = plain.scen_losses(scen, raw, y, data.seen)
        step(optimizer, config.lambda_local * loss_LEN + config.lambda_global * loss_GEN)

    scen.requires_grad_(False)
    g = []
    with torch.no_grad():
        for rows in in_pieces(data.split.trainval):
            _, h, _, _ = plain.scen_forward(scen, data.raw[rows])
            g.append(h.mean(dim=1))
        scen.gen.scaler.fit(torch.cat(g))


def fit_global_classifier(data: Data, scen: SCEN, classifier, config):
    """Stage 2."""
    optimizer = plain.rmsprop(classifier, config)
    for _ in range(config.distill_iterations):
        raw, _ = data.batch()
        x, S = plain.dense_features(scen, raw)
        step(optimizer, F.mse_loss(classifier(x), S))


def train_epoch(data: Data, scen: SCEN, eggn: EGGN, config):
    """An epoch of stage 3."""
    B = len(data.batch()[1])
    for loop in range(config.feedback_loop):
        for _ in range(math.ceil(len(data.split.trainval) / B)):
            iterate(data, scen, eggn, config, B, feedback=loop == 1)


def iterate(data: Data, scen: SCEN, eggn: EGGN, config, B: int, feedback: bool):
    """An iteration of stage 3, with B images in each batch."""
    T, K = config.critic_iter, eggn.att.shape[1]
    batches = [data.batch() for _ in range(T + 1)]
    y = [labels for _, labels in batches]
    # BCE refuses targets beyond [0, 1], and the last bit depends on the batch: clamped
    x = [plain.dense_features(scen, raw)[0].clamp(0, 1) for raw, _ in batches]

    eps, alpha = torch.randn(T + 1, B, K), torch.rand(T, B, 1)
    unseen_y = data.unseen[torch.randint(len(data.unseen), (B,))]
    noise = torch.randn(B, K)
    plain.iteration(eggn, x, y, eps, alpha, unseen_y, noise, feedback)


def embed_split(data: Data, scen: SCEN, indices: np.ndarray) -> Embedding:
    """Dense-semantic features and local logits of these images."""
    pieces = [plain.dense_features(scen, data.raw[rows]) for rows in in_pieces(indices)]
    x, S = zip(*pieces, strict=True)
    return Embedding(torch.cat(x), torch.cat(S), data.y[indices])


class Stopwatch:
    """Seconds by stage."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.began = time.perf_counter()

    def lap(self, stage: str):
        """Count the time since the last lap for a stage."""
        now = time.perf_counter()
        self.seconds[stage] += now - self.began
        self.began = now


def run(path: Path, config) -> dict:
    """All stages on a feature file; the record of the run."""
    data = Data(path, config.batch_size)
    watch = Stopwatch()
    att, channels = torch.from_numpy(data.split.att), data.features.shape[0]
    scen = SCEN(torch.from_numpy(data.features.w2v), att, channels)
    watch.lap("read")
    fit_scen(data, scen, config)
    watch.lap("scen")

    classifier = global_classifier(channels, config.distill_hidden, len(att))
    fit_global_classifier(data, scen, classifier, config)
    watch.lap("distill")

    eggn = plain.use_plain_adam(EGGN(channels, att, classifier, config).to("cpu"))
    splits = {name: embed_split(data, scen, getattr(data.split, name)) for name in SPLITS}
    watch.lap("embed")

    epochs = []
    for epoch in range(1, config.nepoch + 1):
        train_epoch(data, scen, eggn, config)
        watch.lap("eggn")
        acc_zs, (H, U, S) = plain.evaluate(eggn, splits, data.unseen, config)
        watch.lap("evaluate")
        metrics = {"acc_zs": acc_zs, "acc_unseen": U, "acc_seen": S, "H": H}
        in_percent = {name: 100 * float(value) for name, value in metrics.items()}
        epochs.append({"epoch": epoch} | in_percent)
        print(epochs[-1], flush=True)

    return record_of(config, data, epochs, dict(watch.seconds))


def record_of(config, data: Data, epochs: list[dict], seconds: dict[str, float]) -> dict:
    """What is kept of a run."""
    return {
        "stage": "whole run of the transcription",
        "seed": config.seed,
        "epochs": epochs,
        "best_acc_zs": max((row["acc_zs"] for row in epochs), default=0.0),
        "best_H": max((row["H"] for row in epochs), default=0.0),
        "seconds": seconds,
        "all_seconds": sum(seconds.values()),
        "normalization": data.features.provenance.get("normalization"),
        "matmul_precision": config.matmul_precision,
    } | peak_memory_gb(torch.device("cpu"))


def main(argv=None):
    parser = FlagParser(__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG_FOLDER / "sun_gzsl.yaml")
    parser.add_argument("--json", type=Path, default=None, help="write the record here")
    options, overrides = parse_flags(parser, argv)

    config = read_config(options.config, overrides)
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)

    record = run(options.features, config)
    print(json.dumps(record))
    if options.json:
        write_text(options.json, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
