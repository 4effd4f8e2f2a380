"""Float32 matrix products at full speed on AMD's processors: torch has MKL do them, which uses half of their vectors' width.

oneDNN, which torch brings along for convolutions, uses all of it. Inside `with fast_matmul(device):` the products that the
networks are made of go there, as exact as before; nothing in the networks says so, and on other devices nothing changes.
"""
import contextlib
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN; x (..., m), weight (n, m), bias (n,), of any strides. Returns (..., n), without gradient."""
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # a part of a matrix would go to oneDNN's reference, hundreds of times slower
    if bias is not None:
        bias = bias.contiguous()  # oneDNN does not look at its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear with each of its three products by `product`; its gradients can be differentiated in turn."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = d_y.flatten(0, -2)
        return (OneDNNLinear.apply(d_y, weight.T, None) if needs_x else None,
                OneDNNLinear.apply(rows.T, x.flatten(0, -2).T, None) if needs_weight else None,
                rows.sum(dim=0) if needs_bias else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """F.linear; None, here and below, for shapes that are left to torch."""
    return OneDNNLinear.apply(x, weight, bias) if x.dim() >= 2 == weight.dim() else None


def matmul(x: Tensor, y: Tensor) -> Tensor | None:
    """x @ y of a matrix, or rows of any shape, and a matrix; or of a batch of one and another."""
    if x.dim() == y.dim() == 3 and len(x) == len(y) == 1:
        return linear(x[0], y[0].T)[None]
    return linear(x, y.T) if y.dim() == 2 else None


PRODUCTS = {F.linear: linear, Tensor.matmul: matmul}  # Tensor.matmul is what `@` calls


class FastProducts(TorchFunctionMode):
    """Sends products of float32 tensors on the CPU to oneDNN. With bfloat16 allowed ("medium") torch itself does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        replaced = None
        if func in PRODUCTS and not kwargs and torch.get_float32_matmul_precision() != "medium" and all(map(suits, args)):
            replaced = PRODUCTS[func](*args)
        return func(*args, **(kwargs or {})) if replaced is None else replaced


def suits(tensor: Tensor | None) -> bool:
    """Whether oneDNN can take it (a bias may be None)."""
    return tensor is None or tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() > 0


@functools.cache
def mkl_is_halved() -> bool:
    """Whether this is an AMD processor with AVX-512, which MKL does without there."""
    cpu = Path("/proc/cpuinfo")
    return (torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise") and cpu.is_file() and "AuthenticAMD" in cpu.read_text())


def fast_matmul(device: torch.device):
    """The context that a run trains in on the device."""
    return FastProducts() if device.type == "cpu" and mkl_is_halved() else contextlib.nullcontext()
