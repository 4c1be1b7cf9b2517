# SPDX-License-Identifier: Apache-2.0
"""Parquet and Arrow: what the `datasets` library and the Hugging Face hub leave on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from libneox.errors import DataError, UsageError
from libneox.lookahead import Lookahead
from neox_tokenize.blocks import Block

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 512  # of a block


def column_blocks(stream: Lookahead, name: str, path: str | None, head: bytes, keys: Sequence[str]) -> Iterator[Block]:
    """The rows of a Parquet file, an Arrow file or an Arrow stream, with only the columns that `keys` start in.

    Raises:
        UsageError: a Parquet or Arrow file that comes through a pipe or out of an archive: its index is at the end.
        DataError: the file is damaged, lacks a column, or is a token stream.
    """
    import pyarrow as pa

    if path is None and not head.startswith(b"\xff\xff\xff\xff"):
        raise UsageError(
            f"{name}: Parquet and Arrow files have their index at the end and cannot be streamed; name them"
        )
    number = 1
    try:
        for batch in _batches(stream, name, path, head, [key.split(".")[0] for key in keys]):
            batch.validate(full=True)  # offsets beyond the data would be read beyond the memory
            for start in range(0, len(batch), ROWS):
                rows = batch.slice(start, ROWS).to_pylist()
                yield Block(name, "row", "row", number, rows)
                number += len(rows)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: damaged: {str(error).splitlines()[0]}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{name}: damaged or cut off: {str(error).splitlines()[0]}") from error


def _batches(
    stream: Lookahead, name: str, path: str | None, head: bytes, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if head.startswith(b"PAR1"):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns, name)
            yield from file.iter_batches(batch_size=ROWS, columns=sorted(set(columns)))
    elif head.startswith(b"ARROW1"):
        with pa.memory_map(path) as source, pa.ipc.open_file(source) as file:
            _check_columns(file.schema.names, columns, name)
            yield from (file.get_batch(i).select(sorted(set(columns))) for i in range(file.num_record_batches))
    else:
        while stream.peek(1):  # streams may stand one behind the other
            source = _Watched(stream)
            with pa.ipc.open_stream(pa.PythonFile(source, mode="r")) as reader:
                if b"neox.stream" in (reader.schema.metadata or {}):
                    raise DataError(f"{name}: these are tokens already; give them to neox-shard, or to --decode")
                _check_columns(reader.schema.names, columns, name)
                yield from (batch.select(sorted(set(columns))) for batch in reader)
            if source.ended:
                raise DataError(f"{name}: damaged or cut off: the Arrow stream stops without its end mark")


class _Watched(Lookahead):
    """A stream for Arrow, which takes one that stops between two batches for a whole one."""

    ended = False  # whether it was read beyond its end

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.ended = len(data) < size
        return data


def _check_columns(present: Iterable[str], wanted: Iterable[str], name: str) -> None:
    present = list(present)
    for column in wanted:
        if column not in present:
            shown = ", ".join(map(repr, present[:20]))
            raise DataError(f"{name}: no column {column!r} (there are: {shown}); --key names another")
