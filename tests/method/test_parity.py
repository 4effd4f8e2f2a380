"""The project's functions against the published implementation's numbers, and against a plain transcription."""
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROOT

from scegg.method import plain
import make_golden
import parity
from scegg.config import read_config
from scegg.features.reader import normalize_positions
from scegg.method.eggn import EGGN
from model import SCEN, Critic, global_classifier


def test_golden_numbers():
    errors, _ = parity.measure(GOLDEN)
    assert len(errors) >= 15
    assert {group: error for group, error in errors.items() if error > parity.TOLERANCE} == {}


def test_command_line_says_what_differs(tmp_path):
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    arrays["scen/local_logits"] = arrays["scen/local_logits"] * 1.001
    np.savez(tmp_path / "changed.npz", **arrays)
    run = lambda path: subprocess.run([sys.executable, ROOT / "tests/parity.py", path], capture_output=True, text=True)
    good, bad = run(GOLDEN), run(tmp_path / "changed.npz")
    assert good.returncode == 0 and "above" not in good.stdout
    assert bad.returncode == 1
    assert [line.split("  ")[0] for line in bad.stdout.splitlines() if "above" in line] == ["scen forward"]


@pytest.mark.parametrize("changes", [
    {}, dict(seed=1), dict(encoded_noise=False), dict(freeze_dec=True), dict(gammaD=10.0, gammaG=10.0),
    dict(gammaD=10.0, gammaG=10.0, log_gamma=True), dict(a1=0.3, a2=0.9), dict(a1=0.0, a2=0.0), dict(critic_iter=1),
    dict(feedback_loop=1), dict(feedback_loop=3), dict(K=1), dict(B=16, C=20, Cs=14, K=33, D=128, side=4, hidden=64, n=120, iterations=3)])
def test_files_of_other_sizes_and_hyperparameters(tmp_path, changes):
    """Files that the plain transcription wrote (how published code logs gammaD is not known: both ways are read)."""
    make_golden.write(tmp_path / "other.npz", **changes)
    errors, _ = parity.measure(tmp_path / "other.npz")
    assert len(errors) == 15 and {group: error for group, error in errors.items() if error > parity.TOLERANCE} == {}


def small_config(**changes):
    config = read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {})
    return dataclasses.replace(config, **{"ngh": 40, "ndh": 48, "critic_iter": 3, "lr": 1e-3} | changes)


@pytest.mark.parametrize("B, D, K, C, side", [(5, 16, 7, 6, 2), (12, 64, 31, 10, 4)])
def test_scen_equals_transcription(B, D, K, C, side):
    torch.manual_seed(B)
    att, raw = torch.rand(C, K), torch.rand(B, D, side, side)
    scen = SCEN(torch.randn(K, 20), att, D)
    torch.nn.init.normal_(scen.len.W2, std=0.1)  # zero at first: attention would not be exercised
    seen, labels = torch.arange(0, C, 2), torch.arange(0, C, 2)[torch.randint((C + 1) // 2, (B,))]
    ours, theirs = scen.losses(normalize_positions(raw), labels, seen), plain.scen_losses(scen, raw, labels, seen)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(torch.autograd.grad(sum(ours), list(scen.parameters())),
                                  torch.autograd.grad(sum(theirs), list(scen.parameters()))):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    g, S = scen.embed(normalize_positions(raw))
    scen.gen.scaler.fit(g)
    torch.testing.assert_close((scen.gen.scaler(g), S), plain.dense_features(scen, raw), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [dict(a1=0.7), dict(a1=0.0), dict(a1=1.0, gammaD=10.0, gammaG=10.0, recons_weight=0.1),
                                     dict(a1=0.5, freeze_dec=True), dict(a1=0.5, encoded_noise=False),
                                     dict(vae_loss_weight=0.5, rec_seen_cls_weight=0.0, gen_unseen_cls_weight=1.0)])
@pytest.mark.parametrize("feedback", [False, True])
def test_eggn_iterations_equal_transcription(changes, feedback):
    config = small_config(**changes)
    B, D, K, C, T = 9, 26, 13, 8, config.critic_iter
    torch.manual_seed(1)
    att, guide = torch.rand(C, K), global_classifier(D, 20, C)
    ours, theirs = (EGGN(D, att, guide, config).to("cpu") for _ in range(2))
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)  # 0.02 leaves most units in one half of the LeakyReLU
    theirs.load_state_dict(ours.state_dict())
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    for _ in range(3):
        x, y = torch.rand(T + 1, B, D), torch.randint(C, (T + 1, B))
        eps, alpha, noise, unseen = torch.randn(T + 1, B, K), torch.rand(T, B, 1), torch.randn(B, K), torch.randint(C, (B,))
        expected = plain.iteration(theirs, x, y, eps, alpha, unseen, noise, feedback and config.a1 > 0)
        losses = torch.cat([ours.critic_steps(x[:T], y[:T], eps[:T], alpha, feedback and config.a1 > 0),
                            ours.generator_step(x[T], y[T], eps[T], unseen, noise, feedback and config.a1 > 0)])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert ours.lambda1.item() == pytest.approx(theirs.lambda1.item(), rel=1e-6) and ours.lambda1.item() != config.lambda1
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters()):
        change, expected = parameter - start[name], other - start[name]
        assert (change - expected).abs().max() <= 1e-3 * expected.abs().max(), name


@pytest.mark.parametrize("flat", [False, True])
def test_critic_gradients_equal_double_backward(flat):
    """Also where the critic is flat: there the penalty is 1, and its gradient 0 and not 0/0."""
    torch.manual_seed(3)
    B, D, K = 11, 17, 5
    critic, x, fake, a, alpha = Critic(D, K, 33), torch.rand(B, D), torch.rand(B, D), torch.rand(B, K), torch.rand(B, 1)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if flat:
        torch.nn.init.zeros_(critic.fc2.weight)
    lambda1 = torch.tensor(7.5, dtype=torch.float64)
    real, score, penalty = critic.loss_gradients(x, fake, a, alpha, 3.0, lambda1)
    assert not flat or penalty == 1
    ours = [parameter.grad.clone() for parameter in critic.parameters()]
    xi = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
    gradient, = torch.autograd.grad(critic(xi, a).sum(), xi, create_graph=True)
    expected = ((gradient.norm(dim=1) - 1) ** 2).mean()
    loss = 3.0 * (critic(fake, a).mean() - critic(x, a).mean() + lambda1 * expected)
    torch.testing.assert_close(penalty, expected)
    for mine, theirs in zip(ours, torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
