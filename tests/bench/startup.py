# SPDX-License-Identifier: Apache-2.0
"""How long the commands take to answer `--help`, `--version` and a usage error: `python tests/bench/startup.py`.

The limit is 0.3 s, warm, for each. Prints the median of several runs beside bare Python's own start, and exits 1 if a
median is over the limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = ("neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen")
LIMIT_S = 0.3


def seconds(arguments: list[str], repeats: int) -> float:
    """Median wall time of a process, after one run to warm the file cache."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        null = subprocess.DEVNULL
        subprocess.run(arguments, stdin=null, stdout=null, stderr=null, check=False)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bare = seconds([sys.executable, "-c", ""], options.repeats)
    figures = {
        command: {
            question: seconds([sys.executable, "-m", command.replace("-", "_"), question], options.repeats)
            for question in ("--help", "--version", "--no-such-flag")
        }
        for command in COMMANDS
    }
    worst = max(value for row in figures.values() for value in row.values())
    if options.json:
        print(json.dumps({"bare_python_s": bare, "limit_s": LIMIT_S, "seconds": figures}))
    else:
        print(f"bare python {bare:.3f} s; medians of {options.repeats}, limit {LIMIT_S} s")
        print(f"{'':15s}" + "".join(f"{question:>16s}" for question in figures[COMMANDS[0]]))
        for command, row in figures.items():
            print(f"{command:15s}" + "".join(f"{value:16.3f}" for value in row.values()))
    return int(worst > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
