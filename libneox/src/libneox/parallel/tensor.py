# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism, put on a model from outside: the ranks of a group hold slices of its matrices.

`shard_model` cuts the parameters of a finished model (or of a part of one) as the table of
`libneox.parallel.sharding` says and makes its layers talk. Names stay the logical ones. Per block two sums over the
group are needed forward and two backward (arXiv 1909.08053). With `sequence`, norms, residuals and dropouts
between them work on T / ranks positions each, and every sum becomes a reduce-scatter behind a row-parallel matrix and
an all-gather before a column-parallel one (arXiv 2205.05198); the bytes sent are the same.

Suffixes: B batch, T positions, D hidden size, M positions of all rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libneox.model.part import Part
from libneox.model.transformer import Block, Embedding, Linear, Transformer
from libneox.model_config import ModelConfig
from libneox.parallel.shard import Shard
from libneox.parallel.sharding import Split, check_divides, split_of, sums_gradient


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


def shard_model(module: Transformer, config: ModelConfig, shard: Shard, *, device: str | torch.device = "cpu") -> None:
    """Cut a model, or a part of one, in place.

    Parameters keep this rank's slice of their values; those on the meta device get memory on `device`. Each cut one
    is marked `model_parallel`: DeepSpeed counts the others once in the norm of the gradient.

    Raises:
        UsageError: heads, widths or rows cannot be shared equally.
    """
    if shard.size == 1:
        return
    check_divides(config, shard.size)
    for name, parameter in list(module.named_parameters()):
        _cut_parameter(module, name, parameter, shard, split_of(config, name), device)
        if sums_gradient(name, sequence=shard.sequence):
            module.get_parameter(name).register_hook(shard.sum_gradient)
    for layer in module.modules():
        if isinstance(layer, Block):
            _connect_block(layer, shard)
    heads = config.num_heads // shard.size
    module.slopes = module.slopes[shard.rank * heads : (shard.rank + 1) * heads]
    module.kv_heads = config.num_kv_heads // shard.size
    module.logits = functools.partial(_whole_logits, module, shard)  # type: ignore[method-assign]
    if module.embed is not None:
        module.embed = VocabularyParallelEmbedding(module.embed, shard)  # type: ignore[assignment]
    # blocks work on this rank's positions; what embeds and what the head sees are all of them
    if module.is_first:
        module.layers[0].register_forward_pre_hook(lambda _, args: (shard.scatter(args[0]), *args[1:]))
    if module.is_last:
        module.final_norm.register_forward_hook(lambda _, args, x_BTD: shard.enter(x_BTD))


def _whole_logits(model: Transformer, shard: Shard, hidden_BTD: Tensor) -> Tensor:
    """`Transformer.logits` when every rank has some rows of the head. Without gradients: training has no use for it."""
    mine = F.linear(hidden_BTD, model.head_weight).detach()
    return shard.collected(mine).movedim(0, -2).flatten(-2).float()


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
        return _ColumnLinear.apply(x_BTD, self.weight, self.bias, self._shard)


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


class _ColumnLinear(torch.autograd.Function):
    """`F.linear(shard.enter(x), weight, bias)`, whose backward pass multiplies while others' numbers are on their way.

    With sequence parallelism only this rank's positions are kept for it, and gathered a second time.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight: Tensor, bias: Tensor | None, shard: Shard) -> Tensor:
        ctx.save_for_backward(x_BTD, weight)
        ctx.shard = shard
        return F.linear(shard.starting(x_BTD)(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x_BTD, weight = ctx.saved_tensors
        entered = ctx.shard.starting(x_BTD)
        summed = ctx.shard.summing(grads[0] @ weight)
        grad_M = grads[0].flatten(0, -2)
        d_weight = grad_M.T @ entered().flatten(0, -2)
        d_bias = grad_M.sum(0) if ctx.needs_input_grad[2] else None
        return summed(), d_weight, d_bias, None
