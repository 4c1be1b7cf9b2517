# SPDX-License-Identifier: Apache-2.0
"""Documents in a random order, for data larger than memory.

The place of each document is a keyed bijection of its number (`libneox.data.order.permute`), so no permutation is held,
and the result depends on the seed alone, not on the memory used. Data that fit the budget are gathered at once. Others
are read in file order and dealt to buckets by place; then each bucket is ordered in memory and written.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from libneox.data.mmap import MMapDataset
from libneox.data.order import permute
from libneox.data.writer import unfinished
from libneox.errors import DataError, UsageError
from libneox.files import CHUNK_BYTES
from libneox.progress import Progress
from neox_shard.cat import blocks
from neox_shard.merge import one_sequence_each
from neox_shard.sink import PROG, Sink, batches

MOST_BUCKETS = 200  # two open files each
Array = np.ndarray[Any, Any]


def shuffle_dataset(
    prefix: Path, out: Path | None, stdout: BinaryIO, *, seed: int, memory: int, force: bool, quiet: bool
) -> None:
    """Write the documents of a dataset in the order that `seed` gives.

    Datasets with as many documents, such as PREFIX and PREFIX_label, are shuffled alike by the same seed.

    Args:
        memory: bytes of tokens to hold at a time.

    Raises:
        DataError: documents of several sequences, which would be torn apart.
        UsageError: no output for the buckets.
    """
    data = MMapDataset(prefix)
    if not one_sequence_each(data):
        raise DataError(f"{data.prefix}: has documents of several sequences, which shuffling would tear apart")
    key = int.from_bytes(hashlib.sha256(f"neox-shard shuffle/{seed}".encode()).digest()[:8], "little")
    buckets = min(MOST_BUCKETS, -(-(data.num_tokens * data.dtype.itemsize + 16 * len(data)) // memory))
    if buckets > 1 and out is None:
        raise UsageError(
            f"{data.prefix}: larger than --memory, so it needs a disk to shuffle on; name the output with -o"
        )
    with Sink(out, stdout, [data], force=force) as sink, ExitStack() as stack:
        progress = stack.enter_context(Progress(PROG, "documents", total=len(data), quiet=quiet, live=out is not None))
        if buckets <= 1:
            _gather(data, sink, key, progress)
        else:
            assert sink.writer is not None
            dealt = [stack.enter_context(_Bucket(sink.writer.prefix, number)) for number in range(buckets)]
            _deal(data, dealt, key, progress)
            for bucket in dealt:
                bucket.empty_into(sink, data.dtype)
        sink.commit(quiet)


def ragged(tokens: Array, starts: Array, lengths: Array) -> Array:
    """tokens[starts[0] : starts[0] + lengths[0]], then those of starts[1], and so on, as one array."""
    before = np.cumsum(lengths) - lengths
    return tokens[np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))]


def _gather(data: MMapDataset, sink: Sink, key: int, progress: Progress) -> None:
    order = np.empty(len(data), np.int64)
    order[permute(np.arange(len(data)), len(data), key)] = np.arange(len(data))
    lengths = data.sizes[order].astype(np.int64)
    for first, last in batches(lengths):
        starts = data.pointers[order[first:last]] // data.dtype.itemsize
        sink.add(ragged(data.tokens, starts, lengths[first:last]), lengths[first:last])
        progress.update(last - first)


def _deal(data: MMapDataset, buckets: list[_Bucket], key: int, progress: Progress) -> None:
    first = 0
    for values, lengths in blocks(data):
        places = permute(np.arange(first, first + len(lengths)), len(data), key)
        bucket_of = places // -(-len(data) // len(buckets))
        starts = np.cumsum(lengths) - lengths
        for number in np.unique(bucket_of).tolist():
            here = np.flatnonzero(bucket_of == number)
            buckets[number].add(ragged(values, starts[here], lengths[here]), lengths[here], places[here])
        first += len(lengths)
        progress.update(len(lengths))


class _Bucket:
    """Documents on disk, with the place of each. Its files go when the context ends."""

    def __init__(self, prefix: Path, number: int):
        self._paths = [unfinished(prefix, f"{kind}{number}") for kind in ("bucket", "places")]
        self._files: list[BinaryIO] = []

    def __enter__(self) -> _Bucket:
        self._files = [open(path, "w+b", buffering=CHUNK_BYTES // 8) for path in self._paths]  # noqa: SIM115
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files:
            file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, values: Array, lengths: Array, places: Array) -> None:
        """Append documents."""
        self._files[0].write(np.ascontiguousarray(values).tobytes())
        self._files[1].write(np.stack([places, lengths], axis=1).astype("<i8").tobytes())

    def empty_into(self, sink: Sink, dtype: np.dtype[Any]) -> None:
        """Write the documents in the order of their places, and free the disk."""
        for file in self._files:
            file.seek(0)
        values = np.frombuffer(self._files[0].read(), dtype)
        places, lengths = np.frombuffer(self._files[1].read(), "<i8").reshape(-1, 2).T
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(places, kind="stable")
        for first, last in batches(lengths[order]):
            chosen = order[first:last]
            sink.add(ragged(values, starts[chosen], lengths[chosen]), lengths[chosen])
        for file in self._files:
            file.truncate(0)
