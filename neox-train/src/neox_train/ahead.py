# SPDX-License-Identifier: Apache-2.0
"""Micro-batches made in a thread while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from neox_train.batches import Batches
from neox_train.objective import MicroBatch


class Ahead:
    """`Batches` whose `step` has usually been made when it is asked for. What a step consists of stays the same."""

    def __init__(self, batches: Batches):
        self.plan, self._batches = batches.plan, batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[tuple[int, int | None], Future[list[MicroBatch]]] | None = None

    def step(self, first: int, length: int | None = None) -> Iterator[MicroBatch]:
        """See `Batches.step`. An error of making batches is raised at the step that needs them."""
        asked, self._next = self._next, None
        made = asked[1].result() if asked and asked[0] == (first, length) else list(self._batches.step(first, length))
        wanted = first + self.plan.global_batch, length
        self._next = wanted, self._thread.submit(lambda: list(self._batches.step(*wanted)))
        return iter(made)
