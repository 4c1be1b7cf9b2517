# SPDX-License-Identifier: Apache-2.0
"""A model described in NeoX keys, for the config.yml of a checkpoint made from other formats."""

from __future__ import annotations

import dataclasses
from typing import Any

from libneox.model_config import ModelConfig


def neox_keys_of(config: ModelConfig) -> dict[str, Any]:
    """NeoX keys that `load_config` resolves to `config` again. What concerns training is left at its defaults."""
    keys: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "ffn_hidden_size": config.ffn_size,
        "seq_length": config.seq_length,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "norm": config.norm,
        "pos_emb": config.pos_emb,
        "no_weight_tying": not config.tie_embeddings,
        "activation": "gelu" if config.activation == "gelu_tanh" else config.activation,
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "gpt_j_residual": config.residual != "sequential",
        "gpt_j_tied": config.residual == "parallel_tied",
        "use_bias_in_norms": config.norm_bias,
        "use_bias_in_attn_linear": config.qkv_bias,
        "use_bias_in_mlp": config.mlp_bias,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method": config.init_method,
        "output_layer_init_method": config.output_layer_init_method,
        "init_method_std": config.init_method_std,
    }
    return keys | _norm(config) | _attention(config) | _positions(config)


def _norm(config: ModelConfig) -> dict[str, Any]:
    names = {"rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}
    return {names.get(config.norm, "layernorm_epsilon"): config.norm_eps}


def _attention(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if config.num_kv_heads != config.num_heads:
        keys["num_kv_heads"] = config.num_kv_heads
    if config.head_dim * config.num_heads != config.hidden_size:
        keys["head_dim"] = config.head_dim
    if config.attn_out_bias != config.qkv_bias:
        keys["use_bias_in_attn_out"] = config.attn_out_bias
    if config.sliding_window is not None:
        keys["sliding_window_width"] = config.sliding_window - 1  # GPT-NeoX does not count the token itself
    if config.qk_norm != "none":
        keys["qk_norm"] = config.qk_norm
    if config.qk_norm == "joint":
        keys["qk_norm_groups"] = config.qk_norm_groups
    return keys


def _positions(config: ModelConfig) -> dict[str, Any]:
    if config.pos_emb == "learned" and config.learned_position_offset:
        return {"opt_pos_emb_offset": config.learned_position_offset}
    if config.pos_emb == "rpe":
        return {"rpe_num_buckets": config.rpe_num_buckets, "rpe_max_distance": config.rpe_max_distance}
    if config.pos_emb != "rotary":
        return {}
    keys: dict[str, Any] = {"rotary_pct": config.rotary_pct, "rotary_emb_base": config.rotary_base}
    if config.rope_scaling is not None:
        fields = dataclasses.asdict(config.rope_scaling)
        wanted = {"linear": (), "ntk": (), "llama3": _LLAMA3, "yarn": _YARN}[config.rope_scaling.type]
        keys["rope_scaling"] = {
            name: value
            for name, value in fields.items()
            if value is not None and name in ("type", "factor", "original_max_position_embeddings", *wanted)
        }
    return keys


_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "attention_factor")
