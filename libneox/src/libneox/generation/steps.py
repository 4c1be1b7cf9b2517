# SPDX-License-Identifier: Apache-2.0
"""One decoding step. On a GPU the whole step is captured once and replayed: launching its kernels one by one takes
longer than running them."""

from __future__ import annotations

import torch
from torch import Tensor

from libneox.model import KVCache, Transformer

WARM_UP_STEPS = 2


class Steps:
    """Feeds one token a row through the model.

    The first step of a `whole` cache on a GPU is captured; the cache must not be re-arranged afterwards.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self._model, self._cache = model, cache
        self._captured = cache.whole and model.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Add a column to the cache and return the logits after it: float32 [B, V], valid until the next step."""
        if not self._captured:
            return self._model(ids_B[:, None], cache=self._cache)[:, 0]
        self._cache.room_for(1)
        if self._graph is None:
            self._capture(ids_B)
        self._ids_B.copy_(ids_B)
        self._graph.replay()  # type: ignore[union-attr]
        self._cache.length += 1  # the graph has counted the column on the device
        return self._logits_BV

    def _capture(self, ids_B: Tensor) -> None:
        """Run the step aside to warm up, record it, and set the cache back."""
        length, self._ids_B = self._cache.length, ids_B.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._model(self._ids_B[:, None], cache=self._cache)
                self._cache.truncate(length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits_BV = self._model(self._ids_B[:, None], cache=self._cache)[:, 0]
        self._cache.truncate(length)
        self._graph = graph
