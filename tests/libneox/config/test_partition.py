# SPDX-License-Identifier: Apache-2.0
"""How the layers of a model are shared out to the stages of a pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from libneox.config import load_config
from libneox.config.partition import holders, partition
from libneox.config.support import check_supported
from libneox.errors import UsageError
from libneox.model_config import ModelConfig

RUN = {"train_iters": 1, "train_micro_batch_size_per_gpu": 1, "data_path": "x"}
SHAPE = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 8}


@pytest.fixture
def config() -> ModelConfig:
    return load_config([{**SHAPE, "make_vocab_size_divisible_by": 8}]).model_config(1000)


def sizes(config: ModelConfig, parts: int, method: str) -> list[int]:
    found = partition(config, parts, method)
    assert [piece for part in found for piece in part] == list(range(config.num_layers + 2))
    return [len(part) for part in found]


@pytest.mark.parametrize(
    ("method", "parts", "expected"),
    [
        ("type:transformer|mlp", 1, [6]),
        ("type:transformer|mlp", 2, [3, 3]),
        ("type:transformer|mlp", 3, [3, 1, 2]),  # the odd block goes to the first
        ("type:TRANSFORMER", 4, [2, 1, 1, 2]),
        ("type:embedding|linear", 2, [5, 1]),
        ("uniform", 4, [2, 2, 1, 1]),
        ("parameters", 3, [1, 4, 1]),  # 8000 in the embedding and in the head, 808 in a block
    ],
)
def test_stages_are_balanced(config: ModelConfig, method: str, parts: int, expected: list[int]) -> None:
    assert sizes(config, parts, method) == expected


@pytest.mark.parametrize(
    ("method", "parts", "message"),
    [
        ("uniform", 7, "6 layers cannot fill 7 stages"),
        ("best", 2, "use uniform, parameters or type:REGEX"),
        ("type:gmlp", 2, "found in no layer's name"),
        ("type:(", 2, "no regular expression"),
    ],
)
def test_what_cannot_be_is_refused(config: ModelConfig, method: str, parts: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        partition(config, parts, method)


def test_who_holds_a_parameter(config: ModelConfig) -> None:
    parts = partition(config, 3, "type:transformer")
    held = holders(config, parts)
    assert list(held) == list(config.parameter_shapes())
    assert held["embed.weight"] == [0, 2]  # tied
    assert [held[f"layers.{i}.mlp.up.weight"] for i in range(4)] == [[0], [0], [1], [2]]
    assert held["final_norm.weight"] == [2]
    apart = dataclasses.replace(config, tie_embeddings=False, pos_emb="rpe")
    assert holders(apart, parts)["embed.weight"] == [0]
    assert holders(apart, parts)["head.weight"] == [2]
    assert holders(apart, parts)["rpe.weight"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2 gives gradients away"),
        ({"engine": "plain"}, "engine: plain has no pipeline"),
        ({"optimizer": {"type": "sm3", "params": {"lr": 0.1}}}, "optimizer.type: sm3 needs whole matrices"),
    ],
)
def test_what_a_pipeline_cannot_run_is_refused_at_once(more: dict[str, Any], message: str) -> None:
    config = load_config([RUN | SHAPE | {"pipe_parallel_size": 2} | more])
    with pytest.raises(UsageError, match=message):
        check_supported(config)
    check_supported(load_config([RUN | SHAPE | more]))
