# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a command, whatever the size of the process that asks.

The kernel counts what a process held before its exec, that is its parent's memory, into the `ru_maxrss` of a child: a
test process that once held 3 GB finds 3 GB in all that it starts. So a bare interpreter of a few MB stands between.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

BETWEEN = """
import os, sys
report, *command = sys.argv[1:]
_, status, usage = os.wait4(os.posix_spawnp(command[0], command, os.environ), 0)
with open(report, "w") as file:
    file.write(str(usage.ru_maxrss * 1024))
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""


def measured(command: Sequence[object], report: Path) -> list[str]:
    """The command line that runs `command` on the same files and then writes its peak memory in bytes to `report`.

    It is the peak of its largest process, be it the command or one that it started and waited for. The exit code is
    passed on, a signal's as 128 and its number.
    """
    return [sys.executable, "-I", "-S", "-c", BETWEEN, str(report), *map(str, command)]
