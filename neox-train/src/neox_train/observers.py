# SPDX-License-Identifier: Apache-2.0
"""Whoever looks on while a run trains: norms of tensors, profilers, trackers. None of them changes a number."""

from __future__ import annotations

from typing import Any

from libneox.config import NeoxConfig
from libneox.errors import UsageError
from libneox.parallel.group import Group
from libneox.parallel.mesh import Mesh
from neox_train.steps import Engine


class Observer:
    """Told of every step, on every rank. What a subclass does not care for, it leaves out."""

    def begin_step(self, step: int) -> None:
        """Step number `step`, from 1, is about to begin."""

    def before_update(self, engine: Engine) -> dict[str, Any]:
        """Gradients of the step are there, weights are still the old ones; gives fields for metrics.jsonl."""
        return {}

    def end_step(self, record: dict[str, Any]) -> None:
        """A step is over; `record` is its line of metrics.jsonl, complete on rank 0."""

    def close(self) -> None:
        """The run is over, or has failed."""


def build_observers(config: NeoxConfig, group: Group, mesh: Mesh) -> list[Observer]:
    """The observers a configuration asks for, on every rank the same.

    Raises:
        UsageError: it asks for what cannot be seen in this layout.
    """
    observers: list[Observer] = []
    if every := config.train.replica_check_interval:
        if config.zero_stage == 3:
            raise UsageError("replica_check_interval: ZeRO stage 3 keeps no copies to compare; remove it")
        from neox_train.replicas import ReplicaCheck

        observers.append(ReplicaCheck(group, mesh, every))
    return observers
