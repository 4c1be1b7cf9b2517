# SPDX-License-Identifier: Apache-2.0
"""Adam with 8-bit moments: it trains, resumes to the bit, goes on from Adam's checkpoint, refuses what it cannot."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch

from libneox.checkpoint.store import open_tensors
from libneox.config import load_config
from libneox.config.estimate import dry_run
from libneox.errors import UsageError
from neox_train.eight_bit import coded, decoded, largest
from neox_train.extras import check_installed

EIGHT = {"engine": "auto", "use_bnb_optimizer": True, "checkpoint_factor": 4}
BY_BLOCKS = "layers.0.mlp.up.weight"  # 128 x 32: enough elements for codes


def test_codes_of_a_known_table() -> None:
    table = torch.tensor([-0.5, -0.1, 0.0, 0.25, 1.0])
    values = torch.tensor([8.0, -4.0, 1.9, 0.1]).repeat(100)[:300]  # two blocks, the second one short
    scale = largest(values)
    assert scale.tolist() == [8.0, 8.0]
    codes = coded(values, table, scale)
    assert codes[:4].tolist() == [4, 0, 3, 2]
    assert decoded(codes, table, scale)[:4].tolist() == [8.0, -4.0, 2.0, 0.0]
    assert torch.equal(coded(decoded(codes, table, scale), table, scale), codes)
    assert coded(torch.zeros(5), table, torch.zeros(1)).tolist() == [2] * 5


def test_trains_near_adam_and_resumes_to_the_bit(train, config, losses, tmp_path: Path) -> None:
    train(config("adam.yml", save=str(tmp_path / "adam")), "-q")
    train(config("whole.yml", save=str(tmp_path / "whole"), **EIGHT), "-q")
    path = config(**EIGHT)
    train(path, "-q", "--set", "exit_interval=4", code=75)
    train(path, "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")
    for name in (file.name for file in (tmp_path / "whole/step_8").glob("*.safetensors")):
        assert filecmp.cmp(tmp_path / "whole/step_8" / name, tmp_path / "RUN/step_8" / name, shallow=False)
    assert losses(tmp_path / "RUN")[:2] == losses(tmp_path / "adam")[:2]  # the first update knows no moments
    assert losses(tmp_path / "RUN") == pytest.approx(losses(tmp_path / "adam"), rel=0.05)
    assert losses(tmp_path / "RUN") != losses(tmp_path / "adam")


def test_moments_in_a_checkpoint_are_those_of_adam(train, config, tmp_path: Path) -> None:
    train(config("adam.yml", save=str(tmp_path / "adam")), "-q", "--set", "train_iters=1")
    train(config(**EIGHT), "-q", "--set", "train_iters=1")
    with (
        open_tensors(tmp_path / "adam/step_1", "optimizer") as a,
        open_tensors(tmp_path / "RUN/step_1", "optimizer") as b,
    ):
        for name in a:
            scale = a[name].abs().max().item()
            torch.testing.assert_close(b[name], a[name], rtol=0, atol=0.02 * scale)
        assert f"exp_avg_absmax/{BY_BLOCKS}" in set(b)
        assert len(b[f"exp_avg/{BY_BLOCKS}"].unique()) <= 16 * 256  # codes times the magnitudes of 16 blocks


def test_goes_on_from_adam_but_not_back(train, config, losses, tmp_path: Path) -> None:
    path = config(engine="auto")
    train(path, "-q", "--set", "exit_interval=4", code=75)
    train(path, "-q", "--set", "use_bnb_optimizer=true", "--set", "exit_interval=6", code=75)
    train(config("adam.yml", engine="auto", save=str(tmp_path / "adam")), "-q")
    assert losses(tmp_path / "RUN") == pytest.approx(losses(tmp_path / "adam")[:6], rel=0.02)
    assert "set no_load_optim: true" in train(path, "-q", code=2).stderr


def test_refused() -> None:
    base = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
    for keys, message in (
        ({"optimizer": {"type": "sgd", "params": {"lr": 0.1}}}, "sgd has no such form; take adam"),
        ({"zero_optimization": {"stage": 2}}, "ZeRO cuts; set zero_optimization.stage: 0"),
        ({"engine": "deepspeed"}, "set engine: auto"),
        ({"model_parallel_size": 2}, "set model_parallel_size: 1"),
    ):
        with pytest.raises(UsageError, match=message):
            load_config([base | {"use_bnb_optimizer": True} | keys])


def test_the_estimate_knows_of_bytes() -> None:
    keys = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
    keys |= {"vocab_size": 100, "train_micro_batch_size_per_gpu": 1, "precision": "bfloat16"}
    (row,) = dry_run(load_config([keys | {"use_bnb_optimizer": True}]))["memory_per_rank"]
    assert row["optimizer"] == (4 + 2) * row["parameters"]


def test_without_the_library_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"bitsandbytes is not installed; pip install 'neox-train\[bitsandbytes\]'"):
        check_installed(load_config([{"use_bnb_optimizer": True}]))
