# SPDX-License-Identifier: Apache-2.0
"""The thread that looks after the other ranks: who is dead, and who is only through."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from libneox.errors import DataError, StoppedEarly
from neox_train import watch

BEAT = 0.02
DEAD = 0.5


class Store:
    """What a Watch asks of a rendezvous store; `gone` is what a client of a dead one meets."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.gone = False

    def set(self, key: str, value: str) -> None:
        self._reach()
        self.kept[key] = value

    def get(self, key: str) -> bytes:
        self._reach()
        return self.kept[key].encode()

    def check(self, keys: list[str]) -> bool:
        self._reach()
        return all(key in self.kept for key in keys)

    def _reach(self) -> None:
        if self.gone:
            raise ConnectionError("the store is gone")


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes that processes would have ended with; beats are quick."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit  # which ends a thread, and nothing else

    monkeypatch.setattr(watch.os, "_exit", leave)
    monkeypatch.setattr(watch, "BEAT_S", BEAT)
    monkeypatch.setattr(watch, "DEAD_S", DEAD)
    return codes


@pytest.fixture
def ranks() -> Callable[..., watch.Watch]:
    """Watches of two ranks that share a store; what they tell goes to `told`."""
    store, told = Store(), []

    def of(rank: int) -> watch.Watch:
        group = SimpleNamespace(rank=rank, world_size=2, is_first=rank == 0, served_by="rank 0")
        group.another_connection = lambda prefix: store
        made = watch.Watch(group, step_timeout_s=60, on_loss=told.append)  # type: ignore[arg-type]
        made.store, made.told = store, told  # type: ignore[attr-defined]
        return made

    return of


def test_a_rank_without_a_beat_is_dead(ranks: Any, exits: list[int], capfd: Any) -> None:
    dead, first = ranks(1), ranks(0)
    dead.mark(3)
    first.store.set("beat/1", dead._beat())
    with first:
        deadline = time.monotonic() + 20
        while not exits and time.monotonic() < deadline:
            time.sleep(BEAT)
    assert exits == [69]
    assert "rank 1 on " in first.told[0]
    assert "no sign of life since step 3" in first.told[0]


@pytest.mark.parametrize("ending", [None, StoppedEarly("stopped by SIGTERM")])
@pytest.mark.parametrize("through", [0, 1])
def test_a_rank_that_is_through_is_not(through: int, ending: Exception | None, ranks: Any, exits: list[int]) -> None:
    """One rank may have more to do at the end: deleting old steps, sending figures."""
    with ranks(1 - through) as busy:
        try:
            with ranks(through):
                time.sleep(4 * BEAT)
                if ending is not None:
                    raise ending
        except StoppedEarly:
            pass
        time.sleep(DEAD / 2)
        busy.store.gone = through == 0  # it served the store, and has waited long enough
        time.sleep(2 * DEAD)
    assert exits == []
    assert busy.told == []


def test_a_failure_is_announced_by_the_rank_that_met_it(ranks: Any, exits: list[int]) -> None:
    """The others leave `Group.on_first` with its code, and must not be taken for the cause."""
    first, other = ranks(0), ranks(1)
    with pytest.raises(SystemExit), other:
        raise SystemExit(65)
    assert "failed" not in first.store.kept
    with pytest.raises(DataError), first:
        raise DataError("text.bin: broken")
    assert json.loads(first.store.kept["failed"])["reason"] == "text.bin: broken"
    assert exits == []
