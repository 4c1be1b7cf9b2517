# SPDX-License-Identifier: Apache-2.0
"""One decoding step. On a GPU the whole step is recorded once and replayed."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from libneox.model import KVCache, Transformer, cuda_graph


class Steps:
    """Feeds one token a row through the model.

    The first step of a `whole` cache on a GPU is recorded; the cache must not be re-arranged afterwards.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self._model, self._cache = model, cache
        self._recorded = cache.whole and model.device.type == "cuda"
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Add a column to the cache and return the logits after it: float32 [B, V], valid until the next step."""
        if not self._recorded:
            return self._step(ids_B)
        self._cache.room_for(1)
        if self._replay is None:
            length, self._ids_B = self._cache.length, ids_B.clone()
            undo = functools.partial(self._cache.truncate, length)
            self._replay = cuda_graph.record(lambda: self._step(self._ids_B), undo, self._model.device)
        self._ids_B.copy_(ids_B)
        logits_BV = self._replay()
        self._cache.length += 1  # the graph has counted the column on the device
        return logits_BV

    def _step(self, ids_B: Tensor) -> Tensor:
        return self._model(ids_B[:, None], cache=self._cache)[:, 0]
