# SPDX-License-Identifier: Apache-2.0
"""Which samples a step is made of, and their tensors. A pure function of the step: nothing is consumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from libneox.config import BatchPlan, NeoxConfig
from libneox.data.splits import SampleSet
from libneox.errors import DataError
from libneox.model.documents import cu_seqlens_of, document_starts, restarted_positions
from libneox.model.loss import IGNORE
from neox_train.objective import MicroBatch


def sample_numbers(plan: BatchPlan, first: int, micro_step: int, data_rank: int) -> range:
    """Positions in the sample order that a rank computes in one micro-step of a step that begins at sample `first`.

    As in GPT-NeoX a micro-step takes micro_batch * data_parallel consecutive samples and each rank a contiguous slice
    of them, so the set of samples of a step depends on the global batch alone.
    """
    start = first + (micro_step * plan.data_parallel + data_rank) * plan.micro_batch
    return range(start, start + plan.micro_batch)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Micro-batches of one rank, from one sample set.

    Attributes:
        vocab_size: ids must be below it.
        eod_id: end-of-document, where loss or attention depends on documents.
        by_token: the loss of a step is the mean over its tokens, rather than the mean of micro-batch means.
        data_group: process group of the data-parallel ranks, if it is not all of them.
    """

    samples: SampleSet
    plan: BatchPlan
    data_rank: int
    device: torch.device
    vocab_size: int
    eod_id: int | None
    eod_mask_loss: bool
    document_mask: bool
    reset_position_ids: bool
    by_token: bool = False
    data_group: Any = None

    def step(self, first: int, length: int | None = None) -> Iterator[MicroBatch]:
        """The micro-batches of the step that begins at sample `first`.

        With `by_token` it is a collective of the data-parallel ranks.

        Args:
            length: positions that are kept of each sample; default all.
        """
        numbers = (sample_numbers(self.plan, first, micro, self.data_rank) for micro in range(self.plan.grad_accum))
        batches = (self.make(some, length) for some in numbers)
        return self._with_divisor(list(batches)) if self.by_token else batches

    def _with_divisor(self, batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Engines take the mean over micro-batches and ranks: with this divisor it is one over the step's tokens."""
        divisor = torch.stack([weight_of(batch) for batch in batches]).sum()
        if self.plan.data_parallel > 1:
            dist.all_reduce(divisor, group=self.data_group)
        divisor /= self.plan.grad_accum * self.plan.data_parallel
        return (batch._replace(divisor=divisor) for batch in batches)

    def make(self, numbers: range, length: int | None = None) -> MicroBatch:
        """Tensors of some samples, cut to `length` positions.

        Raises:
            DataError: an id that the tokenizer does not have.
        """
        sample = self.samples.read(np.arange(numbers.start, numbers.stop) % len(self.samples))
        tokens, labels = sample.tokens, sample.labels
        if length is not None:
            tokens, labels = tokens[:, : length + 1], labels if labels is None else labels[:, : length + 1]
        self._check(tokens, numbers)
        ids = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))
        wanted = tokens[:, 1:] if labels is None else np.where(labels[:, 1:] < 0, IGNORE, labels[:, 1:])
        targets = torch.from_numpy(np.ascontiguousarray(wanted))
        mask = (ids != self.eod_id).float() if self.eod_mask_loss else None
        cu_seqlens = positions = None
        if self.document_mask or self.reset_position_ids:
            starts = document_starts(ids, self.eod_id)
            cu_seqlens = cu_seqlens_of(starts) if self.document_mask else None
            positions = restarted_positions(starts) if self.reset_position_ids else None
        tensors = (ids, targets, mask, cu_seqlens, positions)
        return MicroBatch(*(t if t is None else self._moved(t) for t in tensors))

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device; a GPU fetches it by itself from memory that stays in place."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _check(self, tokens: np.ndarray[Any, Any], numbers: range) -> None:
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            row, column = np.argwhere((tokens >= self.vocab_size) | (tokens < 0))[0]
            raise DataError(
                f"sample {numbers[row]}: token id {tokens[row, column]}, the vocabulary is 0 to {self.vocab_size - 1}; "
                "the data was made with another tokenizer"
            )


def weight_of(batch: MicroBatch) -> Tensor:
    """Sum of the weights that the positions of a micro-batch have in the loss, float32 scalar."""
    weights = (batch.targets != IGNORE).float()
    return (weights if batch.mask is None else weights * batch.mask).sum()


def batches_of(
    config: NeoxConfig,
    samples: SampleSet,
    plan: BatchPlan,
    *,
    data_rank: int,
    data_group: Any = None,
    device: torch.device,
    vocab_size: int,
    eod_id: int | None,
) -> Batches:
    """The batches of a configuration over one of its sample sets."""
    data = config.data
    return Batches(
        samples,
        plan,
        data_rank,
        device,
        vocab_size,
        eod_id,
        data.eod_mask_loss,
        data.document_mask,
        data.reset_position_ids,
        config.optim.loss_weighting == "tokens",
        data_group,
    )
