# SPDX-License-Identifier: Apache-2.0
"""The list of layers computes what the model computes, under names that map onto the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libneox.errors import UsageError
from libneox.model import Transformer
from libneox.model.stages import logical_name, share_parameters, stages


def test_layers_in_a_row_equal_the_model(shape: dict[str, Any], tiny_model: Callable[..., Transformer]) -> None:
    model = tiny_model(**shape)
    if model.config.pos_emb == "rpe":
        with pytest.raises(UsageError, match="rpe"):
            stages(model.config)
        return
    x = ids = torch.arange(22).view(2, 11)
    for layer in share_parameters(model):
        x = layer.eval()(x)
    torch.testing.assert_close(x, model(ids), atol=1e-6, rtol=0)
    x = ids
    for layer in share_parameters(model, head=False):
        x = layer.eval()(x)
    torch.testing.assert_close(x, model.hidden(ids), atol=1e-6, rtol=0)


def test_names_and_parameters_are_the_models(shape: dict[str, Any], tiny_model: Callable[..., Transformer]) -> None:
    model = tiny_model(
        **{**shape, "pos_emb": "rotary" if shape.get("pos_emb") == "rpe" else shape.get("pos_emb", "rotary")}
    )
    ours = dict(model.named_parameters())
    seen = {}
    for stage, layer in zip(stages(model.config), share_parameters(model), strict=True):
        for name, parameter in layer.named_parameters():
            assert ours[logical_name(stage, name)] is parameter
            seen[logical_name(stage, name)] = parameter
    assert seen.keys() == ours.keys()


def test_gradients_reach_the_models_parameters(tiny_model: Callable[..., Transformer]) -> None:
    model = tiny_model(tie_embeddings=True, pos_emb="learned")
    x = torch.arange(12).view(1, 12)
    for layer in share_parameters(model):
        x = layer(x)
    x.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
