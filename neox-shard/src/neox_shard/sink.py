# SPDX-License-Identifier: Apache-2.0
"""Where mix, shuffle and merge write to: a dataset, or a token stream on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from libneox.cli import refuse_terminal, warn
from libneox.data.manifest import TokenizerRecord, load_tokenizer_of, read_manifest
from libneox.data.mmap import MMapDataset
from libneox.data.writer import DatasetWriter, command_line, describe_command, fitted
from libneox.errors import DataError, UsageError
from libneox.stream import StreamHeader, StreamWriter, TokenBatch
from libneox.tokenizer import Tokenizer

PROG = "neox-shard"
BATCH_TOKENS = 1 << 20
Array = np.ndarray[Any, Any]


class Sink:
    """One output made from datasets. A context manager: without `commit` nothing appears.

    Args:
        out: prefix, or None for a token stream on stdout.
        sources: what it is made from; decides dtype and tokenizer, and is noted in the manifest.

    Raises:
        DataError: the sources have different dtypes.
        UsageError: they were made by different tokenizers, or a stream is wanted of data without one.
        OutputExists: the output exists.
    """

    def __init__(self, out: Path | None, stdout: BinaryIO, sources: Sequence[MMapDataset], *, force: bool = False):
        self.dtype = common_dtype(sources)
        self.tokens = self.documents = 0
        self._sources = sources
        tokenizer = common_tokenizer([data.prefix for data in sources])
        self._dataset: DatasetWriter | None = None
        self._stream: StreamWriter | None = None
        if out is not None:
            record = tokenizer and TokenizerRecord(
                tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id
            )
            data = tokenizer.data if tokenizer else None
            self._dataset = DatasetWriter(out, self.dtype, force=force, tokenizer=record, tokenizer_data=data)
        else:
            refuse_terminal(stdout, "a token stream")
            if tokenizer is None:
                raise UsageError(f"{sources[0].prefix}: no tokenizer is known for it, so no stream; write it with -o")
            header = stream_header(tokenizer, [data.dtype for data in sources])
            self._stream = StreamWriter(stdout, header)
            self.dtype = np.dtype(header.dtype)

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dataset is not None:
            self._dataset.abort()

    @property
    def writer(self) -> DatasetWriter | None:
        """The dataset being written; None for a stream."""
        return self._dataset

    def add(self, values: Array, lengths: Array, documents: Array | None = None) -> None:
        """Append sequences; see `DatasetWriter.add`. A stream has no documents of several sequences."""
        self.tokens += len(values)
        self.documents += len(lengths)
        if self._dataset is not None:
            self._dataset.add(values, lengths, documents)
            return
        assert self._stream is not None
        lengths = np.asarray(lengths, np.int64)
        at = 0
        for first, last in batches(lengths):
            size = int(lengths[first:last].sum())
            ids = fitted(values[at : at + size], self.dtype, self._sources[0].prefix)
            self._stream.write(TokenBatch(ids, lengths[first:last]))
            at += size

    def commit(self, quiet: bool) -> None:
        """Make the output appear, or end the stream."""
        if self._stream is not None:
            self._stream.finish()
        if self._dataset is not None:
            self._dataset.commit(command=command_line(), sources=_origins(self._sources))
            if not quiet:
                warn(PROG, f"{self._dataset.prefix}: {self.documents:,} documents, {self.tokens:,} tokens")


def batches(lengths: Array) -> list[tuple[int, int]]:
    """Ranges of documents of about BATCH_TOKENS tokens each, and at least one document."""
    ends = np.cumsum(lengths)
    found, first = [], 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BATCH_TOKENS, side="right")))
        found.append((first, last))
        first = last
    return found


def common_dtype(sources: Sequence[MMapDataset]) -> np.dtype[Any]:
    """The dtype of all sources.

    Raises:
        DataError: they differ.
    """
    for data in sources[1:]:
        if data.dtype != sources[0].dtype:
            raise DataError(
                f"{data.prefix}: holds {data.dtype.name}, but {sources[0].prefix} holds {sources[0].dtype.name}; "
                "tokenize them alike"
            )
    return sources[0].dtype


def common_tokenizer(prefixes: Sequence[Path]) -> Tokenizer | None:
    """The one tokenizer of several datasets; None if it is not known for all of them.

    Raises:
        UsageError: they were made by different ones.
    """
    found = [load_tokenizer_of(prefix) for prefix in prefixes]
    known = [(prefix, tokenizer) for prefix, tokenizer in zip(prefixes, found, strict=True) if tokenizer is not None]
    for prefix, tokenizer in known[1:]:
        if tokenizer.fingerprint != known[0][1].fingerprint:
            raise UsageError(
                f"{prefix}: made by another tokenizer (sha256 {tokenizer.fingerprint[:12]}) than {known[0][0]} "
                f"({known[0][1].fingerprint[:12]}); tokenize them with one"
            )
    return known[0][1] if len(known) == len(prefixes) else None


def stream_header(tokenizer: Tokenizer, dtypes: Sequence[np.dtype[Any]]) -> StreamHeader:
    """The header of a stream of such data.

    Raises:
        DataError: the data are no token ids.
    """
    if any(dtype.kind not in "iu" for dtype in dtypes):
        raise DataError("a dataset of floating-point numbers is no token stream")
    narrow = all(dtype == np.uint16 for dtype in dtypes)
    return StreamHeader(
        dtype="uint16" if narrow else "int32",
        tokenizer_kind=tokenizer.kind,
        tokenizer_data=tokenizer.data,
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        info={"command": describe_command()},
    )


def _origins(sources: Sequence[MMapDataset]) -> list[dict[str, Any]]:
    found = []
    for data in sources:
        manifest = read_manifest(data.prefix)
        found.append({"prefix": str(data.prefix), "bin_sha256": manifest.bin.sha256 if manifest else None})
    return found
