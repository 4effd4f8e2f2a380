"""A whole run of the plain transcription (scegg/method/plain.py) on a feature file: its accuracies and its time are what train_joint.py is held against.

    python -m benchmarks.plain_run FEATURES.hdf5 --seed 1 --json record.json --batch_size 40 --scen_iterations 800

Everything is in RAM as it is in the file; stages 2 and 3 encode their batches anew in every step. Random draws are its own: runs agree with
train_joint.py's in distribution, not one by one. Every key of the config is a flag.
"""
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from scegg.method import plain as literal
from scegg.config import parse_flags, read_config
from scegg.features.reader import open_features
from scegg.method.eggn import EGGN
from model import SCEN, global_classifier
from scegg.method.embeddings import Embedding
from scegg.run.pipeline import SPLITS
from util import FlagParser, exit_on_user_error, peak_memory_gb, write_text


class Data:
    """A feature file in RAM: raw maps (N, D, h, w), labels, and class-balanced batches of trainval (section 5)."""

    def __init__(self, path: Path, batch_size: int):
        self.features = open_features(path)
        self.split, self.B = self.features.split, batch_size
        self.raw = self.features.raw(np.arange(len(self.split.labels)))
        self.y = torch.from_numpy(self.split.labels)
        self.members = {c: self.split.trainval[self.split.labels[self.split.trainval] == c] for c in self.split.seen}

    def batch(self):
        """(raw maps, labels) of min(Cs, B) distinct seen classes and max(B // Cs, 1) images of each."""
        seen = self.split.seen
        classes = np.random.choice(seen, min(len(seen), self.B), replace=False)
        rows = np.concatenate([np.random.choice(self.members[c], max(self.B // len(seen), 1)) for c in classes])
        return self.raw[rows], self.y[rows]


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit_scen(data: Data, scen: SCEN, config):
    """Stage 1, and the scaler on all of trainval."""
    optimizer, seen = literal.rmsprop(scen, config), torch.from_numpy(data.split.seen)
    for _ in range(config.scen_iterations):
        raw, y = data.batch()
        local, globally = literal.scen_losses(scen, raw, y, seen)
        step(optimizer, config.lambda_local * local + config.lambda_global * globally)
    scen.requires_grad_(False)
    with torch.no_grad():
        scen.gen.scaler.fit(torch.cat([literal.scen_forward(scen, data.raw[rows])[1].mean(dim=1)
                                       for rows in np.split(data.split.trainval, range(64, len(data.split.trainval), 64))]))


def distil(data: Data, scen: SCEN, classifier, config):
    """Stage 2."""
    optimizer = literal.rmsprop(classifier, config)
    for _ in range(config.distill_iterations):
        x, S = literal.dense_features(scen, data.batch()[0])
        step(optimizer, F.mse_loss(classifier(x), S))


def train_epoch(data: Data, scen: SCEN, eggn: EGGN, config):
    """An epoch of stage 3."""
    B, K, unseen = len(data.batch()[1]), eggn.att.shape[1], torch.from_numpy(data.split.unseen)
    for loop in range(config.feedback_loop):
        for _ in range(math.ceil(len(data.split.trainval) / B)):
            batches = [data.batch() for _ in range(config.critic_iter + 1)]
            # clamped: other batches than the scaler was fitted on round a last bit differently, which BCE refuses beyond [0, 1]
            x = [literal.dense_features(scen, raw)[0].clamp(0, 1) for raw, _ in batches]
            literal.iteration(eggn, x, [y for _, y in batches], torch.randn(config.critic_iter + 1, B, K), torch.rand(config.critic_iter, B, 1),
                              unseen[torch.randint(len(unseen), (B,))], torch.randn(B, K), feedback=loop == 1)


def embeddings(data: Data, scen: SCEN) -> dict[str, Embedding]:
    """Dense-semantic features and local logits of every split."""
    def embed(indices):
        x, S = zip(*(literal.dense_features(scen, data.raw[rows]) for rows in np.split(indices, range(64, len(indices), 64))))
        return Embedding(torch.cat(x), torch.cat(S), data.y[indices])

    return {name: embed(getattr(data.split, name)) for name in SPLITS}


def main(argv=None):
    parser = FlagParser(__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).resolve().parents[1] / "wandb_config" / "sun_gzsl.yaml")
    parser.add_argument("--json", type=Path, default=None, help="write the record here")
    options, overrides = parse_flags(parser, argv)
    config = read_config(options.config, overrides)
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    data, seconds, began = Data(options.features, config.batch_size), {}, time.perf_counter()

    def lap(name):
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = seconds.get(name, 0.0) + now - began, now

    att, D = torch.from_numpy(data.split.att), data.features.shape[0]
    scen = SCEN(torch.from_numpy(data.features.w2v), att, D)
    lap("read")
    fit_scen(data, scen, config)
    lap("scen")
    classifier = global_classifier(D, config.distill_hidden, len(att))
    distil(data, scen, classifier, config)
    lap("distill")
    eggn = literal.use_plain_adam(EGGN(D, att, classifier, config).to("cpu"))
    splits, epochs = embeddings(data, scen), []
    lap("embed")
    for epoch in range(1, config.nepoch + 1):
        train_epoch(data, scen, eggn, config)
        lap("eggn")
        acc_zs, (H, U, S) = literal.evaluate(eggn, splits, torch.from_numpy(data.split.unseen), config)
        lap("evaluate")
        epochs.append({"epoch": epoch} | {name: 100 * float(value) for name, value in
                                          (("acc_zs", acc_zs), ("acc_unseen", U), ("acc_seen", S), ("H", H))})
        print(epochs[-1], flush=True)
    best = {f"best_{name}": max((row[name] for row in epochs), default=0.0) for name in ("acc_zs", "H")}
    record = {"stage": "whole run of the transcription", "seed": config.seed, "epochs": epochs} | best | {
        "seconds": seconds, "all_seconds": sum(seconds.values()), "normalization": data.features.provenance.get("normalization"),
        "matmul_precision": config.matmul_precision} | peak_memory_gb(torch.device("cpu"))
    print(json.dumps(record))
    if options.json:
        write_text(options.json, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
