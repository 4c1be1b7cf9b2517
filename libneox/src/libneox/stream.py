# SPDX-License-Identifier: Apache-2.0
"""The token stream: what `neox-tokenize` writes and `neox-shard` reads. The one module that knows the bytes.

A token stream is an Arrow IPC stream, so that any Arrow reader can look at it:

    column           type                    present
    tokens           list<uint16|int32>      always; one row is one document
    labels           list<int32>             with loss masks; as long as the tokens, -100 is no loss
    reward           float32                 with rewards; one for a document
    id               string                  where documents were given names
    tokens.KEY, labels.KEY, reward.KEY, id.KEY   in place of the four when several keys were tokenized

Schema metadata: `neox.stream` = 1, the tokenizer (`neox.tokenizer_kind`, `neox.tokenizer` the file's bytes,
`neox.tokenizer_sha256`), `neox.vocab_size`, `neox.eod_id` (empty: none) and `neox.info`, a JSON object that says how
the stream was made. The last batch has no rows and the custom metadata `neox.end` = 1, `neox.documents` (rows),
`neox.tokens` (over all keys) and `neox.rejects` (JSON, reason to count). It is the trailer: Arrow itself takes a
stream that stops between two batches for a whole one, and a producer that was killed must never become a short dataset.
Streams one behind the other (`cat a b`) are one stream if their tokenizers and columns agree.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from libneox.errors import DataError, UsageError
from libneox.lookahead import Lookahead

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

VERSION = "1"
CONTINUATION = b"\xff\xff\xff\xff"  # the first bytes of every Arrow IPC message
NO_LOSS = -100  # the label of a position that is not trained on
LARGEST_BATCH = 2**31 - 1  # tokens in a batch: Arrow's list offsets are int32


@dataclass(frozen=True)
class StreamHeader:
    """What holds for a whole stream.

    Attributes:
        dtype: of the tokens, "uint16" or "int32".
        tokenizer_kind, tokenizer_data: give the tokenizer back with `libneox.tokenizer.Tokenizer.from_bytes`.
        tokenizer_sha256: its fingerprint, hex.
        vocab_size: ids are below it.
        eod_id: the id that ends a document, or None.
        keys: the JSON keys tokenized side by side; ("",) for a plain stream of one.
        labels, rewards, ids: which of the optional columns exist, the same for each key.
        info: how the stream was made: command line, engine. Not compared when streams are concatenated.
    """

    dtype: str
    tokenizer_kind: str
    tokenizer_data: bytes = field(repr=False)
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int | None
    keys: tuple[str, ...] = ("",)
    labels: bool = False
    rewards: bool = False
    ids: bool = False
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in ("uint16", "int32"):
            raise UsageError(f"a token stream holds uint16 or int32 tokens, not {self.dtype}")
        if self.dtype == "uint16" and self.vocab_size > 65536:
            raise UsageError(f"a vocabulary of {self.vocab_size} ids does not fit uint16; use int32")

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names in their order."""
        kinds = ["tokens", *["labels"] * self.labels, *["reward"] * self.rewards, *["id"] * self.ids]
        return tuple(_column(kind, key) for key in self.keys for kind in kinds)


@dataclass(frozen=True)
class TokenBatch:
    """Consecutive documents of one key.

    Attributes:
        values: uint16 or int32 [tokens], the documents' tokens one after another.
        lengths: int64 [documents], summing to len(values).
        labels: int32 [tokens] or None.
        rewards: float32 [documents] or None.
        ids: one string a document or None.
        key: the JSON key the documents come from; "" in a plain stream.
    """

    values: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None = None
    rewards: np.ndarray | None = None
    ids: list[str] | None = None
    key: str = ""

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, documents: int) -> TokenBatch:
        """Its first documents, not copied."""
        tokens = int(self.lengths[:documents].sum())
        return TokenBatch(
            self.values[:tokens],
            self.lengths[:documents],
            None if self.labels is None else self.labels[:tokens],
            None if self.rewards is None else self.rewards[:documents],
            None if self.ids is None else self.ids[:documents],
            self.key,
        )


class StreamWriter:
    """Write a token stream to a binary file or pipe.

    `finish` writes the trailer. Leaving the `with` block by an exception does not, and the reader will refuse the
    stream; leaving it normally calls `finish`.
    """

    def __init__(self, sink: BinaryIO, header: StreamHeader):
        import pyarrow as pa

        self._header, self._sink = header, sink
        self._schema = _schema(header)
        self._writer = pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), self._schema)
        self._finished = False
        self.documents = self.tokens = 0

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    def write(self, *batches: TokenBatch) -> None:
        """Write the next documents: one batch for each key of the header, in its order, of equally many documents.

        Nothing is copied when the arrays are contiguous and of the header's dtype.
        """
        import pyarrow as pa

        if tuple(batch.key for batch in batches) != self._header.keys or len({len(batch) for batch in batches}) != 1:
            raise ValueError(f"one batch a key is needed, of equally many documents, for keys {self._header.keys}")
        arrays = [array for batch in batches for array in self._arrays(batch)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._sink.flush()
        self.documents += len(batches[0])
        self.tokens += sum(len(batch.values) for batch in batches)

    def finish(self, rejects: Mapping[str, int] | None = None) -> None:
        """Write the trailer: the stream is whole. Does not close the sink.

        Args:
            rejects: documents left out on purpose, reason to count; zero counts are not recorded.
        """
        import pyarrow as pa

        if self._finished:
            return
        metadata = {
            "neox.end": "1",
            "neox.documents": str(self.documents),
            "neox.tokens": str(self.tokens),
            "neox.rejects": json.dumps({reason: count for reason, count in (rejects or {}).items() if count}),
        }
        nothing = [array for key in self._header.keys for array in self._arrays(self._empty(key))]
        end = pa.record_batch(nothing, schema=self._schema)
        self._writer.write_batch(end, custom_metadata=metadata)
        self._writer.close()
        self._sink.flush()
        self._finished = True

    def _empty(self, key: str) -> TokenBatch:
        import numpy as np

        values, counts = np.zeros(0, self._header.dtype), np.zeros(0, np.int64)
        return TokenBatch(values, counts, values.astype(np.int32), counts.astype(np.float32), [], key)

    def _arrays(self, batch: TokenBatch) -> Iterator[pa.Array]:
        import numpy as np
        import pyarrow as pa

        if len(batch.values) > LARGEST_BATCH:
            raise DataError(
                f"a batch of {len(batch.values)} tokens is longer than {LARGEST_BATCH}; use smaller batches"
            )
        offsets = np.zeros(len(batch) + 1, dtype=np.int32)
        np.cumsum(batch.lengths, out=offsets[1:])
        if offsets[-1] != len(batch.values):
            raise ValueError("the lengths of the documents do not sum to the number of tokens")
        lists = [(batch.values, self._header.dtype)]
        if self._header.labels:
            lists.append((batch.labels, "int32"))
        for values, dtype in lists:
            array = np.ascontiguousarray(values)
            if array.dtype != dtype or len(array) != len(batch.values):
                raise ValueError(f"{len(batch.values)} tokens or labels of type {dtype} expected, not {array.dtype}")
            kind = pa.list_(pa.field("item", pa.from_numpy_dtype(array.dtype), nullable=False))
            yield pa.ListArray.from_arrays(_to_arrow(offsets), _to_arrow(array), type=kind)
        if self._header.rewards:
            yield _to_arrow(np.ascontiguousarray(batch.rewards, dtype=np.float32))
        if self._header.ids:
            names = [name.encode() for name in batch.ids or []]
            ends = np.cumsum([0, *map(len, names)], dtype=np.int32)
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(names))]
            yield pa.Array.from_buffers(pa.string(), len(names), buffers)


class StreamReader:
    """Read a token stream, batch by batch; iterate over it to get `TokenBatch`es.

    A stream of several keys gives one batch for each key in turn. `documents`, `tokens` and `rejects` count what has
    been read so far; `header.info` is that of the first stream. Iterating ends normally only behind the last trailer.

    Args:
        source: a binary file or pipe.
        name: what to call it in messages.
    Raises:
        DataError: the source is empty, text, another Arrow stream, damaged, or stops before its trailer.
        UsageError: a concatenated stream was made by another tokenizer.
    """

    def __init__(self, source: BinaryIO, name: str = "stdin"):
        self._source, self._name = Lookahead(source), name
        self.documents = self.tokens = 0
        self.rejects: Counter[str] = Counter()
        self._sniff()
        self._reader, self.header = self._open()

    def __iter__(self) -> Iterator[TokenBatch]:
        while True:
            yield from self._one_stream()
            if not self._source.peek(1):
                return
            self._sniff()
            self._reader, header = self._open()
            self._check_same(header)

    def _one_stream(self) -> Iterator[TokenBatch]:
        documents = tokens = 0
        ended = False
        while True:
            with _arrow_errors(self._name):
                try:
                    batch, metadata = self._reader.read_next_batch_with_custom_metadata()
                except StopIteration:
                    break
                batch.validate(full=True)
            if ended:
                raise DataError(f"{self._name}: documents behind the end mark; the token stream is damaged")
            if metadata is not None and metadata.get(b"neox.end") == b"1":
                ended = True
                self._check_trailer(metadata, documents, tokens)
                continue
            documents += len(batch)
            self.documents += len(batch)
            for key in self.header.keys:
                result = self._token_batch(batch, key)
                tokens += len(result.values)
                self.tokens += len(result.values)
                yield result
        if not ended:
            raise _truncated(self._name, f"after {self.documents} documents")

    def _token_batch(self, batch: pa.RecordBatch, key: str) -> TokenBatch:
        import numpy as np

        columns = dict(zip(self.header.columns, batch.columns, strict=True))
        tokens = columns[_column("tokens", key)]
        lengths = np.diff(_to_numpy(tokens.offsets)).astype(np.int64)
        labels = columns.get(_column("labels", key))
        if labels is not None and not np.array_equal(np.diff(_to_numpy(labels.offsets)), lengths):
            raise DataError(f"{self._name}: a document's labels and tokens differ in length; make the stream again")
        rewards, ids = columns.get(_column("reward", key)), columns.get(_column("id", key))
        return TokenBatch(
            values=_to_numpy(tokens.flatten()),
            lengths=lengths,
            labels=None if labels is None else _to_numpy(labels.flatten()),
            rewards=None if rewards is None else _to_numpy(rewards),
            ids=None if ids is None else ids.to_pylist(),
            key=key,
        )

    def _check_trailer(self, metadata: Mapping[bytes, bytes], documents: int, tokens: int) -> None:
        try:
            promised = int(metadata[b"neox.documents"]), int(metadata[b"neox.tokens"])
            self.rejects.update(json.loads(metadata.get(b"neox.rejects", b"{}")))
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{self._name}: the token stream's end mark is damaged ({error})") from error
        if promised != (documents, tokens):
            raise DataError(
                f"{self._name}: {documents} documents and {tokens} tokens arrived, but the producer wrote "
                f"{promised[0]} and {promised[1]}; run the producer again"
            )

    def _sniff(self) -> None:
        head = self._source.peek(4)
        if head == CONTINUATION:
            return
        if not head:
            raise DataError(f"{self._name}: empty, not even a header; did the command that should write it fail?")
        if CONTINUATION.startswith(head):
            raise _truncated(self._name, "in its header")
        if head[:1] in b'{["' or head.isascii():
            raise DataError(f"{self._name}: this is text, not a token stream; pipe it through neox-tokenize first")
        raise DataError(f"{self._name}: not a token stream (it starts with {head!r}); neox-tokenize makes one")

    def _open(self) -> tuple[pa.RecordBatchStreamReader, StreamHeader]:
        import pyarrow as pa

        with _arrow_errors(self._name):
            reader = pa.ipc.open_stream(pa.PythonFile(self._source, mode="r"))
        return reader, _header(reader.schema, self._name)

    def _check_same(self, header: StreamHeader) -> None:
        if header.tokenizer_sha256 != self.header.tokenizer_sha256:
            raise UsageError(
                f"{self._name}: concatenated token streams of different tokenizers "
                f"({self.header.tokenizer_sha256[:12]} and {header.tokenizer_sha256[:12]}); tokenize with one"
            )
        if header != self.header:
            shown = [(h.dtype, *h.columns) for h in (self.header, header)]
            raise DataError(f"{self._name}: concatenated token streams differ: {shown[0]} and {shown[1]}")


# pyarrow's own conversions from and to numpy import pandas wherever it is installed. That costs 0.2 s and more at
# start-up, and a signal that arrives meanwhile is lost, because pyarrow drops every exception of that import.


def _to_arrow(array: np.ndarray) -> pa.Array:
    """A contiguous array of numbers, not copied."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(array.dtype), len(array), [None, pa.py_buffer(array)])


def _to_numpy(array: pa.Array) -> np.ndarray:
    """An array of numbers without nulls, not copied and read-only."""
    import numpy as np

    dtype = np.dtype(array.type.to_pandas_dtype())
    if len(array) == 0:
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, count=len(array), offset=array.offset * dtype.itemsize)


def _column(kind: str, key: str) -> str:
    return f"{kind}.{key}" if key else kind


def _schema(header: StreamHeader) -> pa.Schema:
    import pyarrow as pa

    def integers(kind: str) -> pa.DataType:
        return pa.list_(pa.field("item", pa.type_for_alias(kind), nullable=False))

    types = {
        "tokens": integers(header.dtype),
        "labels": integers("int32"),
        "reward": pa.float32(),
        "id": pa.string(),
    }
    fields = [pa.field(name, types[name.split(".", 1)[0]], nullable=False) for name in header.columns]
    metadata = {
        "neox.stream": VERSION,
        "neox.tokenizer_kind": header.tokenizer_kind,
        "neox.tokenizer": header.tokenizer_data,
        "neox.tokenizer_sha256": header.tokenizer_sha256,
        "neox.vocab_size": str(header.vocab_size),
        "neox.eod_id": "" if header.eod_id is None else str(header.eod_id),
        "neox.keys": json.dumps(header.keys),
        "neox.info": json.dumps(dict(header.info)),
    }
    return pa.schema(fields, metadata=metadata)


def _header(schema: pa.Schema, name: str) -> StreamHeader:
    metadata = schema.metadata or {}
    version = metadata.get(b"neox.stream", b"").decode(errors="replace")
    if version != VERSION:
        what = f"token stream version {version}" if version else "an Arrow stream, but not of tokens"
        raise DataError(f"{name}: {what}; this program reads token streams of version {VERSION}")
    try:
        keys = tuple(json.loads(metadata[b"neox.keys"]))
        kinds = {column.split(".", 1)[0] for column in schema.names}
        header = StreamHeader(
            dtype=str(schema.field(_column("tokens", keys[0])).type.value_type),
            tokenizer_kind=metadata[b"neox.tokenizer_kind"].decode(),
            tokenizer_data=metadata[b"neox.tokenizer"],
            tokenizer_sha256=metadata[b"neox.tokenizer_sha256"].decode(),
            vocab_size=int(metadata[b"neox.vocab_size"]),
            eod_id=int(metadata[b"neox.eod_id"]) if metadata[b"neox.eod_id"] else None,
            keys=keys,
            labels="labels" in kinds,
            rewards="reward" in kinds,
            ids="id" in kinds,
            info=json.loads(metadata[b"neox.info"]),
        )
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, UsageError) as error:
        raise DataError(f"{name}: the token stream's header is damaged ({error}); make the stream again") from error
    if not schema.equals(_schema(header)):
        raise DataError(f"{name}: the token stream's columns are {schema.names}, which do not fit its header")
    return replace(header, info=dict(header.info))


def _truncated(name: str, where: str) -> DataError:
    return DataError(f"{name}: the token stream stops {where}, before its end mark; the producer failed or was killed")


class _arrow_errors:  # noqa: N801 - used as a statement
    """Turn pyarrow's complaints about bytes into a DataError; errors of the system stay what they are."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, MemoryError):  # one of Arrow's errors too
            return
        if isinstance(error, OSError) and error.errno is None or isinstance(error, pa.ArrowException):
            text = str(error).split("\n")[0]
            if "but only" in text or "but got" in text or "got " in text or "available" in text:
                raise _truncated(self._name, f"in the middle of a batch ({text})") from error
            raise DataError(f"{self._name}: the token stream is damaged ({text}); make it again") from error
