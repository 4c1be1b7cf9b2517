# SPDX-License-Identifier: Apache-2.0
"""Fixtures: run neox-tokenize in this process, and look at the stream it made."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libneox.cli import flat
from libneox.stream import StreamHeader, StreamReader
from libneox.tokenizer import Tokenizer
from neox_tokenize import cli


@dataclass
class Stream:
    """A token stream, read: per key the documents' ids and labels."""

    header: StreamHeader
    ids: dict[str, list[list[int]]]
    labels: dict[str, list[list[int]]]
    rewards: list[float]
    rejects: dict[str, int]
    data: bytes

    @property
    def texts(self) -> list[str]:
        """The documents of a plain stream, decoded."""
        tokenizer = Tokenizer.from_bytes(self.header.tokenizer_kind, self.header.tokenizer_data)
        return [tokenizer.decode(ids) for ids in self.ids[""]]


def read_stream(data: bytes) -> Stream:
    """Read a token stream into lists."""
    reader = StreamReader(io.BytesIO(data))
    ids: dict[str, list[list[int]]] = {key: [] for key in reader.header.keys}
    labels: dict[str, list[list[int]]] = {key: [] for key in reader.header.keys}
    rewards: list[float] = []
    for batch in reader:
        bounds = np.cumsum([0, *batch.lengths])
        for start, end in itertools.pairwise(bounds):
            ids[batch.key].append(batch.values[start:end].tolist())
            if batch.labels is not None:
                labels[batch.key].append(batch.labels[start:end].tolist())
        if batch.rewards is not None and batch.key == reader.header.keys[0]:
            rewards += batch.rewards.tolist()
    return Stream(reader.header, ids, labels, rewards, dict(reader.rejects), data)


Tokenize = Callable[..., Stream]


@pytest.fixture
def tokenize(tmp_path: Path) -> Tokenize:
    """`tokenize(data or paths, **options)`: what `neox-tokenize FILE...` writes, read back."""
    numbers = itertools.count()

    def run(source: bytes | str | Path | list[Path], name: str = "in.jsonl", **options: Any) -> Stream:
        if isinstance(source, str):
            source = source.encode()
        if isinstance(source, bytes):
            file = tmp_path / f"{next(numbers)}" / name
            file.parent.mkdir()
            file.write_bytes(source)
            source = file
        sink = io.BytesIO()
        paths = source if isinstance(source, list) else [source]
        flat(cli.tokenize)(files=paths, stdout=sink, **{"tokenizer": "bytes", "quiet": True, **options})
        return read_stream(sink.getvalue())

    return run


@pytest.fixture(scope="session")
def tokenizers_folder(golden: Path) -> Path:
    """The folder with 20B_tokenizer.json and gpt2.json, which lies beside the golden one."""
    folder = golden.parent / "tokenizers"
    if not (folder / "20B_tokenizer.json").exists():
        pytest.skip("no 20B_tokenizer.json beside the golden folder")
    return folder
