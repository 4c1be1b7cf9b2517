# SPDX-License-Identifier: Apache-2.0
"""Tiny models for the tests of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libneox.model import Transformer
from libneox.model_config import ModelConfig


def _config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "ffn_size": 64,
        "vocab_size": 90, "padded_vocab_size": 96, "seq_length": 32, "max_position_embeddings": 32,
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


def _model(**changes: Any) -> Transformer:
    """A model whose every parameter is noise, so that no bias or norm is trivial."""
    model = Transformer(_config(**changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("norm.weight")
            parameter.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """A function from changes to a tiny ModelConfig."""
    return _config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Transformer]:
    """A function from changes of the config to a tiny model with random parameters, in eval mode."""
    return _model


SHAPES: dict[str, dict[str, Any]] = {
    "pythia": {"residual": "parallel", "rotary_pct": 0.25},
    "gpt2": {"pos_emb": "learned", "tie_embeddings": True, "activation": "gelu_tanh"},
    "llama": {
        "norm": "rmsnorm", "activation": "swiglu", "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False,
        "num_kv_heads": 2,
    },
    "mistral": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 1, "sliding_window": 5},
    "alibi": {"pos_emb": "alibi", "num_heads": 4, "num_kv_heads": 2},
    "alibi_window": {"pos_emb": "alibi", "sliding_window": 6},
    "sinusoidal": {"pos_emb": "sinusoidal", "norm": "scalenorm"},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 16},
    "none": {"pos_emb": "none", "norm": "non_parametric_layernorm", "residual": "parallel_tied"},
    "qk_joint": {"qk_norm": "joint", "qk_norm_groups": 2},
    "qk_head": {"qk_norm": "head", "num_kv_heads": 2, "apply_query_key_layer_scaling": True},
}  # fmt: skip


@pytest.fixture(params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Changes that make each family in turn: every position encoding, norm, residual form, window and QK-norm."""
    return SHAPES[request.param]
