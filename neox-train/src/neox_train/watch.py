# SPDX-License-Identifier: Apache-2.0
"""A thread that notices when another rank fails, dies or hangs, and ends this one instead of waiting for it.

Every rank beats into the store and looks whether a failure was announced; rank 0 looks at all beats, the others at
rank 0's. What is found is one line naming rank, host and step, in run_status.json too, and exit code 69. What one rank
finds wrong with the configuration or the input is wrong for all: they end with its exit code and leave the word to it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from libneox.errors import InputMissing, PeerLost, StoppedEarly, UsageError
from libneox.parallel.group import Group

BEAT_S = 0.5
DEAD_S = 6.0  # without a beat for so long a process is dead, or stopped
LEFT = "null"  # instead of a beat: this rank is through, and the others are not waited for
SHARED = (UsageError.exit_code, InputMissing.exit_code)  # failures of the run and not of the rank that met them first


class Watch:
    """Watches the ranks of a run while it is open; with one rank it does nothing."""

    def __init__(self, group: Group, *, step_timeout_s: float, on_loss: Callable[[str], None]):
        """`on_loss` is told the one line, on the rank that found out, before the process ends."""
        self._group, self._timeout, self._on_loss = group, step_timeout_s, on_loss
        self._step, self._mark = 0, 0
        self._done = threading.Event()
        self._store = group.another_connection("watch") if group.world_size > 1 else None
        self._thread = threading.Thread(target=self._run, name="neox-watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._store is not None:
            self._store.set(self._key(self._group.rank), self._beat())
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._store is None:
            return
        # SystemExit is what the others raise when rank 0 fails at what it does for all (`Group.on_first`), and tells it
        if error is not None and not isinstance(error, StoppedEarly | SystemExit):
            self._failed(error)
        self._done.set()
        self._thread.join(2 * BEAT_S)
        with contextlib.suppress(Exception):  # rank 0 may be gone already
            self._store.set(self._key(self._group.rank), LEFT)

    def mark(self, step: int) -> None:
        """Note that this rank got somewhere; called several times a step."""
        self._step = step
        self._mark += 1

    def _failed(self, error: BaseException) -> None:
        """Tell the others. An error of communication is an echo of somebody else's: let the thread find out whose."""
        if is_communication(error):
            time.sleep(DEAD_S + 3)
            return
        report = {
            "rank": self._group.rank,
            "host": socket.gethostname(),
            "step": self._step,
            "code": getattr(error, "exit_code", 1),
            "reason": str(error) or type(error).__name__,
        }
        with contextlib.suppress(Exception):
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps(report))
            if self._group.is_first:
                time.sleep(3 * BEAT_S)  # the store may live in this process: let the others read

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _beat(self) -> str:
        return json.dumps([time.time(), self._step, self._mark, socket.gethostname()])

    def _run(self) -> None:
        seen: dict[int, tuple[Any, float, Any, float]] = {}  # rank: beat, when it changed, mark, when that changed
        watched = list(range(self._group.world_size)) if self._group.is_first else [0]
        before = time.monotonic()
        while not self._done.wait(BEAT_S):
            now = time.monotonic()
            if now - before > 4 * BEAT_S:  # this process itself was stopped for a while
                seen.clear()
            before = now
            try:
                self._store.set(self._key(self._group.rank), self._beat())
                if self._store.check(["failed"]):
                    report = json.loads(self._store.get("failed"))
                    self._leave(f"rank {report['rank']} on {report['host']} failed at step {report['step']}", report)
                self._look(watched, seen, now)
            except Exception as error:  # the store is gone, and with it the process that serves it
                if self._done.is_set():
                    return
                self._leave(f"{self._group.served_by} is gone (step {self._step}; {type(error).__name__})", None)

    def _look(self, watched: list[int], seen: dict[int, tuple[Any, float, Any, float]], now: float) -> None:
        hosts: dict[int, str] = {}
        for rank in watched:
            if not self._store.check([self._key(rank)]):
                continue
            text = self._store.get(self._key(rank)).decode()
            if text == LEFT:  # from here on nobody waits for anybody
                self._done.set()
                return
            beat, step, mark, hosts[rank] = json.loads(text)
            last = seen.get(rank, (beat, now, mark, now))
            seen[rank] = (beat, now if beat != last[0] else last[1], mark, now if mark != last[2] else last[3])
            if rank != self._group.rank and now - seen[rank][1] > DEAD_S:
                gone = f"rank {rank} on {hosts[rank]} is dead or stopped"
                if self._group.is_first:
                    self._announce(rank, hosts[rank], step, "is dead")
                self._leave(f"{gone}: no sign of life since step {step}", None)
        if not self._group.is_first or len(seen) < len(watched):
            return  # who sees one rank alone cannot tell the one that hangs from those that wait for it
        slowest = min(seen, key=lambda rank: seen[rank][2])
        if now - max(s[3] for s in seen.values()) > self._timeout:
            host = hosts[slowest]
            self._announce(slowest, host, self._step, "hangs")
            if slowest == self._group.rank:
                faulthandler.dump_traceback(file=sys.stderr)
            self._leave(f"rank {slowest} on {host} hangs at step {self._step} for {self._timeout:.0f} s", None)

    def _announce(self, rank: int, host: str, step: int, what: str) -> None:
        """Let all leave now, and not when they miss the beats of those that have left."""
        self._store.set("failed", json.dumps({"rank": rank, "host": host, "step": step, "code": 69, "reason": what}))

    def _leave(self, line: str, report: dict[str, Any] | None) -> None:
        if report is not None and report["rank"] == self._group.rank:
            if report["reason"] != "hangs":
                return  # it is this rank's own failure, which its main thread is reporting
            faulthandler.dump_traceback(file=sys.stderr)
        if report is not None and report["code"] in SHARED:
            os._exit(report["code"])
        with contextlib.suppress(Exception):
            if report is None:
                self._on_loss(line)
            if report is None or self._group.rank == min({0, 1} - {report["rank"]}):
                print(f"neox-train: error: {line}; the last checkpoint is whole, run the same command again",
                      file=sys.stderr, flush=True)  # fmt: skip
        if self._group.is_first:
            time.sleep(3 * BEAT_S)  # the store may live in this process: let the others read, who hangs show its stack
        os._exit(PeerLost.exit_code)


def is_communication(error: BaseException) -> bool:
    """Whether an error comes from a connection between ranks, so that the cause is somewhere else."""
    if isinstance(error, PeerLost):
        return True
    text = f"{type(error).__name__} {error}".lower()
    words = ("gloo", "nccl", "connection closed", "connection reset", "disterror", "distbackend", "diststore", "peer")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
