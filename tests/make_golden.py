"""Write files in the golden one's format from the plain transcription, to test parity.py with.

Their sizes and hyperparameters are free.
"""

import dataclasses
import json

import numpy as np
import torch
from torch.nn import functional as F

import parity
from model import SCEN, global_classifier
from scegg.config import read_config
from scegg.method import plain
from scegg.method.eggn import EGGN

# Our names of SCEN's parameters, and the published ones.
PUBLISHED_NAMES = {ours: theirs for theirs, ours in parity.SCEN_NAMES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a file is: images, classes, networks, iterations."""

    B: int = 7  # images in a batch
    C: int = 9  # classes
    Cs: int = 6  # seen classes
    K: int = 11  # attributes
    D: int = 24  # channels
    side: int = 3  # of a map
    hidden: int = 20  # units of EGGN's networks
    distill_hidden: int = 32  # units of the global classifier
    n: int = 40  # training images
    iterations: int = 2  # of EGGN in each loop


def write(path, seed=0, log_gamma=False, **changes):
    """Write a file of these sizes and hyperparameters; the others are the published file's.

    changes: fields of Sizes, keys of the hyperparameters. log_gamma: whether the log of the
    critic's losses carries gammaD.
    """
    own_sizes = {field.name for field in dataclasses.fields(Sizes)} & set(changes)
    sizes = Sizes(**{name: changes.pop(name) for name in own_sizes})
    given = published_hyperparameters() | changes | {"iterations_per_loop": sizes.iterations}
    config = config_of(given, sizes)

    # The draws below come from one stream: their order decides what the file holds.
    torch.manual_seed(seed)
    inputs = draw_inputs(sizes)
    arrays, scen = scen_part(inputs, sizes)
    arrays |= dense_features_part(scen, arrays)
    classifier = global_classifier(sizes.D, sizes.distill_hidden, sizes.C)
    arrays |= distillation_part(classifier, arrays["train/x"], arrays["train/local_logits"])

    eggn = EGGN(sizes.D, inputs["att"], classifier, config).to("cpu")
    logged_gamma = config.gammaD if log_gamma else 1.0
    arrays |= eggn_part(eggn, arrays, sizes, logged_gamma)
    arrays |= evaluation_part(eggn, arrays, sizes)

    numbers = {key: value.detach().numpy() for key, value in arrays.items()}
    facts = {"hyperparameters": json.dumps(given), "log_columns": parity.LOG_COLUMNS}
    np.savez(path, **facts, **numbers)


def published_hyperparameters():
    """The hyperparameters of the published file."""
    with np.load(parity.GOLDEN) as published:
        return json.loads(str(published["hyperparameters"]))


def config_of(given, sizes):
    """SUN's config with a file's hyperparameters and sizes laid over it."""
    config = read_config(parity.SUN, {})
    known = {key: value for key, value in given.items() if hasattr(config, key)}
    config = dataclasses.replace(config, **{"a2": given["a1"]} | known)
    return dataclasses.replace(
        config,
        ngh=sizes.hidden,
        ndh=sizes.hidden + 3,
        distill_hidden=sizes.distill_hidden,
    )


def draw_inputs(sizes):
    """Classes, attributes and word vectors, in a dict by the file's keys."""
    order = torch.randperm(sizes.C)
    return {
        "seen": order[: sizes.Cs].sort()[0],
        "unseen": order[sizes.Cs :].sort()[0],
        "att": torch.rand(sizes.C, sizes.K),
        "w2v": torch.randn(sizes.K, 10),
    }


def published_eggn_name(name):
    """A parameter of EGGN: the published file calls the feedback network F."""
    return name.replace("Fb.", "F.", 1)


def parameters(prefix, module, names=parity.same_name):
    """A module's parameters as they are now, by the file's keys."""
    return {
        f"{prefix}/{names(name)}": value.detach().clone()
        for name, value in module.named_parameters()
    }


def gradients(prefix, module, names=parity.same_name):
    """The gradients of a module's parameters, by the file's keys."""
    return {
        f"{prefix}/{names(name)}": value.grad.clone() for name, value in module.named_parameters()
    }


def three_steps(module, loss):
    """Three steps of RMSprop, as torch does them by default, on `loss()`."""
    settings = {"lr": 1e-4, "weight_decay": 1e-4, "momentum": 0.9}
    optimizer = torch.optim.RMSprop(module.parameters(), **settings)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def scen_part(inputs, sizes):
    """(arrays by key, SCEN after its three steps): stage 1, and the images of both stages."""
    scen = SCEN(inputs["w2v"], inputs["att"], sizes.D)
    torch.nn.init.normal_(scen.len.W2, std=0.3)
    raw = torch.rand(sizes.B, sizes.D, sizes.side, sizes.side)
    train_maps = torch.rand(sizes.n, sizes.D, sizes.side, sizes.side)
    seen = inputs["seen"]
    y = seen[torch.randint(sizes.Cs, (sizes.B,))]

    out = inputs | {"train/F": train_maps, "train/y": seen[torch.arange(sizes.n) % sizes.Cs]}
    out |= scen_outputs(scen, raw, y, seen)
    out |= parameters("scen/param", scen, PUBLISHED_NAMES.get)
    out |= gradients("scen/grad", scen, PUBLISHED_NAMES.get)
    three_steps(scen, lambda: sum(plain.scen_losses(scen, raw, y, seen)))
    out |= parameters("scen/param_after_3_steps", scen, PUBLISHED_NAMES.get)
    return out, scen


def scen_outputs(scen, raw, y, seen):
    """All that SCEN computes of a batch of raw maps, by key; leaves the gradients of its losses."""
    attention, h, scores, S = plain.scen_forward(scen, raw)
    g = scen.gen.compose(h.transpose(1, 2)).squeeze(2)
    local, globally = plain.scen_losses(scen, raw, y, seen)
    (local + globally).backward()

    return {
        "scen/F": raw,
        "scen/y": y,
        "scen/attention": attention,
        "scen/local_features": h,
        "scen/attribute_scores": scores,
        "scen/local_logits": S,
        "scen/global_feature_mlp": g,
        "scen/global_logits": scen.gen.global_cls(g),
        "scen/global_feature_avg": h.mean(dim=1),
        "scen/loss_local": local,
        "scen/loss_global": globally,
    }


def dense_features_part(scen, arrays):
    """The scaler's range and the dense features of training and test images, by key."""
    scaler = scen.gen.scaler
    with torch.no_grad():
        scaler.fit(plain.scen_forward(scen, arrays["train/F"])[1].mean(dim=1))
    x, S = plain.dense_features(scen, arrays["train/F"])
    test_x, _ = plain.dense_features(scen, arrays["scen/F"])

    return {
        "train/min": scaler.minimum,
        "train/max": scaler.maximum,
        "train/x": x,
        "train/local_logits": S,
        "test/x": test_x,
    }


def distillation_part(classifier, x, S):
    """Stage 2, by key."""
    loss = F.mse_loss(classifier(x), S)
    loss.backward()
    out = {"distil/loss": loss}
    out |= parameters("distil/param", classifier)
    out |= gradients("distil/grad", classifier)

    three_steps(classifier, lambda: F.mse_loss(classifier(x), S))
    return out | parameters("distil/param_after_3_steps", classifier)


def eggn_part(eggn, arrays, sizes, logged_gamma):
    """Stage 3, by key: all loops, with every draw. logged_gamma: what the critic's log carries."""
    out = parameters("eggn/param", eggn, published_eggn_name)
    rows = []
    for i in range(sizes.iterations * eggn.config.feedback_loop):
        feedback = i // sizes.iterations == 1
        rows.append(eggn_iteration(eggn, arrays, sizes.B, feedback, logged_gamma))

    for name in rows[0]:
        out[f"eggn/{name}"] = torch.cat([row[name] for row in rows])
    return out | parameters("eggn/param_after", eggn, published_eggn_name)


def eggn_iteration(eggn, arrays, B, feedback, logged_gamma):
    """One iteration's draws, losses and lambda1, each with a first axis to append along."""
    x, y, unseen = arrays["train/x"], arrays["train/y"], arrays["unseen"]
    T, K = eggn.config.critic_iter, eggn.att.shape[1]
    index, eps = torch.randint(len(x), (T + 1, B)), torch.randn(T + 1, B, K)
    alpha = torch.rand(T, B, 1)
    unseen_y = unseen[torch.randint(len(unseen), (B,))]
    noise = torch.randn(B, K)

    weight = float(eggn.lambda1)
    draws = x[index], y[index], eps, alpha, unseen_y, noise
    losses = plain.iteration(eggn, *draws, feedback).double()
    losses[3] *= weight  # the published log has the penalty times lambda1
    losses[1:4] *= logged_gamma

    return {
        "batch_index": index,
        "eps": eps,
        "alpha": alpha,
        "unseen_label": unseen_y[None],
        "noise": noise[None],
        "log": losses[None],
        "lambda1": eggn.lambda1.clone()[None],
    }


@torch.no_grad()
def evaluation_part(eggn, arrays, sizes):
    """The classifiers' input, four synthetic features of an unseen class and the metric, by key."""
    noise = torch.randn(4, sizes.K)
    a = eggn.att[arrays["unseen"][-1]].expand(4, sizes.K)
    feedback = eggn.Fb(eggn.Dec.hidden(eggn.G(noise, a)))
    fake = eggn.G.output(eggn.G.hidden(noise, a) + eggn.config.a2 * feedback)

    target, predicted = torch.randint(sizes.C, (2, 60))
    return {
        "classifier/input": eggn.Dec.classifier_input(arrays["test/x"]),
        "synth/noise": noise,
        "synth/feature": fake,
        "metric/target": target,
        "metric/pred": predicted,
        "metric/mean_per_class_accuracy": torch.tensor(plain.accuracy(target, predicted)),
    }
