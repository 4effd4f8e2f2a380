"""Write a file in the golden format from the plain transcription, of any sizes and hyperparameters, to test parity.py with."""
import dataclasses
import json
from pathlib import Path

from scegg.method import plain as literal
import numpy as np
import parity
import torch
from torch.nn import functional as F

from scegg.config import read_config
from scegg.method.eggn import EGGN
from model import SCEN, global_classifier

SUN = Path(__file__).resolve().parents[1] / "wandb_config" / "sun_gzsl.yaml"
KEYS = {ours: theirs for theirs, ours in parity.SCEN_NAMES.items()}


def published_eggn_name(name):
    """The published file calls the feedback network F."""
    return name.replace("Fb.", "F.", 1)


def snapshot(prefix, module, names=lambda name: name):
    return {f"{prefix}/{names(name)}": value.detach().clone() for name, value in module.named_parameters()}


def gradients(prefix, module, names=lambda name: name):
    return {f"{prefix}/{names(name)}": value.grad.clone() for name, value in module.named_parameters()}


def three_steps(module, loss):
    """Three steps of RMSprop, as torch does them by default, on `loss()`."""
    optimizer = torch.optim.RMSprop(module.parameters(), lr=1e-4, weight_decay=1e-4, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def scen_part(scen, raw, y, seen):
    attention, h, scores, S = literal.scen_forward(scen, raw)
    g = scen.gen.compose(h.transpose(1, 2)).squeeze(2)
    local, globally = literal.scen_losses(scen, raw, y, seen)
    (local + globally).backward()
    out = {"F": raw, "y": y, "attention": attention, "local_features": h, "attribute_scores": scores, "local_logits": S,
           "global_feature_mlp": g, "global_logits": scen.gen.global_cls(g), "global_feature_avg": h.mean(dim=1),
           "loss_local": local, "loss_global": globally}
    out = {f"scen/{key}": value for key, value in out.items()}
    out |= snapshot("scen/param", scen, KEYS.get) | gradients("scen/grad", scen, KEYS.get)
    three_steps(scen, lambda: sum(literal.scen_losses(scen, raw, y, seen)))
    return out | snapshot("scen/param_after_3_steps", scen, KEYS.get)


def distillation_part(classifier, x, S):
    loss = F.mse_loss(classifier(x), S)
    loss.backward()
    out = {"distil/loss": loss} | snapshot("distil/param", classifier) | gradients("distil/grad", classifier)
    three_steps(classifier, lambda: F.mse_loss(classifier(x), S))
    return out | snapshot("distil/param_after_3_steps", classifier)


def eggn_part(eggn, x, y, unseen, B, iterations, logged_gamma):
    config, T, K = eggn.config, eggn.config.critic_iter, eggn.att.shape[1]
    out, rows = snapshot("eggn/param", eggn, published_eggn_name), []
    for i in range(iterations * config.feedback_loop):
        index, eps, alpha = torch.randint(len(x), (T + 1, B)), torch.randn(T + 1, B, K), torch.rand(T, B, 1)
        unseen_y, noise = unseen[torch.randint(len(unseen), (B,))], torch.randn(B, K)
        weight = float(eggn.lambda1)
        losses = literal.iteration(eggn, x[index], y[index], eps, alpha, unseen_y, noise, i // iterations == 1).double()
        losses[3] *= weight
        losses[1:4] *= logged_gamma
        rows.append({"batch_index": index, "eps": eps, "alpha": alpha, "unseen_label": unseen_y[None], "noise": noise[None],
                     "log": losses[None], "lambda1": eggn.lambda1.clone()[None]})
    out |= {f"eggn/{key}": torch.cat([row[key] for row in rows]) for key in rows[0]}
    return out | snapshot("eggn/param_after", eggn, published_eggn_name)


def write(path, seed=0, B=7, C=9, Cs=6, K=11, D=24, side=3, hidden=20, distill_hidden=32, n=40, iterations=2, log_gamma=False, **changes):
    """A golden file of these sizes, the other hyperparameters being those of the published file but for `changes`."""
    torch.manual_seed(seed)
    with np.load(parity.GOLDEN) as published:
        given = json.loads(str(published["hyperparameters"])) | changes | {"iterations_per_loop": iterations}
    config = read_config(SUN, {})
    known = {key: value for key, value in given.items() if hasattr(config, key)}
    config = dataclasses.replace(config, **{"a2": given["a1"]} | known, ngh=hidden, ndh=hidden + 3, distill_hidden=distill_hidden)
    order = torch.randperm(C)
    seen, unseen, att, w2v = order[:Cs].sort()[0], order[Cs:].sort()[0], torch.rand(C, K), torch.randn(K, 10)
    scen = SCEN(w2v, att, D)
    torch.nn.init.normal_(scen.len.W2, std=0.3)
    raw, maps = torch.rand(B, D, side, side), torch.rand(n, D, side, side)
    y = seen[torch.arange(n) % Cs]
    arrays = {"seen": seen, "unseen": unseen, "att": att, "w2v": w2v} | scen_part(scen, raw, seen[torch.randint(Cs, (B,))], seen)
    with torch.no_grad():
        scen.gen.scaler.fit(literal.scen_forward(scen, maps)[1].mean(dim=1))
    x, S = literal.dense_features(scen, maps)
    test_x = literal.dense_features(scen, raw)[0]
    arrays |= {"train/F": maps, "train/y": y, "train/min": scen.gen.scaler.minimum, "train/max": scen.gen.scaler.maximum, "train/x": x,
               "train/local_logits": S, "test/x": test_x}
    classifier = global_classifier(D, distill_hidden, C)
    arrays |= distillation_part(classifier, x, S)
    eggn = EGGN(D, att, classifier, config).to("cpu")
    arrays |= eggn_part(eggn, x, y, unseen, B, iterations, config.gammaD if log_gamma else 1.0)
    with torch.no_grad():
        noise, a = torch.randn(4, K), att[unseen[-1]].expand(4, K)
        fake = eggn.G(noise, a)
        fake = eggn.G.output(eggn.G.hidden(noise, a) + config.a2 * eggn.Fb(eggn.Dec.hidden(fake)))
        target, predicted = torch.randint(C, (2, 60))
        arrays |= {"classifier/input": eggn.Dec.classifier_input(test_x), "synth/noise": noise, "synth/feature": fake,
                   "metric/target": target, "metric/pred": predicted,
                   "metric/mean_per_class_accuracy": torch.tensor(literal.accuracy(target, predicted))}
    np.savez(path, hyperparameters=json.dumps(given), log_columns=parity.LOG_COLUMNS,
             **{key: value.detach().numpy() for key, value in arrays.items()})
