# SPDX-License-Identifier: Apache-2.0
"""Packing 1 and 10 million documents of 20 tokens from a pipe: `python -m tests.bench.shard_pack [FOLDER]`.

Prints documents a second and the peak memory of neox-shard, start-up included: flat means that ten times as many
documents need no more of it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from libneox.stream import StreamHeader, StreamWriter, TokenBatch
from libneox.tokenizer import load_tokenizer
from tests.peak_memory import measured

BATCH, LENGTH = 50_000, 20
LIMIT_MB, LIMIT_GROWTH_MB = 600, 20


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    peaks = []
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for documents in (1_000_000, 10_000_000):
            runs = [_pack(Path(folder), documents) for _ in range(3)]
            seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
            peaks.append(peak)
            rate = documents / seconds
            print(f"{documents:>11,} documents: {seconds:.2f} s, {rate:,.0f} a second, peak {peak:.0f} MB")
    print(f"growth {peaks[1] - peaks[0]:.0f} MB (limit {LIMIT_GROWTH_MB}); peak {peaks[1]:.0f} MB (limit {LIMIT_MB})")
    return int(peaks[1] > LIMIT_MB or peaks[1] - peaks[0] > LIMIT_GROWTH_MB)


def _pack(folder: Path, documents: int) -> tuple[float, float]:
    """Seconds and peak MB of one run."""
    command = [sys.executable, "-m", "neox_shard", "-o", folder / "out", "--force", "-q"]
    started = time.perf_counter()
    process = subprocess.Popen(measured(command, folder / "peak"), stdin=subprocess.PIPE)
    assert process.stdin is not None
    _produce(process.stdin, documents)
    process.stdin.close()
    if process.wait() != 0:
        raise SystemExit(f"neox-shard ended with {process.returncode}")
    return time.perf_counter() - started, int((folder / "peak").read_text()) / 1e6


def _produce(sink: BinaryIO, documents: int) -> None:
    tokenizer = load_tokenizer("bytes")
    header = StreamHeader(
        tokenizer.dtype, tokenizer.kind, tokenizer.data, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id
    )
    values = (np.arange(BATCH * LENGTH) % 258).astype(np.uint16)
    lengths = np.full(BATCH, LENGTH, np.int64)
    with StreamWriter(sink, header) as writer:
        for _ in range(documents // BATCH):
            writer.write(TokenBatch(values, lengths))


if __name__ == "__main__":
    sys.exit(main())
