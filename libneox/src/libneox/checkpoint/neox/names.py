# SPDX-License-Identifier: Apache-2.0
"""Names of GPT-NeoX's tensors, and how each is cut over tensor-parallel ranks: one table, read in both directions.

A model of n layers is a list: 0 embedding, 1 nothing, 2..n+1 blocks, n+2 nothing, n+3 final norm, n+4 head.
A pipeline checkpoint has one file per entry and rank, a sequential one all entries as `sequential.INDEX.NAME`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from libneox.model_config import ModelConfig

# rows, columns: cut along dimension 0, 1. qkv: rows, with three blocks per rank when key and value heads are shared.
# gated: rows, each rank holding [up; gate]. row_bias: bias behind a matrix cut by columns. same: a copy on every rank.
Cut = Literal["rows", "columns", "qkv", "gated", "row_bias", "same"]

NORM_WEIGHT = {"layernorm": "weight", "rmsnorm": "scale", "scalenorm": "g"}
# The MLP's two matrices were called differently over the years; the first name is today's.
MLP_NAMES = {
    "mlp.linear1": ("mlp.up", "mlp.linear1.{}", "mlp.dense_h_to_4h.{}", "mlp.fc1_{}"),
    "mlp.linear2": ("mlp.down", "mlp.linear2.{}", "mlp.dense_4h_to_h.{}", "mlp.fc2_{}"),
}
# Buffers that follow from the configuration and are not parameters.
BUFFERS = (
    "attention.rotary_emb.inv_freq",
    "attention.alibi_embed.slopes",
    "attention.bias",
    "attention.masked_bias",
    "position_embeddings.inv_freq",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a logical tensor stands in a GPT-NeoX checkpoint. `names` in order of preference; the first is written."""

    index: int
    names: tuple[str, ...]
    cut: Cut


def places(config: ModelConfig) -> dict[str, Place]:
    """The place of every parameter of `config`, by logical name, in model order."""
    head = config.num_layers + 4
    found = {
        "embed.weight": Place(0, ("word_embeddings.weight",), "rows"),
        "pos_embed.weight": Place(0, ("position_embeddings.weight",), "same"),
        "rpe.weight": Place(2, ("attention.rpe.weight",), "columns"),
        "head.weight": Place(head, ("final_linear.weight",), "rows"),
    } | _norm(config, head - 1, "final_norm", "norm")
    for i in range(config.num_layers):
        found |= _block(config, i)
    return {name: found[name] for name in config.parameter_shapes()}


def _block(config: ModelConfig, layer: int) -> dict[str, Place]:
    index, at = layer + 2, f"layers.{layer}."
    found = _norm(config, index, at + "attn_norm", "input_layernorm")
    found |= _norm(config, index, at + "mlp_norm", "post_attention_layernorm")
    for kind in ("weight", "bias"):
        weight = kind == "weight"
        found |= {
            f"{at}attn.qkv.{kind}": Place(index, (f"attention.query_key_value.{kind}",), "qkv"),
            f"{at}attn.out.{kind}": Place(index, (f"attention.dense.{kind}",), "columns" if weight else "row_bias"),
            f"{at}attn.qk_norm.{kind}": Place(index, (f"attention.qk_layernorm.{kind}",), "rows"),
        }
        for ours, *patterns in MLP_NAMES.values():
            cut: Cut = "columns" if weight else "row_bias"
            if ours == "mlp.up":
                cut = "gated" if config.gated else "rows"
            names = tuple(pattern.format(kind) for pattern in patterns)
            found[f"{at}{ours}.{kind}"] = Place(index, names, cut)
    return found


def _norm(config: ModelConfig, index: int, ours: str, theirs: str) -> dict[str, Place]:
    weight = NORM_WEIGHT.get(config.norm, "weight")
    names = (f"{theirs}.{weight}", f"{theirs}.weight", f"{theirs}.scale")
    return {
        f"{ours}.weight": Place(index, tuple(dict.fromkeys(names)), "same"),
        f"{ours}.bias": Place(index, (f"{theirs}.bias",), "same"),
    }
