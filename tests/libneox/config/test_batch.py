# SPDX-License-Identifier: Apache-2.0
"""Batch arithmetic (C-03)."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from libneox.config import load_config
from libneox.errors import UsageError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ((None, 4, 1), (32, 4, 1)),
        ((256, 4, None), (256, 4, 8)),
        ((256, None, 2), (256, 16, 2)),
        ((256, None, None), (256, 32, 1)),
        ((None, 4, 8), (256, 4, 8)),
        ((None, 4, None), (32, 4, 1)),
    ],
)
def test_what_is_missing_is_inferred(given: tuple[int | None, ...], plan: tuple[int, int, int]) -> None:
    found = load_config([dict(zip(KEYS, given, strict=True))]).batch_plan(8)
    assert (found.global_batch, found.micro_batch, found.grad_accum) == plan
    assert found.data_parallel == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (256, 4, 1),
            "train_batch_size: 256 is not micro-batch 4 * accumulation 1 * 8 data-parallel ranks = 32; "
            "set gradient_accumulation_steps to 8, or leave it out",
        ),
        (
            (100, 3, None),
            "train_batch_size: 100 is not micro-batch 3 * accumulation 4 * 8 data-parallel ranks = 96; "
            "set train_batch_size to 96",
        ),
        (
            (48, 4, None),
            "train_batch_size: 48 is not micro-batch 4 * accumulation 1 * 8 data-parallel ranks = 32; "
            "set train_micro_batch_size_per_gpu to 3",
        ),
        ((None, None, 2), "train_micro_batch_size_per_gpu: is unknown; set it, or train_batch_size"),
    ],
)
def test_what_does_not_fit_is_shown_with_a_fix(given: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config([dict(zip(KEYS, given, strict=True))]).batch_plan(8)
    assert str(caught.value).endswith(message)


def test_the_fix_that_is_proposed_works() -> None:
    rng = random.Random(0)
    fixed = 0
    for _ in range(2000):
        keys: dict[str, Any] = {KEYS[0]: rng.randint(1, 200)}
        keys |= {name: rng.randint(1, 12) for name in KEYS[1:] if rng.random() < 0.6}
        ranks = rng.choice([1, 2, 3, 8])
        try:
            plan = load_config([keys]).batch_plan(ranks)
        except UsageError as error:
            name, value = re.findall(r"set (\w+) to (\d+)", str(error))[0]
            plan = load_config([keys | {name: int(value)}]).batch_plan(ranks)
            fixed += 1
        assert plan.global_batch == plan.micro_batch * plan.grad_accum * plan.data_parallel
    assert fixed > 500


def test_ranks_must_divide_into_the_layout() -> None:
    config = load_config([{"train_micro_batch_size_per_gpu": 2, "model_parallel_size": 2, "pipe_parallel_size": 2}])
    assert config.batch_plan(8).data_parallel == 2
    with pytest.raises(UsageError, match="start a multiple of 4 ranks"):
        config.batch_plan(6)
    for none in (0, 1):
        assert load_config([{"train_micro_batch_size_per_gpu": 2, "pipe_parallel_size": none}]).pipeline_stages == 1
