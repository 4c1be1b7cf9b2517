# SPDX-License-Identifier: Apache-2.0
"""Where a rank stands among pipeline stages, data-parallel replicas and tensor-parallel shards.

rank = (pipe_rank * data_size + data_rank) * tensor_size + tensor_rank: neighbours share a tensor-parallel group, as in
Megatron-LM, GPT-NeoX and DeepSpeed's PipeModelDataParallelTopology.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The grid of a run's ranks, seen from one of them.

    Attributes:
        rank: of this process in the run.
        pipe_size, data_size, tensor_size: extents; their product is the number of ranks.
        groups: process group of each axis that this rank is in, by "pipe", "data" and "tensor"; filled by `connected`.
    """

    rank: int = 0
    pipe_size: int = 1
    data_size: int = 1
    tensor_size: int = 1
    groups: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.pipe_size * self.data_size * self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Which shard of every sharded tensor."""
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which slice of every batch."""
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipe_rank(self) -> int:
        """Which stage of the pipeline."""
        return self.rank // (self.tensor_size * self.data_size)

    def members(self, axis: str) -> Iterator[list[int]]:
        """The ranks of every group along "pipe", "data" or "tensor", in the same order on every rank."""
        sizes = {"pipe": self.pipe_size, "data": self.data_size, "tensor": self.tensor_size}
        others = [name for name in sizes if name != axis]
        for place in itertools.product(*(range(sizes[name]) for name in others)):
            fixed = dict(zip(others, place, strict=True))
            yield [self._rank_of(**fixed, **{axis: index}) for index in range(sizes[axis])]

    def _rank_of(self, *, pipe: int, data: int, tensor: int) -> int:
        return (pipe * self.data_size + data) * self.tensor_size + tensor

    def connected(self) -> Mesh:
        """This mesh with its process groups; a collective, after torch.distributed has started."""
        groups = {}
        for axis in ("pipe", "data", "tensor"):
            for ranks in self.members(axis):
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    groups[axis] = group
        return dataclasses.replace(self, groups=groups)
