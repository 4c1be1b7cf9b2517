# SPDX-License-Identifier: Apache-2.0
"""A text that is continued again and again: what was read before is not read twice."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from libneox.generation.engine import Completion, Engine, OnText, Row, cache_dtype
from libneox.model import KVCache

LEAST_CAPACITY = 1024


class Conversation:
    """Completes prompts one by one, keeping the keys and values of the part they share with the text before."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._cache: KVCache | None = None
        self._known: list[int] = []  # ids whose keys and values the cache holds

    @torch.inference_mode()
    def complete(self, prompt: str | Sequence[int], on_text: OnText | None = None, *, turn: int = 0) -> Completion:
        """Complete a prompt (text or ids).

        Args:
            on_text: given the text as it comes, whole characters at a time.
            turn: number of the prompt; keys the random numbers.
        Raises:
            DataError: the prompt leaves no room in the model's context.
        """
        started, engine = time.perf_counter(), self._engine
        request = engine.request(prompt, index=turn)
        row = Row(engine, request, copy=0)
        row.on_text = on_text
        if row.limit > 0:
            shared = self._take_up(request.ids, len(request.ids) + row.limit + engine.guesses)
            cache: KVCache = self._cache  # type: ignore[assignment]
            fed = torch.tensor([request.ids[shared:]], device=engine.model.device)
            logits = engine.model.logits(engine.model.hidden(fed, cache=cache)[:, -1])
            try:
                engine.decode_single(row, cache, logits)
            finally:  # also when interrupted: what is in the cache is known either way
                self._known = [*request.ids, *row.tokens][: cache.length]
                cache.truncate(len(self._known))
        return row.completion(time.perf_counter() - started)

    def _take_up(self, ids: list[int], needed: int) -> int:
        """Make the cache hold a beginning of `ids` and have room for `needed` columns; return how many it holds."""
        model = self._engine.model
        if self._cache is None or self._cache.capacity < needed:
            capacity = max(LEAST_CAPACITY, 2 * needed)
            self._cache = KVCache(model.config, 1, capacity, dtype=cache_dtype(model), device=model.device)
            self._known = []
        shared = 0
        for ours, its in zip(ids[:-1], self._known, strict=False):  # the last id is fed again, for its logits
            if ours != its:
                break
            shared += 1
        self._cache.truncate(shared)
        self._known = self._known[:shared]  # should reading the rest be interrupted
        return shared
