# SPDX-License-Identifier: Apache-2.0
"""What travels from the readers to the workers: runs of raw records that know where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libneox.errors import DataError
from libneox.files import human_bytes
from libneox.lookahead import Lookahead

BLOCK_BYTES = 1 << 20
READ_BYTES = 1 << 18
# A single record that is both larger than this and this many times its compressed size is a bomb, not a text.
BOMB_BYTES, BOMB_RATIO = 1 << 25, 1000


@dataclass(frozen=True)
class Block:
    """Consecutive raw records of one source.

    Attributes:
        source: the file, and the member for an archive; for messages.
        kind: "json" (each record is JSON), "text" (each is a document's UTF-8 bytes) or "row" (each is a mapping).
        unit: what a record is called: line, document, row.
        first: number of the first record, from 1.
        records: the records.
        names: of the records, where each has its own (members of an archive).
    """

    source: str
    kind: str
    unit: str
    first: int
    records: list[bytes] | list[Mapping[str, Any]]
    names: Sequence[str] | None = None

    def where(self, index: int) -> str:
        """How a message calls record `index`: `FILE:LINE` for lines."""
        if self.names is not None:
            return self.names[index]
        number = self.first + index
        return f"{self.source}:{number}" if self.unit == "line" else f"{self.source}: {self.unit} {number}"


@dataclass(frozen=True)
class Limits:
    """What a reader may take in.

    Attributes:
        record_bytes: the largest single document or line.
        long_window: accept zstd windows up to 2 GiB.
    """

    record_bytes: int = 1 << 30
    long_window: bool = False

    def check(self, size: int, where: str, stream: Lookahead, started_at: int) -> None:
        """Raise DataError if a record of `size` bytes so far is too large, or grows like a bomb.

        Args:
            started_at: the stream's `compressed_bytes` when the record began.
        """
        if size > self.record_bytes:
            raise self.too_long(where)
        if size > BOMB_BYTES and stream.compressed_bytes is not None:
            used = stream.compressed_bytes - started_at
            if size > BOMB_RATIO * max(used, 1):
                raise DataError(
                    f"{where}: {human_bytes(size)} out of {human_bytes(used)} compressed; refused as a bomb"
                )

    def too_long(self, where: str) -> DataError:
        """What is said of a record beyond the limit."""
        return DataError(
            f"{where}: longer than {human_bytes(self.record_bytes)}; --max-doc-bytes raises the limit"
            " (if memory allows), or the file is not what it seems"
        )


def line_blocks(
    stream: Lookahead, source: str, kind: str, limits: Limits, *, keep_ends: bool = False
) -> Iterator[Block]:
    """Cut a stream into blocks of whole lines; CR LF counts as a line's end, a missing last one does not matter.

    Args:
        keep_ends: leave every line its end.
    """
    pending: list[bytes] = []  # pieces of lines not given yet
    size = line_size = 0  # of all that is pending, and of its last, unfinished line
    number = unfinished = 1  # of the first line that is pending, and of the last
    line_started = 0
    while chunk := stream.read1(READ_BYTES):
        cut = chunk.rfind(b"\n") + 1
        pending.append(chunk)
        size += len(chunk)
        line_size = len(chunk) - cut if cut else line_size + len(chunk)
        if cut:
            line_started = stream.compressed_bytes or 0
            unfinished += chunk.count(b"\n")
        else:
            limits.check(line_size, f"{source}:{unfinished}: a line", stream, line_started)
        if cut and size >= BLOCK_BYTES:
            pending[-1] = chunk[:cut]
            block = _lines(b"".join(pending), source, kind, number, limits, keep_ends)
            pending, size = [chunk[cut:]], line_size
            number += len(block.records)
            yield block
    if size:
        data = b"".join(pending)
        pending.clear()
        yield _lines(data, source, kind, number, limits, keep_ends)


def _lines(data: bytes, source: str, kind: str, number: int, limits: Limits, keep_ends: bool) -> Block:
    lines = data.split(b"\n")
    last = lines.pop()
    if keep_ends:
        lines = [line + b"\n" for line in lines]
    elif b"\r" in data:
        lines = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    if last:
        lines.append(last)
    if len(data) > limits.record_bytes:
        for index, line in enumerate(lines):
            if len(line) > limits.record_bytes:
                raise limits.too_long(f"{source}:{number + index}: a line")
    return Block(source, kind, "line", number, lines)


def read_document(stream: Lookahead, where: str, limits: Limits) -> bytes:
    """All that is left of a stream, as one document within the limits."""
    parts, size = [], 0
    while chunk := stream.read1(READ_BYTES):
        parts.append(chunk)
        size += len(chunk)
        limits.check(size, where, stream, 0)
    return b"".join(parts)
