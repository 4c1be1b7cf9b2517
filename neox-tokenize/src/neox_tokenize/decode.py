# SPDX-License-Identifier: Apache-2.0
"""The other way: a token stream back to JSONL."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import numpy as np

from libneox.files import open_input
from libneox.stream import StreamReader, TokenBatch
from libneox.tokenizer import Tokenizer


def decode_stream(paths: tuple[str, ...], stdout: BinaryIO, *, limit: int | None) -> None:
    """Write each document of the token streams as one JSON object a line, its end-of-document id left out.

    A plain stream gives {"text": ...}, one of several keys an object with those keys.

    Raises:
        DataError: no token stream, a truncated one, or ids outside the vocabulary.
    """
    left = limit if limit is not None else -1
    for path in paths or ("-",):
        with open_input(path) as file:
            reader = StreamReader(file, "stdin" if path == "-" else path)
            header = reader.header
            tokenizer = Tokenizer.from_bytes(header.tokenizer_kind, header.tokenizer_data)
            row: list[TokenBatch] = []
            for batch in reader:
                row.append(batch)
                if len(row) < len(header.keys):
                    continue
                for document in _documents(row, tokenizer, header.eod_id):
                    if left == 0:
                        return
                    left -= 1
                    stdout.write(json.dumps(document, ensure_ascii=False).encode(errors="replace") + b"\n")
                row = []


def _documents(row: list[TokenBatch], tokenizer: Tokenizer, eod_id: int | None) -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = [{} for _ in range(len(row[0]))]
    for batch in row:
        ends = np.cumsum(batch.lengths)
        for document, start, end in zip(documents, (ends - batch.lengths).tolist(), ends.tolist(), strict=True):
            ids = batch.values[start:end].tolist()
            if ids and ids[-1] == eod_id:
                ids.pop()
            document[batch.key or "text"] = tokenizer.decode(ids)
    return documents
