# SPDX-License-Identifier: Apache-2.0
"""An optimiser's state as a checkpoint holds it: float32 tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class States:
    """Of an optimiser that keeps them as such, as torch's do."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def of(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """The tensors of a parameter; empty before its first update."""
        state = self.optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set one of them; `set_step` comes after all."""
        self.optimizer.state[parameter][key] = value

    def set_step(self, step: int, device: torch.device) -> None:
        """Set the number of updates done."""
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(step), device=device)
