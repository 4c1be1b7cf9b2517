# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a model: torch's own, or on request oneDNN's, asked for directly.

For float32 on an x86 CPU torch calls MKL, which on other makers' processors reaches two thirds of what oneDNN does.
Both sum in float32; they differ by rounding. Products in bfloat16 are oneDNN's in any case: asked for directly they add
the bias on the way, and torch.compile can take them (of its own, two biases with one gradient become two variables of
one name in C++, seen in torch 2.13).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_WEIGHT = 1 << 16  # elements; for smaller matrices the call costs more than it saves
_onednn: frozenset[torch.dtype] = frozenset()


def use_onednn(*dtypes: torch.dtype) -> frozenset[torch.dtype]:
    """Choose for this process whose products oneDNN is asked for; returns those that it has.

    float32 is best among them if `mkl_is_slow()`, which depends on the machine alone: a choice made with a clock could
    differ between two runs, and so would their last digits.
    """
    global _onednn
    _onednn = frozenset(filter(has_onednn, dtypes))
    return _onednn


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype, in this torch and on this CPU."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    if a.dtype not in _onednn or a.dtype != b.dtype or a.device.type != "cpu":
        return False
    return b.numel() >= LEAST_WEIGHT or torch.compiler.is_compiling()


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
def _linear_backward(grad: Tensor, x: Tensor, weight_NK: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_MN = grad.reshape(-1, grad.shape[-1])
    d_x = _product(grad_MN, weight_NK.T).view(x.shape)
    d_weight = grad_MN.T @ x.reshape(-1, x.shape[-1])  # asked directly, oneDNN would copy both factors first
    return d_x, d_weight, grad_MN.sum(0) if biased else grad.new_empty(0)


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight_NK: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight_NK.new_empty(weight_NK.shape), grad.new_empty(grad.shape[-1] if biased else 0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight_NK, bias_N = inputs
    ctx.save_for_backward(x, weight_NK)
    ctx.biased = bias_N is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    d_x, d_weight, d_bias = torch.ops.neox.linear_backward(grad, *ctx.saved_tensors, ctx.biased)
    return d_x, d_weight, d_bias if ctx.biased else None


_linear.register_autograd(_gradients, setup_context=_save)
