# SPDX-License-Identifier: Apache-2.0
"""One rank of a tensor-parallel group: what it sends and receives, forward and backward.

Suffixes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from libneox.errors import UsageError
from libneox.model_config import ModelConfig
from libneox.parallel.mesh import Mesh
from libneox.parallel.sharding import Split, split_of

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank of a tensor-parallel group. With one rank in it, everything here gives back what it is given.

    Attributes:
        sequence: between the matrices a rank holds its share of the positions only.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sequence: bool = False

    @classmethod
    def of(cls, mesh: Mesh, *, sequence: bool = False) -> Shard:
        """This rank's place in the tensor-parallel group of a connected mesh."""
        return cls(mesh.tensor_rank, mesh.tensor_size, mesh.groups.get("tensor"), sequence and mesh.tensor_size > 1)

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Into a region where every rank has all positions and computes a part of the features."""
        if self.size == 1:
            return x_BTD
        return (_Gathered if self.sequence else _Copied).apply(x_BTD, self)

    def leave(self, part_BTD: Tensor) -> Tensor:
        """Out of it: the sum of what the ranks computed."""
        if self.size == 1:
            return part_BTD
        return (_SumScattered if self.sequence else _Summed).apply(part_BTD, self)

    def total(self, part: Tensor) -> Tensor:
        """The sum over ranks, whole on each."""
        return part if self.size == 1 else _Summed.apply(part, self)

    def scatter(self, x_BTD: Tensor) -> Tensor:
        """This rank's positions of what is the same on all ranks."""
        return _Cut.apply(x_BTD, self) if self.sequence else x_BTD

    def joined(self, split: Split | None, piece: Tensor) -> Tensor:
        """The whole tensor out of every rank's piece; a collective if it is cut."""
        if split is None or self.size == 1:
            return piece
        return split.joined(self.collected(piece.detach()).unbind())

    def collected(self, mine: Tensor) -> Tensor:
        """Every rank's tensor, in order of rank along a new first dimension."""
        everybody = mine.new_empty((self.size, *mine.shape))
        _all_gather(everybody.flatten(0, 1), mine.contiguous(), group=self.group)
        return everybody

    def piece(self, split: Split | None, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        return whole if split is None or self.size == 1 else split.piece(whole, self.rank, self.size)

    def starting(self, part_BTD: Tensor) -> Callable[[], Tensor]:
        """What `enter` gives, without gradients: begun now, waited for by calling what is returned."""
        return _gather_later(part_BTD, self) if self.sequence else lambda: part_BTD

    def summing(self, x_BTD: Tensor) -> Callable[[], Tensor]:
        """Its counterpart, what `leave` gives, likewise; may overwrite x."""
        return _sum_scatter_later(x_BTD, self) if self.sequence else _sum_later(x_BTD, self)

    def sum_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of a tensor that every rank holds, when each has seen a part of what it acts on."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    @contextlib.contextmanager
    def own_random(self, device: torch.device) -> Iterator[None]:
        """Random numbers of this rank alone, where its neighbours work on other heads or positions.

        They follow from the common stream, which afterwards stands at the same place on all ranks: whoever restores
        the common stream to run a region again (activation checkpointing) gets the same numbers again.
        """
        seed = int(torch.randint(1 << 62, ()))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield


WHOLE = Shard()


class Pieces:
    """Logical tensors by name: whole ones from every rank's piece, and this rank's piece of a whole one."""

    def __init__(self, config: ModelConfig, shard: Shard):
        self._config, self._shard = config, shard

    def whole(self, name: str, piece: Tensor) -> Tensor:
        """The whole tensor, on every rank; a collective if it is cut."""
        return self._shard.joined(split_of(self._config, name), piece)

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of it; may be a view."""
        return self._shard.piece(split_of(self._config, name), whole)


class _Copied(torch.autograd.Function):
    """x on every rank; the gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.shard), None


class _Summed(torch.autograd.Function):
    """The sum of the ranks' x; the gradient is everybody's."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, shard: Shard) -> Tensor:
        return _sum(x_BTD.clone(), shard)  # selective checkpointing keeps x, which must stay what it is

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gathered(torch.autograd.Function):
    """All positions out of every rank's; the gradient is the sum of the ranks', cut again."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _gather(x_BTD, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_scatter(grads[0], ctx.shard), None


class _SumScattered(torch.autograd.Function):
    """The sum of the ranks' x, of which each keeps its positions."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _sum_scatter(x_BTD, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.shard), None


class _Cut(torch.autograd.Function):
    """This rank's positions of an x that is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        check_positions(x_BTD.shape[1], shard)
        return x_BTD.chunk(shard.size, 1)[shard.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.shard), None


def check_positions(length: int, shard: Shard) -> None:
    """Raise UsageError unless the positions can be shared equally."""
    if shard.sequence and length % shard.size:
        raise UsageError(
            f"sequence_parallel: {length} positions cannot be shared by model_parallel_size {shard.size} ranks; "
            "set it to false"
        )


def _sum(x: Tensor, shard: Shard) -> Tensor:
    return _sum_later(x, shard)()


def _sum_later(x: Tensor, shard: Shard) -> Callable[[], Tensor]:
    """In place if x is contiguous."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=shard.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x

    return finish


def _gather(part_BTD: Tensor, shard: Shard) -> Tensor:
    return _gather_later(part_BTD, shard)()


def _gather_later(part_BTD: Tensor, shard: Shard) -> Callable[[], Tensor]:
    part_BTD = part_BTD.contiguous()
    parts = part_BTD.new_empty((shard.size, *part_BTD.shape))
    work = _all_gather(parts.flatten(0, 1), part_BTD, group=shard.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return parts.transpose(0, 1).flatten(1, 2)

    return finish


def _sum_scatter(x_BTD: Tensor, shard: Shard) -> Tensor:
    return _sum_scatter_later(x_BTD, shard)()


def _sum_scatter_later(x_BTD: Tensor, shard: Shard) -> Callable[[], Tensor]:
    batch, length, width = x_BTD.shape
    parts = x_BTD.unflatten(1, (shard.size, length // shard.size)).transpose(0, 1).contiguous()
    mine = x_BTD.new_empty(batch, length // shard.size, width)
    work = _reduce_scatter(mine, parts.flatten(0, 1), group=shard.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return mine

    return finish
