# SPDX-License-Identifier: Apache-2.0
"""Causal attention for training on a CPU, as matrix products over tiles of the scores.

torch's own kernel for CPUs multiplies in small pieces, at a quarter of the rate of a large product; some queries with
all keys before them, in many heads, are a large product and still fit the cache. The backward pass makes the
probabilities again, no more than a tile of them is held at any time; those of short sequences, which are less than
other activations, are kept for it. Scores and probabilities are rounded to the dtype of the queries, as in GPT-NeoX;
softmax and sums are float32 in any case.

Suffixes: B batch, N query heads, K key/value heads, G query heads of each of these, T positions, H head dimension,
P = B * K pairs, Q queries of a tile in all heads of a group, S keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 128  # of a tile
TILE = 1 << 19  # scores of a tile, for each thread
SHORT = 512  # positions
_on = False


def use_tiles(on: bool) -> None:
    """Choose for this process whether attention on a CPU goes by tiles."""
    global _on
    _on = on


def takes(q_BTNH: Tensor, k_BKSH: Tensor, dropout: float) -> bool:
    """Whether plainly causal attention of these goes by tiles."""
    if not _on or q_BTNH.device.type != "cpu" or dropout or q_BTNH.shape[1] != k_BKSH.shape[2]:
        return False
    return q_BTNH.dtype == k_BKSH.dtype and q_BTNH.dtype in (torch.float32, torch.bfloat16)


def attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float) -> Tensor:
    """Causal attention [B, T, N, H]; query head n reads key/value head n // (N/K)."""
    mixed_BTNH, _ = torch.ops.neox.causal_attention(q_BTNH, k_BTKH, v_BTKH, scale, _keeps(q_BTNH, k_BTKH, v_BTKH))
    return mixed_BTNH


def _keeps(q_BTNH: Tensor, *others: Tensor) -> bool:
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTNH, *others))
    return needed and q_BTNH.shape[1] <= SHORT


class _Kept:
    """Probabilities of all tiles one after the other: written in the forward pass, read in the same order backwards."""

    def __init__(self, flat: Tensor):
        self._flat, self._at = flat, 0

    @staticmethod
    def size(q_BTNH: Tensor) -> int:
        """Elements of all tiles."""
        batch, length, heads, _ = q_BTNH.shape
        return sum(batch * heads * (queries.stop - queries.start) * queries.stop for queries in _queries(length))

    def next(self, shape: tuple[int, ...]) -> Tensor:
        """The next tile."""
        begin, self._at = self._at, self._at + math.prod(shape)
        return self._flat[begin : self._at].view(shape)


def _queries(length: int) -> Iterator[slice]:
    """Those of each row of tiles. The last ones first: they see all keys."""
    for first in reversed(range(0, length, QUERIES)):
        yield slice(first, min(first + QUERIES, length))


def _pairs(q_PQH: Tensor, k_PSH: Tensor) -> Iterator[slice]:
    """Those of each tile in a row."""
    most = max(1, TILE * torch.get_num_threads() // (q_PQH.shape[1] * k_PSH.shape[1]))
    for begin in range(0, len(q_PQH), most):
        yield slice(begin, begin + most)


def _unseen(queries: slice, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of these queries with the keys beside them: -inf where the key is behind."""
    size = queries.stop - queries.start
    return torch.full((size, size), float("-inf"), dtype=dtype).triu_(1)


def _probabilities(q_PQH: Tensor, k_PSH: Tensor, unseen_QQ: Tensor, kept: _Kept | None) -> Tensor:
    """[P, Q, S] of scaled queries."""
    scores = torch.bmm(q_PQH, k_PSH.mT)
    beside = scores.unflatten(1, (-1, len(unseen_QQ)))[..., -len(unseen_QQ) :]  # what is left of it, all see
    beside += unseen_QQ
    return torch.softmax(scores, -1, out=None if kept is None else kept.next(scores.shape))


def _by_pair(x_BTNH: Tensor, kv_heads: int) -> Tensor:
    """[B, T, N, H] -> [P, G * T, H], a dense copy: of slices torch's product would make one each time."""
    by_head = x_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    return by_head.clone(memory_format=torch.contiguous_format).flatten(2, 3).flatten(0, 1)


def _put(x_PQH: Tensor, target_BTNH: Tensor, kv_heads: int) -> None:
    """The opposite of `_by_pair`."""
    target = target_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    target.copy_(x_PQH.view(target.shape))


def _add(part_PSH: Tensor, sum_PTH: Tensor, pairs: slice) -> None:
    """To the sums of these pairs, which begin with the longest part."""
    here = sum_PTH[pairs, : part_PSH.shape[1]]
    if here.shape[1] == sum_PTH.shape[1]:
        here.copy_(part_PSH)
    else:
        here += part_PSH


# Operators of our own are one node each to torch.compile.
@torch.library.custom_op("neox::causal_attention", mutates_args=())
def _forward(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    heads = k_BTKH.shape[2]
    flat = torch.empty(_Kept.size(q_BTNH) if keep else 0, dtype=q_BTNH.dtype)
    kept = _Kept(flat) if keep else None
    k_PTH, v_PTH = _by_pair(k_BTKH, heads), _by_pair(v_BTKH, heads)
    out_BTNH = torch.empty(q_BTNH.shape, dtype=q_BTNH.dtype)
    for queries in _queries(q_BTNH.shape[1]):
        q_PQH, unseen_QQ = _by_pair(q_BTNH[:, queries], heads).mul_(scale), _unseen(queries, q_BTNH.dtype)
        k_PSH, v_PSH = (x[:, : queries.stop].contiguous() for x in (k_PTH, v_PTH))
        mixed_PQH = torch.empty_like(q_PQH)
        for pairs in _pairs(q_PQH, k_PSH):
            p_PQS = _probabilities(q_PQH[pairs], k_PSH[pairs], unseen_QQ, kept)
            torch.bmm(p_PQS, v_PSH[pairs], out=mixed_PQH[pairs])
        _put(mixed_PQH, out_BTNH[:, queries], heads)
    return out_BTNH, flat


@_forward.register_fake
def _(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    return q_BTNH.new_empty(q_BTNH.shape), q_BTNH.new_empty(_Kept.size(q_BTNH) if keep else 0)


@torch.library.custom_op("neox::causal_attention_backward", mutates_args=())
def _backward(
    d_BTNH: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, flat: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _Kept(flat) if flat.numel() else None
    heads, dtype = k_BTKH.shape[2], q_BTNH.dtype
    k_PTH, v_PTH = _by_pair(k_BTKH, heads), _by_pair(v_BTKH, heads)
    dk_PTH, dv_PTH = (torch.empty(x.shape, dtype=torch.float32) for x in (k_PTH, v_PTH))  # sums of several tiles
    dq_BTNH, dk_BTKH, dv_BTKH = (torch.empty(x.shape, dtype=dtype) for x in (q_BTNH, k_BTKH, v_BTKH))
    for queries in _queries(q_BTNH.shape[1]):
        q_PQH, unseen_QQ = _by_pair(q_BTNH[:, queries], heads).mul_(scale), _unseen(queries, dtype)
        d_PQH = _by_pair(d_BTNH[:, queries], heads)
        k_PSH, v_PSH = (x[:, : queries.stop].contiguous() for x in (k_PTH, v_PTH))
        dq_PQH = torch.empty_like(q_PQH)
        for pairs in _pairs(q_PQH, k_PSH):
            if kept is not None:
                p_PQS = kept.next((len(q_PQH[pairs]), q_PQH.shape[1], k_PSH.shape[1]))
            else:
                p_PQS = _probabilities(q_PQH[pairs], k_PSH[pairs], unseen_QQ, None)
            _add(torch.bmm(p_PQS.mT, d_PQH[pairs]), dv_PTH, pairs)
            dp_PQS = torch.bmm(d_PQH[pairs], v_PSH[pairs].mT)
            ds_PQS = torch._softmax_backward_data(dp_PQS, p_PQS, -1, dtype)
            _add(torch.bmm(ds_PQS.mT, q_PQH[pairs]), dk_PTH, pairs)
            torch.bmm(ds_PQS, k_PSH[pairs], out=dq_PQH[pairs])
        _put(dq_PQH.mul_(scale), dq_BTNH[:, queries], heads)
    _put(dk_PTH, dk_BTKH, heads)
    _put(dv_PTH, dv_BTKH, heads)
    return dq_BTNH, dk_BTKH, dv_BTKH


@_backward.register_fake
def _(
    d_BTNH: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, flat: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTNH.new_empty(q_BTNH.shape), k_BTKH.new_empty(k_BTKH.shape), v_BTKH.new_empty(v_BTKH.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, bool], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_BTNH: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *torch.ops.neox.causal_attention_backward(d_BTNH, *ctx.saved_tensors, ctx.scale), None, None


_forward.register_autograd(_gradients, setup_context=_save)
