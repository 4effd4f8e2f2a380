"""Float32 matrix products at full speed on AMD's processors.

For products torch calls MKL, which uses half of the vector width of AMD's processors. oneDNN uses
all of it, and torch brings it along for convolutions. Inside `with fast_matmul(device):` the
networks' products go to oneDNN. They are as exact as before, and no network knows of it.
On other devices nothing changes.
"""

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias (..., n) by oneDNN, without gradient.

    x (..., m), weight (n, m) and bias (n,) may have any strides.
    """
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        # oneDNN has only a slow reference for parts of a matrix, hundreds of times slower
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()  # oneDNN does not look at its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear with all three of its products by oneDNN; its gradients can be differentiated."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear_by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = d_y.flatten(0, -2)
        d_x = d_weight = d_bias = None

        if needs_x:
            d_x = OneDNNLinear.apply(d_y, weight.T, None)
        if needs_weight:
            d_weight = OneDNNLinear.apply(rows.T, x.flatten(0, -2).T, None)
        if needs_bias:
            d_bias = rows.sum(dim=0)
        return d_x, d_weight, d_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """F.linear of rows x (..., m) and a matrix (n, m); None for shapes that are left to torch."""
    if x.dim() >= 2 and weight.dim() == 2:
        return OneDNNLinear.apply(x, weight, bias)
    return None


def matmul(x: Tensor, y: Tensor) -> Tensor | None:
    """x @ y of rows (..., m) and a matrix (m, n), or of two batches of one matrix; else None."""
    if x.dim() == y.dim() == 3 and len(x) == len(y) == 1:
        return linear(x[0], y[0].T)[None]
    return linear(x, y.T) if y.dim() == 2 else None


REPLACEMENTS = {F.linear: linear, Tensor.matmul: matmul}  # Tensor.matmul is what `@` calls


class OneDNNMatmul(TorchFunctionMode):
    """Sends products of float32 tensors on the CPU to oneDNN.

    With matmul precision "medium" (bfloat16 allowed) torch does so itself.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in REPLACEMENTS and not kwargs and onednn_takes_all(args):
            result = REPLACEMENTS[func](*args)
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def onednn_takes_all(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a product of these tensors may go to oneDNN."""
    allows_bfloat16 = torch.get_float32_matmul_precision() == "medium"
    return not allows_bfloat16 and all(onednn_takes(tensor) for tensor in tensors)


def onednn_takes(tensor: Tensor | None) -> bool:
    """Whether oneDNN can take an argument of a product. A bias may be None."""
    if tensor is None:
        return True
    on_cpu = tensor.device.type == "cpu"
    return tensor.dtype == torch.float32 and on_cpu and tensor.numel() > 0


@functools.cache
def mkl_uses_half_vectors() -> bool:
    """Whether this is an AMD processor with AVX-512, which MKL does not use there."""
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_both:
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "AuthenticAMD" in cpu.read_text()


def fast_matmul(device: torch.device) -> contextlib.AbstractContextManager:
    """The context that a run trains in on this device."""
    if device.type == "cpu" and mkl_uses_half_vectors():
        return OneDNNMatmul()
    return contextlib.nullcontext()
