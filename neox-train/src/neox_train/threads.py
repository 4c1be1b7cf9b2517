# SPDX-License-Identifier: Apache-2.0
"""How many threads a rank on a CPU computes with.

torch takes all cores that a process may use, and knows neither of other ranks on them nor of a container's share of
time; both make many threads slower than few.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import torch

from libneox.parallel.group import Group

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "MICROSECONDS PERIOD", or "max PERIOD" (Linux, cgroups v2)


class Neighbours(NamedTuple):
    """Ranks that share with this one, itself included: the host and its container, and exactly its cores."""

    on_host: int = 1
    on_cores: int = 1


ALONE = Neighbours()


def set_threads(asked: int | None, neighbours: Neighbours = ALONE) -> int:
    """Set the threads of this process and return their number.

    Args:
        asked: the key `cpu_threads`; without it OMP_NUM_THREADS holds where it is set, as torch has read it.
    """
    count = torch.get_num_threads()
    if asked is not None:
        count = asked
    elif not os.environ.get("OMP_NUM_THREADS"):
        count = max(1, min(count // neighbours.on_cores, cores_granted() // neighbours.on_host))
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def neighbours_of(group: Group) -> Neighbours:
    """Those of this rank. All on a host are on the same cores, unless a launcher has bound them to others."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    host = socket.gethostname()
    places = group.gather([host, cores])
    return Neighbours([name for name, _ in places].count(host), places.count([host, cores]))


def cores_granted() -> int:
    """Cores' worth of time that this container gets, rounded up; a large number where nothing limits it."""
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 16
