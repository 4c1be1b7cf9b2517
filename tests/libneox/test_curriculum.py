# SPDX-License-Identifier: Apache-2.0
"""Lengths of a curriculum by hand, what --dry-run makes of them, and sections that are none."""

from __future__ import annotations

from typing import Any

import pytest

from libneox.config import load_config
from libneox.config.estimate import dry_run, render
from libneox.curriculum import Growth, Stairs, curriculum_of, periods
from libneox.errors import UsageError

LINEAR: dict[str, Any] = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 64,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 7, "difficulty_step": 8},
}
MODEL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 64, "max_position_embeddings": 64,
    "vocab_size": 100, "train_batch_size": 4, "train_iters": 10,
}  # fmt: skip


def section(**changes: Any) -> dict[str, Any]:
    return {"curriculum_learning": LINEAR | changes}


def test_linear() -> None:
    curriculum = curriculum_of(load_config([MODEL | section()]))
    assert [curriculum.length_at(step) for step in range(1, 10)] == [16, 24, 32, 40, 48, 56, 64, 64, 64]


def test_root() -> None:
    curriculum = Growth(first=0, last=100, total=100, multiple=10, root=2.0)
    assert [curriculum.length_at(step) for step in (1, 4, 25, 50, 81, 99, 100)] == [10, 20, 50, 70, 90, 90, 100]


def test_never_under_the_first_multiple_that_reaches_the_first_length() -> None:
    curriculum = Growth(first=20, last=70, total=100, multiple=16)
    assert [curriculum.length_at(step) for step in (1, 23, 24, 60, 89, 100)] == [32, 32, 32, 48, 64, 64]
    assert curriculum.length_at(125) == 70  # where a whole multiple more would be due


def test_discrete() -> None:
    keys = {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [8, 32, 64], "max_step": [2, 5]}}
    curriculum = curriculum_of(load_config([MODEL | section(**keys)]))
    assert [curriculum.length_at(step) for step in range(1, 8)] == [8, 8, 32, 32, 32, 64, 64]


@pytest.mark.parametrize("root", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 50, 300])
def test_periods_are_the_lengths_of_every_step(root: float, steps: int) -> None:
    for curriculum in (
        Growth(first=5, last=90, total=100, multiple=8, root=root),
        Stairs(lengths=(8, 16, 64), until=(3, 20)),
    ):
        spelled = [length for length, count in periods(curriculum, steps) for _ in range(count)]
        assert spelled == [curriculum.length_at(step) for step in range(1, steps + 1)]


def test_dry_run_counts_what_is_computed() -> None:
    report = dry_run(load_config([MODEL | section()]))
    assert report["tokens"]["total"] == 4 * (16 + 24 + 32 + 40 + 48 + 56 + 4 * 64)
    assert "10 steps of 64 to 256" in render(report)
    model = load_config([MODEL]).model_config()
    lengths = [16, 24, 32, 40, 48, 56, 64, 64, 64, 64]
    assert report["tokens"]["flops_palm"] == sum(4 * t * model.flops_per_token(t).palm for t in lengths)


def test_disabled_is_none() -> None:
    assert curriculum_of(load_config([MODEL | section(enabled=False)])) is None
    assert curriculum_of(load_config([MODEL])) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum_type": "vocabulary"}, "the length of samples grows: seqlen"),
        ({"schedule_type": "custom"}, "is none of fixed_linear, fixed_root, fixed_discrete"),
        ({"schedule_config": {"difficulty_step": 8}}, "fixed_linear takes total_curriculum_step, difficulty_step"),
        ({"max_difficulty": 65}, "65 tokens is not between min_difficulty 8 and seq_length 64"),
        ({"min_difficulty": 0}, "min_difficulty: expected a whole number from 1, found 0"),
        (
            {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [8, 64], "max_step": [1, 2]}},
            "2 lengths change at 1 steps, found 2",
        ),
        (
            {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [64, 8], "max_step": [1]}},
            "expected whole numbers that rise",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config([MODEL | section(**changes)])


def test_lengths_that_sequence_parallelism_cannot_cut() -> None:
    parallel = {"model_parallel_size": 2, "sequence_parallel": True}
    load_config([MODEL | parallel | section()])
    odd = {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [9, 64], "max_step": [1]}}
    with pytest.raises(UsageError, match="9 tokens cannot be split over model_parallel_size 2"):
        load_config([MODEL | parallel | section(**odd)])
