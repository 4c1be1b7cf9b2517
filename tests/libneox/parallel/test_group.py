# SPDX-License-Identifier: Apache-2.0
"""Messages between ranks: everybody's, in order, of this attempt and no other; who is missing is named."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from libneox.errors import DataError, PeerLost
from libneox.parallel.group import Group
from libneox.parallel.launch import discover

RANKS = 3


@pytest.fixture
def port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def group(port: int, rank: int, **more: Any) -> Group:
    """A rank of a run as torchrun starts it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    env = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    attempt = more.pop("attempt", None)
    if attempt is not None:
        env |= {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    return Group(discover(env), timeout_s=20, **more)


def on_all(work: Callable[[int], Any]) -> list[Any]:
    """What each rank's thread gave."""
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(work, range(RANKS)))


@pytest.fixture
def groups(port: int) -> list[Group]:
    """All ranks of a run."""
    return on_all(lambda rank: group(port, rank))


def test_everybody_has_what_each_gave_and_nothing_piles_up(groups: list[Group]) -> None:
    def talk(rank: int) -> list[Any]:
        found = [groups[rank].gather([rank, number]) for number in range(40)]
        assert groups[rank].tell({"rank": rank}) == {"rank": 0}
        groups[rank].stand_by(lambda: False, lambda: False)
        return [*found, groups[rank].gather("last")]

    expected = [[[rank, number] for rank in range(RANKS)] for number in range(40)] + [["last"] * RANKS]
    assert on_all(talk) == [expected] * RANKS
    assert groups[0]._store.num_keys() < 10 * RANKS


def test_a_failure_of_the_first_ends_the_others_with_its_code(groups: list[Group]) -> None:
    def fail() -> None:
        raise DataError("text.bin: broken")

    def ask(rank: int) -> BaseException:
        with pytest.raises((DataError, SystemExit)) as caught:
            groups[rank].on_first(fail)
        return caught.value

    first, *others = on_all(ask)
    assert str(first) == "text.bin: broken"
    assert [other.code for other in others if isinstance(other, SystemExit)] == [65] * (RANKS - 1)


def test_a_rank_that_does_not_come_is_named(port: int) -> None:
    def come(rank: int) -> str:
        if rank == 1:
            return ""
        with pytest.raises(PeerLost) as caught:
            group(port, rank, rendezvous_s=2)
        return str(caught.value)

    assert on_all(come)[0] == "rank 1 of 3 did not start within 2 s"  # the others may find rank 0 gone by then


@pytest.fixture
def agent(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store of torchrun's agent, which outlives an attempt."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    yield store
    del store


def test_a_restarted_run_reads_no_messages_of_the_attempt_before(agent: Any, port: int) -> None:
    for attempt in range(2):

        def talk(rank: int, attempt: int = attempt) -> list[Any]:
            ours = group(port, rank, attempt=attempt)
            watched = ours.another_connection("watch")
            stale = watched.check(["failed"])
            found = ours.gather([rank, attempt])
            watched.set("failed", "by then all have looked")
            return [stale, *found]

        assert on_all(talk) == [[False, *([rank, attempt] for rank in range(RANKS))]] * RANKS
