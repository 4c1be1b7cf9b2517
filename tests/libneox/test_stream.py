# SPDX-License-Identifier: Apache-2.0
"""The token stream: what is written comes back, and nothing that is damaged passes for whole."""

from __future__ import annotations

import io
import os
import tempfile
import threading

import numpy as np
import pyarrow as pa
import pytest

from libneox.errors import DataError, UsageError
from libneox.stream import StreamHeader, StreamReader, StreamWriter, TokenBatch


def header(**changes: object) -> StreamHeader:
    values = {
        "dtype": "uint16",
        "tokenizer_kind": "bytes",
        "tokenizer_data": b"\xff\x00 any bytes",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 300,
        "eod_id": 0,
        "info": {"command": "x"},
    }
    return StreamHeader(**{**values, **changes})  # type: ignore[arg-type]


def batch(*documents: list[int], dtype: str = "uint16", **more: object) -> TokenBatch:
    values = np.array([token for document in documents for token in document], dtype=dtype)
    return TokenBatch(values, np.array([len(document) for document in documents], dtype=np.int64), **more)


def written(*batches: TokenBatch, head: StreamHeader | None = None, **rejects: int) -> bytes:
    sink = io.BytesIO()
    with StreamWriter(sink, head or header()) as writer:
        for one in batches:
            writer.write(one)
        writer.finish(rejects)
    return sink.getvalue()


def documents(data: bytes) -> list[list[int]]:
    result = []
    for one in StreamReader(io.BytesIO(data)):
        ends = np.cumsum(one.lengths)
        result += [one.values[end - length : end].tolist() for end, length in zip(ends, one.lengths, strict=True)]
    return result


def test_round_trip() -> None:
    data = written(batch([1, 2], [3]), batch([], [299]), empty=2)
    reader = StreamReader(io.BytesIO(data))
    assert reader.header == header()
    assert reader.header.info == {"command": "x"}
    assert [one.values.dtype for one in reader] == [np.uint16, np.uint16]
    assert (reader.documents, reader.tokens, dict(reader.rejects)) == (4, 4, {"empty": 2})
    assert documents(data) == [[1, 2], [3], [], [299]]


def test_optional_columns_and_several_keys() -> None:
    head = header(dtype="int32", keys=("a.b", "c"), labels=True, rewards=True, ids=True)
    one = batch([1, 2], [3], dtype="int32", labels=np.array([-100, 2, 3], np.int32), key="a.b")
    one = TokenBatch(one.values, one.lengths, one.labels, np.array([0.5, -1], np.float32), ["x", "y"], "a.b")
    two = TokenBatch(one.values[:1], np.array([1, 0]), one.labels[:1], one.rewards, one.ids, "c")
    sink = io.BytesIO()
    with StreamWriter(sink, head) as writer:
        writer.write(one, two)
    got = list(StreamReader(io.BytesIO(sink.getvalue())))
    assert [g.key for g in got] == ["a.b", "c"]
    for expected, found in zip((one, two), got, strict=True):
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        np.testing.assert_array_equal(found.rewards, expected.rewards)
        assert found.ids == ["x", "y"]


def test_any_arrow_reader_reads_it() -> None:
    with pa.ipc.open_stream(written(batch([1, 2], [3]))) as reader:
        assert reader.read_all().column("tokens").to_pylist() == [[1, 2], [3]]


def test_every_truncation_is_an_error() -> None:
    data = written(batch([1, 2], [3]), batch([4]))
    end_mark = len(data) - 8  # Arrow's own, which follows our trailer
    for cut in range(end_mark):
        with pytest.raises(DataError):
            list(StreamReader(io.BytesIO(data[:cut])))


def test_a_flipped_bit_is_an_error_of_the_data_or_harmless() -> None:
    """No pipe flips bits, but a file may; then no error of Arrow's own, and no crash, comes through."""
    data, found = written(batch([1, 2], [3]), batch([4] * 50)), 0
    for position in range(len(data)):
        for bit in (position % 8, (position + 3) % 8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with tempfile.TemporaryFile() as file:
                file.write(flipped)
                file.seek(0)
                try:
                    list(StreamReader(file))
                except DataError:
                    found += 1
    assert found > len(data)  # of two at each position; what is left is padding and ids, which carry no sum


def test_a_writer_that_fails_writes_no_trailer() -> None:
    sink = io.BytesIO()

    def fail() -> None:
        with StreamWriter(sink, header()) as writer:
            writer.write(batch([1]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(DataError, match="before its end mark"):
        documents(sink.getvalue())


def test_concatenated_streams_are_one() -> None:
    assert documents(written(batch([1])) + written() + written(batch([2], [3]))) == [[1], [2], [3]]


def test_a_truncated_second_stream_is_an_error() -> None:
    whole = written(batch([1]))
    for cut in (1, 3, 5, len(whole) // 2):
        with pytest.raises(DataError):
            documents(whole + whole[:cut])


def test_concatenated_streams_must_agree() -> None:
    with pytest.raises(UsageError, match="different tokenizers"):
        documents(written() + written(head=header(tokenizer_sha256="cd")))
    with pytest.raises(DataError, match="differ"):
        documents(written() + written(head=header(dtype="int32")))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b'{"text": "a"}\n', "pipe it through neox-tokenize"),
        (b"x", "neox-tokenize"),
        (b"\x28\xb5\x2f\xfd\x00", "not a token stream"),
    ],
)
def test_other_input_is_named(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        StreamReader(io.BytesIO(data))


def test_a_foreign_arrow_stream_is_named() -> None:
    sink = io.BytesIO()
    table = pa.table({"tokens": [[1]]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="not of tokens"):
        StreamReader(io.BytesIO(sink.getvalue()))


def test_counts_of_the_trailer_are_checked() -> None:
    data = written(batch([1, 2]), batch([3, 4]))
    one = written(batch([1, 2]))
    record = data.index(np.array([3, 4], np.uint16).tobytes())
    assert record > len(one) - 200  # the two batches are messages of their own
    # take the second batch's message out: lengths of all messages of this kind are equal
    size = len(data) - len(one)
    start = len(one) - (len(one) - _last_batch_end(one))
    with pytest.raises(DataError, match="arrived"):
        documents(data[:start] + data[start + size :])


def _last_batch_end(data: bytes) -> int:
    source = pa.BufferReader(data)
    reader = pa.ipc.open_stream(source)
    reader.read_next_batch()
    return source.tell()


def test_a_pipe_and_a_small_writer() -> None:
    """Bytes that come one by one are as good as a file."""
    data = written(batch(list(range(300)) * 300))
    read, write = os.pipe()

    def dribble() -> None:
        with os.fdopen(write, "wb", buffering=0) as sink:
            for start in range(0, 4000, 1):
                sink.write(data[start : start + 1])
            sink.write(data[4000:])

    thread = threading.Thread(target=dribble)
    thread.start()
    with open(read, "rb", buffering=0) as source:
        reader = StreamReader(source)
        assert [len(one.values) for one in reader] == [90000]
    thread.join()


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="70000"):
        header(vocab_size=70000)


def test_wrong_arrays_are_our_bug() -> None:
    writer = StreamWriter(io.BytesIO(), header())
    with pytest.raises(ValueError, match="sum"):
        writer.write(TokenBatch(np.zeros(3, np.uint16), np.array([2])))
    with pytest.raises(ValueError, match="uint16"):
        writer.write(TokenBatch(np.zeros(2, np.int64), np.array([2])))
