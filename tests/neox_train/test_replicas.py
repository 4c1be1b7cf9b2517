# SPDX-License-Identifier: Apache-2.0
"""A weight that changes by itself on one rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from libneox import run_directory
from libneox.errors import IntegrityError
from libneox.parallel.mesh import Mesh
from neox_train.replicas import ReplicaCheck, checksum


class Gathering:
    """The messages of a Group between threads."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def of(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait(20)
            values = list(self._values)
            self._barrier.wait(20)
            return values

        return SimpleNamespace(rank=rank, gather=gather)


def check(weights: list[torch.Tensor], masters: list[torch.Tensor], mesh: dict[str, int], step: int = 4) -> list[str]:
    """What each rank says after a step."""
    gathering = Gathering(len(weights))

    def rank_main(rank: int) -> str:
        model = torch.nn.Module()
        model.register_parameter("w", torch.nn.Parameter(weights[rank]))
        engine = SimpleNamespace(local=lambda: dict(model.named_parameters()), master=lambda name: masters[rank])
        observer = ReplicaCheck(gathering.of(rank), Mesh(rank, **mesh), every=2)
        observer.begin_step(step)
        try:
            observer.before_update(engine)  # type: ignore[arg-type]
        except IntegrityError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(weights)) as pool:
        return list(pool.map(rank_main, range(len(weights))))


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The same with the lowest bit of one element changed."""
    other = tensor.clone()
    other.view(torch.int16)[-1] ^= 1
    return other


def test_one_bit_is_found_and_the_rank_is_named() -> None:
    weight = torch.randn(1000).bfloat16()
    three = [weight, flipped(weight), weight]
    told = check(three, [weight.float()] * 3, {"data_size": 3})
    assert len(set(told)) == 1
    assert told[0].startswith("step 4: w of rank 1 on ")
    assert check([weight] * 3, [weight.float()] * 3, {"data_size": 3}) == [""] * 3
    assert check(three, [weight.float()] * 3, {"data_size": 3}, step=5) == [""] * 3


def test_two_replicas_are_judged_by_their_masters() -> None:
    weight = torch.randn(10).bfloat16()
    told = check([weight, flipped(weight)], [weight.float()] * 2, {"data_size": 2})
    assert "w of rank 1 on " in told[0]
    told = check([weight, flipped(weight)], [weight.float(), flipped(weight).float()], {"data_size": 2})
    assert "rank 0 on" in told[0]
    assert "differ from each other" in told[0]


def test_shards_are_no_replicas() -> None:
    a, b = torch.randn(2, 10).bfloat16()
    assert check([a, b, a, b], [a] * 4, {"data_size": 2, "tensor_size": 2}) == [""] * 4
    told = check([a, b, a, flipped(b)], [a.float(), b.float()] * 2, {"data_size": 2, "tensor_size": 2})
    assert "w of rank 3 on " in told[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_change_changes_the_sum(dtype: torch.dtype) -> None:
    tensor = torch.randn(50, dtype=dtype)
    for index in range(50):
        other = tensor.clone()
        other[index] = -other[index]
        assert checksum(other) != checksum(tensor)
    assert checksum(torch.stack([tensor, tensor]).T[:, 0]) == checksum(tensor)


def test_it_changes_nothing_and_is_refused_where_there_are_no_copies(train, config, losses, tmp_path: Path) -> None:
    train(config("a.yml", save=str(tmp_path / "a")), "-q")
    train(config("b.yml", save=str(tmp_path / "b"), replica_check_interval=2), "-q")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    done = train(config(replica_check_interval=2, zero_optimization={"stage": 3}), code=2)
    assert "stage 3 keeps no copies" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_run_of_two_ranks_ends_before_anything_of_it_is_saved(
    train_apart, config, script, precision: str, tmp_path: Path
) -> None:
    """Rank 1's copy of a weight changes by one bit in step 5."""
    path = script(
        "if os.environ['RANK'] == '1':",
        "    step = loop.one_step",
        "    def corrupt(run):",
        "        if run.state.step == 4:",
        "            bits = run.engine.objective.model.embed.weight.data.view(-1).view(torch.int16)",
        "            bits[7] ^= 1",
        "        return step(run)",
        "    loop.one_step = corrupt",
    )
    keys = {"train_micro_batch_size_per_gpu": 2, "checkpoint_factor": 2, "precision": precision}
    done = train_apart(config(replica_check_interval=1, **keys), "-q", ranks=2, script=path, code=None)
    assert done.returncode != 0
    assert "step 5: embed.weight of rank 1 on " in done.stderr
    status = run_directory.read_status(tmp_path / "RUN") or {}
    assert status["code"] == 81
    assert "rank 1" in status["reason"]
    assert run_directory.list_steps(tmp_path / "RUN") == [2, 4]
