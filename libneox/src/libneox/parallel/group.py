# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they meet, and small JSON messages between them.

Messages go through the rendezvous store as JSON text: no pickled object ever crosses a socket, and a rank that
waits for another one knows which one it is and how long it has waited.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from libneox.errors import PeerLost, UsageError
from libneox.parallel.launch import Launch

RENDEZVOUS_S = 60.0
POLL_S = 0.2
LEAVE_S = 3.0  # how long rank 0 waits for the others to leave


class Group:
    """All processes of this run; with one of them, everything is immediate and no socket is opened."""

    def __init__(self, launch: Launch, *, timeout_s: float, rendezvous_s: float = RENDEZVOUS_S):
        """Meet the other processes.

        Args:
            timeout_s: how long a message or a collective may take before the run is given up.
        Raises:
            PeerLost: they do not come within `rendezvous_s`.
            UsageError: the port is taken on this host.
        """
        self.rank, self.world_size, self.local_rank = launch.rank, launch.world_size, launch.local_rank
        self.timeout_s = timeout_s
        self._gathered = self._stood_by = 0
        self._launch = launch
        self._store: Any = None
        where = f"{launch.master_addr}:{launch.master_port}"
        if self.world_size > 1:
            try:
                self._store = dist.TCPStore(
                    launch.master_addr,
                    launch.master_port,
                    self.world_size,
                    is_master=self.rank == 0 and not _agent_store(),
                    timeout=timedelta(seconds=rendezvous_s),
                    wait_for_workers=False,  # `_meet` does, and names the one that is missing
                    multi_tenant=True,
                )
                # a rank that meets another job at this address must not be taken for one of it
                self._store = dist.PrefixStore(f"neox/{launch.job}", self._store)
                self._meet(rendezvous_s)
            except dist.DistNetworkError as error:
                if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                    raise UsageError(f"{where}: the port is taken; set another MASTER_PORT") from error
                raise PeerLost(f"{where}: nobody answered within {rendezvous_s:.0f} s; check MASTER_ADDR") from error
            except dist.DistStoreError as error:
                raise PeerLost(f"{where}: rank 0 did not come within {rendezvous_s:.0f} s") from error

    def another_connection(self, prefix: str) -> Any:
        """A second connection to the store, for a thread: one connection serves one request at a time."""
        store = dist.TCPStore(
            self._launch.master_addr,
            self._launch.master_port,
            self.world_size,
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        return dist.PrefixStore(f"neox-{prefix}/{self._launch.job}", store)

    def _meet(self, rendezvous_s: float) -> None:
        """Wait until every rank is here, so that a missing one is named in seconds rather than by a hung collective."""
        self._store.set(f"here/{self.rank}", socket.gethostname())
        deadline = time.monotonic() + rendezvous_s
        for rank in range(self.world_size):
            while not self._store.check([f"here/{rank}"]):
                if time.monotonic() > deadline:
                    raise PeerLost(f"rank {rank} of {self.world_size} did not start within {rendezvous_s:.0f} s")
                time.sleep(0.05)

    def start_collectives(self, backend: str) -> None:
        """Make torch.distributed ready, with a group of one as well (DeepSpeed wants it)."""
        store = self._store or dist.HashStore()
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("collectives", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout_s),
        )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def served_by(self) -> str:
        """Whose process the messages go through."""
        return "the launcher" if _agent_store() else "rank 0"

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in order of rank, on every rank. A barrier as well; every rank must call it.

        Raises:
            PeerLost: a rank did not answer in `timeout_s`.
        """
        if self.world_size == 1:
            return [value]
        self._gathered = now = self._gathered + 1
        if now > 2:  # everybody has answered the last one, so everybody has read the one before
            self._store.delete_key(f"m/{now - 2}/{self.rank}")
        self._store.set(f"m/{now}/{self.rank}", json.dumps(value))
        return [json.loads(self._take(f"m/{now}/{rank}", rank)) for rank in range(self.world_size)]

    def tell(self, value: Any) -> Any:
        """What rank 0 gave, on every rank."""
        return self.gather(value if self.is_first else None)[0]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 and have its JSON result on every rank.

        Raises:
            NeoxError: what `work` raised, on rank 0; the others leave with the same exit code and say nothing.
        """
        if self.world_size == 1:
            return work()
        report: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.is_first:
            try:
                report = {"value": work()}
            except BaseException as error:
                failure = error
                report = {"code": getattr(error, "exit_code", 1)}
        report = self.gather(report)[0]
        if failure is not None:
            raise failure
        if "code" in report:
            raise SystemExit(report["code"])
        return report["value"]

    def stand_by(self, busy: Callable[[], bool], asked: Callable[[], bool]) -> bool:
        """Wait while rank 0 is `busy`, for as long as that takes; every rank must call it.

        Args:
            busy: called on rank 0 alone.
            asked: called on every rank, again and again: whether somebody wants it to wait no longer.
        Returns:
            Whether one of them did.
        """
        self._stood_by += 1
        key = f"wait/{self._stood_by}"
        while True:
            stop = asked()
            if self.world_size > 1 and stop:
                self._store.set(f"{key}/asked", "")
            if self.is_first:
                stop = stop or (self.world_size > 1 and self._store.check([f"{key}/asked"]))
                if stop or not busy():
                    if self.world_size > 1:
                        self._store.set(f"{key}/over", str(int(stop)))
                    return stop
            elif self._store.check([f"{key}/over"]):
                return self._store.get(f"{key}/over") == b"1"
            time.sleep(POLL_S)

    def _take(self, key: str, rank: int) -> str:
        try:
            self._store.wait([key], timedelta(seconds=self.timeout_s))
            return self._store.get(key).decode()
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
            raise PeerLost(f"rank {rank} did not answer within {self.timeout_s:.0f} s; see its own error") from error

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise sum over all ranks, float64 where the device has it."""
        return [float(value) for value in self.queue_sum(values, device)]

    def queue_sum(self, values: Sequence[Tensor | float], device: torch.device) -> Sequence[Tensor | float]:
        """The same of numbers that the device may still be computing; with several ranks, so are the sums."""
        if self.world_size == 1:
            return values
        host = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in values], dtype=torch.float64)
        sums = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                sums[index] = value
        dist.all_reduce(sums)
        return sums.unbind()

    def close(self) -> None:
        """Leave; never raises, the run is over.

        Rank 0 serves the messages of all: it stays until the others have read theirs and left, but not for long.
        """
        with contextlib.suppress(Exception):
            if dist.is_initialized():
                dist.destroy_process_group()
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set(f"left/{self.rank}", "")
                everybody = [f"left/{rank}" for rank in range(self.world_size)]
                deadline = time.monotonic() + LEAVE_S
                while self.is_first and time.monotonic() < deadline and not self._store.check(everybody):
                    time.sleep(0.02)


def _agent_store() -> bool:
    """torchrun's agent serves a store at MASTER_ADDR:MASTER_PORT itself, and says so."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
