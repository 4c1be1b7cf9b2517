# SPDX-License-Identifier: Apache-2.0
"""A blocking reader over a file or pipe that can look ahead."""

from __future__ import annotations

from typing import Protocol

LARGEST_READ = 1 << 26  # a damaged length may ask for any amount, and a file makes room for it before it reads


class Readable(Protocol):
    """Whatever can be read from: `read` gives at most `size` bytes, none only at the end."""

    def read(self, size: int, /) -> bytes: ...


class Lookahead:
    """Reads whole amounts, and shows what comes next without consuming it.

    `io.BufferedReader.peek` shows whatever one read of a pipe happened to bring, which may be a single byte; and a raw
    pipe gives at most 64 KiB however much is asked for, which Arrow takes for the end of the data.
    """

    closed = False

    def __init__(self, source: Readable):
        self._source = source
        self._head = b""

    @property
    def compressed_bytes(self) -> int | None:
        """Compressed bytes behind what was given so far; None if the data is not compressed."""
        return None

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the source."""
        if len(self._head) < size:
            self._head += self._fully(size - len(self._head))
        return self._head[:size]

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end of the source; all that is left if negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read1(1 << 20), b""))
        if not self._head:
            return self._fully(size)
        head, self._head = self._head[:size], self._head[size:]
        return head + self._fully(size - len(head))

    def read1(self, size: int) -> bytes:
        """At most `size` bytes, at least one unless the source is at its end."""
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        return self._source.read(size) or b""

    def close(self) -> None:
        """Leave the source open: it belongs to whoever opened it, and more may follow."""

    def flush(self) -> None:
        """Nothing to flush; Arrow asks before it closes."""

    def _fully(self, size: int) -> bytes:
        if size <= 0:
            return b""
        data = self._source.read(min(size, LARGEST_READ)) or b""
        if len(data) == size or not data:
            return data
        parts, missing = [data], size - len(data)
        while missing and (data := self._source.read(min(missing, LARGEST_READ))):
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)
