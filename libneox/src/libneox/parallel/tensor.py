# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism, put on a model from outside: the ranks of a group hold slices of its matrices.

`shard_model` cuts the parameters of a finished model (or of a layer of `libneox.model.stages`) as the table of
`libneox.parallel.sharding` says and makes its layers talk. Names stay the logical ones. Per block two sums over the
group are needed forward and two backward (arXiv 1909.08053). With `sequence`, norms, residuals and dropouts
between them work on T / ranks positions each, and every sum becomes a reduce-scatter behind a row-parallel matrix and
an all-gather before a column-parallel one (arXiv 2205.05198); the bytes sent are the same.

Suffixes: B batch, T positions, D hidden size, V padded vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from libneox.errors import UsageError
from libneox.model.part import Part
from libneox.model.stages import BlockStage, EmbeddingStage, NormStage
from libneox.model.transformer import Block, Embedding, Linear, Transformer
from libneox.model_config import ModelConfig
from libneox.parallel.mesh import Mesh
from libneox.parallel.sharding import Split, check_divides, split_of, sums_gradient

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
        """The sum over ranks, whole on each; overwrites `part`."""
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


def sharded_model(config: ModelConfig, shard: Shard, device: str | torch.device = "cpu") -> Transformer:
    """A model of which this rank holds its part; no rank ever holds all of it. Its memory is not initialised."""
    if shard.size == 1:
        with torch.device(device):
            return Transformer(config)
    with torch.device("meta"):
        model = Transformer(config)
    shard_model(model, config, shard, device=device)
    return model


def sharded_part(config: ModelConfig, pieces: range, shard: Shard, device: str | torch.device = "cpu") -> Part:
    """Some layers of a model, likewise (`libneox.config.partition` says what the pieces are)."""
    with torch.device("meta"):
        part = Part(config, pieces)
    shard_model(part, config, shard, device=device)
    return part.to_empty(device=device) if shard.size == 1 else part


def shard_model(
    module: nn.Module, config: ModelConfig, shard: Shard, *, prefix: str = "", device: str | torch.device = "cpu"
) -> None:
    """Cut a model, or a layer of `libneox.model.stages`, in place.

    Parameters keep this rank's slice of their values; those on the meta device get memory on `device`. Each cut one
    is marked `model_parallel`: DeepSpeed counts the others once in the norm of the gradient.

    Args:
        prefix: of the logical names of the module's parameters (`Stage.prefix`).
    Raises:
        UsageError: heads, widths or rows cannot be shared equally.
    """
    if shard.size == 1:
        return
    check_divides(config, shard.size)
    for name, parameter in list(module.named_parameters()):
        _cut_parameter(module, name, parameter, shard, split_of(config, prefix + name), device)
        if sums_gradient(prefix + name, sequence=shard.sequence):
            module.get_parameter(name).register_hook(shard.sum_gradient)
    for layer in module.modules():
        if isinstance(layer, Block):
            _connect_block(layer, shard)
    if isinstance(module, Transformer | BlockStage):
        heads = config.num_heads // shard.size
        module.slopes = module.slopes[shard.rank * heads : (shard.rank + 1) * heads]
    if isinstance(module, Transformer | EmbeddingStage) and module.embed is not None:
        module.embed = VocabularyParallelEmbedding(module.embed, shard)  # type: ignore[assignment]
    if shard.sequence and isinstance(module, BlockStage):
        module.shares = shard.size
    _connect_ends(module, shard)


def _connect_ends(module: nn.Module, shard: Shard) -> None:
    """Blocks work on this rank's positions; what embeds and what the head sees are all of them."""
    if isinstance(module, Transformer):
        if module.is_first:
            module.layers[0].register_forward_pre_hook(lambda _, args: (shard.scatter(args[0]), *args[1:]))
        if module.is_last:
            module.final_norm.register_forward_hook(lambda _, args, x_BTD: shard.enter(x_BTD))
    elif isinstance(module, EmbeddingStage):
        module.register_forward_hook(lambda _, args, x_BTD: shard.scatter(x_BTD))
    elif isinstance(module, NormStage):
        module.register_forward_hook(lambda _, args, x_BTD: shard.enter(x_BTD))


def _cut_parameter(
    module: nn.Module, name: str, parameter: nn.Parameter, shard: Shard, split: Split | None, device: Any
) -> None:
    if parameter.is_meta:
        shape = parameter.shape if split is None else split.shape(parameter.shape, shard.size)
        value = torch.empty(shape, dtype=parameter.dtype, device=device)
    else:
        value = shard.piece(split, parameter.detach()).clone()
    mine = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if split is not None:
        mine.model_parallel = True  # type: ignore[attr-defined]
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, mine)


def _connect_block(block: Block, shard: Shard) -> None:
    attn, mlp = block.attn, block.mlp
    attn.qkv, attn.out = ColumnParallel(attn.qkv, shard), RowParallel(attn.out, shard)  # type: ignore[assignment]
    mlp.up, mlp.down = ColumnParallel(mlp.up, shard), RowParallel(mlp.down, shard)  # type: ignore[assignment]
    if attn.dropout:
        attn.forward = functools.partial(_with_own_random, attn, attn.forward, shard)  # type: ignore[method-assign]
    if block.dropout and shard.sequence:
        block._drop = functools.partial(_with_own_random, block, block._drop, shard)  # type: ignore[method-assign]


def _with_own_random(
    module: nn.Module, run: Callable[..., Tensor], shard: Shard, x_BTD: Tensor, *rest: Any, **named: Any
) -> Tensor:
    with shard.own_random(x_BTD.device) if module.training else contextlib.nullcontext():
        return run(x_BTD, *rest, **named)


class ColumnParallel(nn.Module):
    """A linear layer of which each rank has some output features."""

    def __init__(self, linear: Linear, shard: Shard):
        super().__init__()
        self.weight, self.bias, self._shard = linear.weight, linear.bias, shard

    def forward(self, x_BTD: Tensor) -> Tensor:
        """All features in, this rank's features out."""
        return F.linear(self._shard.enter(x_BTD), self.weight, self.bias)


class RowParallel(nn.Module):
    """A linear layer of which each rank has some input features; the bias is added once, to the sum."""

    def __init__(self, linear: Linear, shard: Shard):
        super().__init__()
        self.weight, self.bias, self._shard = linear.weight, linear.bias, shard

    def forward(self, part: Tensor) -> Tensor:
        """This rank's features in, all features out."""
        out_BTD = self._shard.leave(F.linear(part, self.weight))
        return out_BTD if self.bias is None else out_BTD + self.bias


class VocabularyParallelEmbedding(nn.Module):
    """An embedding of which each rank has some rows."""

    def __init__(self, embedding: Embedding, shard: Shard):
        super().__init__()
        self.weight, self._shard = embedding.weight, shard
        self._first, self._rows = shard.rank * len(embedding.weight), len(embedding.weight)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Any ids in; whole vectors out, on every rank."""
        rows_BT = ids_BT - self._first
        absent_BT = (rows_BT < 0) | (rows_BT >= self._rows)
        part_BTD = F.embedding(rows_BT.masked_fill(absent_BT, 0), self.weight)
        return self._shard.total(part_BTD.masked_fill(absent_BT.unsqueeze(-1), 0.0))


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
    """The sum of the ranks' x, in the place of x; the gradient is everybody's."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, shard: Shard) -> Tensor:
        if x_BTD.is_contiguous():
            ctx.mark_dirty(x_BTD)
        return _sum(x_BTD, shard)

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
    """In place if x is contiguous."""
    x = x.contiguous()
    dist.all_reduce(x, group=shard.group)
    return x


def _gather(part_BTD: Tensor, shard: Shard) -> Tensor:
    batch, length, width = part_BTD.shape
    return shard.collected(part_BTD).transpose(0, 1).reshape(batch, shard.size * length, width)


def _sum_scatter(x_BTD: Tensor, shard: Shard) -> Tensor:
    batch, length, width = x_BTD.shape
    parts = x_BTD.unflatten(1, (shard.size, length // shard.size)).transpose(0, 1).contiguous()
    mine = x_BTD.new_empty(batch, length // shard.size, width)
    _reduce_scatter(mine, parts.flatten(0, 1), group=shard.group)
    return mine
