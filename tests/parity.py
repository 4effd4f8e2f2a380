"""Hold the project's own functions against numbers of the published implementation.

    python tests/parity.py tests/golden/published_scegg_small.npz

Rebuilds every computation of the file (SPEC section 11), prints the largest relative error of each group and exits 1
above 1e-4. An error is max |ours - published| / max |published| of a tensor. Parameters after optimiser steps are compared
by their change from the start, and there in the 2-norm: |ours - published| / |published| of a tensor's changes. RMSprop
and Adam divide a gradient by its own size, so an element whose gradient is all rounding error takes a step that is all
rounding error, in the published run as in ours: a float64 run differs from a plain float32 transcription by up to 3e-3
in such an element. The largest such element is printed beside the norm, for information.
"""
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scegg.config import read_config  # noqa: E402
from scegg.features.reader import normalize_positions  # noqa: E402
from scegg.method.eggn import EGGN  # noqa: E402
from scegg.method.evaluation import per_class_accuracy  # noqa: E402
from model import LEN, SCEN, global_classifier  # noqa: E402
from scegg.method.losses import classifier_step
from scegg.method.scen import rmsprop, scen_step  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden" / "published_scegg_small.npz"
TOLERANCE = 1e-4
LOG_COLUMNS = ("decoder_loss_last,critic_real_last,critic_fake_last,penalty_last,"
               "vae,rec_cls,unseen_cls,adversarial,decoder_on_fake,total_generator")
SCEN_NAMES = {"V": "len.V", "W1": "len.W1", "W2": "len.W2", "compose.0.weight": "gen.compose.0.weight",
              "compose.0.bias": "gen.compose.0.bias", "compose.2.weight": "gen.compose.2.weight",
              "compose.2.bias": "gen.compose.2.bias", "global_cls.weight": "gen.global_cls.weight",
              "global_cls.bias": "gen.global_cls.bias"}


class Golden:
    """A golden file's tensors by key, and the errors measured against them by group."""

    def __init__(self, path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.errors, self.elements = {}, {}

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def group(self, prefix):
        """{name: tensor} of the keys `prefix/name`."""
        return {key[len(prefix) + 1:]: self[key] for key in self.arrays if key.startswith(prefix + "/")}

    def compare(self, group, ours, published):
        ours, published = (torch.as_tensor(t).detach().double() for t in (ours, published))
        assert ours.shape == published.shape, f"{group}: shape {tuple(ours.shape)}, published {tuple(published.shape)}"
        self.record(self.errors, group, ours - published, published, torch.inf)

    def record(self, errors, group, difference, published, norm):
        """Keep the largest |difference| / |published| of a group, in this norm (inf: the largest element)."""
        if published.numel() == 0:
            return
        measure = lambda tensor: torch.linalg.vector_norm(tensor, norm).item()
        error = measure(difference) / (measure(published) or 1.0)
        errors[group] = max(errors.get(group, 0.0), float("inf") if np.isnan(error) else error)

    def compare_changes(self, group, module, names, start_prefix, end_prefix):
        """Parameters after steps, by their change from the start."""
        parameters = dict(module.named_parameters())
        for name, start in self.group(start_prefix).items():
            ours, published = (end.detach().double() - start.double() for end in (parameters[names(name)], self[f"{end_prefix}/{name}"]))
            self.record(self.errors, group, ours - published, published, 2)
            self.record(self.elements, group, ours - published, published, torch.inf)


def golden_config(golden):
    """SUN's config with the file's hyperparameters laid over it (and weights of 1 for the two losses of stage 1)."""
    given = json.loads(str(golden.arrays["hyperparameters"]))
    config = read_config(Path(__file__).resolve().parents[1] / "wandb_config" / "sun_gzsl.yaml", {})
    known = {key: value for key, value in given.items() if hasattr(config, key)}
    hidden = {"ngh": len(golden["eggn/param/G.fc1.bias"]), "ndh": len(golden["eggn/param/D.fc1.bias"]),
              "distill_hidden": len(golden["distil/param/0.bias"])}
    return dataclasses.replace(config, **({"a2": given["a1"]} | known | hidden)), given["iterations_per_loop"]


def our_eggn_name(name):
    """A parameter of EGGN: the published file calls the feedback network F."""
    return name.replace("F.", "Fb.", 1) if name.startswith("F.") else name


def load(module, tensors, names=lambda name: name):
    module.load_state_dict({names(name): value for name, value in tensors.items()}, strict=False)
    assert {names(name) for name in tensors} == {name for name, _ in module.named_parameters()}
    return module


def check_scen(golden, config):
    maps, y, seen = normalize_positions(golden["scen/F"]), golden["scen/y"], golden["seen"]
    new = lambda: load(SCEN(golden["w2v"], golden["att"], maps.shape[2]), golden.group("scen/param"), SCEN_NAMES.get)
    scen = new()
    output = scen(maps)
    golden.compare("scen forward", output.attention.transpose(1, 2), golden["scen/attention"])
    golden.compare("scen forward", LEN.local_features(output.attention, maps), golden["scen/local_features"])
    golden.compare("scen forward", output.scores, golden["scen/attribute_scores"])
    golden.compare("scen forward", output.local_logits, golden["scen/local_logits"])
    g_mlp = scen.gen.compose_mlp(output.attention, maps)
    golden.compare("scen forward", g_mlp, golden["scen/global_feature_mlp"])
    golden.compare("scen forward", scen.gen.global_cls(g_mlp), golden["scen/global_logits"])
    golden.compare("scen forward", scen.gen.compose_avg(output.attention, maps), golden["scen/global_feature_avg"])
    local, globally = scen.losses(maps, y, seen)
    golden.compare("scen losses", local, golden["scen/loss_local"])
    golden.compare("scen losses", globally, golden["scen/loss_global"])
    (config.lambda_local * local + config.lambda_global * globally).backward()
    parameters = dict(scen.named_parameters())
    for name, gradient in golden.group("scen/grad").items():
        golden.compare("scen gradients", parameters[SCEN_NAMES[name]].grad, gradient)
    scen = new()
    optimizer = rmsprop(scen.parameters(), config.scen_lr, config)
    for _ in range(3):
        scen_step(scen, optimizer, maps, y, seen, config)
    golden.compare_changes("scen 3 steps", scen, SCEN_NAMES.get, "scen/param", "scen/param_after_3_steps")
    return new()


def check_scaler(golden, scen):
    """The published run goes on from SCEN after its three steps."""
    load(scen, golden.group("scen/param_after_3_steps"), SCEN_NAMES.get)
    g, S = scen.embed(normalize_positions(golden["train/F"]))
    scen.gen.scaler.fit(g)
    golden.compare("scaler", scen.gen.scaler.minimum, golden["train/min"])
    golden.compare("scaler", scen.gen.scaler.maximum, golden["train/max"])
    golden.compare("dense features", scen.gen.scaler(g), golden["train/x"])
    golden.compare("dense features", S, golden["train/local_logits"])
    g, _ = scen.embed(normalize_positions(golden["scen/F"]))
    golden.compare("dense features", scen.gen.scaler(g), golden["test/x"])


def check_distillation(golden, config):
    x, S = golden["train/x"], golden["train/local_logits"]
    new = lambda: load(global_classifier(x.shape[1], config.distill_hidden, S.shape[1]), golden.group("distil/param"))
    classifier = new()
    loss = F.mse_loss(classifier(x), S)
    loss.backward()
    golden.compare("distillation loss", loss, golden["distil/loss"])
    parameters = dict(classifier.named_parameters())
    for name, gradient in golden.group("distil/grad").items():
        golden.compare("distillation gradients", parameters[name].grad, gradient)
    classifier = new()
    optimizer = rmsprop(classifier.parameters(), config.scen_lr, config)
    for _ in range(3):
        classifier_step(classifier, optimizer, x, S)
    golden.compare_changes("distillation 3 steps", classifier, lambda name: name, "distil/param",
                           "distil/param_after_3_steps")
    return classifier


def check_eggn(golden, config, iterations, classifier):
    x, y, T = golden["train/x"], golden["train/y"], config.critic_iter
    eggn = load(EGGN(x.shape[1], golden["att"], classifier, config), golden.group("eggn/param"), our_eggn_name).to("cpu")
    batches, eps = (golden[f"eggn/{key}"].unflatten(0, (-1, T + 1)) for key in ("batch_index", "eps"))
    alpha = golden["eggn/alpha"].unflatten(0, (-1, T))
    assert str(golden.arrays["log_columns"]) == LOG_COLUMNS, f"log columns {golden.arrays['log_columns']}, expected {LOG_COLUMNS}"
    rows = golden["eggn/log"]
    logged = []
    for i in range(len(rows)):
        feedback = i // iterations == 1
        critic, generator = batches[i, :T], batches[i, T]
        before = eggn.lambda1.clone()
        losses = eggn.critic_steps(x[critic], y[critic], eps[i, :T], alpha[i], feedback).double()
        losses[3] *= before  # the published log has the penalty times lambda1
        generator_losses = eggn.generator_step(x[generator], y[generator], eps[i, T], golden["eggn/unseen_label"][i],
                                               golden["eggn/noise"][i], feedback)
        logged.append(torch.cat([losses, generator_losses.double()]))
        golden.compare("eggn lambda1", eggn.lambda1, golden["eggn/lambda1"][i])
    # the file does not say whether its critic columns carry gammaD: all or none, whichever fits
    with_gamma = torch.ones(rows.shape[1], dtype=torch.float64)
    with_gamma[1:4] = config.gammaD
    logged = min(torch.stack(logged), torch.stack(logged) * with_gamma, key=lambda ours: (ours - rows).abs().sum())
    for ours, published in zip(logged.flatten(), rows.flatten()):
        golden.compare("eggn losses", ours, published)
    golden.compare_changes("eggn parameters", eggn, our_eggn_name, "eggn/param", "eggn/param_after")
    return eggn


def check_evaluation(golden, eggn):
    golden.compare("classifier input", eggn.Dec.classifier_input(golden["test/x"]), golden["classifier/input"])
    noise, published = golden["synth/noise"], golden["synth/feature"]
    # the file does not record which unseen class it synthesised: the one that fits
    candidates = [eggn.synthesize(label.expand(len(noise)), noise) for label in golden["unseen"]]
    golden.compare("synthesis", min(candidates, key=lambda ours: (ours - published).abs().max()), published)
    target, predicted = golden["metric/target"], golden["metric/pred"]
    classes = int(max(target.max(), predicted.max())) + 1
    golden.compare("metric", per_class_accuracy(target, predicted, classes), golden["metric/mean_per_class_accuracy"])


def measure(path):
    """{group: largest relative error} of a golden file, and {group: largest element's} of the groups measured in the 2-norm."""
    golden = Golden(path)
    config, iterations = golden_config(golden)
    check_scaler(golden, check_scen(golden, config))
    eggn = check_eggn(golden, config, iterations, check_distillation(golden, config))
    check_evaluation(golden, eggn)
    return golden.errors, golden.elements


def main(argv):
    if len(argv) != 2 or not Path(argv[1]).is_file():
        print("usage: python tests/parity.py FILE.npz", file=sys.stderr)
        sys.exit(2)
    errors, elements = measure(argv[1])
    for group, error in errors.items():
        print(f"{group:<28}{error:10.2e}" + (f"   (largest element {elements[group]:.2e})" if group in elements else "")
              + ("" if error <= TOLERANCE else f"   above {TOLERANCE}"))
    sys.exit(0 if max(errors.values()) <= TOLERANCE else 1)


if __name__ == "__main__":
    main(sys.argv)
