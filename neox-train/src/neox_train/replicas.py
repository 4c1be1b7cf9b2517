# SPDX-License-Identifier: Apache-2.0
"""Whether the data-parallel ranks still hold the same weights: memory that lost a bit shows here and nowhere else."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from libneox.errors import IntegrityError
from libneox.parallel.group import Group
from libneox.parallel.mesh import Mesh
from neox_train.observers import Observer
from neox_train.steps import Engine

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24


class ReplicaCheck(Observer):
    """Compare a checksum of the weights before the update of every `every`th step, while they are what was used."""

    within = True

    def __init__(self, group: Group, mesh: Mesh, every: int):
        self._group, self._mesh, self._every, self._step = group, mesh, every, 0

    def begin_step(self, step: int) -> None:
        """Note the step's number."""
        self._step = step

    def before_update(self, engine: Engine) -> dict[str, Any]:
        """Compare.

        Raises:
            IntegrityError: on every rank alike, naming ranks, hosts and tensor; nothing of this step is applied.
        """
        if self._step % self._every:
            return {}
        sums = {name: checksum(tensor) for name, tensor in engine.local().items()}
        digest = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
        place = [self._mesh.pipe_rank, self._mesh.tensor_rank]  # who shares it holds the same tensors
        reports = self._group.gather([place, digest])
        for shared in sorted({tuple(place) for place, _ in reports}):
            ranks = [rank for rank, (place, _) in enumerate(reports) if tuple(place) == shared]
            if len({reports[rank][1] for rank in ranks}) > 1:
                self._name(engine, sums, ranks)
        return {}

    def _name(self, engine: Engine, sums: dict[str, int], ranks: list[int]) -> None:
        """Say who differs, and in which tensor."""
        reports = self._group.gather([socket.gethostname(), sums])
        by_rank = {rank: reports[rank][1] for rank in ranks}
        name = next(n for n in by_rank[ranks[0]] if len({by_rank[rank][n] for rank in ranks}) > 1)
        counts = Counter(by_rank[rank][name] for rank in ranks)
        usual, votes = counts.most_common(1)[0]
        odd = [rank for rank in ranks if by_rank[rank][name] != usual]
        if 2 * votes <= len(ranks):  # no majority: whose weight is not its master's?
            odd = [rank for rank, bad in enumerate(self._group.gather(_differs(engine, name))) if bad and rank in ranks]
        who = ", ".join(f"rank {rank} on {reports[rank][0]}" for rank in odd or ranks)
        what = "differs from its replicas" if odd else "differ from each other"
        raise IntegrityError(
            f"step {self._step}: {name} of {who} {what}; nothing of this step is saved. Look at that host's memory, "
            "then run the same command again"
        )


def _differs(engine: Engine, name: str) -> bool:
    """Whether this rank's weight is another than the float32 master, rounded; a collective."""
    master, weight = engine.master(name), engine.local().get(name)
    if weight is None or master.shape != weight.shape:
        return False
    return not torch.equal(master.to(weight.device, weight.dtype), weight)


def checksum(tensor: Tensor) -> int:
    """A sum over the bits, weighted with odd numbers modulo 2^64: it changes with any one element, on any device."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.dtype.itemsize])
    total = 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=part.device)
        total += int((part * odd).sum())
    return total & (2**64 - 1)
