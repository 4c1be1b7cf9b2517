# SPDX-License-Identifier: Apache-2.0
"""A mixture of 1000 datasets: `python tests/bench/shard_mixture.py`. Prints the time to open it and its descriptors."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from libneox.data.splits import DataSpec, Sources, build_splits
from libneox.data.writer import DatasetWriter

DATASETS = 1000
LIMIT_S, LIMIT_FDS = 1.0, 1100


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "d"
        with DatasetWriter(first, "uint16") as writer:
            writer.add(np.zeros(10_000, np.uint16), np.full(100, 100))
            writer.commit()
        paths = [f"{first}{k}" for k in range(DATASETS)]
        for path in paths:
            for suffix in (".idx", ".bin"):
                Path(path + suffix).write_bytes(Path(f"{first}{suffix}").read_bytes())
        spec = DataSpec(seq_length=64, sources={"train": Sources(tuple(paths))})
        opened, batches = [], []
        for _ in range(5):
            started = time.perf_counter()
            train = build_splits(spec, train_samples=100_000).train
            opened.append(time.perf_counter() - started)
            assert train is not None
            started = time.perf_counter()
            train.batch(range(1024))
            batches.append(time.perf_counter() - started)
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
    seconds = statistics.median(opened)
    print(f"open a mixture of {DATASETS}: {seconds:.2f} s (limit {LIMIT_S})")
    print(f"descriptors: {descriptors} (limit {LIMIT_FDS})")
    print(f"first batch of 1024: {statistics.median(batches):.2f} s")
    return int(seconds > LIMIT_S or descriptors > LIMIT_FDS)


if __name__ == "__main__":
    sys.exit(main())
