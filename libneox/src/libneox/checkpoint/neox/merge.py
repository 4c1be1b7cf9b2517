# SPDX-License-Identifier: Apache-2.0
"""Put the pieces of tensor-parallel ranks together, and cut them again.

Where copies on several ranks should be equal and are not (the norms of GPT-NeoX-20B drifted apart), the average is
taken and reported. Biases behind a row-parallel matrix are *summed* in models with parallel residual, where every
rank added its own before the all-reduce, and are one value everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from libneox.checkpoint.lazy import LazyTensor, concatenate, group_rows, ungroup_rows
from libneox.checkpoint.neox.names import Cut, Place, places
from libneox.errors import DataError
from libneox.model_config import ModelConfig

QkvLayout = Literal["auto", "heads", "blocks"]
Shards = Mapping[tuple[int, str], tuple[LazyTensor, ...]]


def merge(
    shards: Shards,
    config: ModelConfig,
    *,
    qkv_layout: QkvLayout = "auto",
    drift: dict[str, float] | None = None,
    average_row_bias: bool = False,
) -> dict[str, LazyTensor]:
    """Logical tensors out of the pieces of all ranks.

    Args:
        shards: pieces by (list index, name).
        config: what the model is; its `padded_vocab_size` is not looked at.
        qkv_layout: how the rows of query_key_value stand on a rank: `heads` is [q|k|v] per query head, `blocks` is
            [Q|K|V]. `auto` is what GPT-NeoX does since November 2024: heads, and blocks with grouped queries.
        drift: filled with the largest difference between copies, by logical name, where it is not zero.
        average_row_bias: average row-parallel biases even with parallel residual: right for optimizer moments, where
            every rank's copy saw the gradient of the sum.

    Raises:
        DataError: a tensor the configuration calls for is not there.
    """
    drift = {} if drift is None else drift
    merged = {}
    for name, place in places(config).items():
        pieces = _find(shards, name, place)
        if pieces is None:
            raise DataError(f"layer {place.index}: {' or '.join(place.names)} is missing; does the configuration fit?")
        if place.cut == "same" or (place.cut == "row_bias" and (average_row_bias or config.residual == "sequential")):
            merged[name] = _average(name, pieces, drift)
        elif place.cut == "row_bias":
            merged[name] = _sum(pieces)
        elif name == "head.weight" and pieces[0].shape[1] < config.hidden_size:  # output_layer_parallelism: row
            merged[name] = concatenate(pieces, 1)
        else:
            merged[name] = _join(pieces, place.cut, config, qkv_layout)
    return merged


def used_names(shards: Shards, config: ModelConfig) -> set[tuple[int, str]]:
    """The keys of `shards` that `merge` takes."""
    used = set()
    for name, place in places(config).items():
        used |= {(place.index, theirs) for theirs in place.names}
        if name.endswith("mlp.up.weight"):
            used |= {(place.index, f"mlp.{w}.weight") for w in ("w1", "w2", "w3")}
        if name == "rpe.weight":
            used |= {key for key in shards if key[1] == place.names[0]}
    return used


def _find(shards: Shards, name: str, place: Place) -> tuple[LazyTensor, ...] | None:
    for theirs in place.names:
        if (place.index, theirs) in shards:
            return shards[place.index, theirs]
    # the Llama checkpoints of early 2023: w1 is the gate, w3 the up projection, w2 the down projection
    kind = name.rpartition(".")[2]
    if name.endswith(f"mlp.down.{kind}"):
        return shards.get((place.index, f"mlp.w2.{kind}"))
    up, gate = shards.get((place.index, f"mlp.w3.{kind}")), shards.get((place.index, f"mlp.w1.{kind}"))
    if place.cut == "gated" and up and gate:
        return tuple(concatenate(pair) for pair in zip(up, gate, strict=True))
    return None


def _join(pieces: Sequence[LazyTensor], cut: Cut, config: ModelConfig, layout: QkvLayout) -> LazyTensor:
    if cut == "columns":
        return concatenate(pieces, 1)
    joined = concatenate(pieces)
    sizes = row_blocks(cut, config)
    groups = len(pieces)
    if cut == "qkv":
        groups = qkv_groups(config, len(pieces), layout)
    if groups == 1 or not sizes or sum(sizes) != joined.shape[0]:  # a wrong size is reported with the others
        return joined
    return joined.map(lambda tensor: ungroup_rows(tensor, sizes, groups))


def row_blocks(cut: Cut, config: ModelConfig) -> tuple[int, ...]:
    """Sizes of the blocks that stand below each other in a logical tensor of this kind; () if it is one block."""
    if cut == "qkv":
        return config.qkv_sizes
    return (config.ffn_size, config.ffn_size) if cut == "gated" else ()


def qkv_groups(config: ModelConfig, ranks: int, layout: QkvLayout = "auto") -> int:
    """Into how many groups the rows of all ranks' query_key_value fall."""
    heads = layout == "heads" or (layout == "auto" and config.num_kv_heads == config.num_heads)
    return config.num_heads if heads else ranks


def _average(name: str, pieces: Sequence[LazyTensor], drift: dict[str, float]) -> LazyTensor:
    if len(pieces) == 1:
        return pieces[0]
    copies = torch.stack([piece.load().float() for piece in pieces])  # vectors: small
    spread = float((copies.amax(0) - copies.amin(0)).max()) if copies.numel() else 0.0
    if spread == 0.0:
        return pieces[0]
    drift[name] = spread
    return LazyTensor(
        pieces[0].shape,
        pieces[0].dtype,
        lambda: torch.stack([piece.load().float() for piece in pieces]).mean(0).to(pieces[0].dtype),
    )


def _sum(pieces: Sequence[LazyTensor]) -> LazyTensor:
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    return LazyTensor(
        first.shape,
        first.dtype,
        lambda: torch.stack([piece.load().float() for piece in pieces]).sum(0).to(first.dtype),
    )


def cut_for_rank(tensor: LazyTensor, cut: Cut, config: ModelConfig, rank: int, ranks: int) -> LazyTensor:
    """The piece of a logical tensor that one of `ranks` tensor-parallel ranks holds in GPT-NeoX's layout of today."""

    def piece(whole: torch.Tensor) -> torch.Tensor:
        if cut == "same":
            return whole
        if cut == "row_bias":
            # summed when read: whole on one rank and zero on the others is exact at any number of ranks
            return whole if config.residual == "sequential" or rank == 0 else torch.zeros_like(whole)
        if cut == "columns":
            return whole.chunk(ranks, 1)[rank].contiguous()
        if cut == "qkv":
            whole = group_rows(whole, config.qkv_sizes, qkv_groups(config, ranks))
        elif cut == "gated":
            whole = group_rows(whole, row_blocks(cut, config), ranks)
        return whole.chunk(ranks)[rank]

    shape = list(tensor.shape)
    if cut not in ("same", "row_bias"):
        dim = 1 if cut == "columns" else 0
        if shape[dim] % ranks:
            raise DataError(f"{shape[dim]} does not divide into {ranks} tensor-parallel ranks")
        shape[dim] //= ranks
    return tensor.map(piece, shape)
