# SPDX-License-Identifier: Apache-2.0
"""Threads of ranks on a CPU: as asked, as the environment says, or the cores shared out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from libneox.parallel.group import Group
from libneox.parallel.launch import discover
from neox_train import threads


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that torch gives eight threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "variable", "quota", "neighbours", "expected"),
    [
        (None, None, None, (1, 1), 8),
        (None, "", None, (3, 3), 2),
        (None, None, None, (20, 20), 1),
        (None, None, "max 100000", (2, 2), 4),
        (None, None, "max 100000", (2, 1), 8),  # each on cores of its own
        (None, None, "150000 100000", (1, 1), 2),
        (None, None, "400000 100000", (2, 1), 2),
        (None, "8", "100000 100000", (4, 4), 8),
        (5, "8", "100000 100000", (4, 4), 5),
    ],
)
def test_how_many(
    asked: int | None, variable: str | None, quota: str | None, neighbours: tuple[int, int], expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    if quota:
        threads.QUOTA.write_text(quota + "\n")
    assert threads.set_threads(asked, threads.Neighbours(*neighbours)) == expected
    assert torch.get_num_threads() == expected


def test_ranks_bound_to_cores_of_their_own_do_not_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(discover({}), timeout_s=1)
    mine, all_cores = sorted(os.sched_getaffinity(0)), [*range(64)]
    for others, expected in (([["here", mine]] * 2, (3, 3)), ([["here", all_cores], ["there", mine]], (2, 1))):
        monkeypatch.setattr(threads.socket, "gethostname", lambda: "here")
        monkeypatch.setattr(group, "gather", lambda own, others=others: [own, *others])
        assert threads.neighbours_of(group) == expected


def test_two_ranks_share_the_cores(train_apart, config, script) -> None:
    begin = script("torch.set_num_threads(2)", "os.environ.pop('OMP_NUM_THREADS', None)")
    path = config(train_iters=1)
    for words, expected in (((), 1), (("--set", "cpu_threads=3"), 3)):
        done = train_apart(path, *words, "--set", f"save=run{expected}", ranks=2, script=begin)
        assert f"{expected} threads in each rank" in done.stderr
