"""The project's functions against published numbers, and against a plain transcription."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

import make_golden
import parity
from helpers import GOLDEN, ROOT, SUN_CONFIG
from model import SCEN, Critic, global_classifier
from scegg.config import read_config
from scegg.features.reader import normalize_positions
from scegg.method import plain
from scegg.method.eggn import EGGN


def too_large(errors):
    """The groups whose error is above the tolerance."""
    return {group: error for group, error in errors.items() if error > parity.TOLERANCE}


def test_golden_numbers():
    errors, _ = parity.measure(GOLDEN)
    assert len(errors) >= 15
    assert too_large(errors) == {}


def run_parity(path):
    """tests/parity.py on a file, as a process."""
    command = [sys.executable, ROOT / "tests/parity.py", path]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line_says_what_differs(tmp_path):
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    arrays["scen/local_logits"] = arrays["scen/local_logits"] * 1.001
    np.savez(tmp_path / "changed.npz", **arrays)

    good = run_parity(GOLDEN)
    assert good.returncode == 0 and "above" not in good.stdout

    bad = run_parity(tmp_path / "changed.npz")
    assert bad.returncode == 1
    above = [line for line in bad.stdout.splitlines() if "above" in line]
    assert [line.split("  ")[0] for line in above] == ["scen forward"]


OTHER_SIZES = {
    "B": 16,
    "C": 20,
    "Cs": 14,
    "K": 33,
    "D": 128,
    "side": 4,
    "hidden": 64,
    "n": 120,
    "iterations": 3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 1},
        {"encoded_noise": False},
        {"freeze_dec": True},
        {"gammaD": 10.0, "gammaG": 10.0},
        {"gammaD": 10.0, "gammaG": 10.0, "log_gamma": True},
        {"a1": 0.3, "a2": 0.9},
        {"a1": 0.0, "a2": 0.0},
        {"critic_iter": 1},
        {"feedback_loop": 1},
        {"feedback_loop": 3},
        {"K": 1},
        OTHER_SIZES,
    ],
)
def test_files_of_other_sizes_and_hyperparameters(tmp_path, changes):
    """Files that the plain transcription wrote.

    It is not known how the published code logs gammaD: both ways are read.
    """
    make_golden.write(tmp_path / "other.npz", **changes)
    errors, _ = parity.measure(tmp_path / "other.npz")
    assert len(errors) == 15
    assert too_large(errors) == {}


@pytest.mark.parametrize("B, D, K, C, side", [(5, 16, 7, 6, 2), (12, 64, 31, 10, 4)])
def test_scen_equals_transcription(B, D, K, C, side):
    torch.manual_seed(B)
    att, raw = torch.rand(C, K), torch.rand(B, D, side, side)
    scen = SCEN(torch.randn(K, 20), att, D)
    # W2 is zero at first: attention would not be exercised.
    torch.nn.init.normal_(scen.len.W2, std=0.1)
    seen = torch.arange(0, C, 2)
    labels = seen[torch.randint((C + 1) // 2, (B,))]

    ours = scen.losses(normalize_positions(raw), labels, seen)
    theirs = plain.scen_losses(scen, raw, labels, seen)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    our_gradients = torch.autograd.grad(sum(ours), list(scen.parameters()))
    their_gradients = torch.autograd.grad(sum(theirs), list(scen.parameters()))
    for gradient, expected in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    g, S = scen.embed(normalize_positions(raw))
    scen.gen.scaler.fit(g)
    expected = plain.dense_features(scen, raw)
    torch.testing.assert_close((scen.gen.scaler(g), S), expected, rtol=1e-4, atol=1e-5)


def small_config(**changes):
    """SUN's config with small networks and three critic steps."""
    small = {"ngh": 40, "ndh": 48, "critic_iter": 3, "lr": 1e-3}
    return dataclasses.replace(read_config(SUN_CONFIG, {}), **small | changes)


def two_equal_eggns(D, att, config):
    """Two EGGNs with the same weights, larger than at the start of a run.

    A deviation of 0.02 would leave most units in one half of the LeakyReLU.
    """
    guide = global_classifier(D, 20, len(att))
    first, second = (EGGN(D, att, guide, config).to("cpu") for _ in range(2))
    for parameter in first.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize(
    "changes",
    [
        {"a1": 0.7},
        {"a1": 0.0},
        {"a1": 1.0, "gammaD": 10.0, "gammaG": 10.0, "recons_weight": 0.1},
        {"a1": 0.5, "freeze_dec": True},
        {"a1": 0.5, "encoded_noise": False},
        {"vae_loss_weight": 0.5, "rec_seen_cls_weight": 0.0, "gen_unseen_cls_weight": 1.0},
    ],
)
@pytest.mark.parametrize("feedback", [False, True])
def test_eggn_iterations_equal_transcription(changes, feedback):
    config = small_config(**changes)
    B, D, K, C, T = 9, 26, 13, 8, config.critic_iter
    torch.manual_seed(1)
    ours, theirs = two_equal_eggns(D, torch.rand(C, K), config)
    start = {name: value.detach().clone() for name, value in ours.named_parameters()}
    feedback = feedback and config.a1 > 0

    for _ in range(3):
        x, y = torch.rand(T + 1, B, D), torch.randint(C, (T + 1, B))
        eps, alpha = torch.randn(T + 1, B, K), torch.rand(T, B, 1)
        noise, unseen = torch.randn(B, K), torch.randint(C, (B,))

        expected = plain.iteration(theirs, x, y, eps, alpha, unseen, noise, feedback)
        critic_losses = ours.critic_steps(x[:T], y[:T], eps[:T], alpha, feedback)
        generator_losses = ours.generator_step(x[T], y[T], eps[T], unseen, noise, feedback)
        losses = torch.cat([critic_losses, generator_losses])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)

    assert ours.lambda1.item() == pytest.approx(theirs.lambda1.item(), rel=1e-6)
    assert ours.lambda1.item() != config.lambda1
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    for (name, parameter), other in pairs:
        change, expected = parameter - start[name], other - start[name]
        assert (change - expected).abs().max() <= 1e-3 * expected.abs().max(), name


def penalty_by_double_backward(critic, x, fake, a, alpha):
    """The gradient penalty, which can be differentiated again."""
    xi = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(xi, a).sum(), xi, create_graph=True)
    return ((gradient.norm(dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("flat", [False, True])
def test_critic_gradients_equal_double_backward(flat):
    """Also where the critic is flat: there the penalty is 1, and its gradient 0 and not 0/0."""
    torch.manual_seed(3)
    B, D, K = 11, 17, 5
    critic, x, fake = Critic(D, K, 33), torch.rand(B, D), torch.rand(B, D)
    a, alpha = torch.rand(B, K), torch.rand(B, 1)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if flat:
        torch.nn.init.zeros_(critic.fc2.weight)

    lambda1 = torch.tensor(7.5, dtype=torch.float64)
    _, _, penalty = critic.loss_gradients(x, fake, a, alpha, 3.0, lambda1)
    assert not flat or penalty == 1
    ours = [parameter.grad.clone() for parameter in critic.parameters()]

    expected = penalty_by_double_backward(critic, x, fake, a, alpha)
    torch.testing.assert_close(penalty, expected)

    loss = 3.0 * (critic(fake, a).mean() - critic(x, a).mean() + lambda1 * expected)
    theirs = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
