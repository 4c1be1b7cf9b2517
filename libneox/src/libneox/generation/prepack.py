# SPDX-License-Identifier: Apache-2.0
"""Weights in the blocked layout that oneDNN's kernels read fastest: for a model that will only be run, on a CPU.

Decoding is bound by reading the weights once a token, and the plain layout reaches less than half of the memory
bandwidth there. A packed product of a row is also the same, bit for bit, whatever other rows are in the batch, if there
are at least `LEAST_ROWS` of them; so that a text does not depend on the batch it was made in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from libneox.model import Transformer
from libneox.model.transformer import Linear

LEAST_ROWS = 4  # fewer rows are not faster, and use other kernels
PACKED_FOR = 16  # rows the layout is chosen for; good from 4 to 512


class PackedLinear(nn.Module):
    """A linear map whose weight [out, in] is packed once. No gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.in_features = weight.shape[1]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        if count < LEAST_ROWS:
            padded = rows.new_zeros(LEAST_ROWS, self.in_features)
            padded[:count] = rows
            rows = padded
        out = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return out[:count].view(*x.shape[:-1], -1)


def can_prepack(model: Transformer) -> bool:
    """Whether this machine and torch have packed kernels for the model's device and dtype."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and has_bfloat16())


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def prepacked(model: Transformer) -> Transformer:
    """A model that computes the same with packed weights; everything but the linear maps is shared with `model`.

    Drop `model` afterwards to free the plain weights.
    """
    with torch.device("meta"):
        packed = Transformer(model.config).eval()
    packed.attention, packed.slopes = model.attention, model.slopes
    for name, module in model.named_modules():
        path, _, leaf = name.rpartition(".")
        if isinstance(module, Linear):
            setattr(packed.get_submodule(path), leaf, PackedLinear(module.weight, module.bias))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                setattr(packed.get_submodule(name), key, parameter)
    if model.config.tie_embeddings:
        packed.head = PackedLinear(model.embed.weight, None)
    return packed
