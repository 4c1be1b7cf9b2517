# SPDX-License-Identifier: Apache-2.0
"""Small datasets for the tests of libneox.data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libneox.data.writer import DatasetWriter

MakePair = Callable[..., Path]


@pytest.fixture
def make_pair(tmp_path: Path) -> MakePair:
    """Write documents to tmp_path/NAME and return the prefix."""

    def make(name: str, documents: Sequence[Sequence[float]], dtype: str = "uint16", **options: Any) -> Path:
        with DatasetWriter(tmp_path / name, dtype, **options) as writer:
            for document in documents:
                writer.add(np.array(document, dtype), np.array([len(document)]))
            writer.commit()
        return tmp_path / name

    return make


@pytest.fixture
def numbered(make_pair: MakePair) -> Path:
    """60 documents of 1 to 20 tokens; token values count up over the whole file, so that each is its own position."""
    lengths = np.random.RandomState(0).randint(1, 21, 60)
    values = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    return make_pair("numbered", [part.tolist() for part in values], "int32")
