# SPDX-License-Identifier: Apache-2.0
"""Opening a dataset of 50 million documents and 100 GB: `python tests/bench/shard_open.py [FOLDER]`.

Needs 1 GB of disk for the index; .bin is a sparse file. Prints the median of fresh processes, imports apart.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from libneox.data.mmap import HEADER, MAGIC

DOCUMENTS, LENGTH = 50_000_000, 1000
LIMIT_MS, LIMIT_MB = 50, 64
OPEN = """
import sys, time
import libneox.data.splits
from libneox.data.mmap import MMapDataset
def private():
    return sum(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) / 1000
before = private()
start = time.perf_counter()
data = MMapDataset(sys.argv[1])
seconds = time.perf_counter() - start
data.get(len(data) - 1)
print(1000 * seconds, private() - before, len(data))
"""


def main() -> int:
    """Make the files, measure, print, and say whether the limits hold."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        prefix = Path(folder) / "large"
        write_sparse(prefix)
        runs = [_python("-c", OPEN, str(prefix)).split() for _ in range(7)]
        milliseconds = float(np.median([float(run[0]) for run in runs]))
        megabytes = float(np.median([float(run[1]) for run in runs]))
        started = time.perf_counter()
        _python("-m", "neox_shard", "info", str(prefix))
        info = time.perf_counter() - started
    print(
        f"open {DOCUMENTS:,} documents: {milliseconds:.2f} ms (limit {LIMIT_MS}), {megabytes:.1f} MB (limit {LIMIT_MB})"
    )
    print(f"neox-shard info, start-up included: {info:.2f} s (limit 1)")
    return int(milliseconds > LIMIT_MS or megabytes > LIMIT_MB or info > 1)


def write_sparse(prefix: Path) -> None:
    """A pair of equal documents, without writing its tokens."""
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(DOCUMENTS * LENGTH * 2)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, DOCUMENTS, DOCUMENTS + 1))
        for dtype, step, count in (("<i4", 0, DOCUMENTS), ("<i8", 2 * LENGTH, DOCUMENTS), ("<i8", 1, DOCUMENTS + 1)):
            for first in range(0, count, 1 << 20):
                numbers = np.arange(first, min(first + (1 << 20), count), dtype=np.int64)
                file.write((numbers * step + (LENGTH if step == 0 else 0)).astype(dtype).tobytes())


def _python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, check=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
