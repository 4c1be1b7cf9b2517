# SPDX-License-Identifier: Apache-2.0
"""Batch arithmetic: global batch = micro-batch * accumulation * data-parallel ranks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from libneox.errors import UsageError

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig


_MOST_TRIED = 10_000  # sizes of a micro-batch, for a remedy


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPlan:
    """How one optimiser step's samples are cut; global_batch == micro_batch * grad_accum * data_parallel."""

    global_batch: int  # samples of an optimiser step
    micro_batch: int  # samples of one forward pass on one rank
    grad_accum: int  # forward passes of an optimiser step
    data_parallel: int  # ranks that see different samples


def batch_plan(config: NeoxConfig, world_size: int) -> BatchPlan:
    """See `NeoxConfig.batch_plan`."""
    tensor, pipe = config.tensor_parallel, config.pipeline_stages
    if world_size < 1 or world_size % (tensor * pipe):
        raise UsageError(
            f"{world_size} ranks cannot be cut into model_parallel_size {tensor} * pipe_parallel_size {pipe}; "
            f"start a multiple of {tensor * pipe} ranks"
        )
    ranks = world_size // (tensor * pipe)
    batch = config.batch
    total, micro = batch.train_batch_size, batch.train_micro_batch_size_per_gpu
    steps = batch.gradient_accumulation_steps
    if micro is None:
        if total is None:
            raise UsageError("train_micro_batch_size_per_gpu: is unknown; set it, or train_batch_size")
        steps = steps or 1
        micro = max(1, total // (steps * ranks))
    if steps is None:
        steps = 1 if total is None else max(1, total // (micro * ranks))
    if total is None:
        total = micro * steps * ranks
    if total != micro * steps * ranks:
        place = config.places.get("train_batch_size")
        fact = _equation(total, micro, steps, ranks, batch.gradient_accumulation_steps)
        raise UsageError(f"{f'{place}: ' if place else ''}train_batch_size: {fact}")
    return BatchPlan(total, micro, steps, ranks)


def _equation(total: int, micro: int, steps: int, ranks: int, given_steps: int | None) -> str:
    product = f"micro-batch {micro} * accumulation {steps} * {ranks} data-parallel ranks"
    fact = f"{total} is not {product} = {micro * steps * ranks}"
    if given_steps is not None:
        if total % (micro * ranks) == 0:
            return f"{fact}; set gradient_accumulation_steps to {total // (micro * ranks)}, or leave it out"
        if total % (given_steps * ranks) == 0:
            return f"{fact}; set train_micro_batch_size_per_gpu to {total // (given_steps * ranks)}"
        return f"{fact}; set train_batch_size to {micro * steps * ranks}"
    largest = min(micro, total // ranks, _MOST_TRIED)
    fitting = next((size for size in range(largest, 0, -1) if total % (size * ranks) == 0), None)
    if fitting:
        return f"{fact}; set train_micro_batch_size_per_gpu to {fitting}"
    return f"{fact}; set train_batch_size to {max(1, round(total / (micro * ranks))) * micro * ranks}"
