# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a model: torch's own, or on request oneDNN's where torch would call a slower library.

For float32 on an x86 CPU torch calls MKL, which on other makers' processors reaches two thirds of what oneDNN does.
Both sum in float32; they differ by rounding. Products in bfloat16 are oneDNN's in any case.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_WEIGHT = 1 << 16  # elements; for smaller matrices the call costs more than it saves
_onednn = False


def use_onednn(on: bool) -> bool:
    """Choose for this process; returns whether oneDNN is in use now.

    It stays off where torch was built without it. `on` is best `mkl_is_slow()`, which depends on the machine alone: a
    choice made with a clock could differ between two runs, and so would their last digits.
    """
    global _onednn
    _onednn = on and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return _onednn


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is an x86 CPU that MKL has no kernels of its own for."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            vendor = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return False
    return bool(vendor) and "GenuineIntel" not in vendor


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`: [..., K] -> [..., N]."""
    if _takes(x, weight_NK):
        return torch.ops.neox.linear(x, weight_NK, bias_N)
    return F.linear(x, weight_NK, bias_N)


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T, without gradients; transposed views are as good as contiguous factors."""
    if _takes(a_MK, b_NK):
        return _product(a_MK, b_NK)
    return a_MK @ b_NK.T


def _takes(a: Tensor, b: Tensor) -> bool:
    large = _onednn and b.numel() >= LEAST_WEIGHT
    return large and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"


def _product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")


# An operator of our own is one node to torch.compile, which would otherwise look for packed weights in it.
@torch.library.custom_op("neox::linear", mutates_args=())
def _linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return _product(x.reshape(-1, x.shape[-1]), weight_NK, bias_N).view(*x.shape[:-1], -1)


@_linear.register_fake
def _(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_NK.shape[0])


@torch.library.custom_op("neox::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    grad_MN = grad.reshape(-1, grad.shape[-1])
    d_x = _product(grad_MN, weight_NK.T).view(x.shape)
    return d_x, grad_MN.T @ x.reshape(-1, x.shape[-1])  # oneDNN would copy both factors first


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight_NK.new_empty(weight_NK.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight_NK, bias_N = inputs
    ctx.save_for_backward(x, weight_NK)
    ctx.biased = bias_N is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    d_x, d_weight = torch.ops.neox.linear_backward(grad, *ctx.saved_tensors)
    d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.biased else None
    return d_x, d_weight, d_bias


_linear.register_autograd(_gradients, setup_context=_save)
