# SPDX-License-Identifier: Apache-2.0
"""Parts of a model, one after the other, compute what the model computes, under the model's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libneox.model import Transformer
from libneox.model.part import Part

CUTS = ((), (1,), (2,), (1, 2, 3))  # between which pieces of 0 embedding, 1 and 2 blocks, 3 final norm and head


def parts(model: Transformer, cuts: tuple[int, ...]) -> list[Part]:
    """Parts of a model of two layers, holding its very parameters."""
    bounds = [0, *cuts, model.config.num_layers + 2]
    with torch.device("meta"):
        found = [Part(model.config, range(*pair)) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
    for part in found:
        for name, _ in list(part.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(part.get_submodule(path), leaf, model.get_parameter(name))
    return found


@pytest.mark.parametrize("cuts", CUTS)
def test_parts_in_a_row_equal_the_model(
    shape: dict[str, Any], tiny_model: Callable[..., Transformer], cuts: tuple[int, ...]
) -> None:
    model = tiny_model(**shape)
    ids, x = torch.arange(22).view(2, 11), None
    cu_seqlens = torch.tensor([0, 6, 11, 17, 22, 22], dtype=torch.int32)
    for part in parts(model, cuts):
        x = part(ids, x, cu_seqlens_E=cu_seqlens)
    torch.testing.assert_close(x, model.hidden(ids, cu_seqlens_E=cu_seqlens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cuts", CUTS)
def test_every_parameter_is_somewhere(
    shape: dict[str, Any], tiny_model: Callable[..., Transformer], cuts: tuple[int, ...]
) -> None:
    model = tiny_model(**shape)
    held = [set(dict(part.named_parameters())) for part in parts(model, cuts)]
    assert set().union(*held) == set(dict(model.named_parameters()))
    twice = {name for one in held for name in one if sum(name in other for other in held) > 1}
    shared = {"embed.weight"} if model.config.tie_embeddings and cuts else set()
    assert twice <= shared | {"rpe.weight"}
    assert shared <= twice


def test_gradients_reach_the_models_parameters(tiny_model: Callable[..., Transformer]) -> None:
    model = tiny_model(tie_embeddings=True, pos_emb="learned")
    ids, x = torch.arange(12).view(1, 12), None
    for part in parts(model, (1, 2)):
        x = part(ids, x)
    assert x is not None
    (x @ model.head_weight.T).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
