# SPDX-License-Identifier: Apache-2.0
"""Falcon: attention and MLP in parallel, with grouped queries."""

from __future__ import annotations

from libneox.checkpoint.hf.family import FULL_ROTARY, NO_WINDOW, PLAIN, SQUARE_HEADS, Family, Json
from libneox.checkpoint.hf.parts import (
    ends,
    linear,
    norm,
    read_activation,
    read_rope,
    read_sizes,
    refuse,
    write_activation,
    write_rope,
    write_sizes,
)
from libneox.checkpoint.hf.rules import Group, Rule, Zeros
from libneox.errors import DataError
from libneox.model_config import ModelConfig


def _falcon_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "transformer.word_embeddings", "transformer.ln_f", "lm_head")
    bias = config.qkv_bias or config.attn_out_bias or config.mlp_bias
    shared = config.residual == "parallel_tied"
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"transformer.h.{i}."
        first += norm(config, at + "attn_norm", to + ("input_layernorm" if shared else "ln_attn"))
        if not shared:
            first += norm(config, at + "mlp_norm", to + "ln_mlp")
        fused = f"{to}self_attention.query_key_value"
        first.append(Group(f"{at}attn.qkv.weight", f"{fused}.weight", config.qkv_sizes, config.num_kv_heads))
        if config.qkv_bias:
            first.append(Group(f"{at}attn.qkv.bias", f"{fused}.bias", config.qkv_sizes, config.num_kv_heads))
        elif bias:
            first.append(Zeros(f"{fused}.bias", (sum(config.qkv_sizes),)))
        first += linear(config, at + "attn.out", to + "self_attention.dense", always_bias=bias)
        first += linear(config, at + "mlp.up", to + "mlp.dense_h_to_4h", always_bias=bias)
        first += linear(config, at + "mlp.down", to + "mlp.dense_4h_to_h", always_bias=bias)
    return first + last


def _write_falcon(config: ModelConfig) -> Json:
    sizes = write_sizes(config)
    shared = config.residual == "parallel_tied"
    return (
        sizes
        | write_rope(config)
        | {
            "ffn_hidden_size": sizes.pop("intermediate_size"),
            "num_kv_heads": config.num_kv_heads,
            "activation": write_activation(config),
            "layer_norm_epsilon": config.norm_eps,
            "hidden_dropout": config.hidden_dropout,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1 if shared else 2,
            "parallel_attn": True,
            "multi_query": config.num_kv_heads == 1,
            "alibi": False,
            "bias": config.qkv_bias or config.attn_out_bias or config.mlp_bias,
        }
    )


def _read_falcon(raw: Json) -> Json:
    refuse(raw, alibi=False, parallel_attn=True)
    new = raw["new_decoder_architecture"]
    norms = raw.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if norms == 2 and not new:
        raise DataError("num_ln_in_parallel_attn is 2 in the old decoder, which has no counterpart here")
    heads = raw["num_attention_heads"]
    kv_heads = (raw.get("num_kv_heads") or heads) if new else 1 if raw["multi_query"] else heads
    raw = raw | {"intermediate_size": raw.get("ffn_hidden_size") or 4 * raw["hidden_size"], "head_dim": None}
    return (
        read_sizes(raw)
        | read_rope(raw)
        | {
            "num_kv_heads": kv_heads,
            "norm_eps": raw["layer_norm_epsilon"],
            "activation": read_activation(raw, "activation"),
            "residual": "parallel" if norms == 2 else "parallel_tied",
            "hidden_dropout": float(raw.get("hidden_dropout") or 0.0),
            "qkv_bias": raw["bias"],
            "attn_out_bias": raw["bias"],
            "mlp_bias": raw["bias"],
        }
    )


FALCON = Family(
    arch="falcon",
    architecture="FalconForCausalLM",
    allows={
        "norm": ("layernorm",),
        "pos_emb": ("rotary",),
        "residual": ("parallel", "parallel_tied"),
        "activation": sorted(PLAIN),
        "qk_norm": ("none",),
    },
    conditions=(FULL_ROTARY, SQUARE_HEADS, NO_WINDOW),
    write=_write_falcon,
    read=_read_falcon,
    rules=_falcon_rules,
    defaults={
        "layer_norm_epsilon": 1e-5,
        "activation": "gelu",
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
)
