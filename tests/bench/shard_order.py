# SPDX-License-Identifier: Apache-2.0
"""The order of 5 million documents and 3.3 G tokens: `python tests/bench/shard_order.py`.

Prints the median of 7 for both orders, of a batch of 1024 samples, and of the keyed order at position 2.9e9 of 3e9.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from libneox.data.blend import Blend
from libneox.data.order import HashOrder, PackedOrder

DOCUMENTS, LENGTH = 5_000_000, 2048
LIMIT_S, LIMIT_HASH_S = 0.5, 0.05


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(6.0, 1.0, DOCUMENTS), 2**20).astype(np.int32)
    tokens = int(sizes.sum(dtype=np.int64))
    print(f"{DOCUMENTS:,} documents, {tokens / 1e9:.2f} G tokens, samples of {LENGTH}")
    packed = median(lambda: PackedOrder(sizes, 0, DOCUMENTS, seed=1234, seq_length=LENGTH, epochs=1))
    order = PackedOrder(sizes, 0, DOCUMENTS, seed=1234, seq_length=LENGTH, epochs=1)
    positions = rng.integers(0, len(order), 1024)
    batch = median(lambda: [order.pieces(int(s), LENGTH + 1) for s in order.starts(positions)])
    hashed = median(lambda: HashOrder(int(sizes.sum(dtype=np.int64)), seed=1234, seq_length=LENGTH).starts(positions))
    far = HashOrder(3_000_000_000 * LENGTH + 1, seed=1, seq_length=LENGTH)
    constant = median(lambda: far.starts(np.array([2_900_000_000])))
    weights = rng.lognormal(0, 1, 22).tolist()
    blend = median(lambda: Blend(weights).lookup(np.array([9_999_999])), 3)
    busy = time.process_time()
    PackedOrder(sizes, 0, DOCUMENTS, seed=1234, seq_length=LENGTH, epochs=1)
    busy = time.process_time() - busy
    print(f"order: neox  {packed:.3f} s, of which {busy:.3f} s of processor time (limit {LIMIT_S})")
    print(f"order: neox  finding 1024 samples {1000 * batch:.1f} ms")
    print(f"order: hash  {1000 * hashed:.1f} ms with 1024 samples (limit {1000 * LIMIT_HASH_S:.0f})")
    print(f"order: hash  position 2.9e9 of 3e9: {1e6 * constant:.0f} us")
    print(f"mixture of 22, position 1e7: {blend:.2f} s")
    return int(packed > LIMIT_S or hashed > LIMIT_HASH_S)


def median(call: Callable[[], object], runs: int = 7) -> float:
    """Median seconds of several calls."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
