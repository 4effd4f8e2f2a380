"""Hold the project's own functions against numbers of the published implementation.

    python tests/parity.py tests/golden/published_scegg_small.npz

Rebuilds every computation of the file (docs/method.md, section 11) and prints the largest relative
error of each group. Exits with 1 if one is above 1e-4.

An error is max |ours - published| / max |published| of a tensor. Parameters after optimiser steps
are compared by their change from the start, in the 2-norm: |ours - published| / |published|.

Why the 2-norm: RMSprop and Adam divide a gradient by its own size. Where a gradient is nothing but
rounding error, so is the step, in the published run as in ours. A float64 run differs from a plain
float32 transcription by up to 3e-3 in such an element. The largest element's error is printed
beside the norm, for information.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import LEN, SCEN, global_classifier  # noqa: E402
from scegg.config import read_config  # noqa: E402
from scegg.features.reader import normalize_positions  # noqa: E402
from scegg.method.eggn import EGGN, LOSSES  # noqa: E402
from scegg.method.evaluation import per_class_accuracy  # noqa: E402
from scegg.method.scen import rmsprop, scen_step  # noqa: E402
from scegg.method.steps import classifier_step  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "published_scegg_small.npz"
SUN = ROOT / "wandb_config" / "sun_gzsl.yaml"
TOLERANCE = 1e-4
LOG_COLUMNS = (
    "decoder_loss_last,critic_real_last,critic_fake_last,penalty_last,"
    "vae,rec_cls,unseen_cls,adversarial,decoder_on_fake,total_generator"
)
# our names of these columns; a loss that we have besides is in none of them
OUR_COLUMNS = (
    "loss_Dec",
    "critic_real",
    "critic_fake",
    "penalty",
    "loss_vae",
    "loss_rec_cls",
    "loss_unseen_cls",
    "loss_adv",
    "loss_Dec_fake",
    "loss_G",
)

# The published names of SCEN's parameters, and ours.
SCEN_NAMES = {
    "V": "len.V",
    "W1": "len.W1",
    "W2": "len.W2",
    "compose.0.weight": "gen.compose.0.weight",
    "compose.0.bias": "gen.compose.0.bias",
    "compose.2.weight": "gen.compose.2.weight",
    "compose.2.bias": "gen.compose.2.bias",
    "global_cls.weight": "gen.global_cls.weight",
    "global_cls.bias": "gen.global_cls.bias",
}


def same_name(name):
    """The name of a parameter that is called alike in both implementations."""
    return name


class Golden:
    """A golden file's tensors by key, and the errors measured against them by group."""

    def __init__(self, path, device):
        self.device = device
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.errors, self.elements = {}, {}

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key])).to(self.device)

    def group(self, prefix):
        """{name: tensor} of the keys `prefix/name`."""
        start = f"{prefix}/"
        return {key.removeprefix(start): self[key] for key in self.arrays if key.startswith(start)}

    def compare(self, group, ours, published):
        """Record the largest element's error of a tensor."""
        ours = torch.as_tensor(ours).detach().cpu().double()
        published = torch.as_tensor(published).detach().cpu().double()
        shapes = f"shape {tuple(ours.shape)}, published {tuple(published.shape)}"
        assert ours.shape == published.shape, f"{group}: {shapes}"

        self.record(self.errors, group, ours - published, published, torch.inf)

    def record(self, errors, group, difference, published, norm):
        """Keep a group's largest |difference| / |published| in this norm (inf: largest element)."""
        if published.numel() == 0:
            return

        size = torch.linalg.vector_norm(published, norm).item() or 1.0
        error = torch.linalg.vector_norm(difference, norm).item() / size
        if np.isnan(error):
            error = float("inf")
        errors[group] = max(errors.get(group, 0.0), error)

    def compare_changes(self, group, module, names, start_prefix, end_prefix):
        """Record the errors of parameters after steps, by their change from the start."""
        parameters = dict(module.named_parameters())
        for name, start in self.group(start_prefix).items():
            start = start.double()
            ours = parameters[names(name)].detach().double() - start
            published = self[f"{end_prefix}/{name}"].double() - start

            self.record(self.errors, group, ours - published, published, 2)
            self.record(self.elements, group, ours - published, published, torch.inf)


def golden_config(golden):
    """(config, iterations in a loop): SUN's config with the file's hyperparameters laid over it.

    The two losses of stage 1 weigh 1.
    """
    given = json.loads(str(golden.arrays["hyperparameters"]))
    config = read_config(SUN, {})
    known = {key: value for key, value in given.items() if hasattr(config, key)}
    hidden = {
        "ngh": len(golden["eggn/param/G.fc1.bias"]),
        "ndh": len(golden["eggn/param/D.fc1.bias"]),
        "distill_hidden": len(golden["distil/param/0.bias"]),
    }
    changes = {"a2": given["a1"]} | known | hidden
    return dataclasses.replace(config, **changes), given["iterations_per_loop"]


def our_eggn_name(name):
    """A parameter of EGGN: the published file calls the feedback network F."""
    return name.replace("F.", "Fb.", 1) if name.startswith("F.") else name


def load(module, tensors, names=same_name):
    """A module with the file's parameters, all of which it must have, and no others."""
    module.to(next(iter(tensors.values())).device)
    state = {names(name): value for name, value in tensors.items()}
    module.load_state_dict(state, strict=False)
    assert set(state) == {name for name, _ in module.named_parameters()}
    return module


def published_scen(golden):
    """SCEN with the parameters that the published run began with."""
    scen = SCEN(golden["w2v"], golden["att"], golden["scen/F"].shape[1])
    return load(scen, golden.group("scen/param"), SCEN_NAMES.get)


def check_scen(golden, config):
    """Stage 1: the forward pass, the two losses, their gradients, three steps."""
    maps, y, seen = normalize_positions(golden["scen/F"]), golden["scen/y"], golden["seen"]
    scen = published_scen(golden)
    check_scen_forward(golden, scen, maps)

    local, globally = scen.losses(maps, y, seen)
    golden.compare("scen losses", local, golden["scen/loss_local"])
    golden.compare("scen losses", globally, golden["scen/loss_global"])

    (config.lambda_local * local + config.lambda_global * globally).backward()
    parameters = dict(scen.named_parameters())
    for name, gradient in golden.group("scen/grad").items():
        golden.compare("scen gradients", parameters[SCEN_NAMES[name]].grad, gradient)

    scen = published_scen(golden)
    optimizer = rmsprop(scen.parameters(), config.scen_lr, config)
    for _ in range(3):
        scen_step(scen, optimizer, maps, y, seen, config)
    prefixes = "scen/param", "scen/param_after_3_steps"
    golden.compare_changes("scen 3 steps", scen, SCEN_NAMES.get, *prefixes)


def check_scen_forward(golden, scen, maps):
    """All that LEN and GEN compute of a batch of normalised maps."""
    output = scen(maps)
    g_mlp = scen.gen.compose_mlp(output.attention, maps)

    ours = {
        "attention": output.attention.transpose(1, 2),
        "local_features": LEN.local_features(output.attention, maps),
        "attribute_scores": output.scores,
        "local_logits": output.local_logits,
        "global_feature_mlp": g_mlp,
        "global_logits": scen.gen.global_cls(g_mlp),
        "global_feature_avg": scen.gen.compose_avg(output.attention, maps),
    }
    for name, tensor in ours.items():
        golden.compare("scen forward", tensor, golden[f"scen/{name}"])


def check_scaler(golden):
    """The scaler and the dense features; the published run takes SCEN after its three steps."""
    scen = published_scen(golden)
    load(scen, golden.group("scen/param_after_3_steps"), SCEN_NAMES.get)
    scaler = scen.gen.scaler

    g, S = scen.embed(normalize_positions(golden["train/F"]))
    scaler.fit(g)
    golden.compare("scaler", scaler.minimum, golden["train/min"])
    golden.compare("scaler", scaler.maximum, golden["train/max"])
    golden.compare("dense features", scaler(g), golden["train/x"])
    golden.compare("dense features", S, golden["train/local_logits"])

    g, _ = scen.embed(normalize_positions(golden["scen/F"]))
    golden.compare("dense features", scaler(g), golden["test/x"])


def published_classifier(golden, config):
    """The global classifier with the parameters that its distillation began with."""
    channels, classes = golden["train/x"].shape[1], golden["train/local_logits"].shape[1]
    classifier = global_classifier(channels, config.distill_hidden, classes)
    return load(classifier, golden.group("distil/param"))


def check_distillation(golden, config):
    """Stage 2: the loss, its gradients, three steps; returns the classifier after them."""
    x, S = golden["train/x"], golden["train/local_logits"]
    classifier = published_classifier(golden, config)
    loss = F.mse_loss(classifier(x), S)
    loss.backward()
    golden.compare("distillation loss", loss, golden["distil/loss"])

    parameters = dict(classifier.named_parameters())
    for name, gradient in golden.group("distil/grad").items():
        golden.compare("distillation gradients", parameters[name].grad, gradient)

    classifier = published_classifier(golden, config)
    optimizer = rmsprop(classifier.parameters(), config.scen_lr, config)
    for _ in range(3):
        classifier_step(classifier, optimizer, x, S)
    prefixes = "distil/param", "distil/param_after_3_steps"
    golden.compare_changes("distillation 3 steps", classifier, same_name, *prefixes)
    return classifier


def check_eggn(golden, config, iterations, classifier):
    """Stage 3: all iterations of the file with its own draws; returns EGGN after them."""
    columns = str(golden.arrays["log_columns"])
    assert columns == LOG_COLUMNS, f"log columns {columns}, expected {LOG_COLUMNS}"
    eggn = EGGN(golden["train/x"].shape[1], golden["att"], classifier, config)
    eggn = load(eggn, golden.group("eggn/param"), our_eggn_name)

    rows = golden["eggn/log"]
    logged = []
    for i in range(len(rows)):
        logged.append(replay_iteration(golden, eggn, i, feedback=i // iterations == 1))
        golden.compare("eggn lambda1", eggn.lambda1, golden["eggn/lambda1"][i])
    logged = torch.stack(logged)

    # The file does not say whether its critic columns carry gammaD: all or none, whichever fits.
    with_gamma = torch.ones(rows.shape[1], dtype=torch.float64, device=rows.device)
    with_gamma[1:4] = config.gammaD
    candidates = logged, logged * with_gamma
    logged = min(candidates, key=lambda ours: (ours - rows).abs().sum())
    for ours, published in zip(logged.flatten(), rows.flatten(), strict=True):
        golden.compare("eggn losses", ours, published)

    golden.compare_changes("eggn parameters", eggn, our_eggn_name, "eggn/param", "eggn/param_after")
    return eggn


def replay_iteration(golden, eggn, i, feedback):
    """Iteration i with the draws of the file; returns its ten losses in LOG_COLUMNS's order."""
    x, y, T = golden["train/x"], golden["train/y"], eggn.config.critic_iter
    batches = golden["eggn/batch_index"].unflatten(0, (-1, T + 1))[i]
    eps = golden["eggn/eps"].unflatten(0, (-1, T + 1))[i]
    alpha = golden["eggn/alpha"].unflatten(0, (-1, T))[i]
    unseen_y, noise = golden["eggn/unseen_label"][i], golden["eggn/noise"][i]

    before = eggn.lambda1.clone()
    critic, generator = batches[:T], batches[T]
    losses = eggn.critic_steps(x[critic], y[critic], eps[:T], alpha, feedback).double()
    losses[3] *= before  # the published log has the penalty times lambda1

    arguments = x[generator], y[generator], eps[T], unseen_y, noise
    generator_losses = eggn.generator_step(*arguments, feedback)
    losses = torch.cat([losses, generator_losses.double()])
    return losses[[LOSSES.index(name) for name in OUR_COLUMNS]]


def check_evaluation(golden, eggn):
    """The classifiers' input, a class synthesised, and the metric."""
    ours = eggn.Dec.classifier_input(golden["test/x"])
    golden.compare("classifier input", ours, golden["classifier/input"])

    # The file does not record which unseen class it synthesised: the one that fits.
    noise, published = golden["synth/noise"], golden["synth/feature"]
    candidates = [eggn.synthesize(label.expand(len(noise)), noise) for label in golden["unseen"]]
    closest = min(candidates, key=lambda ours: (ours - published).abs().max())
    golden.compare("synthesis", closest, published)

    target, predicted = golden["metric/target"], golden["metric/pred"]
    classes = int(max(target.max(), predicted.max())) + 1
    accuracy = per_class_accuracy(target, predicted, classes)
    golden.compare("metric", accuracy, golden["metric/mean_per_class_accuracy"])


def measure(path, device="cpu"):
    """Measure all errors of a golden file. device: where our functions compute.

    Returns {group: largest relative error} and, of the groups measured in the 2-norm,
    {group: largest element's error}.
    """
    golden = Golden(path, device)
    config, iterations = golden_config(golden)
    check_scen(golden, config)
    check_scaler(golden)
    classifier = check_distillation(golden, config)
    eggn = check_eggn(golden, config, iterations, classifier)
    check_evaluation(golden, eggn)
    return golden.errors, golden.elements


def main(argv):
    """Print the errors of the file that the command line names; exit with 1 if one is too large."""
    if len(argv) != 2 or not Path(argv[1]).is_file():
        print("usage: python tests/parity.py FILE.npz", file=sys.stderr)
        sys.exit(2)

    errors, elements = measure(argv[1])
    for group, error in errors.items():
        line = f"{group:<28}{error:10.2e}"
        if group in elements:
            line += f"   (largest element {elements[group]:.2e})"
        if error > TOLERANCE:
            line += f"   above {TOLERANCE}"
        print(line)
    sys.exit(0 if max(errors.values()) <= TOLERANCE else 1)


if __name__ == "__main__":
    main(sys.argv)
