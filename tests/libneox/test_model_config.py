# SPDX-License-Identifier: Apache-2.0
"""Counting a model: parameters against the closed formula, FLOPs in both conventions."""

from __future__ import annotations

import dataclasses

import pytest

from libneox.model_config import ModelConfig

TINY = ModelConfig(
    num_layers=3,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=256,
    vocab_size=500,
    padded_vocab_size=512,
    seq_length=32,
    max_position_embeddings=48,
)


def change(**fields: object) -> ModelConfig:
    return dataclasses.replace(TINY, **fields)  # type: ignore[arg-type]


def test_default_block_is_12h2_13h() -> None:
    h, v = 64, 512
    assert TINY.num_parameters() == 2 * v * h + 3 * (12 * h * h + 13 * h) + 2 * h
    assert TINY.num_parameters_non_embedding() == 3 * (12 * h * h + 13 * h) + 2 * h


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"tie_embeddings": True}, -512 * 64),
        ({"pos_emb": "learned"}, 48 * 64),
        ({"pos_emb": "learned", "learned_position_offset": 2}, 50 * 64),
        ({"pos_emb": "rpe"}, 32 * 4),
        ({"norm": "rmsnorm"}, -7 * 64),
        ({"norm": "scalenorm"}, -7 * (2 * 64 - 1)),
        ({"norm": "non_parametric_layernorm"}, -7 * 2 * 64),
        ({"norm_bias": False}, -7 * 64),
        ({"num_kv_heads": 1}, -3 * 2 * 48 * (64 + 1)),
        ({"activation": "swiglu"}, 3 * 256 * (64 + 1)),
        ({"residual": "parallel_tied"}, -3 * 2 * 64),
        ({"qkv_bias": False}, -3 * 192),
        ({"attn_out_bias": False}, -3 * 64),
        ({"mlp_bias": False}, -3 * (256 + 64)),
        ({"qk_norm": "joint"}, 3 * 2 * 64),
        ({"qk_norm": "head"}, 3 * 2 * 16),
    ],
)
def test_each_switch_counts(fields: dict[str, object], difference: int) -> None:
    assert change(**fields).num_parameters() - TINY.num_parameters() == difference


def test_matmul_parameters_leave_out_lookups_and_vectors() -> None:
    assert TINY.num_parameters_matmul() == 3 * 12 * 64 * 64 + 512 * 64
    assert change(tie_embeddings=True).num_parameters_matmul() == TINY.num_parameters_matmul()


def test_flops_per_token() -> None:
    flops = TINY.flops_per_token()
    assert flops.palm == 6 * TINY.num_parameters() + 12 * 3 * 64 * 32
    assert flops.causal == 6 * TINY.num_parameters_matmul() + 6 * 3 * 64 * 32
    assert TINY.flops_per_token(64).palm - flops.palm == 12 * 3 * 64 * 32


def test_a_window_saves_attention() -> None:
    keys = sum(min(i + 1, 8) for i in range(32)) / 32
    attention = change(sliding_window=8).flops_per_token().causal - 6 * TINY.num_parameters_matmul()
    assert attention == pytest.approx(12 * 3 * 64 * keys, rel=0.03)
    assert change(sliding_window=100).flops_per_token() == TINY.flops_per_token()
