# SPDX-License-Identifier: Apache-2.0
"""A pipeline trains the model that one rank trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from libneox.checkpoint.store import open_tensors

PP2 = ("-q", "--set", "pipe_parallel_size=2")
GAS4: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "train_iters": 10}


def test_two_stages_equal_one_rank_and_a_run_moves_between_them(
    train, train_apart, config, metrics, tmp_path: Path
) -> None:
    """Losses, gradient norms and validation in fp32 to the tenth step; stopped and continued on one rank, and back."""
    more = GAS4 | {"eval_interval": 2, "eval_iters": 2}
    train(config("one.yml", save=str(tmp_path / "one"), **more), "-q")
    path = config(**more)
    train_apart(path, *PP2, "--set", "exit_interval=4", ranks=2, code=None)
    train(path, "-q", "--set", "exit_interval=7", code=75)
    train_apart(path, *PP2, ranks=2)
    ours, whole = metrics(tmp_path / "RUN"), metrics(tmp_path / "one")
    assert [record["samples"] for record in ours] == [record["samples"] for record in whole]
    for key, close in (("loss", 1e-5), ("grad_norm", 1e-5)):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in whole], rel=close)
    ours, whole = ([r["valid_loss"] for r in records if "valid_loss" in r] for records in (ours, whole))
    assert len(whole) == 5
    assert ours == pytest.approx(whole, rel=1e-5)
    for group in ("model", "optimizer"):
        with open_tensors(tmp_path / "RUN/latest", group) as a, open_tensors(tmp_path / "one/latest", group) as b:
            assert set(a) == set(b)
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4, msg=name)
