# SPDX-License-Identifier: Apache-2.0
"""Causal attention for training on a CPU, as matrix products over tiles of the scores.

torch's own kernel for CPUs multiplies in small pieces, at a quarter of the rate of a large product; some queries with
all keys before them, in many heads, are a large product and still fit the cache. The backward pass makes the
probabilities again: no more than a tile of them is held at any time. Scores and softmax are float32 in any case.

Suffixes: B batch, N query heads, K key/value heads, G query heads of each of these, T positions, H head dimension,
P = B * K pairs, Q queries of a tile in all heads of a group, S keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUERIES = 128  # of a tile
TILE = 1 << 19  # scores of a tile, for each thread
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
    return torch.ops.neox.causal_attention(q_BTNH, k_BTKH, v_BTKH, scale)


class _Tile(NamedTuple):
    pairs: slice  # of batch and key/value head
    first: int  # query
    end: int  # behind the last query, and behind the last key they see


def _tiles(q_PGTH: Tensor) -> Iterator[_Tile]:
    pairs, group, length, _ = q_PGTH.shape
    for first in range(0, length, QUERIES):
        end = min(first + QUERIES, length)
        most = max(1, TILE * torch.get_num_threads() // (group * (end - first) * end))
        for begin in range(0, pairs, most):
            yield _Tile(slice(begin, min(begin + most, pairs)), first, end)


def _probabilities(q_PGTH: Tensor, k_PTH: Tensor, tile: _Tile, scale: float) -> tuple[Tensor, Tensor]:
    """float32 [P, Q, S], and the queries [P, Q, H]."""
    q_PGQH = q_PGTH[tile.pairs, :, tile.first : tile.end]
    q_PQH = q_PGQH.flatten(1, 2)
    scores = torch.bmm(q_PQH.float() * scale, k_PTH[tile.pairs, : tile.end].float().mT)
    square = scores.unflatten(1, q_PGQH.shape[1:3])[..., tile.first :]  # left of it all is seen
    square += torch.full(square.shape[-2:], float("-inf")).triu_(1)
    return scores.softmax(-1), q_PQH


def _by_pair(x_BTNH: Tensor, kv_heads: int) -> Tensor:
    """[B, T, N, H] -> [P, G, T, H], contiguous."""
    return x_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_position(x_PGTH: Tensor, batch: int) -> Tensor:
    """[P, G, T, H] -> [B, T, N, H], contiguous."""
    return x_PGTH.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


# Operators of our own are one node each to torch.compile.
@torch.library.custom_op("neox::causal_attention", mutates_args=())
def _forward(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float) -> Tensor:
    heads = k_BTKH.shape[2]
    q_PGTH = _by_pair(q_BTNH, heads)
    k_PTH, v_PTH = (_by_pair(x, heads).squeeze(1) for x in (k_BTKH, v_BTKH))
    out_PGTH = torch.empty_like(q_PGTH)
    for tile in _tiles(q_PGTH):
        p_PQS, _ = _probabilities(q_PGTH, k_PTH, tile, scale)
        mixed_PQH = torch.bmm(p_PQS.to(v_PTH.dtype), v_PTH[tile.pairs, : tile.end])
        part = out_PGTH[tile.pairs, :, tile.first : tile.end]
        part.copy_(mixed_PQH.view(part.shape))
    return _by_position(out_PGTH, len(q_BTNH))


@_forward.register_fake
def _(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float) -> Tensor:
    return q_BTNH.new_empty(q_BTNH.shape)


@torch.library.custom_op("neox::causal_attention_backward", mutates_args=())
def _backward(
    d_BTNH: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dtype = k_BTKH.shape[2], q_BTNH.dtype
    q_PGTH, d_PGTH = _by_pair(q_BTNH, heads), _by_pair(d_BTNH, heads)
    k_PTH, v_PTH = (_by_pair(x, heads).squeeze(1) for x in (k_BTKH, v_BTKH))
    dq_PGTH = torch.empty_like(q_PGTH)
    dk_PTH, dv_PTH = (torch.zeros(x.shape, dtype=torch.float32) for x in (k_PTH, v_PTH))  # sums of several tiles
    for tile in _tiles(q_PGTH):
        pairs, seen = tile.pairs, slice(tile.end)
        p_PQS, q_PQH = _probabilities(q_PGTH, k_PTH, tile, scale)
        d_PQH = d_PGTH[pairs, :, tile.first : tile.end].flatten(1, 2)
        dv_PTH[pairs, seen] += torch.bmm(p_PQS.to(dtype).mT, d_PQH)
        dp_PQS = torch.bmm(d_PQH, v_PTH[pairs, seen].mT).float()
        ds_PQS = torch._softmax_backward_data(dp_PQS, p_PQS, -1, torch.float32).to(dtype)
        part = dq_PGTH[pairs, :, tile.first : tile.end]
        part.copy_(torch.bmm(ds_PQS, k_PTH[pairs, seen]).mul_(scale).view(part.shape))
        dk_PTH[pairs, seen] += torch.bmm(ds_PQS.mT, q_PQH)
    batch = len(q_BTNH)
    dk_PTH *= scale
    dk_BTKH, dv_BTKH = (_by_position(x.to(dtype).unsqueeze(1), batch) for x in (dk_PTH, dv_PTH))
    return _by_position(dq_PGTH, batch), dk_BTKH, dv_BTKH


@_backward.register_fake
def _(d_BTNH: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTNH.new_empty(q_BTNH.shape), k_BTKH.new_empty(k_BTKH.shape), v_BTKH.new_empty(v_BTKH.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_BTNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.neox.causal_attention_backward(d_BTNH, *ctx.saved_tensors, ctx.scale), None


_forward.register_autograd(_gradients, setup_context=_save)
