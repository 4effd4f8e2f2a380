"""Critics of other depths than the method's: autograd takes the place of the formula."""

import dataclasses

import pytest
import torch

from helpers import ROOT
from model import Critic, leaky
from scegg.config import read_config
from scegg.method import plain
from scegg.method.eggn import EGGN

LAMBDA1 = torch.tensor(7.5, dtype=torch.float64)


class OwnForward(Critic):
    """A critic of one hidden layer that does something else with it."""

    def forward(self, x, a):
        return self.fc2(torch.tanh(self.fc1(torch.cat([x, a], dim=1)))).squeeze(1)


def random_inputs(B=11, D=17, K=5):
    """x, fake, a, alpha of a batch."""
    torch.manual_seed(3)
    return torch.rand(B, D), torch.rand(B, D), torch.rand(B, K), torch.rand(B, 1)


def expected_gradients(critic, x, fake, a, alpha, gammaD):
    """By differentiating the loss as it is written down."""
    xi = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(xi, a).sum(), xi, create_graph=True)
    penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()
    loss = gammaD * (critic(fake, a).mean() - critic(x, a).mean() + LAMBDA1 * penalty)
    return torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Critic(17, 5, 33),
        lambda: Critic(17, 5, 33, 21),
        lambda: Critic(17, 5, 9, 8, 7),
        lambda: OwnForward(17, 5, 33),
    ],
    ids=["one", "two", "three", "own forward"],
)
def test_gradients_of_any_critic(make):
    inputs = random_inputs()
    critic = make()
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    expected = expected_gradients(critic, *inputs, gammaD=3.0)
    real, fake, penalty = critic.loss_gradients(*inputs, 3.0, LAMBDA1)
    x, fakes, a, _ = inputs
    torch.testing.assert_close(real, critic(x, a).mean())
    torch.testing.assert_close(fake, critic(fakes, a).mean())
    assert penalty > 0 and not penalty.requires_grad

    for parameter, gradient in zip(critic.parameters(), expected, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_two_hidden_layers_by_hand():
    x, _, a, _ = random_inputs()
    critic = Critic(17, 5, 33, 21)
    hidden = leaky(critic.fc2(leaky(critic.fc1(torch.cat([x, a], dim=1)))))
    torch.testing.assert_close(critic(x, a), critic.fc3(hidden).squeeze(1))
    assert [name for name, _ in critic.named_children()] == ["fc1", "fc2", "fc3"]


def test_a_deeper_critic_trains_as_the_plain_method_trains_it():
    """EGGN with two hidden layers in its critic, the only change that this takes."""
    config = read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {})
    config = dataclasses.replace(config, ngh=20, ndh=24, critic_iter=3)
    B, D, K, C = 9, 26, 13, 8
    torch.manual_seed(1)
    att = torch.rand(C, K)

    ours, theirs = EGGN(D, att, None, config), EGGN(D, att, None, config)
    for eggn in (ours, theirs):
        eggn.D = Critic(D, K, 24, 16)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to("cpu"), theirs.to("cpu")

    x, y = torch.rand(3, B, D), torch.randint(C, (3, B))
    eps, alpha = torch.randn(3, B, K), torch.rand(3, B, 1)
    losses = ours.critic_steps(x, y, eps, alpha, False)
    for t in range(3):
        expected = plain.critic_step(theirs, x[t], y[t], eps[t], alpha[t], False)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    for parameter, other in zip(ours.D.parameters(), theirs.D.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_a_term_of_the_generators_loss_that_is_not_named_is_an_error(monkeypatch):
    """A term that is trained and neither logged nor checked would go unnoticed."""
    config = read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {})
    config = dataclasses.replace(config, ngh=20, ndh=24)
    torch.manual_seed(0)
    eggn = EGGN(6, torch.rand(4, 3), None, config).to("cpu")
    draws = torch.rand(5, 6), torch.randint(4, (5,)), torch.randn(5, 3)
    unseen = torch.randint(4, (5,)), torch.randn(5, 3)
    assert eggn.generator_step(*draws, *unseen, False).shape == (6,)

    losses = eggn.generator_losses(*draws, *unseen, False)
    one_more = losses | {"loss_new": (0.0, torch.zeros(()))}
    monkeypatch.setattr(eggn, "generator_losses", lambda *_: one_more)
    with pytest.raises(ValueError, match="GENERATOR_LOSSES must name .*loss_new"):
        eggn.generator_step(*draws, *unseen, False)
