# SPDX-License-Identifier: Apache-2.0
"""Reading compressed streams to their true end: zstd, gzip, xz and bzip2, recognised by their first bytes.

The libraries' own file readers are not used: zstandard's returns what it has of a truncated frame without an error,
and its one-shot calls stop after the first frame of several. Here every frame or member is driven to its end mark.
"""

from __future__ import annotations

from typing import Any

from libneox.errors import DataError
from libneox.lookahead import Lookahead, Readable

# One call may return as much as the compressed bytes it is fed hold, and zstd packs 128 KB into 4 bytes at best. So
# the feed is small, and smaller still while the data looks like a bomb: memory stays bounded whatever comes. bzip2
# packs 45 MB into 40 bytes; its library and xz's can be told how much to return.
FEED_BYTES, CAUTIOUS_FEED_BYTES, CAUTIOUS_RATIO = 8192, 512, 200
MOST_AT_ONCE = {"xz": 1 << 22, "bzip2": 1 << 22}
READ_BYTES = 1 << 18
MAX_WINDOW, MAX_LONG_WINDOW = 1 << 27, 1 << 31

MAGIC = {"zstd": b"\x28\xb5\x2f\xfd", "gzip": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\x00"}
SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a skippable zstd frame, behind 0x50 to 0x5f
PADDED = "gzip", "xz"  # may be followed by zeros: on tapes and in block devices, and by xz's own rules
BZIP2_MARKS = b"1AY&SY", b"\x17rE8P\x90"  # of a block and of the end, behind BZh and a digit: three letters may be text


def decompressed(source: Lookahead, name: str, *, long_window: bool = False) -> Lookahead:
    """A reader of what is in `source`: `source` itself, or its decompressed bytes if it starts like a known format.

    Args:
        source: at the start of the data.
        name: for messages.
        long_window: accept zstd windows up to 2 GiB (`zstd --long=31`) instead of 128 MiB.
    Raises:
        DataError: here or on reading, if the data is cut off, damaged, or followed by something else.
    """
    form = compression_of(source.peek(10), name)
    if form is None:
        return source
    return DecompressedLookahead(Decompressor(source, form, name, long_window=long_window))


def compression_of(head: bytes, name: str) -> str | None:
    """Which of the four formats data starting with `head` (10 bytes, fewer if it is shorter) is in, or None.

    Raises:
        DataError: it is cut off within the format's own mark.
    """
    if head[:1] and 0x50 <= head[0] <= 0x5F and head[1:4] == SKIPPABLE:
        return "zstd"
    if head[:3] == b"BZh" and head[4:10] in BZIP2_MARKS:
        return "bzip2"
    for form, magic in MAGIC.items():
        if head.startswith(magic):
            return form
        if 2 <= len(head) < len(magic) and magic.startswith(head):
            raise DataError(f"{name}: truncated {form} data: only its first {len(head)} bytes are here")
    return None


class Decompressor:
    """The decompressed bytes of a stream of any number of frames; `read` gives them in pieces.

    Attributes:
        consumed: compressed bytes used so far.
        produced: decompressed bytes made so far.
    """

    def __init__(self, source: Readable, form: str, name: str, *, long_window: bool):
        self._source, self._form, self._name, self._long = source, form, name, long_window
        self._frame: Any = None  # the library's object for the frame being read, None between frames
        self._input = b""  # compressed bytes not used yet
        self._output = memoryview(b"")  # decompressed bytes not given yet
        self._feed = CAUTIOUS_FEED_BYTES
        self._at_end = False
        self.consumed = self.produced = 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none only at the end."""
        while not self._output and not self._at_end:
            self._output = memoryview(self._next())
        piece = bytes(self._output[:size])
        self._output = self._output[size:]
        return piece

    def _next(self) -> bytes:
        """Use up some compressed bytes and return what they give, possibly nothing."""
        hungry = getattr(self._frame, "needs_input", True)  # if not, it holds back output
        self._input = self._input or (self._source.read(READ_BYTES) if hungry else b"")
        if hungry and not self._input:
            return self._finish()
        if self._frame is None:
            self._begin_frame()
            if not self._input:
                return b""
        feed = self._feed if hungry else 0
        piece, self._input = self._input[:feed], self._input[feed:]
        limit = [MOST_AT_ONCE[self._form]] if self._form in MOST_AT_ONCE else []
        try:
            output: bytes = self._frame.decompress(piece, *limit)
        except Exception as error:  # zstandard.ZstdError, zlib.error, LZMAError, OSError of bz2
            raise self._damaged(error) from error
        unused = b""
        if self._frame.eof:
            unused, self._frame = self._frame.unused_data, None
            self._input = unused + self._input
        self.consumed += len(piece) - len(unused)
        self.produced += len(output)
        self._feed = CAUTIOUS_FEED_BYTES if len(output) > CAUTIOUS_RATIO * len(piece) else FEED_BYTES
        return output

    def _begin_frame(self) -> None:
        if self.consumed:
            head = self._input if len(self._input) >= 10 else self._input + self._source.read(10)
            self._input = head
            if self._form in PADDED and not head.strip(b"\0"):
                self.consumed += len(head)
                self._input = b""
                return
            if compression_of(head[:10], f"{self._name}: at byte {self.consumed}") != self._form:
                raise DataError(
                    f"{self._name}: something else follows the {self._form} data at byte {self.consumed}; "
                    "the file is damaged, or two different ones were joined"
                )
        self._frame = _frame_reader(self._form, self._long)

    def _finish(self) -> bytes:
        if self._frame is not None:
            raise DataError(
                f"{self._name}: truncated {self._form} frame at byte {self.consumed}: the file ends there; "
                "fetch or write it again"
            )
        self._at_end = True
        return b""

    def _damaged(self, error: Exception) -> DataError:
        if "too much memory" in str(error):
            return DataError(
                f"{self._name}: this zstd frame needs a window of more than "
                f"{(MAX_LONG_WINDOW if self._long else MAX_WINDOW) >> 20} MiB"
                + ("" if self._long else "; --long allows up to 2 GiB")
            )
        return DataError(f"{self._name}: damaged {self._form} data near byte {self.consumed} ({error})")


class DecompressedLookahead(Lookahead):
    """A `Lookahead` over a `Decompressor` that knows how much the data grew."""

    def __init__(self, decompressor: Decompressor):
        super().__init__(decompressor)
        self._decompressor = decompressor

    @property
    def compressed_bytes(self) -> int:
        """See `Lookahead`."""
        return self._decompressor.consumed


def _frame_reader(form: str, long_window: bool) -> Any:
    """An object with `decompress(bytes)`, `eof` and `unused_data` for one frame."""
    if form == "zstd":
        import zstandard

        limit = MAX_LONG_WINDOW if long_window else MAX_WINDOW
        return zstandard.ZstdDecompressor(max_window_size=limit).decompressobj()
    if form == "gzip":
        import zlib

        return zlib.decompressobj(wbits=31)
    if form == "xz":
        import lzma

        return lzma.LZMADecompressor()
    import bz2

    return bz2.BZ2Decompressor()
