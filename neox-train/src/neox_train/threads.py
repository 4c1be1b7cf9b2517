# SPDX-License-Identifier: Apache-2.0
"""How many threads a rank on a CPU computes with.

torch takes all cores that a process may use, and knows neither of other ranks on them nor of a container's share of
time; both make many threads slower than few.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from libneox.parallel.group import Group

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "MICROSECONDS PERIOD", or "max PERIOD" (Linux, cgroups v2)


def set_threads(asked: int | None, sharing: int = 1) -> int:
    """Set the threads of this process and return their number.

    Args:
        asked: the key `cpu_threads`; without it OMP_NUM_THREADS holds where it is set, as torch has read it.
        sharing: ranks on the same cores, this one included.
    """
    count = torch.get_num_threads()
    if asked is not None:
        count = asked
    elif "OMP_NUM_THREADS" not in os.environ:
        count = max(1, min(count, cores_granted()) // sharing)
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def ranks_on_my_cores(group: Group) -> int:
    """How many ranks may use exactly the cores of this one: all on a host, unless a launcher has bound them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = group.gather([socket.gethostname(), cores])
    return places.count(places[group.rank])


def cores_granted() -> int:
    """Cores' worth of time that this container gets, rounded up; a large number where nothing limits it."""
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 16
