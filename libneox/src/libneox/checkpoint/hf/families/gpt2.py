# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, matrices stored [in, out]."""

from __future__ import annotations

from libneox.checkpoint.hf.family import MHA, NO_WINDOW, PLAIN, SQUARE_HEADS, Family, Json
from libneox.checkpoint.hf.parts import ends, norm, read_activation, read_sizes, refuse, write_activation
from libneox.checkpoint.hf.rules import Copy, Rule, Transpose, Zeros
from libneox.model_config import ModelConfig


def _gpt2_rules(config: ModelConfig) -> list[Rule]:
    first, last = ends(config, "transformer.wte", "transformer.ln_f", "lm_head")
    first.append(Copy("pos_embed.weight", "transformer.wpe.weight"))
    shapes = config.parameter_shapes()
    for i in range(config.num_layers):
        at, to = f"layers.{i}.", f"transformer.h.{i}."
        first += norm(config, at + "attn_norm", to + "ln_1") + norm(config, at + "mlp_norm", to + "ln_2")
        matrices = (
            ("attn.qkv", "attn.c_attn"),
            ("attn.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        )
        for ours, theirs in matrices:
            first.append(Transpose(f"{at}{ours}.weight", f"{to}{theirs}.weight"))
            bias = f"{at}{ours}.bias"
            rows = shapes[f"{at}{ours}.weight"][:1]
            first.append(Copy(bias, f"{to}{theirs}.bias") if bias in shapes else Zeros(f"{to}{theirs}.bias", rows))
    return first + last


def _read_gpt2(raw: Json) -> Json:
    refuse(raw, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    raw = raw | {
        "hidden_size": raw["n_embd"],
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": raw["n_head"],
        "intermediate_size": raw.get("n_inner") or 4 * raw["n_embd"],
        "max_position_embeddings": raw["n_positions"],
        "attention_dropout": raw.get("attn_pdrop", 0.0),
    }
    return read_sizes(raw) | {
        "pos_emb": "learned",
        "norm_eps": raw["layer_norm_epsilon"],
        "activation": read_activation(raw, "activation_function"),
        "residual": "sequential",
        "hidden_dropout": float(raw.get("resid_pdrop", 0.0)),
    }


GPT2 = Family(
    arch="gpt2",
    architecture="GPT2LMHeadModel",
    allows={
        "norm": ("layernorm",),
        "pos_emb": ("learned",),
        "residual": ("sequential",),
        "activation": sorted(PLAIN),
        "qk_norm": ("none",),
    },
    conditions=(MHA, SQUARE_HEADS, NO_WINDOW),
    write=lambda config: {
        "vocab_size": config.padded_vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "activation_function": write_activation(config, "gelu_new"),
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": config.tie_embeddings,
    },
    read=_read_gpt2,
    rules=_gpt2_rules,
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    ignored=(r".*\.attn\.(bias|masked_bias)",),
    prefix="transformer.",
)
