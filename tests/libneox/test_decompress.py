# SPDX-License-Identifier: Apache-2.0
"""Compressed input is read to its true end, or refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random

import pytest
import zstandard

from libneox.decompress import decompressed
from libneox.errors import DataError
from libneox.lookahead import Lookahead

TEXT = bytes(random.Random(0).choices(b"abcdefgh \n", k=20000)) * 20
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


def zstd(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(data)


FORMS = {"zstd": zstd, "gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress}


def read(data: bytes, **options: bool) -> bytes:
    return decompressed(Lookahead(io.BytesIO(data)), "input", **options).read()


@pytest.mark.parametrize("form", FORMS)
def test_frames_are_read_across(form: str) -> None:
    one, two = FORMS[form](TEXT), FORMS[form](b"the end")
    assert read(one) == TEXT
    assert read(one + two + one) == TEXT + b"the end" + TEXT


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_is_an_error(form: str) -> None:
    data = FORMS[form](TEXT[:3000])
    cuts = range(4 if form == "bzip2" else 2, len(data))  # two letters may be text; the rest of BZh needs its block
    for cut in cuts:
        if form == "bzip2" and cut < 10:
            continue
        with pytest.raises(DataError, match="truncated"):
            read(data[:cut])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tail", [b"x", b"garbage tail", TEXT])
def test_a_tail_of_something_else_is_an_error(form: str, tail: bytes) -> None:
    data = FORMS[form](TEXT)
    with pytest.raises(DataError, match=f"at byte {len(data)}"):
        read(data + tail)


@pytest.mark.parametrize("form", ["gzip", "xz"])
def test_some_may_be_padded_with_zeros(form: str) -> None:
    assert read(FORMS[form](TEXT) + bytes(1000)) == TEXT
    with pytest.raises(DataError, match="something else follows"):
        read(FORMS[form](TEXT) + bytes(1000) + b"x")


@pytest.mark.parametrize("form", FORMS)
def test_empty_data(form: str) -> None:
    assert read(FORMS[form](b"")) == b""
    assert read(FORMS[form](TEXT) + FORMS[form](b"")) == TEXT


def test_skippable_frames_are_skipped() -> None:
    assert read(SKIPPABLE + zstd(TEXT) + SKIPPABLE + zstd(b"x") + SKIPPABLE) == TEXT + b"x"


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_is_an_error(form: str) -> None:
    data = bytearray(FORMS[form](TEXT))
    data[len(data) // 2] ^= 16
    with pytest.raises(DataError):
        read(bytes(data))


def test_long_windows_are_asked_for() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    sink = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(sink, closefd=False) as writer:
        writer.write(TEXT)
    with pytest.raises(DataError, match="--long"):
        read(sink.getvalue())
    assert read(sink.getvalue(), long_window=True) == TEXT


@pytest.mark.parametrize("data", [b"", b"(", b"plain text", b"BZh is how this text starts", b"\n"])
def test_text_is_left_alone(data: bytes) -> None:
    assert read(data) == data


@pytest.mark.parametrize("form", ["zstd", "gzip", "bzip2"])
def test_a_bomb_is_given_in_small_pieces(form: str) -> None:
    stream = decompressed(Lookahead(io.BytesIO(FORMS[form](bytes(1 << 27)))), "bomb")
    largest = total = 0
    while piece := stream.read1(1 << 40):
        largest, total = max(largest, len(piece)), total + len(piece)
    assert total == 1 << 27
    assert largest <= 1 << 26


def test_lookahead_shows_and_gives_whole_amounts() -> None:
    class OneByte(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 1))

    stream = Lookahead(OneByte(b"abcdefgh"))
    assert stream.peek(3) == b"abc"
    assert stream.peek(2) == b"ab"
    assert stream.read(5) == b"abcde"
    assert stream.read1(9) == b"f"
    assert stream.peek(9) == b"gh"
    assert stream.read() == b"gh"
    assert stream.read(1) == b""
