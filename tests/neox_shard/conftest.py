# SPDX-License-Identifier: Apache-2.0
"""Token streams and datasets for the tests of neox-shard."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libneox.data.manifest import TokenizerRecord
from libneox.data.writer import DatasetWriter
from libneox.stream import StreamHeader, StreamWriter, TokenBatch
from libneox.tokenizer import Tokenizer, load_tokenizer

MakeStream = Callable[..., bytes]
MakeDataset = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The built-in byte tokenizer: 258 ids."""
    return load_tokenizer("bytes")


@pytest.fixture(scope="session")
def make_stream(tokenizer: Tokenizer) -> MakeStream:
    """A token stream of documents, given as lists of ids, several documents a batch."""

    def make(
        documents: Sequence[Sequence[int]],
        *,
        labels: Sequence[Sequence[int]] | None = None,
        rewards: Sequence[float] | None = None,
        keys: tuple[str, ...] = ("",),
        batch: int = 7,
        trailer: bool = True,
        rejects: dict[str, int] | None = None,
        data: bytes | None = None,
    ) -> bytes:
        header = StreamHeader(
            tokenizer.dtype,
            tokenizer.kind,
            data or tokenizer.data,
            "0" * 64 if data else tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eod_id,
            keys=keys,
            labels=labels is not None,
            rewards=rewards is not None,
            info={"engine": "test"},
        )
        sink = io.BytesIO()
        writer = StreamWriter(sink, header)
        for first in range(0, len(documents), batch):
            part = slice(first, first + batch)
            lengths = np.array([len(document) for document in documents[part]], np.int64)
            values = np.concatenate([np.array(document, np.uint16) for document in documents[part]])
            columns: dict[str, Any] = {}
            if labels is not None:
                columns["labels"] = np.concatenate([np.array(row, np.int32) for row in labels[part]])
            if rewards is not None:
                columns["rewards"] = np.array(rewards[part], np.float32)
            writer.write(*[TokenBatch(values + number, lengths, key=key, **columns) for number, key in enumerate(keys)])
        if trailer:
            writer.finish(rejects)
        return sink.getvalue()

    return make


@pytest.fixture
def make_dataset(tmp_path: Path, tokenizer: Tokenizer) -> MakeDataset:
    """Write a dataset with a tokenizer to tmp_path/NAME."""

    def make(name: str, documents: Sequence[Sequence[float]], dtype: str = "uint16", plain: bool = False) -> Path:
        record = TokenizerRecord(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id)
        known: dict[str, Any] = {} if plain else {"tokenizer": record, "tokenizer_data": tokenizer.data}
        with DatasetWriter(tmp_path / name, dtype, **known) as writer:
            for document in documents:
                writer.add(np.array(document, dtype), np.array([len(document)]))
            writer.commit()
        return tmp_path / name

    return make


def documents_of(prefix: Path) -> list[list[int]]:
    """All sequences of a dataset."""
    from libneox.data.mmap import MMapDataset

    data = MMapDataset(prefix)
    return [data.get(i).tolist() for i in range(len(data))]


@pytest.fixture(scope="session")
def read() -> Callable[[Path], list[list[int]]]:
    """`documents_of` for tests, which cannot import from here."""
    return documents_of
