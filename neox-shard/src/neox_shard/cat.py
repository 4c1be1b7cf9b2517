# SPDX-License-Identifier: Apache-2.0
"""Datasets back to a token stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from libneox.data.mmap import MMapDataset
from libneox.data.writer import fitted
from libneox.errors import DataError, UsageError
from libneox.progress import Progress
from libneox.stream import StreamWriter, TokenBatch
from libneox.tokenizer import load_tokenizer
from neox_shard.sink import BATCH_TOKENS, PROG, common_tokenizer, stream_header

Array = np.ndarray[Any, Any]


def cat_datasets(
    prefixes: Sequence[Path], stdout: BinaryIO, *, documents: str | None, tokenizer: str | None, quiet: bool
) -> None:
    """Write datasets as one token stream.

    Args:
        documents: `A:B`, counted over all datasets together.
        tokenizer: for datasets that have none beside them.

    Raises:
        UsageError: no tokenizer is known, or the datasets have different ones.
        DataError: a dataset holds floating-point numbers.
    """
    datasets = [MMapDataset(prefix) for prefix in prefixes]
    found = load_tokenizer(tokenizer) if tokenizer else common_tokenizer([data.prefix for data in datasets])
    if found is None:
        raise UsageError(f"{prefixes[0]}: no tokenizer is known for all of the data; name it with --tokenizer FILE")
    header = stream_header(found, [data.dtype for data in datasets])
    total = sum(len(data) for data in datasets)
    lo, hi = parse_range(documents, total, "documents") if documents else (0, total)
    with (
        StreamWriter(stdout, header) as writer,
        Progress(PROG, "documents", total=hi - lo, quiet=quiet, live=False) as progress,
    ):
        first = 0
        for data in datasets:
            for values, lengths in blocks(data, max(lo - first, 0), min(max(hi - first, 0), len(data))):
                writer.write(TokenBatch(fitted(values, np.dtype(header.dtype), data.prefix), lengths))
                progress.update(len(lengths))
            first += len(data)


def blocks(
    data: MMapDataset, lo: int = 0, hi: int | None = None, tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Array, Array]]:
    """Consecutive sequences lo..hi as (tokens, lengths int64), about `tokens` at a time and at least one sequence.

    The tokens are views of the file.

    Raises:
        DataError: the sequences do not lie back to back.
    """
    hi = len(data) if hi is None else hi
    while lo < hi:
        sizes = data.sizes[lo : min(hi, lo + tokens)].astype(np.int64)
        count = max(1, int(np.searchsorted(np.cumsum(sizes), tokens, side="right")))
        yield span(data, lo, lo + count), sizes[:count]
        lo += count


def span(data: MMapDataset, lo: int, hi: int) -> Array:
    """All tokens of the sequences lo..hi, a view of the file.

    Raises:
        DataError: the sequences do not lie back to back.
    """
    if lo == hi:
        return data.tokens[:0]
    start, rest = divmod(int(data.pointers[lo]), data.dtype.itemsize)
    stop = int(data.pointers[hi - 1]) // data.dtype.itemsize + int(data.sizes[hi - 1])
    if rest or start < 0 or stop > data.num_tokens or stop - start != int(data.sizes[lo:hi].sum(dtype=np.int64)):
        raise DataError(f"{data.prefix}.idx: sequences near {lo} do not lie back to back; run neox-shard verify")
    return data.tokens[start:stop]


def parse_range(text: str, total: int, what: str) -> tuple[int, int]:
    """`A:B` as bounds; either may be missing, B may lie behind the end.

    Raises:
        UsageError: it is no range, or begins behind the end.
    """
    first, colon, last = text.partition(":")
    try:
        lo, hi = int(first or 0), int(last) if last else total
    except ValueError as error:
        raise UsageError(f"--{what}: {text!r} is no range A:B") from error
    if not colon or lo < 0 or hi < lo or lo > total:
        raise UsageError(f"--{what}: {text!r} is no range A:B within the {total} {what}")
    return lo, min(hi, total)
