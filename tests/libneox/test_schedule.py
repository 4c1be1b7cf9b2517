# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules against the original's numbers, and where they deliberately differ."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from libneox.config import load_config
from libneox.errors import UsageError
from libneox.schedule import Schedule

# lr0 1, min 0.1, warm-up 0.2, 10 steps: values after 0..10 steps, made by the original
VECTORS = {
    "cosine": [0.5, 0.5, 1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1],
    "linear": [0.5, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.1],
    "exponential": [0.5, 0.5, 1, 0.917021, 0.840927, 0.771148, 0.707159, 0.648479, 0.594669, 0.545324, 0.500074],
    "constant": [0.5, 0.5, *[1.0] * 9],
}


def make(style: Any, **changes: Any) -> Schedule:
    return Schedule(**{"style": style, "lr": 1.0, "min_lr": 0.1, "warmup": 2.0, "horizon": 10} | changes)


@pytest.mark.parametrize("style", VECTORS)
def test_vectors(style: str) -> None:
    assert [make(style).lr_at(k) for k in range(11)] == pytest.approx(VECTORS[style], abs=1e-6)


def test_golden_table(golden: Path) -> None:
    compared = 0
    with (golden / "model/lr/lr_schedules.csv").open() as file:
        for row in csv.DictReader(file):
            horizon, k = int(row["total_iters"]), int(row["num_iters"])
            warmup = float(row["warmup"]) * horizon
            if k > horizon or (0 < warmup < 1 and k <= warmup):
                continue  # the original climbs again past the horizon, and overshoots in a warm-up under one step
            numbers = {
                "lr": float(row["start_lr"]),
                "min_lr": float(row["min_lr"]),
                "warmup": warmup,
                "horizon": horizon,
            }
            assert make(row["style"], **numbers).lr_at(k) == pytest.approx(float(row["lr"]), rel=1e-12), row
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential", "constant", "wsd", "inverse_sqrt"])
def test_past_the_horizon_nothing_changes(style: str) -> None:
    schedule = make(style)
    assert {schedule.lr_at(k) for k in range(10, 40)} == {schedule.lr_at(10)}


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential", "wsd", "inverse_sqrt"])
def test_falls_after_the_warm_up(style: str) -> None:
    values = [make(style, horizon=1000, warmup=50.0).lr_at(k) for k in range(51, 1001)]
    assert all(later <= earlier for earlier, later in zip(values, values[1:], strict=False))
    assert max(values) <= 1.0
    assert min(values) >= 0.1


def test_a_warm_up_under_one_step_does_not_overshoot() -> None:
    schedule = make("linear", warmup=0.1, min_lr=0.0)
    assert schedule.lr_at(0) == 1.0
    assert max(schedule.lr_at(k) for k in range(20)) == 1.0


def test_warm_up_as_long_as_the_run() -> None:
    schedule = make("cosine", warmup=10.0)
    assert [schedule.lr_at(k) for k in (0, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.lr_at(11) == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.55), ("cosine", 0.55), ("sqrt", 1 - 0.9 * math.sqrt(0.5))])
def test_wsd(shape: str, middle: float) -> None:
    schedule = make("wsd", horizon=100, warmup=10.0, wsd_decay_fraction=0.2, wsd_decay_style=shape)
    assert [schedule.lr_at(k) for k in (10, 50, 80, 90, 100)] == pytest.approx([1, 1, 1, middle, 0.1])


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential", "constant", "wsd", "inverse_sqrt"])
def test_a_horizon_of_no_steps(style: str) -> None:
    schedule = make(style, horizon=0, warmup=0.0)
    assert 0.1 <= schedule.lr_at(0) == schedule.lr_at(5) <= 1.0


def test_inverse_sqrt() -> None:
    schedule = make("inverse_sqrt", horizon=10_000, warmup=100.0, min_lr=0.0)
    assert [schedule.lr_at(k) for k in (100, 400, 10_000)] == pytest.approx([1, 0.5, 0.1])


def test_horizon_from_the_config() -> None:
    keys = {"train_iters": 100, "optimizer": {"type": "adam", "params": {"lr": 0.5}}, "warmup": 0.1, "min_lr": 0.05}
    assert load_config([keys]).lr_schedule().horizon == 100
    assert load_config([keys | {"lr_decay_fraction": 0.505}]).lr_schedule().horizon == 50
    assert load_config([keys | {"lr_decay_fraction": 0.5, "lr_decay_iters": 80}]).lr_schedule().warmup == 8.0
    epochs = load_config([{"train_epochs": 2}])
    assert epochs.lr_schedule(train_iters=33).horizon == 33
    with pytest.raises(UsageError, match="needs a horizon"):
        epochs.lr_schedule()
    assert load_config([keys]).lr_schedule().describe() == "linear from 0.5 to 0.05 over 100 steps, 10 of them warm-up"
