# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose texts vary, and the byte tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libneox.model import Transformer
from libneox.model_config import ModelConfig
from libneox.tokenizer import Tokenizer, byte_tokenizer


def _model(**changes: Any) -> Transformer:
    base: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "ffn_size": 64,
        "vocab_size": 258, "padded_vocab_size": 384, "seq_length": 64, "max_position_embeddings": 64,
        "residual": "parallel", "rotary_pct": 0.5,
    }  # fmt: skip
    model = Transformer(ModelConfig(**{**base, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("norm.weight")
            parameter.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.4, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def noise_model() -> Callable[..., Transformer]:
    """A function from changes of the config to a tiny model of noise over the byte tokenizer's ids."""
    return _model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The built-in tokenizer: <|endoftext|> is 0, byte b is 2 + b."""
    return byte_tokenizer()
