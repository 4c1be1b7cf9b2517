# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from neox_train.objective import LanguageModeling, MicroBatch


class Outcome(NamedTuple):
    """How one optimiser step went; tensors are scalars, and may still be in the device's queue.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping.
        skipped: whether the weights were left as they were (the gradient was not finite).
    """

    grad_norm: Tensor | float
    skipped: Tensor | bool


class Engine(Protocol):
    """A model in training, however it is spread over ranks. All tensors it gives and takes are whole and logical.

    `weight`, `master`, `gradient` and `state` are collectives: every rank calls them in the same order.
    """

    objective: LanguageModeling
    device: torch.device
    queues: bool
    """Whether `step` waits for nothing; from a loss or gradient that is not finite on, every step is skipped."""

    def train(self, on: bool) -> None:
        """Switch dropout on or off."""

    def backward(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Add up the gradients of a step's micro-batches; returns the mean of their losses (float32 scalar).

        All ranks of a pipeline and of a tensor-parallel group return the same.
        """

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Mean loss of micro-batches without gradients."""

    def step(self, lr: float) -> Outcome:
        """Average the gradients over micro-batches and ranks, clip, update."""

    def names(self) -> list[str]:
        """Logical parameters in the model's order."""

    def local(self) -> Mapping[str, Tensor]:
        """What this rank holds of the parameters, in the compute dtype, by name: its shards, its stage's."""

    def weight(self, name: str) -> Tensor:
        """A parameter in the compute dtype."""

    def master(self, name: str) -> Tensor:
        """A parameter in float32."""

    def gradient(self, name: str) -> Tensor:
        """Gradient of a parameter in float32, averaged over micro-batches and ranks, before it is clipped.

        Between `backward` and `step`; the result is not to be written to.
        """

    def state_specs(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(state, parameter, shape) of every state tensor the optimiser has by now; all are float32."""

    def state(self, key: str, name: str) -> Tensor:
        """One of them."""

    def scalars(self) -> dict[str, Any]:
        """What else of the optimiser a checkpoint must hold: Adam's step, the loss scaler."""

    def restore_master(self, name: str, value: Tensor) -> None:
        """Set a parameter in float32 and in the compute dtype."""

    def restore_state(self, key: str, name: str, value: Tensor) -> None:
        """Set one state tensor."""

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Set what `scalars` gave; after the state tensors."""

    def close(self) -> None:
        """Let go of everything."""
