# SPDX-License-Identifier: Apache-2.0
"""Adam on a CPU a tile at a time: every value is read from memory once and written once.

The plain way goes over all parameters once for each of: gradients to float32, clipping, Adam, weights to the compute
dtype. Memory being slow, that is most of an update's time; and the float32 gradients are as large as the model. A tile
goes through all of it in the cache. The arithmetic, and every bit of the result, is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

TILE = 1 << 20  # elements


class Leaf(NamedTuple):
    """A parameter in float32, its copy in the compute dtype (the same tensor in float32 runs), and its gradient."""

    master: nn.Parameter
    weight: Tensor
    gradient: Tensor


def takes(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether `update` does what the optimiser's own step would."""
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return plain and device.type == "cpu" and all(g["fused"] and not g["amsgrad"] for g in optimizer.param_groups)


def norm(gradient: Tensor) -> Tensor:
    """L2 norm, float32 []: torch's own makes a float32 copy of a bfloat16 tensor first."""
    if gradient.dtype == torch.float32 or gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    parts = [torch.linalg.vector_norm(tile.float()) for tile in gradient.reshape(-1).split(TILE)]
    return torch.linalg.vector_norm(torch.stack(parts))


def update(optimizer: torch.optim.Optimizer, leaves: Iterable[Leaf], coefficient: Tensor | None) -> None:
    """One step of a fused Adam or AdamW.

    Args:
        leaves: of all parameters of the optimiser.
        coefficient: float32 [], what gradients are multiplied with first.
    """
    adam = torch._fused_adamw_ if isinstance(optimizer, torch.optim.AdamW) else torch._fused_adam_
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    with torch.no_grad():
        for master, weight, gradient in leaves:
            group, state = group_of[master], optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["step"] += 1
            beta1, beta2 = group["betas"]
            flat = [t.view(-1).split(TILE) for t in (weight, master, state["exp_avg"], state["exp_avg_sq"])]
            for grad, low, value, mean, square in zip(gradient.reshape(-1).split(TILE), *flat, strict=True):
                scaled = grad.float()
                if coefficient is not None:  # in its place, unless that is the gradient's own
                    scaled = scaled * coefficient if scaled is grad else scaled.mul_(coefficient)
                adam(
                    [value], [scaled], [mean], [square], [], [state["step"]], lr=group["lr"], beta1=beta1, beta2=beta2,
                    weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=group["maximize"],
                )  # fmt: skip
                if weight is not master:
                    low.copy_(value)
