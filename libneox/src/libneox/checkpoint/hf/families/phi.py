# SPDX-License-Identifier: Apache-2.0
"""Phi and StableLM: part of a head rotated, one norm for attention and MLP in the parallel form."""

from __future__ import annotations

from libneox.checkpoint.hf.family import ACTIVATIONS, GATED_READ, NO_WINDOW, PLAIN, SQUARE_HEADS, Family, Json
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
    write_activation,
    write_rope,
    write_sizes,
)
from libneox.checkpoint.hf.rules import Rule
from libneox.model_config import GATED, ModelConfig


def _phi_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "model.embed_tokens", "model.final_layernorm", "lm_head", head_bias=True)
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"model.layers.{i}."
        first += norm(config, at + "attn_norm", to + "input_layernorm")
        names = [f"{to}self_attn.{part}_proj" for part in "qkv"]
        first += split_qkv(config, at + "attn.qkv", names, bias=config.qkv_bias, zero_bias=True)
        first += linear(config, at + "attn.out", to + "self_attn.dense", always_bias=True)
        first += linear(config, at + "mlp.up", to + "mlp.fc1", always_bias=True)
        first += linear(config, at + "mlp.down", to + "mlp.fc2", always_bias=True)
    return first + last


def _read_phi(raw: Json) -> Json:
    refuse(raw, qk_layernorm=False)
    return (
        read_sizes(raw)
        | read_rope(raw, partial=0.5)
        | {
            "norm_eps": raw["layer_norm_eps"],
            "activation": read_activation(raw),
            "residual": "parallel_tied",
            "hidden_dropout": float(raw.get("resid_pdrop", 0.0)),
        }
    )


PHI = Family(
    arch="phi",
    architecture="PhiForCausalLM",
    allows={
        "norm": ("layernorm",),
        "pos_emb": ("rotary",),
        "residual": ("parallel_tied",),
        "activation": sorted(PLAIN),
        "qk_norm": ("none",),
        "tie_embeddings": (False,),
    },
    conditions=(SQUARE_HEADS, NO_WINDOW),
    write=lambda config: (
        write_sizes(config)
        | write_rope(config)
        | {
            "num_key_value_heads": config.num_kv_heads,
            "hidden_act": write_activation(config, "gelu_new"),
            "layer_norm_eps": config.norm_eps,
            "partial_rotary_factor": config.rotary_pct,
            "resid_pdrop": config.hidden_dropout,
            "qk_layernorm": False,
        }
    ),
    read=_read_phi,
    rules=_phi_rules,
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
)


def _stablelm_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "model.embed_tokens", "model.norm", "lm_head")
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"model.layers.{i}."
        first += norm(config, at + "attn_norm", to + "input_layernorm")
        names = [f"{to}self_attn.{part}_proj" for part in "qkv"]
        first += split_qkv(config, at + "attn.qkv", names, bias=config.qkv_bias)
        first += linear(config, at + "attn.out", to + "self_attn.o_proj")
        if config.residual == "sequential":
            first += norm(config, at + "mlp_norm", to + "post_attention_layernorm")
        first += gated_mlp(config, at, to + "mlp")
    return first + last


def _read_stablelm(raw: Json) -> Json:
    refuse(raw, qk_layernorm=False)
    return (
        read_sizes(raw)
        | read_rope(raw, partial=0.25)
        | {
            "norm_eps": raw["layer_norm_eps"],
            "activation": read_activation(raw, gated=True),
            "residual": "parallel_tied" if raw["use_parallel_residual"] else "sequential",
            "hidden_dropout": float(raw.get("hidden_dropout", 0.0)),
            "qkv_bias": raw["use_qkv_bias"],
            "attn_out_bias": False,
            "mlp_bias": False,
        }
    )


STABLELM = Family(
    arch="stablelm",
    architecture="StableLmForCausalLM",
    allows={
        "norm": ("layernorm",),
        "pos_emb": ("rotary",),
        "residual": ("sequential", "parallel_tied"),
        "activation": tuple(GATED_READ.values()),
        "qk_norm": ("none",),
        "attn_out_bias": (False,),
        "mlp_bias": (False,),
    },
    conditions=(SQUARE_HEADS, NO_WINDOW),
    write=lambda config: (
        write_sizes(config)
        | write_rope(config)
        | {
            "num_key_value_heads": config.num_kv_heads,
            "hidden_act": ACTIVATIONS[GATED[config.activation]],
            "layer_norm_eps": config.norm_eps,
            "partial_rotary_factor": config.rotary_pct,
            "hidden_dropout": config.hidden_dropout,
            "use_qkv_bias": config.qkv_bias,
            "use_parallel_residual": config.residual == "parallel_tied",
            "qk_layernorm": False,
        }
    ),
    read=_read_stablelm,
    rules=_stablelm_rules,
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "silu",
        "use_qkv_bias": False,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
)
