# SPDX-License-Identifier: Apache-2.0
"""The loss when the rows of the head are spread over a tensor-parallel group.

Each rank scores its share of the vocabulary; the ranks tell each other two numbers a position, and none ever holds all
logits. The gradient of the hidden states is summed over the group once, where they left the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libneox.model.loss import Vocabulary
from libneox.parallel.shard import Shard


class SharedVocabulary(Vocabulary):
    """Rows of a head of which every rank holds `rows`, in the order of ranks."""

    def __init__(self, shard: Shard, rows: int):
        self._shard, self._rows = shard, rows

    def find(self, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """See `libneox.model.loss.Vocabulary`."""
        rows_M = labels_M - self._shard.rank * self._rows
        held_M = (rows_M >= 0) & (rows_M < self._rows)
        return rows_M.where(held_M, 0), held_M.float()

    def reduce(self, lse_C1: Tensor, target_C1: Tensor, held_C1: Tensor) -> tuple[Tensor, Tensor]:
        """See `libneox.model.loss.Vocabulary`; a collective."""
        mine_C2 = torch.cat((lse_C1, target_C1 * held_C1), dim=-1)
        all_RC2 = self._shard.collected(mine_C2)
        return all_RC2[..., :1].logsumexp(0), all_RC2[..., 1:].sum(0)
