# SPDX-License-Identifier: Apache-2.0
"""Several datasets one behind the other, documents and all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from libneox.data.check import check_documents
from libneox.data.mmap import MMapDataset
from libneox.errors import DataError
from libneox.progress import Progress
from neox_shard.cat import blocks, span
from neox_shard.sink import PROG, Sink

_DOCUMENTS = 1 << 16
Array = np.ndarray[Any, Any]


def merge_datasets(prefixes: Sequence[Path], out: Path | None, stdout: BinaryIO, *, force: bool, quiet: bool) -> None:
    """Concatenate datasets in the order given.

    Raises:
        DataError: different dtypes, documents that do not cover all sequences, or multimodal data, whose modes the
            format that is written has no place for.
        UsageError: different tokenizers.
    """
    datasets = [MMapDataset(prefix) for prefix in prefixes]
    for data in datasets:
        if data.modes is not None:
            raise DataError(f"{data.prefix}: multimodal, and the modes of its sequences would be lost")
        check_documents(data)
    total = sum(len(data) for data in datasets)
    with (
        Sink(out, stdout, datasets, force=force) as sink,
        Progress(PROG, "documents", total=total, quiet=quiet, live=out is not None) as bar,
    ):
        for data in datasets:
            for values, lengths, documents in document_blocks(data):
                sink.add(values, lengths, documents)
                bar.update(len(lengths))
        sink.commit(quiet)


def one_sequence_each(data: MMapDataset) -> bool:
    """Whether every document is one sequence; taken to be so where GPT-NeoX's merge tool left an empty index."""
    entries = data.doc_idx
    if len(entries) == 1:
        return True
    if len(entries) != len(data) + 1:
        return False
    steps = range(0, len(entries), _DOCUMENTS)
    return all(bool((np.diff(entries[at : at + _DOCUMENTS + 1]) == 1).all()) for at in steps)


def document_blocks(data: MMapDataset) -> Iterator[tuple[Array, Array, Array | None]]:
    """The whole dataset as (tokens, lengths, sequences of each document or None for one each)."""
    if one_sequence_each(data):
        for values, lengths in blocks(data):
            yield values, lengths, None
        return
    for first in range(0, len(data.doc_idx) - 1, _DOCUMENTS):
        bounds = data.doc_idx[first : first + _DOCUMENTS + 1]
        lo, hi = int(bounds[0]), int(bounds[-1])
        yield span(data, lo, hi), data.sizes[lo:hi].astype(np.int64), np.diff(bounds)
