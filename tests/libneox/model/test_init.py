# SPDX-License-Identifier: Apache-2.0
"""Initial values: the distributions of GPT-NeoX, and independence of layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from libneox.errors import UsageError
from libneox.model import Transformer, init_weights
from libneox.model.init import initial_value
from libneox.model_config import ModelConfig

Config = Callable[..., ModelConfig]
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "ffn_size": 512, "num_layers": 3}


@pytest.mark.parametrize(
    ("method", "deviation"),
    [
        ("normal", 0.01),
        ("scaled_normal", 0.01 / math.sqrt(6)),
        ("single_residual_scaled_normal", 0.01 / math.sqrt(3)),
        ("small_init", math.sqrt(2 / (5 * 256))),
        ("wang_init", 2 / 3 / 16),
        ("xavier_normal", math.sqrt(2 / (256 + 768))),
        ("xavier_uniform", math.sqrt(2 / (256 + 768))),
        ("orthogonal", math.sqrt(2) / math.sqrt(768)),
        ("scaled_orthogonal", math.sqrt(2 / 3) / math.sqrt(768)),
    ],
)
def test_distributions(method: str, deviation: float, tiny_config: Config) -> None:
    value = initial_value(tiny_config(**WIDE, init_method=method, init_method_std=0.01), "layers.0.attn.qkv.weight", 5)
    assert value.std().item() == pytest.approx(deviation, rel=0.01)
    assert abs(value.mean().item()) < deviation / 50
    if "orthogonal" in method:
        gram = value.T @ value
        torch.testing.assert_close(gram, torch.eye(256) * gram[0, 0], atol=1e-4, rtol=1e-4)


def test_the_table(tiny_config: Config) -> None:
    config = tiny_config(**WIDE, pos_emb="learned", init_method="normal", output_layer_init_method="scaled_normal")
    model = init_weights(Transformer(config), 1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            scale = math.sqrt(6) if name.endswith(("attn.out.weight", "mlp.down.weight")) else 1.0
            assert parameter.std().item() == pytest.approx(0.02 / scale, rel=0.05), name


def test_depends_on_seed_and_name_alone(tiny_config: Config) -> None:
    config = tiny_config()
    name = "layers.1.mlp.up.weight"
    alone = initial_value(config, name, 7)
    assert torch.equal(dict(init_weights(Transformer(config), 7).named_parameters())[name], alone)
    assert torch.equal(initial_value(tiny_config(num_layers=5), name, 7), alone)
    assert not torch.equal(initial_value(config, name, 8), alone)
    assert not torch.equal(initial_value(config, "layers.0.mlp.up.weight", 7), alone)


def test_padding_of_the_vocabulary_leaves_the_rest_alone(tiny_config: Config) -> None:
    small, large = (initial_value(tiny_config(padded_vocab_size=n), "embed.weight", 7) for n in (96, 256))
    assert torch.equal(large[:96], small)


def test_bfloat16_model_gets_the_rounded_values(tiny_config: Config) -> None:
    exact, rounded = Transformer(tiny_config()), Transformer(tiny_config()).bfloat16()
    init_weights(exact, 3)
    init_weights(rounded, 3)
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)


def test_mup_divides_hidden_matrices_only(tiny_config: Config) -> None:
    config = tiny_config(**WIDE, use_mup=True, mup_base_hidden_size=64, init_method_std=0.02)
    assert initial_value(config, "layers.0.mlp.up.weight", 1).std().item() == pytest.approx(0.01, rel=0.02)
    assert initial_value(config, "embed.weight", 1).std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(("method", "mup"), [("kaiming", False), ("orthogonal", True)])
def test_unknown_methods_are_refused(method: str, mup: bool, tiny_config: Config) -> None:
    config = tiny_config(init_method=method, use_mup=mup, mup_base_hidden_size=32)
    with pytest.raises(UsageError, match=method):
        initial_value(config, "embed.weight", 1)
