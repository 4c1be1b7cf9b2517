# SPDX-License-Identifier: Apache-2.0
"""Llama, Mistral, Qwen2 and Qwen3: RMSNorm, gated MLP, whole heads rotated; biases, windows and QK-norm differ."""

from __future__ import annotations

import dataclasses

from libneox.checkpoint.hf.family import ACTIVATIONS, FULL_ROTARY, GATED_READ, NO_WINDOW, SQUARE_HEADS, Family, Json
from libneox.checkpoint.hf.parts import (
    ends,
    gated_mlp,
    linear,
    norm,
    read_activation,
    read_rope,
    read_sizes,
    refuse,
    split_qkv,
    write_rope,
    write_sizes,
)
from libneox.checkpoint.hf.rules import Copy, Rule
from libneox.errors import DataError
from libneox.model_config import GATED, ModelConfig


def _write_llama(config: ModelConfig) -> Json:
    return (
        write_sizes(config)
        | write_rope(config)
        | {
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": ACTIVATIONS[GATED[config.activation]],
            "rms_norm_eps": config.norm_eps,
        }
    )


def _read_llama(raw: Json) -> Json:
    refuse(raw, partial_rotary_factor=1.0, pretraining_tp=1)
    return (
        read_sizes(raw)
        | read_rope(raw)
        | {
            "norm": "rmsnorm",
            "norm_eps": raw["rms_norm_eps"],
            "activation": read_activation(raw, gated=True),
            "residual": "sequential",
            "qkv_bias": bool(raw.get("attention_bias", False)),
            "attn_out_bias": bool(raw.get("attention_bias", False)),
            "mlp_bias": bool(raw.get("mlp_bias", False)),
        }
    )


def _llama_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "model.embed_tokens", "model.norm", "lm_head")
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"model.layers.{i}."
        first += norm(config, at + "attn_norm", to + "input_layernorm")
        names = [f"{to}self_attn.{part}_proj" for part in "qkv"]
        first += split_qkv(config, at + "attn.qkv", names, bias=config.qkv_bias)
        if config.qk_norm == "head":
            first += [Copy(f"{at}attn.{part}_norm.weight", f"{to}self_attn.{part}_norm.weight") for part in "qk"]
        first += linear(config, at + "attn.out", to + "self_attn.o_proj")
        first += norm(config, at + "mlp_norm", to + "post_attention_layernorm")
        first += gated_mlp(config, at, to + "mlp")
    return first + last


_LLAMA_ALLOWS = {
    "norm": ("rmsnorm",),
    "pos_emb": ("rotary",),
    "residual": ("sequential",),
    "activation": tuple(GATED_READ.values()),
    "qk_norm": ("none",),
}
_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
LLAMA = Family(
    arch="llama",
    architecture="LlamaForCausalLM",
    allows=_LLAMA_ALLOWS,
    conditions=(
        FULL_ROTARY,
        NO_WINDOW,
        ("query, key, value and output must all have a bias or none", lambda c: c.qkv_bias == c.attn_out_bias),
        ("the hidden size must be a multiple of the heads", lambda c: c.hidden_size % c.num_heads == 0),
    ),
    write=lambda config: _write_llama(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
    read=_read_llama,
    rules=_llama_rules,
    defaults=_LLAMA_DEFAULTS,
)


def _no_biases(config: ModelConfig) -> bool:
    return not (config.qkv_bias or config.attn_out_bias or config.mlp_bias)


MISTRAL = dataclasses.replace(
    LLAMA,
    arch="mistral",
    architecture="MistralForCausalLM",
    conditions=(FULL_ROTARY, ("no biases", _no_biases)),
    write=lambda config: _write_llama(config) | {"sliding_window": config.sliding_window},
    read=lambda raw: (
        _read_llama(raw | {"attention_bias": False, "mlp_bias": False}) | {"sliding_window": raw["sliding_window"]}
    ),
    defaults=_LLAMA_DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
)


def _read_qwen(raw: Json) -> Json:
    if raw.get("use_sliding_window"):
        raise DataError("use_sliding_window: windows in some layers only have no counterpart here")
    return _read_llama(raw)


QWEN2 = dataclasses.replace(
    LLAMA,
    arch="qwen2",
    architecture="Qwen2ForCausalLM",
    conditions=(
        FULL_ROTARY,
        NO_WINDOW,
        SQUARE_HEADS,
        (
            "biases in query, key and value, and nowhere else",
            lambda c: c.qkv_bias and not (c.attn_out_bias or c.mlp_bias),
        ),
    ),
    write=lambda config: (
        {key: value for key, value in _write_llama(config).items() if key != "head_dim"}
        | {"use_sliding_window": False, "sliding_window": None}
    ),
    read=lambda raw: _read_qwen(raw | {"attention_bias": False}) | {"qkv_bias": True},
    defaults=_LLAMA_DEFAULTS | {"max_position_embeddings": 32768},
)
QWEN3 = dataclasses.replace(
    LLAMA,
    arch="qwen3",
    architecture="Qwen3ForCausalLM",
    allows=_LLAMA_ALLOWS | {"qk_norm": ("head",)},
    conditions=(
        FULL_ROTARY,
        NO_WINDOW,
        ("query, key, value and output must all have a bias or none", lambda c: c.qkv_bias == c.attn_out_bias),
        ("no biases in the MLP", lambda c: not c.mlp_bias),
    ),
    write=lambda config: (
        _write_llama(config) | {"attention_bias": config.qkv_bias, "use_sliding_window": False, "sliding_window": None}
    ),
    read=lambda raw: _read_qwen(raw) | {"qk_norm": "head"},
    defaults=_LLAMA_DEFAULTS | {"head_dim": 128, "max_position_embeddings": 32768},
)
