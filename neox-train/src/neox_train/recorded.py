# SPDX-License-Identifier: Apache-2.0
"""The forward and backward pass of a micro-batch as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from libneox.model import cuda_graph
from neox_train.objective import MicroBatch

Record = Callable[[Callable[[], Tensor], Callable[[], object], torch.device, Any], Callable[[], Tensor]]


class Recorded:
    """Calls `work` by replaying what it did for the first micro-batch of the same shapes.

    Gradients are added to tensors that stay where they are, so they have to be set to zero rather than to None.
    """

    def __init__(
        self, work: Callable[[MicroBatch], Tensor], weights: Iterable[nn.Parameter], record: Record = cuda_graph.record
    ):
        self._work, self._weights, self._record = work, list(weights), record
        self._device = self._weights[0].device
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None  # a loss is copied at once
        self._recordings: dict[tuple[torch.Size | None, ...], tuple[MicroBatch, Callable[[], Tensor]]] = {}

    def __call__(self, batch: MicroBatch) -> Tensor:
        """The loss of the micro-batch, float32 scalar; its gradients are added."""
        shapes = tuple(None if field is None else field.shape for field in batch)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._make(batch)
        fields, replay = self._recordings[shapes]
        for field, given in zip(fields, batch, strict=True):
            if field is not None:
                field.copy_(given)
        return replay().clone()

    def _make(self, batch: MicroBatch) -> tuple[MicroBatch, Callable[[], Tensor]]:
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        so_far = [weight.grad.clone() for weight in self._weights if weight.grad is not None]
        fields = MicroBatch(*(None if field is None else field.clone() for field in batch))  # type: ignore[arg-type]

        def undo() -> None:
            for weight, gradient in zip(self._weights, so_far, strict=True):
                assert weight.grad is not None
                weight.grad.copy_(gradient)

        return fields, self._record(lambda: self._work(fields), undo, self._device, self._pool)
