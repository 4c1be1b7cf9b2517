# SPDX-License-Identifier: Apache-2.0
"""Training on samples whose length grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from libneox.curriculum import Growth

LENGTHS = [16, 16, 16, 24, 24, 24, 32, 32]
CURRICULUM: dict[str, Any] = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 32,
    "schedule_type": "fixed_discrete",
    "schedule_config": {"difficulty": [16, 24, 32], "max_step": [3, 6]},
}


@pytest.mark.parametrize("stage", [0, 1])
def test_samples_are_cut(train, config, metrics, stage: int, tmp_path: Path) -> None:
    still = {"type": "adam", "params": {"lr": 0.0}}
    keys = {"zero_optimization": {"stage": stage}, "eval_interval": 1, "eval_iters": 1, "optimizer": still}
    train(config(curriculum_learning=CURRICULUM, **keys), "-q")
    records = metrics(tmp_path / "RUN")
    assert [record["curriculum_seqlen"] for record in records] == LENGTHS
    assert [record["tokens"] for record in records] == [4 * sum(LENGTHS[: step + 1]) for step in range(8)]
    train(config("plain.yml", save=str(tmp_path / "long"), **keys), "-q")
    whole = metrics(tmp_path / "long")
    assert records[0]["loss"] != whole[0]["loss"]
    assert [r["loss"] == w["loss"] for r, w in zip(records, whole, strict=True)] == [n == 32 for n in LENGTHS]
    assert [record["valid_loss"] for record in records] == [record["valid_loss"] for record in whole]


def test_a_batch_is_the_head_of_the_whole_one(config) -> None:
    import torch

    from libneox.config import load_config
    from libneox.data.splits import build_splits
    from neox_train.batches import batches_of

    path = config(curriculum_learning=CURRICULUM)
    loaded = load_config([path])
    sets = build_splits(loaded, train_samples=32)
    more = {"data_rank": 0, "device": torch.device("cpu"), "vocab_size": 258, "eod_id": None}
    batches = batches_of(loaded, sets.train, loaded.batch_plan(1), **more)
    (cut,), (full,) = batches.step(4, 16), batches.step(4)
    assert torch.equal(cut.ids, full.ids[:, :16])
    assert torch.equal(cut.targets, full.targets[:, :16])


def test_resumes_exactly(train, config, losses, metrics, tmp_path: Path) -> None:
    train(config("whole.yml", save=str(tmp_path / "whole"), curriculum_learning=CURRICULUM), "-q")
    path = config(curriculum_learning=CURRICULUM)
    train(path, "-q", "--set", "exit_interval=5", code=75)
    train(path, "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")
    assert metrics(tmp_path / "RUN")[-1]["tokens"] == 4 * sum(LENGTHS)


@pytest.mark.parametrize("root", [1, 2, 3])
@pytest.mark.parametrize(("first", "multiple"), [(8, 8), (20, 16), (64, 8), (5, 3)])
def test_lengths_are_those_of_deepspeed(root: int, first: int, multiple: int) -> None:
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    theirs = CurriculumScheduler(
        {
            "min_difficulty": first,
            "max_difficulty": 100,
            "schedule_type": "fixed_root",
            "schedule_config": {"total_curriculum_step": 50, "difficulty_step": multiple, "root_degree": root},
        }
    )
    ours = Growth(first=first, last=100, total=50, multiple=multiple, root=float(root))
    steps = range(1, 120)
    assert [ours.length_at(step) for step in steps] == [theirs.update_difficulty(step) for step in steps]


@pytest.mark.slow
def test_stages_of_a_pipeline_take_each_length(train, train_apart, config, metrics, tmp_path: Path) -> None:
    """Short samples, several micro-batches and the mean over tokens, on two stages as on one rank."""
    keys = {"curriculum_learning": CURRICULUM, "loss_weighting": "tokens", "eod_mask_loss": True}
    keys |= {"eval_interval": 4, "eval_iters": 1}
    train(config("one.yml", **keys, save=str(tmp_path / "one")), "-q")
    train_apart(config(**keys, train_micro_batch_size_per_gpu=2, pipe_parallel_size=2), "-q", ranks=2)
    for ours, whole in zip(metrics(tmp_path / "RUN"), metrics(tmp_path / "one"), strict=True):
        for name in ("tokens", "loss", "grad_norm", *(name for name in whole if name == "valid_loss")):
            assert ours[name] == pytest.approx(whole[name], rel=1e-4), (name, ours["step"])
