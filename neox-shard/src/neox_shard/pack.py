# SPDX-License-Identifier: Apache-2.0
"""Token streams to datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from libneox.cli import warn
from libneox.data.manifest import TokenizerRecord
from libneox.data.mmap import pair_paths
from libneox.data.writer import DatasetWriter, check_prefix, command_line, read_manifest_or_none
from libneox.errors import DataError, UsageError
from libneox.files import human_bytes, open_input
from libneox.progress import Progress
from libneox.stream import StreamHeader, StreamReader, TokenBatch

PROG = "neox-shard"


def pack_streams(
    inputs: Sequence[Path], out: Path, *, force: bool = False, fail_on_empty: bool = False, quiet: bool = False
) -> dict[str, dict[str, Any]]:
    """Write token streams, one behind the other, to the datasets that their columns ask for.

    Returns:
        The manifest of each dataset, as JSON values by prefix.

    Raises:
        DataError: a stream is damaged or stops before its end mark; nothing is left behind then.
        UsageError: the streams were made by different tokenizers.
        OutputExists: an output exists.
    """
    check_prefix(out, force=True)  # the directory, before anything is read
    with ExitStack() as stack:
        readers = _open_all(inputs, stack)
        first = next(readers)
        writers = _writers(out, first.header, force, stack)
        progress = stack.enter_context(Progress(PROG, "documents", quiet=quiet))
        rejects: dict[str, int] = {}
        sources: list[dict[str, Any]] = []
        for reader in _chain(first, readers):
            for batch in reader:
                _check_ids(batch, reader.header, progress.count)
                _add(writers, batch)
                if batch.key == reader.header.keys[-1]:
                    progress.update(len(batch))
            sources.append(dict(reader.header.info))
            for reason, count in reader.rejects.items():
                rejects[reason] = rejects.get(reason, 0) + count
        _report_empty(progress.count, fail_on_empty)
        facts = {"command": command_line(), "sources": [source for source in sources if source], "rejects": rejects}
        main = next(iter(writers.values())).prefix.name
        manifests = {}
        for writer in writers.values():
            name = writer.prefix.name
            manifest = writer.prepare(**facts, part_of=main if name != main else None)
            manifests[str(writer.prefix)] = asdict(manifest)
        for writer in reversed(writers.values()):  # the first last: its .idx is the sign that all are there
            writer.publish()
        if not quiet:
            _summary(progress, manifests, rejects)
    return manifests


def _open_all(inputs: Sequence[Path], stack: ExitStack) -> Iterator[StreamReader]:
    """Open each input when its turn has come."""
    first: StreamHeader | None = None
    for path in inputs:
        name = "stdin" if str(path) == "-" else str(path)
        reader = StreamReader(stack.enter_context(open_input(path)), name)
        if first is not None and reader.header != first:
            same = reader.header.tokenizer_sha256 == first.tokenizer_sha256
            what = "columns or dtype" if same else "tokenizer"
            raise UsageError(f"{name}: its {what} are not those of {inputs[0]}; pack them into datasets of their own")
        first = first or reader.header
        yield reader


def _chain(first: StreamReader, rest: Iterable[StreamReader]) -> Iterator[StreamReader]:
    yield first
    yield from rest


def _writers(out: Path, header: StreamHeader, force: bool, stack: ExitStack) -> dict[tuple[str, str], DatasetWriter]:
    """A writer for each column, by key and kind of column. With labels all tokens are int32, as GPT-NeoX has them."""
    record = TokenizerRecord(header.tokenizer_kind, header.tokenizer_sha256, header.vocab_size, header.eod_id)
    token_dtype = "int32" if header.labels else header.dtype
    kinds = [("tokens", "", token_dtype)]
    kinds += [("labels", "_label", "int32")] * header.labels + [("rewards", "_reward", "float32")] * header.rewards
    writers: dict[tuple[str, str], DatasetWriter] = {}
    main: Path | None = None
    for key in header.keys:
        if "/" in key or "\0" in key:
            raise UsageError(f"key {key!r}: is part of a file's name here, and no file can be called so; rename it")
        base = f"{out.name}_{key}" if key else out.name
        for kind, suffix, dtype in kinds:
            tokens = kind == "tokens"
            prefix = out.with_name(base + suffix)
            main = main or prefix
            writer = DatasetWriter(
                prefix,
                dtype,
                force=force or _left_over(prefix, main),
                tokenizer=record if tokens else None,
                tokenizer_data=header.tokenizer_data if tokens else None,
            )
            writers[key, kind] = stack.enter_context(writer)
    return writers


def _left_over(prefix: Path, main: Path) -> bool:
    """Whether a dataset is part of one that a killed command did not finish."""
    manifest = read_manifest_or_none(prefix)
    return manifest is not None and manifest.part_of == main.name and not pair_paths(main)[0].exists()


def _add(writers: dict[tuple[str, str], DatasetWriter], batch: TokenBatch) -> None:
    writers[batch.key, "tokens"].add(batch.values, batch.lengths)
    if batch.labels is not None:
        writers[batch.key, "labels"].add(batch.labels, batch.lengths)
    if batch.rewards is not None:
        writers[batch.key, "rewards"].add(batch.rewards, np.ones(len(batch), np.int64))


def _check_ids(batch: TokenBatch, header: StreamHeader, before: int) -> None:
    if len(batch.values) and (int(batch.values.max()) >= header.vocab_size or int(batch.values.min()) < 0):
        wrong = int(np.flatnonzero((batch.values >= header.vocab_size) | (batch.values < 0))[0])
        document = before + int(np.searchsorted(np.cumsum(batch.lengths), wrong, side="right"))
        raise DataError(
            f"document {document}: id {int(batch.values[wrong])} is outside the vocabulary of {header.vocab_size}; "
            "the producer of this stream is broken"
        )


def _report_empty(documents: int, fail: bool) -> None:
    if documents == 0 and fail:
        raise DataError("the stream holds no documents (--fail-on-empty)")
    if documents == 0:
        warn(PROG, "warning: the stream holds no documents; the dataset is empty")


def _summary(progress: Progress, manifests: dict[str, dict[str, Any]], rejects: dict[str, int]) -> None:
    tokens = sum(found["tokens"] for found in manifests.values() if found["tokenizer"])
    size = sum(found["bin"]["bytes"] + found["idx"]["bytes"] for found in manifests.values())
    left_out = "".join(f", {count:,} left out ({reason})" for reason, count in rejects.items())
    warn(
        PROG,
        f"{', '.join(manifests)}: {progress.count:,} documents, {tokens:,} tokens, {human_bytes(size)}, "
        f"{progress.seconds:.1f} s{left_out}",
    )
