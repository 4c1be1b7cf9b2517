# SPDX-License-Identifier: Apache-2.0
"""GPTNeoX: Pythia, GPT-NeoX-20B and what GPT-NeoX trains by default."""

from __future__ import annotations

from libneox.checkpoint.hf.family import MHA, NO_WINDOW, PLAIN, SQUARE_HEADS, Family, Json
from libneox.checkpoint.hf.parts import (
    ends,
    linear,
    norm,
    read_activation,
    read_rope,
    read_sizes,
    write_activation,
    write_rope,
    write_sizes,
)
from libneox.checkpoint.hf.rules import Group, Rule, Zeros
from libneox.model_config import ModelConfig


def _write_gpt_neox(config: ModelConfig) -> Json:
    keys = write_sizes(config) | write_rope(config)
    keys["rope_parameters"]["partial_rotary_factor"] = config.rotary_pct  # the class assumes 0.25, not 1
    del keys["rope_theta"]
    return keys | {
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": float(config.rotary_base),
        "hidden_act": write_activation(config, "gelu_fast"),
        "hidden_dropout": config.hidden_dropout,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.residual != "sequential",
        "attention_bias": config.qkv_bias or config.attn_out_bias,
    }


def _read_gpt_neox(raw: Json) -> Json:
    return (
        read_sizes(raw)
        | read_rope(raw, partial=0.25, old_share="rotary_pct")
        | {
            "num_kv_heads": raw["num_attention_heads"],
            "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
            "norm_eps": raw["layer_norm_eps"],
            "activation": read_activation(raw),
            "residual": "parallel" if raw["use_parallel_residual"] else "sequential",
            "hidden_dropout": float(raw["hidden_dropout"]),
            "qkv_bias": raw["attention_bias"],
            "attn_out_bias": raw["attention_bias"],
        }
    )


def _gpt_neox_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    tied = config.residual == "parallel_tied"
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"gpt_neox.layers.{i}."
        first += norm(config, at + "attn_norm", to + "input_layernorm")
        first += norm(
            config, at + "mlp_norm", to + "post_attention_layernorm", source=at + "attn_norm" if tied else None
        )
        kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
        for kind in kinds:
            names = f"{at}attn.qkv.{kind}", f"{to}attention.query_key_value.{kind}"
            first.append(Group(*names, config.qkv_sizes, config.num_heads))
        # attention_bias switches both of attention's biases together
        if config.attn_out_bias and not config.qkv_bias:
            first.append(Zeros(f"{to}attention.query_key_value.bias", (sum(config.qkv_sizes),)))
        always = config.qkv_bias or config.attn_out_bias
        first += linear(config, at + "attn.out", to + "attention.dense", always_bias=always)
        first += linear(config, at + "mlp.up", to + "mlp.dense_h_to_4h", always_bias=True)
        first += linear(config, at + "mlp.down", to + "mlp.dense_4h_to_h", always_bias=True)
    return first + last


GPT_NEOX = Family(
    arch="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    allows={
        "norm": ("layernorm",),
        "pos_emb": ("rotary",),
        "activation": sorted(PLAIN),
        "qk_norm": ("none",),
    },
    conditions=(MHA, SQUARE_HEADS, NO_WINDOW),
    write=_write_gpt_neox,
    read=_read_gpt_neox,
    rules=_gpt_neox_rules,
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r".*rotary_emb\.inv_freq"),
)
