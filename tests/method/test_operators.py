"""How many operators a step asks of the device: on a GPU each is a kernel or more to launch."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import SUN_CONFIG
from model import global_classifier
from scegg.config import read_config
from scegg.features.sampler import BalancedSampler
from scegg.method.eggn import EGGN
from scegg.method.evaluation import SoftmaxClassifier

CONFIG = dataclasses.replace(read_config(SUN_CONFIG, {}), ngh=20, ndh=24, a1=0.5)
NO_WORK = ("empty", "detach", "alias", "_record_function")  # nor do views compute anything


class Operators(TorchDispatchMode):
    """The names of the operators that compute something within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(NO_WORK):
            self.names.append(name)
        return function(*args, **kwargs or {})


def operators_of(call, *inputs) -> list[str]:
    """Those of a call, the optimisers' states being there already."""
    call(*inputs)
    with Operators() as operators:
        call(*inputs)
    return operators.names


@pytest.mark.parametrize("feedback, at_most", [(False, 800), (True, 880)])
def test_operators_of_an_eggn_iteration(feedback, at_most):
    """Draws and gathers included; critic_iter 5. It was 779, and 853 with feedback (torch 2.12)."""
    torch.manual_seed(0)
    y = torch.arange(7).repeat(8)
    eggn = EGGN(26, torch.rand(9, 13), global_classifier(26, 20, 9), CONFIG).to("cpu")
    inputs = torch.rand(56, 26), y, BalancedSampler(y, 7), torch.tensor([7, 8]), feedback
    names = operators_of(eggn.draw_and_iterate, *inputs)
    assert len(names) <= at_most
    assert names.count("_fused_adam_") == CONFIG.critic_iter * 2 + 3 + feedback


def test_operators_of_a_classifiers_epoch():
    """An epoch is a permutation, its steps, and the losses put together: 14 a step, and 2."""
    x, y = torch.rand(40, 6), torch.arange(40) % 5
    config = dataclasses.replace(CONFIG, syn_num=10)
    names = operators_of(SoftmaxClassifier(x, y, 5, config).epoch)
    assert names.count("_fused_adam_") == 4
    assert len(names) <= 15 * 4 + 2
