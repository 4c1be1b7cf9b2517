# SPDX-License-Identifier: Apache-2.0
"""Starcoder2: the GPT-NeoX block in sequence, with grouped queries."""

from __future__ import annotations

from libneox.checkpoint.hf.family import FULL_ROTARY, PLAIN, SQUARE_HEADS, Family, Json
from libneox.checkpoint.hf.parts import (
    ends,
    linear,
    norm,
    read_activation,
    read_rope,
    read_sizes,
    split_qkv,
    write_activation,
    write_rope,
    write_sizes,
)
from libneox.checkpoint.hf.rules import Rule
from libneox.model_config import ModelConfig


def _starcoder2_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "model.embed_tokens", "model.norm", "lm_head")
    bias = config.qkv_bias or config.attn_out_bias or config.mlp_bias
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"model.layers.{i}."
        first += norm(config, at + "attn_norm", to + "input_layernorm")
        names = [f"{to}self_attn.{part}_proj" for part in "qkv"]
        first += split_qkv(config, at + "attn.qkv", names, bias=config.qkv_bias, zero_bias=bias)
        first += linear(config, at + "attn.out", to + "self_attn.o_proj", always_bias=bias)
        first += norm(config, at + "mlp_norm", to + "post_attention_layernorm")
        first += linear(config, at + "mlp.up", to + "mlp.c_fc", always_bias=bias)
        first += linear(config, at + "mlp.down", to + "mlp.c_proj", always_bias=bias)
    return first + last


def _read_starcoder2(raw: Json) -> Json:
    bias = raw["use_bias"]
    return (
        read_sizes(raw)
        | read_rope(raw)
        | {
            "norm_eps": raw["norm_epsilon"],
            "activation": read_activation(raw),
            "residual": "sequential",
            "sliding_window": raw.get("sliding_window"),
            "hidden_dropout": float(raw.get("residual_dropout", 0.0)),
            "qkv_bias": bias,
            "attn_out_bias": bias,
            "mlp_bias": bias,
        }
    )


STARCODER2 = Family(
    arch="starcoder2",
    architecture="Starcoder2ForCausalLM",
    allows={
        "norm": ("layernorm",),
        "pos_emb": ("rotary",),
        "residual": ("sequential",),
        "activation": sorted(PLAIN),
        "qk_norm": ("none",),
    },
    conditions=(FULL_ROTARY, SQUARE_HEADS),
    write=lambda config: (
        write_sizes(config)
        | write_rope(config)
        | {
            "num_key_value_heads": config.num_kv_heads,
            "hidden_act": write_activation(config),
            "norm_epsilon": config.norm_eps,
            "sliding_window": config.sliding_window,
            "use_bias": config.qkv_bias or config.attn_out_bias or config.mlp_bias,
            "residual_dropout": config.hidden_dropout,
            "embedding_dropout": config.hidden_dropout,
        }
    ),
    read=_read_starcoder2,
    rules=_starcoder2_rules,
    defaults={
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
)
