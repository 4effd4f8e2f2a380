"""Products by oneDNN: the numbers, the gradients, and what is left to torch."""

import pytest
import torch
from torch.nn import functional as F

import parity
from helpers import GOLDEN
from scegg.speed import onednn
from scegg.speed.onednn import OneDNNMatmul, fast_matmul

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")


def with_gradients(call, *shapes):
    """[call's value and the gradients of its inputs], for random inputs and a random gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]
    value = call(*inputs)
    value.backward(torch.randn(value.shape, generator=generator))
    return [value.detach(), *(tensor.grad for tensor in inputs)]


CALLS = {
    "rows": (F.linear, (7, 33), (20, 33), (20,)),
    "without bias": (F.linear, (7, 33), (20, 33)),
    "maps": (F.linear, (3, 9, 33), (20, 33)),
    "one output": (F.linear, (64, 50), (1, 50), (1,)),
    "matrices": (lambda x, y: x @ y, (31, 64), (64, 5)),
    "transposed": (lambda x, y: x.T @ y.T, (64, 31), (5, 64)),
    "part of a bias": (lambda x, y, b: F.linear(x, y, b[::2]), (7, 33), (5, 33), (10,)),
    "part of a matrix": (lambda x, y: x @ y[:, 3:40], (31, 64), (64, 50)),
    "part of rows": (lambda x, y: F.linear(x[:, :30], y[:, 4:34]), (8, 40), (6, 40)),
    "a batch of one": (lambda x, y: x.transpose(1, 2) @ y, (1, 16, 9), (1, 16, 21)),
}


@pytest.mark.parametrize("case", CALLS)
def test_values_and_gradients_are_torchs(case, monkeypatch):
    call, *shapes = CALLS[case]
    expected = with_gradients(call, *shapes)
    used = []
    original = onednn.linear_by_onednn

    def counted(*args):
        used.append(args)
        return original(*args)

    monkeypatch.setattr(onednn, "linear_by_onednn", counted)
    with OneDNNMatmul():
        ours = with_gradients(call, *shapes)

    assert used
    for value, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_gradients_can_be_differentiated():
    """As the plain gradient penalty does, score and penalty in one loss."""

    def penalty(x, W, w):
        x = x.detach().requires_grad_(True)
        score = F.linear(F.leaky_relu(F.linear(x, W), 0.2), w).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        return score + ((gradient.norm(dim=1) - 1) ** 2).mean()

    shapes = (6, 33), (20, 33), (1, 20)
    _, _, *expected = with_gradients(penalty, *shapes)
    with OneDNNMatmul():
        _, _, *ours = with_gradients(penalty, *shapes)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


LEFT_TO_TORCH = [
    lambda: torch.ones(3, 4).double() @ torch.ones(4, 2).double(),
    lambda: torch.ones(3, 4) @ torch.ones(4),
    lambda: torch.ones(4) @ torch.ones(4),
    lambda: torch.ones(0, 4) @ torch.ones(4, 2),
    lambda: torch.ones(2, 3, 4) @ torch.ones(4),
    lambda: torch.arange(4) @ torch.arange(4),
    lambda: torch.ones(2, 1, 3, 4) @ torch.ones(2, 5, 4, 3),
    lambda: torch.ones(1, 3, 4) @ torch.ones(5, 4, 3),
    lambda: torch.ones(5, 3, 4) @ torch.ones(5, 4, 2),
    lambda: F.linear(torch.ones(4), torch.ones(3, 4), bias=torch.ones(3)),
]


@pytest.mark.parametrize("call", LEFT_TO_TORCH)
def test_other_products_are_torchs_own(call, monkeypatch):
    monkeypatch.setattr(onednn, "linear_by_onednn", None)
    expected = call()
    with OneDNNMatmul():
        assert torch.equal(call(), expected)


def test_wrong_shapes_fail_as_in_torch():
    with OneDNNMatmul(), pytest.raises(RuntimeError):
        torch.ones(3, 4) @ torch.ones(5, 2)


def test_golden_numbers():
    with OneDNNMatmul():
        errors, _ = parity.measure(GOLDEN)
    assert {group: error for group, error in errors.items() if error > parity.TOLERANCE} == {}


def test_repeats_bit_for_bit():
    shapes = (64, 300), (128, 300), (128,)
    with OneDNNMatmul():
        first = with_gradients(F.linear, *shapes)
        second = with_gradients(F.linear, *shapes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gpus_and_other_processors_keep_torchs_products(monkeypatch):
    assert not isinstance(fast_matmul(torch.device("cuda")), OneDNNMatmul)
    for halved in (False, True):
        monkeypatch.setattr(onednn, "mkl_uses_half_vectors", lambda halved=halved: halved)
        assert isinstance(fast_matmul(torch.device("cpu")), OneDNNMatmul) == halved


def test_products_with_bfloat16_allowed_are_torchs_own(monkeypatch):
    monkeypatch.setattr(onednn, "linear_by_onednn", None)
    torch.set_float32_matmul_precision("medium")
    try:
        with OneDNNMatmul():
            assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).eq(3).all()
    finally:
        torch.set_float32_matmul_precision("highest")
