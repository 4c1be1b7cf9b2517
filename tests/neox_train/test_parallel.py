# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a model train it as one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from libneox.checkpoint.store import open_tensors

# the padding of the vocabulary must not follow the number of ranks, or the losses would
TP2 = ("-q", "--set", "model_parallel_size=2", "--set", "padded_vocab_size=384")
ONE = ("-q", "--set", "padded_vocab_size=384")
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "gpt_j_residual": False,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "no_weight_tying": False,
    "rotary_pct": 1.0,
    "ffn_hidden_size": 48,
}


def test_two_ranks_equal_one_and_stop_for_one_to_go_on(train, train_apart, config, metrics, tmp_path: Path) -> None:
    """Losses and gradient norms of ten steps with sequence parallelism, the second half resumed on one rank."""
    more = {"train_iters": 10, "eval_interval": 5, "eval_iters": 1}
    train(config("one.yml", save=str(tmp_path / "one"), **more), *ONE)
    path = config(sequence_parallel=True, **more)
    train_apart(path, *TP2, "--set", "exit_interval=6", ranks=2, code=None)
    train(path, *ONE)
    ours, whole = metrics(tmp_path / "RUN"), metrics(tmp_path / "one")
    compare(ours, whole)
    assert ours[4]["valid_loss"] == pytest.approx(whole[4]["valid_loss"], rel=1e-5)


def compare(ours: list[dict[str, Any]], whole: list[dict[str, Any]], close: float = 1e-5) -> None:
    assert [record["samples"] for record in ours] == [record["samples"] for record in whole]
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in whole], rel=close)
    norms = [[record["grad_norm"] for record in records] for records in (ours, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * close)


def test_what_cannot_be_shared_is_refused(train, config) -> None:
    done = train(config(num_kv_heads=1), *TP2, code=2)
    assert "num_kv_heads: 1 heads cannot be split over model_parallel_size 2" in done.stderr
    done = train(config(), *TP2, code=2)
    assert "1 ranks cannot be cut into model_parallel_size 2" in done.stderr


@pytest.mark.slow
def test_optimizers_that_need_whole_matrices_are_refused(train_apart, config) -> None:
    path = config(optimizer={"type": "muon", "params": {"lr": 0.02}}, zero_optimization={"stage": 0})
    done = train_apart(path, *TP2, ranks=2, code=None)
    assert "model_parallel_size: muon needs whole matrices, which 2 ranks would cut" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bfloat16")])
def test_every_stage_on_four_ranks(
    train, train_apart, config, metrics, stage: int, precision: str, tmp_path: Path
) -> None:
    """Begun on one rank, continued at TP 2 x DP 2, and then at TP 2 from its own checkpoint."""
    more = {"zero_optimization": {"stage": stage}, "precision": precision, "train_iters": 12}
    train(config("one.yml", save=str(tmp_path / "one"), **more), *ONE)
    path = config(**more, train_micro_batch_size_per_gpu=1)
    train(path, *ONE, "--set", "exit_interval=2", code=75)
    train_apart(path, *TP2, "--set", "exit_interval=7", ranks=4, code=None, timeout=300)
    train_apart(path, *TP2, ranks=2, timeout=300)
    compare(metrics(tmp_path / "RUN"), metrics(tmp_path / "one"), 1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "plain"])
@pytest.mark.parametrize("sequence", [False, True])
def test_clipping_sees_the_whole_gradient(
    train, train_apart, config, metrics, sequence: bool, engine: str, tmp_path: Path
) -> None:
    """SGD shows what Adam hides: a norm that counts a shard twice, or not at all, moves the weights elsewhere."""
    more = LLAMA | {
        "optimizer": {"type": "sgd", "params": {"lr": 0.5}},
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": 1 if engine == "deepspeed" else 0},
        "engine": engine,
        "qk_norm": "head",
    }
    train(config("one.yml", save=str(tmp_path / "one"), **more), *ONE)
    train_apart(config(**more, sequence_parallel=sequence), *TP2, ranks=2)
    for ours, reference in zip(metrics(tmp_path / "RUN"), metrics(tmp_path / "one"), strict=True):
        assert reference["grad_norm"] > 0.2  # so that clipping acts
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-6)
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    with open_tensors(tmp_path / "RUN/latest") as a, open_tensors(tmp_path / "one/latest") as b:
        assert set(a) == set(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)
