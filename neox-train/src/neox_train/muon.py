# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices between hidden layers, AdamW for all other parameters (Jordan et al. 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neox_train.optimizers import is_hidden_matrix


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers of torch behind one interface: `param_groups` and `state` are those of both."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        """Each has its own groups; neither may be stepped by itself."""
        self._parts = (muon, adamw)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of Muon, then those of AdamW."""
        return [group for part in self._parts for group in part.param_groups]

    @property
    def state(self) -> _States:  # type: ignore[override]
        """State of a parameter, by whichever optimiser holds it."""
        return _States(self._parts)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step both."""
        for part in self._parts:
            part.step()


class _States:
    """`optimizer.state` of several optimisers as one mapping."""

    def __init__(self, parts: tuple[torch.optim.Optimizer, ...]):
        self._owner: dict[Tensor, defaultdict[Tensor, Any]] = {
            parameter: part.state for part in parts for group in part.param_groups for parameter in group["params"]
        }

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        return self._owner[parameter][parameter]

    def get(self, parameter: Tensor, default: dict[str, Any]) -> dict[str, Any]:
        """State of a parameter, or `default` before its first step."""
        return self._owner[parameter].get(parameter, default)

    def items(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters that have a state, with it."""
        return [(parameter, states[parameter]) for parameter, states in self._owner.items() if parameter in states]

    def values(self) -> list[dict[str, Any]]:
        """All states."""
        return [state for _, state in self.items()]


def build_muon(groups: list[dict[str, Any]], params: dict[str, Any], decay: float) -> MuonWithAdamW:
    """Sort groups of named parameters into the two optimisers.

    Args:
        groups: with `names` beside `params`.
        params: lr, momentum, nesterov, ns_steps of Muon; adam_lr (default lr), betas, eps of AdamW.
    """
    lr = params.get("lr", 0.02)
    muon: list[dict[str, Any]] = []
    adamw: list[dict[str, Any]] = []
    for group in groups:
        named = list(zip(group["names"], group["params"], strict=True))
        kept = {key: value for key, value in group.items() if key not in ("params", "names")}
        matrices = [parameter for name, parameter in named if is_hidden_matrix(name)]
        others = [parameter for name, parameter in named if not is_hidden_matrix(name)]
        scale = group["lr_scale"] * params.get("adam_lr", lr) / lr
        if matrices:
            muon.append(kept | {"params": matrices})
        if others:
            adamw.append(kept | {"params": others, "lr_scale": scale})
    given = {key: params[key] for key in ("momentum", "nesterov", "ns_steps") if key in params}
    betas = tuple(params.get("betas", (0.9, 0.95)))
    return MuonWithAdamW(
        torch.optim.Muon(muon, lr=lr, weight_decay=decay, **given),
        torch.optim.AdamW(
            adamw, lr=lr, betas=betas, eps=float(params.get("eps", 1e-8)), weight_decay=decay, fused=True
        ),
    )
