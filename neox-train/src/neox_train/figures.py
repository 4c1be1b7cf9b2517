# SPDX-License-Identifier: Apache-2.0
"""Norms of single tensors in metrics.jsonl: parameters, gradients, states of the optimiser."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from libneox.config import NeoxConfig
from neox_train.observers import Observer
from neox_train.steps import Engine


class TensorFigures(Observer):
    """Every `log_interval` steps one object for each figure asked for, with a number for each tensor by name.

    All are those of the step: weights and states before the update, gradients averaged over micro-batches and ranks and
    not clipped yet. Each tensor is made whole for a moment, so a step with figures takes longer.
    """

    within = True

    def __init__(self, config: NeoxConfig):
        keys = config.log
        self._parameters, self._gradients = keys.log_param_norm, keys.log_grad_norm
        self._zeros, self._states = keys.log_grad_pct_zeros, keys.log_optimizer_states
        self._every, self._step = keys.log_interval, 0

    def begin_step(self, step: int) -> None:
        """Note the step's number."""
        self._step = step

    def before_update(self, engine: Engine) -> dict[str, Any]:
        """The figures, on every rank."""
        if self._step % self._every:
            return {}
        found: dict[str, dict[str, Any]] = {}
        if self._parameters:
            found["param_norm"] = {name: norm(engine.master(name)) for name in engine.names()}
        if self._gradients or self._zeros:
            gradients = {name: _gradient(engine.gradient(name)) for name in engine.names()}
            if self._gradients:
                found["tensor_grad_norm"] = {name: figure for name, (figure, _) in gradients.items()}
            if self._zeros:
                found["grad_pct_zeros"] = {name: figure for name, (_, figure) in gradients.items()}
        if self._states:
            found["optimizer_state_norm"] = states = {}
            for key, name, _ in engine.state_specs():
                states.setdefault(key, {})[name] = norm(engine.state(key, name))
        return found


def norm(tensor: Tensor) -> float | None:
    """L2 norm, None if it is not finite (JSON has no word for that)."""
    value = tensor.float().norm().item()
    return value if value - value == 0 else None


def _gradient(gradient: Tensor) -> tuple[float | None, float]:
    """Its norm, and how many of a hundred elements are exactly zero."""
    return norm(gradient), 100 * (gradient == 0).float().mean().item()
