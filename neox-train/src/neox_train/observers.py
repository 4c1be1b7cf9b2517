# SPDX-License-Identifier: Apache-2.0
"""Whoever looks on while a run trains: norms of tensors, profilers, trackers. None of them changes a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libneox.config import NeoxConfig
from libneox.errors import UsageError
from libneox.parallel.group import Group
from libneox.parallel.mesh import Mesh
from neox_train.steps import Engine


class Observer:
    """Told of every step, on every rank. What a subclass does not care for, it leaves out.

    Attributes:
        within: it looks at a step while it goes on, so that the next one must not begin before `end_step`.
    """

    within = False

    def begin_step(self, step: int) -> None:
        """Step number `step`, from 1, is about to begin."""

    def before_update(self, engine: Engine) -> dict[str, Any]:
        """Gradients of the step are there, weights are still the old ones; gives fields for metrics.jsonl."""
        return {}

    def end_step(self, record: dict[str, Any]) -> None:
        """A step is over; `record` is its line of metrics.jsonl, complete on rank 0."""

    def end_run(self, step: int, closing: dict[str, Any]) -> None:
        """The last step is done; `closing` are the figures of the evaluations after it."""

    def close(self) -> None:
        """The run is over, or has failed."""


def build_observers(
    config: NeoxConfig,
    group: Group,
    mesh: Mesh,
    *,
    run: Path,
    first_step: int,
    device: torch.device,
    warn: Callable[[str], None],
) -> list[Observer]:
    """The observers a configuration asks for; those that talk to each other are on every rank.

    Args:
        run: the run directory.
        first_step: number of the step that is done first.
        warn: prints a line on stderr, on rank 0.

    Raises:
        UsageError: it asks for what cannot be seen in this layout.
    """
    observers: list[Observer] = []
    if config.speed.freeze_gc:
        from neox_train.speed import QuietCollector

        observers.append(QuietCollector())
    if every := config.train.replica_check_interval:
        if config.zero_stage == 3:
            raise UsageError("replica_check_interval: ZeRO stage 3 keeps no copies to compare; remove it")
        from neox_train.replicas import ReplicaCheck

        observers.append(ReplicaCheck(group, mesh, every))
    keys = config.log
    if keys.log_param_norm or keys.log_grad_norm or keys.log_grad_pct_zeros or keys.log_optimizer_states:
        from neox_train.figures import TensorFigures

        observers.append(TensorFigures(config))
    if keys.log_gradient_noise_scale:
        from neox_train.noise_scale import NoiseScale

        batch, on_host = config.batch_plan(group.world_size).global_batch, keys.gradient_noise_scale_cpu_offload
        observers.append(NoiseScale(group, batch, keys.gradient_noise_scale_n_batches, on_host=on_host))
    if config.log.profile or config.log.memory_profiling:
        from neox_train.profile import build_profilers

        observers += build_profilers(config, run, group.rank, device, first_step, warn)
    from neox_train.trackers import build_trackers

    return observers + build_trackers(config, group, run, first_step, warn)
